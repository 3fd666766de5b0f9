"""Procedural worlds: small scenes, ray-cast analytically, with exact labels for all seven tasks. The embedded default dataset.

    rooms    closed rooms with furniture and lamps            labelled: normal, depth, shading, albedo
    streets  road, buildings, poles, trees, moving vehicles   labelled: semantic, normal, depth, optical flow, scene flow
    things   textured solids flying through a textured box    labelled: optical flow, scene flow
    real     streets and rooms in another look                labelled: everything; for testing, never for training

Coordinates are OpenCV's everywhere: x right, y down, z forward, metres; pixel (u, v) has its centre at (u, v). Every solid is an
affine image of the unit cube, ball or cylinder, and a ray meets those in an interval, so that one `trace` serves the image, the
shadows and the labels. image = tonemap(albedo * shading); only `real` then adds a colour cast, vignetting and sensor noise.
The same (world, split, index, seed) always gives the same sample.
"""
import zlib
from types import SimpleNamespace as Style

import numpy as np

CLASSES = ("road", "building", "pole", "light", "sign", "vegetation", "sky", "vehicle")
ROAD, BUILDING, POLE, LIGHT, SIGN, VEGETATION, SKY, VEHICLE = range(8)
IGNORE = 255
ALL = ("semantic", "normal", "depth", "optical_flow", "scene_flow", "shading", "albedo")
FLOWS = ("optical_flow", "scene_flow")
WORLDS = {"rooms": ("normal", "depth", "shading", "albedo"), "streets": ("semantic", "normal", "depth", "optical_flow", "scene_flow"),
          "things": FLOWS, "real": ALL}
TRAIN_WORLDS = ("rooms", "streets", "things")
SPLITS = {"train": 4000, "val": 100, "test": 200}  # default number of samples

BOX, BALL, TUBE = range(3)  # shapes
PLAIN, CHECKS, WINDOWS, STRIPES, BLOBS, LANES = range(6)  # patterns
CHUNK = 12288  # rays per pass, so that they stay in the processor's cache

# What sets `real` apart from the worlds of training: camera, light, patterns and (hue, saturation, value) ranges of the colours.
SYNTHETIC = Style(focal=(0.7, 0.95), eye=(1.3, 2.0), sun=(0.8, 1.8), patterns=(CHECKS, PLAIN), facades=(WINDOWS, WINDOWS, CHECKS),
                  horizon=((0.5, 0.6), (0.05, 0.15), (0.8, 0.95)), zenith=((0.55, 0.62), (0.3, 0.7), (0.5, 0.9)),
                  grass=((0.1, 0.3), (0.2, 0.5), (0.25, 0.45)), leaf=((0.18, 0.4), (0.4, 0.8), (0.15, 0.5)),
                  facade=((0.0, 0.15), (0.1, 0.6), (0.3, 0.75)), interior=(CHECKS, PLAIN, WINDOWS), coat=(0.0, 0.6))
REAL = Style(focal=(0.62, 0.8), eye=(2.0, 2.8), sun=(0.35, 0.8), patterns=(STRIPES, BLOBS), facades=(WINDOWS, STRIPES),
             horizon=((0.05, 0.12), (0.05, 0.3), (0.75, 0.95)), zenith=((0.5, 0.58), (0.2, 0.5), (0.5, 0.8)),
             grass=((0.07, 0.12), (0.2, 0.5), (0.25, 0.45)), leaf=((0.08, 0.32), (0.4, 0.8), (0.15, 0.5)),
             facade=((0.5, 1.05), (0.1, 0.6), (0.3, 0.75)), interior=(STRIPES, BLOBS, PLAIN), coat=(0.4, 0.95))

CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).T  # (3,8) of the unit cube


def lattice(n=32):
    """Periodic noise of three octaves, standard deviation about 0.6: (n*n*n,) float32."""
    rng, total = np.random.default_rng(0), 0
    for weight, doublings in ((0.9, 0), (0.8, 1), (0.5, 2)):
        x = rng.uniform(-1, 1, (n >> doublings,) * 3)
        for axis in (0, 1, 2) * doublings:
            x = np.stack([x, (x + np.roll(x, -1, axis)) / 2], axis + 1).reshape([-1 if a == axis else k for a, k in enumerate(x.shape)])
        total = total + weight * x
    return total.astype(np.float32).ravel()


LATTICE = lattice()


# ---- scenes: lists of solids, lights and two cameras ----

class Scene:
    """Solids `add`ed one by one, lights, and a camera in two frames; `freeze` turns the solids into arrays of one row each."""

    def __init__(self, focal, position, turn):
        self.focal = focal  # in image widths
        self.R, self.C = [rotation(*turn)] * 2, [np.array(position, float)] * 2  # camera to world, frames 0 and 1
        self.rows, self.lights, self.ambient = [], [], 0.3  # light: position, aim, power, distance where it starts to fade
        self.sky = np.ones((2, 3))  # colours of the horizon and overhead
        self.cast, self.vignette, self.noise = np.ones(3), 0.0, 0.0

    def add(self, shape, centre, half, colour, other=None, pattern=PLAIN, period=1.0, cls=IGNORE, yaw=0.0, tilt=(0, 0), speed=(0, 0, 0),
            grain=0.3, casts=True):
        """Centre, half-extents and period of the pattern in m, speed in m per frame, linear RGB colours, grain: contrast of the noise."""
        other = colour if other is None else other
        self.rows.append((pattern, shape, centre, speed, rotation(yaw, *tilt) * half, half, casts, cls, colour, other, period, grain))

    def freeze(self, rng):
        """Makes arrays of K rows of the solids; afterwards the scene can be traced."""
        columns = zip(*sorted(self.rows, key=lambda row: row[0]))  # by pattern, so that each pattern is painted in one go
        (self.pattern, self.shape, self.centre, self.speed, self.basis, self.half, self.casts, self.cls, self.colour, self.other,
         self.period, self.grain) = map(np.array, columns)
        self.unit = np.linalg.inv(self.basis)  # world to the solid's own axes, in which it is the unit cube, ball or cylinder
        self.offset = rng.uniform(0, 32, (3, len(self.rows)))  # of its noise
        for name in ("half", "colour", "other", "period", "grain", "offset"):
            setattr(self, name, getattr(self, name).astype(np.float32))
        return self


def rotation(yaw, pitch=0.0, roll=0.0):
    """Angles in radians -> (3,3); positive yaw turns to the right, pitch up, roll clockwise."""
    (a, b, c), (p, q, r) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    return np.array([[a, 0, p], [0, 1, 0], [-p, 0, a]]) @ [[1, 0, 0], [0, b, -q], [0, q, b]] @ np.array([[c, -r, 0], [r, c, 0], [0, 0, 1]])


def hsv(rng, hue, saturation, value):
    """A random linear RGB colour with hue, saturation, value drawn from the (low, high) ranges."""
    h, s, v = (rng.uniform(*x) for x in (hue, saturation, value))
    k = (np.array([5, 3, 1]) + 6 * h) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def pick(rng, options):
    """One of the options."""
    return options[rng.integers(len(options))]


def street(rng, style):
    """A road seen from a vehicle or pavement: buildings, trees, bushes, poles with signs and lights, moving vehicles."""
    eye = rng.uniform(*style.eye)
    s = Scene(rng.uniform(*style.focal), (rng.uniform(-1.5, 1.5), -eye, 0), rng.normal(0, (0.1, 0.04, 0.01)))
    sun = np.array([rng.uniform(-1, 1), -rng.uniform(*style.sun), rng.uniform(-1.2, 0.4)])
    s.lights, s.ambient = [(150 * sun, np.array([0, 0, 15]), rng.uniform(0.6, 0.75), np.inf)], rng.uniform(0.25, 0.4)
    s.sky = np.array([hsv(rng, *style.horizon), hsv(rng, *style.zenith)])
    wide, grass, grey = rng.uniform(2.8, 4.5), hsv(rng, *style.grass), hsv(rng, (0, 1), (0, 0.1), (0.12, 0.3))
    s.add(BOX, (0, 1.05, 26), (40, 1, 40), grass, grass * 0.6, pick(rng, style.patterns), 1.5, casts=False, grain=0.5)  # ends before 80 m
    s.add(BOX, (0, 1, 26), (wide, 1, 39), grey, grey + 0.45, LANES, wide, ROAD, casts=False, grain=0.4)
    for side in (-1, 1):
        z = rng.uniform(3, 8)
        while z < 45:
            deep, far, tall = rng.uniform(3, 6), rng.uniform(3, 6), rng.uniform(2, 6)
            if rng.random() < 0.75:
                wall = hsv(rng, *style.facade)
                s.add(BOX, (side * (wide + rng.uniform(1.8, 4.5) + far), -tall, z + deep), (far, tall, deep), wall,
                      pick(rng, (wall * 0.3, wall * 0.4 + 0.5)), pick(rng, style.facades), rng.uniform(1.4, 2.6), BUILDING)
            z += 2 * deep + pick(rng, (0, rng.uniform(1, 6)))
        for _ in range(rng.integers(0, 3)):  # trees
            z, r, leaf = rng.uniform(6, 18), rng.uniform(0.9, 1.8), hsv(rng, *style.leaf)
            x, y = side * (wide + rng.uniform(0.8, 2) + r * 0.6), -rng.uniform(1.6, 2.6) - r
            s.add(TUBE, (x, y / 2, z), (0.18, -y / 2, 0.18), leaf * (1.2, 0.6, 0.5), cls=VEGETATION)
            s.add(BALL, (x, y, z), (r, r * rng.uniform(0.9, 1.5), r), leaf, leaf * 0.5, BLOBS, 0.8, VEGETATION, grain=0.5)
        for _ in range(rng.integers(0, 3)):  # bushes
            z, r, leaf = rng.uniform(5, 14), rng.uniform(0.4, 0.9), hsv(rng, *style.leaf)
            x = side * (wide + rng.uniform(0.6, 2) + r)
            s.add(BALL, (x, -r * 0.6, z), (r, r, r), leaf, leaf * 0.5, BLOBS, 0.5, VEGETATION, grain=0.5)
    for i in range(rng.integers(3, 6)):  # thin things are sized in pixels of a 64-pixel-wide image, so that 48 pixels resolve them
        z, side, grey = rng.uniform(4.5, 11), (-1, 1)[i % 2], hsv(rng, (0, 1), (0, 0.25), (0.15, 0.7))
        px = z / (64 * s.focal)
        x, top, r = side * (wide + rng.uniform(0.2, 0.6)), -eye - px * rng.uniform(5, 16), px * rng.uniform(1.0, 1.7)
        s.add(TUBE, (x, top / 2, z), (r, -top / 2, r), grey, grey * 0.5, pick(rng, style.patterns), 0.6, POLE, grain=0.2)
        kind, front = pick(rng, (SIGN, SIGN, SIGN, LIGHT, LIGHT, POLE)), z - r - px
        if kind == SIGN:
            a, hue = px * rng.uniform(2.6, 4.6), pick(rng, ((0, 0.02), (0.58, 0.66), (0.12, 0.16)))
            s.add(pick(rng, (BOX, BALL)), (x, top + rng.uniform(-0.5, 1) * a, front), (a, a, px), hsv(rng, hue, (0.8, 1), (0.6, 0.95)),
                  0.9 * np.ones(3), pick(rng, (PLAIN, STRIPES)), a, SIGN, grain=0.1)
        if kind == LIGHT:
            a, b = px * rng.uniform(2.2, 3.2), px * rng.uniform(4, 6)
            x, y = x - side * px * pick(rng, (0, 3)), top + px * rng.uniform(-2, 5)
            hue, up = pick(rng, (((0, 0.02), -0.5), ((0.33, 0.42), 0.5)))  # red above, green below
            s.add(BOX, (x, y, front), (a, b, a), hsv(rng, (0, 1), (0, 0.3), (0.03, 0.1)), cls=LIGHT, grain=0.1)
            s.add(BALL, (x, y + up * b, front - a), (a * 0.8, a * 0.8, a * 0.4), hsv(rng, hue, (0.8, 1), (0.9, 1)), cls=LIGHT, grain=0.1)
    for lane in rng.permutation((-1, 1))[:rng.integers(1, 3)]:
        z, across, paint = rng.uniform(6.5, 16), rng.random() < 0.25, hsv(rng, (0, 1), (0.3, 1), (0.2, 0.9))
        w, tall, long = rng.uniform(0.8, 1), rng.uniform(0.35, 0.5), rng.uniform(1.7, 2.3)
        glass = hsv(rng, (0.5, 0.6), (0, 0.3), (0.05, 0.2))
        go = (pick(rng, (-1, 1)) * rng.uniform(2, 5) * z / (96 * s.focal), 0, 0) if across else (0, 0, rng.uniform(-0.8, 0.8))
        at, yaw = np.array([lane * wide * 0.5, -0.25 - tall, z]), np.pi / 2 if across else rng.normal(0, 0.05)
        how = dict(cls=VEHICLE, yaw=yaw, speed=go, grain=0.2)
        s.add(BOX, at, (w, tall, long), paint, paint * 0.6, pick(rng, style.patterns), 0.7, **how)
        s.add(BOX, at - (0, tall + 0.3, 0), (w * 0.85, 0.3, long * 0.55), glass, paint, WINDOWS, 1.1, **how)
    return s


def room(rng, style):
    """A closed room: six walls, furniture on the floor, one or two lamps. Nothing in it moves but the camera."""
    w, h, long = rng.uniform(1.8, 3.2), rng.uniform(1.2, 1.6), rng.uniform(2.5, 5)
    s = Scene(rng.uniform(*style.focal), (rng.uniform(-0.5, 0.5) * w, -rng.uniform(1, 1.6), 0.4 - long),
              rng.normal((0, -0.12, 0), (0.25, 0.06, 0.02)))
    s.ambient = rng.uniform(0.08, 0.3)
    for _ in range(rng.integers(1, 3)):
        lamp = np.array([rng.uniform(-0.8, 0.8) * w, -2 * h + rng.uniform(0.1, 0.8), rng.uniform(-0.7, 0.7) * long])
        s.lights.append((lamp, lamp + (0, 1, 0), rng.uniform(0.4, 0.9), rng.uniform(1.5, 3.5)))

    def coat(low=0.25, high=0.85):
        colour = hsv(rng, style.coat, (0.05, 0.7), (low, high))
        return dict(colour=colour, other=colour * rng.uniform(0.3, 0.8), pattern=pick(rng, style.interior), period=rng.uniform(0.3, 0.9))

    s.add(BOX, (0, 0.1, 0), (w, 0.1, long), **coat(0.2, 0.6), casts=False, grain=0.45)
    s.add(BOX, (0, -2 * h - 0.1, 0), (w, 0.1, long), **coat(0.7, 0.9), casts=False)
    for side in (-1, 1):
        s.add(BOX, (side * (w + 0.1), -h, 0), (0.1, h, long), **coat(0.4), casts=False)
        s.add(BOX, (0, -h, side * (long + 0.1)), (w, h, 0.1), **coat(0.4), casts=False)
    for _ in range(rng.integers(3, 8)):
        a, b, c, yaw = rng.uniform(0.15, 0.5), rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.5), rng.uniform(0, 3)
        x, z, kind = rng.uniform(-0.85, 0.85) * w, rng.uniform(2.2 - long, long - 0.4), pick(rng, (BOX, BALL, TUBE, "table"))
        if kind == "table":
            wood, top = coat(), -rng.uniform(0.5, 0.8)
            s.add(BOX, (x, top, z), (a + 0.3, 0.06, c + 0.2), yaw=yaw, **wood)
            s.add(TUBE, (x, top / 2, z), (0.09, -top / 2, 0.09), **wood)
            s.add(BALL, (x, top - 0.06 - b / 2, z), (b / 2, b / 2, b / 2), **coat())
        else:
            s.add(kind, (x, -b, z), (a, b, c), yaw=yaw, **coat())
    return s


def flight(rng):
    """Solids of any orientation, each flying its own way, inside a large textured box."""
    s = Scene(rng.uniform(0.7, 1.0), (0, 0, 0), rng.normal(0, 0.2, 3))
    s.lights, s.ambient = [(rng.normal((0, -3, -4), (4, 2, 1)), np.array([0, 0, 6]), rng.uniform(0.5, 0.7), np.inf)], rng.uniform(0.25, 0.4)

    def coat():
        colour, other = (hsv(rng, (0, 1), (0.1, 0.9), (low, 0.9)) for low in (0.25, 0.1))
        return dict(colour=colour, other=pick(rng, (other, colour * 0.4)), pattern=pick(rng, (PLAIN, CHECKS, WINDOWS, BLOBS)),
                    yaw=rng.uniform(-3, 3), tilt=rng.uniform(-3, 3, 2))

    s.add(BOX, (0, 0, 0), rng.uniform(7, 11, 3), period=rng.uniform(1.5, 3), casts=False, grain=0.5, **coat())
    for _ in range(rng.integers(4, 9)):
        z, way = rng.uniform(3, 8), rng.normal(0, 1, 3)
        at = z * np.array([rng.uniform(-0.5, 0.5) / s.focal, rng.uniform(-0.33, 0.33) / s.focal, 1])
        go = way / np.linalg.norm(way) * rng.uniform(1, 6) * z / (96 * s.focal)
        s.add(pick(rng, (BOX, BALL, TUBE)), s.R[0] @ at, rng.uniform(0.05, 0.17, 3) * z, speed=go, period=rng.uniform(0.4, 1), grain=0.4,
              **coat())
    return s


def indoor(index):
    """Whether sample `index` of `real` is a room; the others are streets."""
    return index % 4 == 3


def build(world, split, index, seed=0):
    """The frozen Scene of one sample, with its camera motion."""
    rng = np.random.default_rng([zlib.crc32(f"{world}/{split}".encode()), index, seed])
    real = world == "real"
    closed = indoor(index) if real else world == "rooms"
    s = flight(rng) if world == "things" else (room if closed else street)(rng, REAL if real else SYNTHETIC)
    s.freeze(rng)
    if real:
        s.cast, s.vignette, s.noise = rng.uniform(0.85, 1.05, 3), rng.uniform(0.1, 0.3), rng.uniform(0.01, 0.025)
    # Motion scaled so that the flow is about one latent cell (4 of 96 pixels): that is what makes it learnable. Up, down and sideways alike, but
    # forwards only, as vehicles drive, and turning little: whether a small motion along the optical axis comes or goes is hardly visible.
    rays, unit = pixel_rays(s.focal, 16, 24, 1), 96 * s.focal
    t, hit = trace(s, 0, s.C[0], s.R[0], rays, np.arange(len(s.shape)))
    points = (t * rays)[:, hit >= 0].astype(float)
    turn, go = rng.normal(0, (1, 0.8, 0.4)) / unit, rng.normal(0, (1, 0.7, 0.6))
    go[2] = abs(go[2])

    def flow(turn, go):
        q = rotation(*turn).T @ (points - go[:, None])
        return np.linalg.norm(q[:2] / q[2] - points[:2] / points[2], axis=0) * unit

    go *= rng.uniform(1, 4) * 0.01 / np.median(flow(0 * turn, 0.01 * go))
    size = flow(turn, go)
    scale = min(rng.uniform(2, 5.5) / np.median(size), 9 / np.percentile(size, 95))
    s.R = [s.R[0], s.R[0] @ rotation(*turn * scale)]
    s.C = [s.C[0], s.C[0] + s.R[0] @ go * scale]
    return s


# ---- ray casting ----

def pixel_rays(focal, height, width, n):
    """n x n rays per pixel, in camera axes with z = 1 (so that the ray parameter is depth): (3, height*n*n*width)."""
    sub = (np.arange(n) + 0.5) / n - 0.5
    v, y, x, u = np.meshgrid(np.arange(height) - (height - 1) / 2, sub, sub, np.arange(width) - (width - 1) / 2, indexing="ij")
    u, v = (u + x).ravel() / (focal * width), (v + y).ravel() / (focal * width)
    return np.stack([u, v, np.ones_like(u)]).astype(np.float32)


def slab(o, d):
    """Rays against -1 <= axis <= 1: parameters of entry and exit."""
    inverse = 1 / (d + np.float32(1e-20))  # never 1 / 0
    middle, half = -o * inverse, abs(inverse)
    return middle - half, middle + half


def disc(o, d):
    """Rays o (k,1), d (k,N) against the unit ball of k dimensions: entry and exit, NaN for a miss."""
    a = np.einsum("kn,kn->n", d, d) + np.float32(1e-20)
    t = -(o.T @ d)[0] / a
    p = o + t * d  # the closest point: precise also for small balls far away
    with np.errstate(invalid="ignore"):
        h = np.sqrt((1 - np.einsum("kn,kn->n", p, p)) / a)
    return t - h, t + h


def trace(s, frame, eye, axes, rays, solids):
    """Nearest hits of the rays eye + t axes @ rays, t > 0, with the numbered solids. eye (3,), axes (3,3) of a camera or light that looks
    along its z, rays (3,N) float32 -> t (N,), inf for none; solid number (N,), -1 for none."""
    best, hit = np.full(rays.shape[1], np.inf, np.float32), np.full(rays.shape[1], -1, np.int16)
    centre = s.centre[solids] + frame * s.speed[solids] - eye
    corners = (s.basis[solids] @ CORNERS + centre[:, :, None]).transpose(0, 2, 1) @ axes  # (K,8,3) seen from the eye
    seen = corners[..., :2] / np.maximum(corners[..., 2:], 1e-3)
    low, high, ahead = seen.min(1).astype(np.float32), seen.max(1).astype(np.float32), corners[..., 2].min(1) > 1e-3
    u, v = rays[:2] / np.where(rays[2] > 0, rays[2], np.float32(np.nan))
    least, most = np.fmin.reduce([u, v], axis=1, initial=np.inf), np.fmax.reduce([u, v], axis=1, initial=-np.inf)
    meets = ~ahead | ((low <= most) & (high >= least)).all(1)
    starts, turns = (s.unit[solids] @ -centre[:, :, None]).astype(np.float32), (s.unit[solids] @ axes).astype(np.float32)
    everything = np.arange(len(u))
    for j in np.flatnonzero(meets):  # only rays inside a solid's bounding rectangle can meet it
        (l, m), (r, n), k = low[j], high[j], solids[j]
        i = np.flatnonzero((u >= l) & (u <= r) & (v >= m) & (v <= n)) if ahead[j] else everything
        if not len(i):
            continue
        o, d = starts[j], turns[j] @ rays.take(i, 1)
        if s.shape[k] == BOX:
            entry, leave = slab(o, d)
            entry, leave = entry.max(0), leave.min(0)
        elif s.shape[k] == BALL:
            entry, leave = disc(o, d)
        else:
            (a, b), (e, l) = disc(o[::2], d[::2]), slab(o[1], d[1])
            entry, leave = np.maximum(a, e), np.minimum(b, l)
        np.copyto(entry, leave, where=entry < 1e-4)  # from inside, the far wall
        won = np.flatnonzero((entry <= leave) & (entry > 1e-4) & (entry < best.take(i)))
        best[i[won]], hit[i[won]] = entry[won], k
    return best, hit


def noise(q):
    """Value noise at points (3,N): the trilinearly interpolated LATTICE, which has detail at 1, 2 and 4 steps."""
    base = np.floor(q)
    (fx, fy, fz), (x, y, z) = q - base, base.astype(np.int64) & 31
    x0, x1, y0, y1, z1 = x << 10, ((x + 1) & 31) << 10, y << 5, ((y + 1) & 31) << 5, (z + 1) & 31

    def edge(i):
        a = LATTICE.take(i + z)
        return a + fz * (LATTICE.take(i + z1) - a)

    a, b = edge(x0 + y0), edge(x1 + y0)
    a += fy * (edge(x0 + y1) - a)
    b += fy * (edge(x1 + y1) - b)
    return a + fx * (b - a)


def paint(kind, q, period, pixel):
    """Share (N,) of the second colour at points q (3,N) m of a pattern; detail finer than the pixels (N,) m fades to the mean."""
    w = np.maximum(pixel / period, 0.02)
    fade = np.clip(2 - 4 * w, 0, 1)
    wave = lambda x: np.clip((abs(x - np.floor(x) - 0.5) - 0.25) / w, -1, 1) * fade  # period 1, edges one pixel wide
    x, y, z = q / period
    if kind == CHECKS:
        return 0.5 + 0.5 * wave(x) * wave(y) * wave(z)
    if kind == WINDOWS:
        return 0.25 * (1 + wave(x + z)) * (1 + wave(y))
    if kind == STRIPES:
        return 0.5 + 0.5 * wave(x + y + z)
    if kind == BLOBS:
        return 0.5 + 0.5 * np.clip(4 * noise(2 * q / period), -1, 1) * fade
    if kind == LANES:  # a dashed line in the middle, one at either edge; the period is half the width of the road
        line = lambda x: np.clip((0.09 - abs(x)) / pixel + 0.5, 0, 1) * np.clip(0.18 / pixel, 0, 1)
        return line(q[0]) * (q[2] % 4 < 2) + line(abs(q[0]) - period + 0.3)


def fractal(q, pixel):
    """Noise at points q (3,N) m whose finest detail is that which pixels of size (N,) m can just show, as in a mip map."""
    level = np.log2(1.5 * pixel)
    first = np.floor(level)
    q, part = q * np.exp2(-first), level - first
    a = noise(q)
    return a + part * (noise(q * np.float32(0.5)) - a)


def shade(s, frame, points, normal):
    """Grey irradiance (N,) in [0,1] of world points (3,N): ambient, brighter from above, plus every light, its shadows and its fall-off."""
    total, casters = s.ambient * (1 - 0.25 * (1 + normal[1])), np.flatnonzero(s.casts)
    start = points + np.float32(0.01) * normal
    for position, aim, power, reach in s.lights:
        d = np.float32(position)[:, None] - points
        far = np.sqrt((d * d).sum(0))
        light = power * np.maximum((d * normal).sum(0) / far, 0) * np.minimum(1, (np.float32(reach) / far) ** 2)
        lit = np.flatnonzero(light > 0)
        x, y, z = aim - position
        axes = rotation(np.arctan2(x, z), np.arctan2(-y, np.hypot(x, z)))
        t, _ = trace(s, frame, position, axes, axes.T.astype(np.float32) @ (start.take(lit, 1) - np.float32(position)[:, None]), casters)
        light[lit[t < 1]] = 0
        total += light
    return np.clip(total, 0, 1)


def look(s, frame, rays, width):
    """Camera rays (3,N) of one frame -> dict of depth (N,), solid (N,), normal (3,N) world, albedo (3,N), shading (N,)."""
    eye, axes, solids = np.float32(s.C[frame])[:, None], s.R[frame].astype(np.float32), np.arange(len(s.shape))
    depth, hit = trace(s, frame, s.C[frame], s.R[frame], rays, solids)
    # group the rays by solid, sky first, so that each solid is one slice
    order, count = np.argsort(hit, kind="stable"), np.bincount(hit + 1, minlength=len(solids) + 1)
    ends, sky = np.cumsum(count), count[0]
    d, t = axes @ rays.take(order, 1), depth.take(order)
    albedo, shading, normal = np.empty_like(d), np.ones_like(t), np.zeros_like(d)
    up = np.clip(-2 * d[1, :sky] / np.sqrt((d[:, :sky] ** 2).sum(0)), 0, 1)
    albedo[:, :sky] = np.float32(s.sky[:1].T) + up * np.float32(s.sky[1:] - s.sky[:1]).T
    d, t = d[:, sky:], t[sky:]
    points, q, n, each = eye + t * d, np.empty_like(d), normal[:, sky:], lambda x: np.repeat(x, count[1:], axis=-1)
    for k, end in enumerate(ends[1:] - sky):
        i = slice(end - count[k + 1], end)
        if not count[k + 1]:
            continue
        unit = s.unit[k].astype(np.float32)
        x = unit @ (points[:, i] - np.float32(s.centre[k] + frame * s.speed[k])[:, None])
        q[:, i] = x * s.half[k][:, None]
        if s.shape[k] == BOX:
            x *= abs(x) == abs(x).max(0)
        if s.shape[k] == TUBE:
            lid = abs(x[1]) > np.hypot(x[0], x[2])
            x *= np.stack([~lid, lid, ~lid])
        n[:, i] = unit.T @ x
    n /= np.sqrt((n * n).sum(0))
    slope = (n * d).sum(0)
    n *= -np.sign(slope)
    pixel = t / np.float32(s.focal * width) / np.sqrt(np.maximum(abs(slope), np.float32(0.02)))  # a pixel covers more of a slanted surface
    share, period, pattern = np.zeros_like(t), each(s.period), each(s.pattern)
    for kind in set(s.pattern) - {PLAIN}:
        i = slice(*np.searchsorted(pattern, (kind, kind + 1)))  # solids are sorted by pattern
        share[i] = paint(kind, q[:, i], period[i], pixel[i])
    colour, other = each(s.colour.T), each(s.other.T)
    albedo[:, sky:] = np.clip((colour + share * (other - colour)) * (1 + each(s.grain) * fractal(q + each(s.offset), pixel)), 0.01, 0.99)
    shading[sky:] = shade(s, frame, points, n)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return {"depth": depth, "solid": hit, "normal": normal.take(back, 1), "albedo": albedo.take(back, 1), "shading": shading.take(back)}


def tonemap(linear):
    """Linear [0,1] -> display [0,1]."""
    return np.clip(linear, 0, 1) ** np.float32(1 / 2.2)


def photo(s, frame, size, n, rng):
    """The picture (H,W,3) uint8 of one frame: the mean of n x n tone-mapped rays per pixel, then the camera's own defects."""
    (h, w), colours = size, []
    rays = pixel_rays(s.focal, h, w, n)
    for part in np.array_split(rays, -(-rays.shape[1] // CHUNK), axis=1):  # small enough for the processor's cache
        seen = look(s, frame, part, w)
        colours.append(tonemap(seen["albedo"] * seen["shading"]))
    image = np.concatenate(colours, 1).reshape(3, h, n * n, w).mean(2).transpose(1, 2, 0)
    if s.noise:
        y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
        image = image * s.cast * (1 - s.vignette * (x * x + y * y)[..., None] / 2) + rng.normal(0, s.noise, (h, w, 3))
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def render(world, split, index, size=(64, 96), supersample=2, seed=0, second=True):
    """One complete sample: name, image, next (if `second`), all seven labels and masks (see ToyWorld.load), and for checks intrinsics
    (focal length, cx, cy) in pixels and visible (H,W) bool: whether the pixel's point is seen in the second frame."""
    s, (h, w) = build(world, split, index, seed), size
    rays = pixel_rays(s.focal, h, w, 1)
    seen = look(s, 0, rays, w)
    solid, hit = seen["solid"], seen["solid"] >= 0
    cls = np.where(hit, s.cls[solid], SKY)
    # motion: the point in the first camera, in the world one frame later, in the second camera
    here = np.where(hit, seen["depth"], 1) * rays.astype(float)
    later = s.R[0] @ here + s.C[0][:, None] + s.speed[solid].T * hit
    there = s.R[1].T @ (later - s.C[1][:, None])
    moved = hit & (there[2] > 0.1)
    focal, middle = s.focal * w, np.array([[(w - 1) / 2], [(h - 1) / 2]])
    target = focal * there[:2] / np.where(moved, there[2], 1) + middle
    flow = np.where(moved, target - (focal * rays[:2] + middle), 0)
    everywhere, image = np.ones_like(hit), lambda x: np.ascontiguousarray(np.moveaxis(x.reshape(-1, h, w), 0, 2))
    labels = {"semantic": cls.astype(np.uint8), "normal": -s.R[0].T @ seen["normal"], "depth": np.where(hit, seen["depth"], 0),
              "optical_flow": flow, "scene_flow": np.where(moved, there - here, 0), "shading": seen["shading"], "albedo": seen["albedo"]}
    valid = {"semantic": cls != IGNORE, "normal": hit, "depth": hit, "optical_flow": moved, "scene_flow": moved,
             "shading": everywhere, "albedo": everywhere}
    grain = np.random.default_rng([zlib.crc32(f"{world}/{split}/noise".encode()), index, seed])
    sample = {"name": f"{world}/{split}/{index}", "image": photo(s, 0, size, supersample, grain),
              "labels": {k: image(x if k == "semantic" else x.astype(np.float32)) for k, x in labels.items()},
              "valid": {k: x.reshape(h, w) for k, x in valid.items()}, "intrinsics": (focal, (w - 1) / 2, (h - 1) / 2)}
    if second:
        sample["next"] = photo(s, 1, size, supersample, grain)
        t, _ = trace(s, 1, s.C[1], s.R[1], there.astype(np.float32), np.arange(len(s.shape)))
        inside = ((target >= 0) & (target <= [[w - 1], [h - 1]])).all(0)
        sample["visible"] = (moved & inside & (t > 0.998)).reshape(h, w)
    return sample


class ToyWorld:
    """Reader of one world. name, split, tasks (those labelled), size; len(); indices(task); load(i, tasks).

    world: one of WORLDS; split: train, val or test; n: number of samples (default SPLITS); size: (H, W) pixels; all_labels: every task of
    every world, for evaluation. Raises ValueError for an unknown world, split or task.
    """

    train_crop, jitter, mix, vflip = {}, {}, {}, False    # augmentation and mixing as data.py reads them: flips only, evenly mixed
    depth_range = (0.1, 80.0)                             # metres, to which aligned depth is clipped in evaluation
    version = "37082f39"    # of the scenes: a latent cache of others is refused. Change it with them (tests/test_toyworld.py tells)

    def __init__(self, world, split, n=None, size=(32, 48), seed=0, all_labels=False):
        if world not in WORLDS or split not in SPLITS:
            raise ValueError(f"toy world {world!r}, split {split!r}: expected one of {', '.join(WORLDS)} and one of {', '.join(SPLITS)}")
        self.name, self.split, self.size, self.seed = world, split, tuple(size), seed
        self.n = SPLITS[split] if n is None else n
        self.tasks = ALL if all_labels else WORLDS[world]
        self.paired = all_labels or world != "rooms"      # rooms train as Hypersim does, without a second frame

    def __len__(self):
        return self.n

    def indices(self, task):
        """Numbers of the samples that carry the task's label; indoors no class is defined, so that rooms carry no semantic label."""
        if task not in self.tasks or (task == "semantic" and self.name in ("rooms", "things")):
            return range(0)
        return [i for i in range(self.n) if not indoor(i)] if task == "semantic" and self.name == "real" else range(self.n)

    def load(self, i, tasks=(), with_next=False):
        """Sample i: name; image (H,W,3) uint8; next, if a flow is asked for or with_next (rooms: only with all_labels); labels {task: (H,W,C)}: float32, semantic uint8
        with 255 ignored, depth m, flow px, scene flow m, normals pointing away, shading, albedo linear [0,1]; valid {task: (H,W) bool}."""
        unknown = set(tasks) - set(self.tasks)
        if unknown:
            raise ValueError(f"{self.name} has no labels for {', '.join(sorted(unknown))}: it has {', '.join(self.tasks)}")
        if not 0 <= i < self.n:
            raise IndexError(f"{self.name}/{self.split} has {self.n} samples, asked for number {i}")
        sample = render(self.name, self.split, i, self.size, seed=self.seed, second=self.paired and (with_next or any(t in FLOWS for t in tasks)))
        return {key: {t: sample[key][t] for t in tasks} if key in ("labels", "valid") else sample[key]
                for key in ("name", "image", "next", "labels", "valid") if key in sample}
