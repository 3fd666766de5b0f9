"""The analytic ray caster behind the toy worlds: a Scene of solids, lights and two cameras -> pictures and labels.

Coordinates are OpenCV's everywhere: x right, y down, z forward, metres; pixel (u, v) has its centre at (u, v). Every
solid is an affine image of the unit cube, ball or cylinder, and a ray meets those in an interval, so that one `trace`
serves the image, the shadows and the labels. image = tonemap(albedo * shading), then the camera's own defects.

Shapes: K solids, N rays or points. Heavy arrays are float32 and hold one row per axis, (3,N).
"""
import numpy as np

from tasks import IGNORE

BOX, BALL, TUBE = range(3)  # shapes
PLAIN, CHECKS, WINDOWS, STRIPES, BLOBS, LANES = range(6)  # patterns
CHUNK = 12288  # rays per pass, so that they stay in the processor's cache
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).T  # (3,8) of the unit cube


# ---- scenes ----

def rotation(yaw, pitch=0.0, roll=0.0):
    """Angles in radians -> (3,3); positive yaw turns to the right, pitch up, roll clockwise."""
    (a, b, c), (p, q, r) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    turned = np.array([[a, 0, p], [0, 1, 0], [-p, 0, a]])
    lifted = np.array([[1, 0, 0], [0, b, -q], [0, q, b]])
    rolled = np.array([[c, -r, 0], [r, c, 0], [0, 0, 1]])
    return turned @ lifted @ rolled


class Scene:
    """Solids `add`ed one by one, lights, and a camera in two frames; `freeze` turns the solids into arrays of K rows.

    R, C: rotation and position, camera to world, of each frame; focal: in image widths. lights: (position, aim, power,
    distance where it starts to fade); ambient: light from everywhere. sky: (2,3) colours of the horizon and overhead.
    cast, vignette, noise: what the camera does to the picture.
    """

    def __init__(self, focal, position, turn):
        self.focal = focal
        self.R, self.C = [rotation(*turn)] * 2, [np.array(position, float)] * 2
        self.rows, self.lights, self.ambient = [], [], 0.3
        self.sky = np.ones((2, 3))
        self.cast, self.vignette, self.noise = np.ones(3), 0.0, 0.0

    def add(self, shape, centre, half, colour, other=None, pattern=PLAIN, period=1.0, cls=IGNORE, yaw=0.0, tilt=(0, 0),
            speed=(0, 0, 0), grain=0.3, casts=True):
        """One solid. centre, half extents and the pattern's period in m, speed in m per frame, linear RGB colours.

        grain: contrast of the noise on it; casts: whether it throws a shadow.
        """
        other = colour if other is None else other
        basis = rotation(yaw, *tilt) * half
        self.rows.append((pattern, shape, centre, speed, basis, half, casts, cls, colour, other, period, grain))

    def freeze(self, rng):
        """Makes arrays of K rows of the solids; afterwards the scene can be traced."""
        rows = sorted(self.rows, key=lambda row: row[0])  # by pattern, so that each pattern is painted in one go
        (self.pattern, self.shape, self.centre, self.speed, self.basis, self.half, self.casts, self.cls, self.colour,
         self.other, self.period, self.grain) = map(np.array, zip(*rows, strict=True))
        self.unit = np.linalg.inv(self.basis)  # world to the solid's own axes, in which it is the unit shape
        self.offset = rng.uniform(0, 32, (3, len(self.rows)))  # of its noise
        for name in ("half", "colour", "other", "period", "grain", "offset"):
            setattr(self, name, getattr(self, name).astype(np.float32))
        return self


# ---- where rays meet solids ----

def pixel_rays(focal, height, width, n):
    """n x n rays per pixel, in camera axes with z = 1, so that the ray parameter is depth: (3, height*n*n*width)."""
    sub = (np.arange(n) + 0.5) / n - 0.5
    rows, columns = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    v, y, x, u = np.meshgrid(rows, sub, sub, columns, indexing="ij")
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


def interval(shape, o, d):
    """Rays o (3,1), d (3,N) against a unit shape: entry and exit (N,); a miss has NaN, or its exit before its entry."""
    if shape == BALL:
        return disc(o, d)
    if shape == BOX:
        entry, leave = slab(o, d)
        return entry.max(0), leave.min(0)
    (side, other_side), (lid, other_lid) = disc(o[::2], d[::2]), slab(o[1], d[1])
    return np.maximum(side, lid), np.minimum(other_side, other_lid)


def trace(s, frame, eye, axes, rays, solids):
    """Nearest hits of the rays eye + t axes @ rays, t > 0, with the numbered solids.

    eye (3,), axes (3,3) of a camera or light that looks along its z, rays (3,N) float32
    -> t (N,), inf for none; solid number (N,), -1 for none.
    """
    best, hit = np.full(rays.shape[1], np.inf, np.float32), np.full(rays.shape[1], -1, np.int16)
    centre = s.centre[solids] + frame * s.speed[solids] - eye
    corners = (s.basis[solids] @ CORNERS + centre[:, :, None]).transpose(0, 2, 1) @ axes  # (K,8,3) seen from the eye
    seen = corners[..., :2] / np.maximum(corners[..., 2:], 1e-3)
    low, high = seen.min(1).astype(np.float32), seen.max(1).astype(np.float32)
    ahead = corners[..., 2].min(1) > 1e-3
    u, v = rays[:2] / np.where(rays[2] > 0, rays[2], np.float32(np.nan))
    least, most = np.fmin.reduce([u, v], axis=1, initial=np.inf), np.fmax.reduce([u, v], axis=1, initial=-np.inf)
    meets = ~ahead | ((low <= most) & (high >= least)).all(1)
    starts = (s.unit[solids] @ -centre[:, :, None]).astype(np.float32)
    turns = (s.unit[solids] @ axes).astype(np.float32)
    everything = np.arange(len(u))
    for j in np.flatnonzero(meets):  # only rays inside a solid's bounding rectangle can meet it
        (left, top), (right, bottom), k = low[j], high[j], solids[j]
        inside = (u >= left) & (u <= right) & (v >= top) & (v <= bottom)
        i = np.flatnonzero(inside) if ahead[j] else everything
        if not len(i):
            continue
        entry, leave = interval(s.shape[k], starts[j], turns[j] @ rays.take(i, 1))
        np.copyto(entry, leave, where=entry < 1e-4)  # from inside, the far wall
        won = np.flatnonzero((entry <= leave) & (entry > 1e-4) & (entry < best.take(i)))
        best[i[won]], hit[i[won]] = entry[won], k
    return best, hit


# ---- what the surfaces look like ----

def lattice(n=32):
    """Periodic noise of three octaves, standard deviation about 0.6: (n*n*n,) float32."""
    rng, total = np.random.default_rng(0), 0
    for weight, doublings in ((0.9, 0), (0.8, 1), (0.5, 2)):
        x = rng.uniform(-1, 1, (n >> doublings,) * 3)
        for axis in (0, 1, 2) * doublings:  # twice as many points, those between the old ones halfway
            between = (x + np.roll(x, -1, axis)) / 2
            shape = [-1 if a == axis else k for a, k in enumerate(x.shape)]
            x = np.stack([x, between], axis + 1).reshape(shape)
        total = total + weight * x
    return total.astype(np.float32).ravel()


LATTICE = lattice()


def noise(q):
    """Value noise at points (3,N): the trilinearly interpolated LATTICE, which has detail at 1, 2 and 4 steps."""
    base = np.floor(q)
    (fx, fy, fz), (x, y, z) = q - base, base.astype(np.int64) & 31
    x0, x1 = x << 10, ((x + 1) & 31) << 10
    y0, y1 = y << 5, ((y + 1) & 31) << 5
    z1 = (z + 1) & 31

    def edge(i):
        a = LATTICE.take(i + z)
        return a + fz * (LATTICE.take(i + z1) - a)

    a, b = edge(x0 + y0), edge(x1 + y0)
    a += fy * (edge(x0 + y1) - a)
    b += fy * (edge(x1 + y1) - b)
    return a + fx * (b - a)


def paint(kind, q, period, pixel):
    """Share (N,) of the second colour at points q (3,N) m of a pattern; detail finer than the pixels (N,) m fades."""
    w = np.maximum(pixel / period, 0.02)
    fade = np.clip(2 - 4 * w, 0, 1)

    def wave(x):
        """Of period 1, with edges one pixel wide."""
        return np.clip((abs(x - np.floor(x) - 0.5) - 0.25) / w, -1, 1) * fade

    def line(x):
        return np.clip((0.09 - abs(x)) / pixel + 0.5, 0, 1) * np.clip(0.18 / pixel, 0, 1)

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
        return line(q[0]) * (q[2] % 4 < 2) + line(abs(q[0]) - period + 0.3)


def fractal(q, pixel):
    """Noise at points q (3,N) m whose finest detail is what pixels of size (N,) m can just show, as in a mip map."""
    level = np.log2(1.5 * pixel)
    first = np.floor(level)
    q, part = q * np.exp2(-first), level - first
    a = noise(q)
    return a + part * (noise(q * np.float32(0.5)) - a)


def shade(s, frame, points, normal):
    """Grey irradiance (N,) in [0,1] of world points (3,N): ambient, brighter from above, plus the lights.

    Every light has its shadows and its fall-off.
    """
    total, casters = s.ambient * (1 - 0.25 * (1 + normal[1])), np.flatnonzero(s.casts)
    start = points + np.float32(0.01) * normal
    for position, aim, power, reach in s.lights:
        source = np.float32(position)[:, None]
        d = source - points
        far = np.sqrt((d * d).sum(0))
        light = power * np.maximum((d * normal).sum(0) / far, 0) * np.minimum(1, (np.float32(reach) / far) ** 2)
        lit = np.flatnonzero(light > 0)
        x, y, z = aim - position
        axes = rotation(np.arctan2(x, z), np.arctan2(-y, np.hypot(x, z)))
        t, _ = trace(s, frame, position, axes, axes.T.astype(np.float32) @ (start.take(lit, 1) - source), casters)
        light[lit[t < 1]] = 0
        total += light
    return np.clip(total, 0, 1)


def own_axes(s, frame, points, count):
    """World points (3,N) on the solids, count[k] of solid k after those of solid k-1
    -> the same in each solid's own axes, in m; normals in world axes, of either side and any length."""
    q, n = np.empty_like(points), np.empty_like(points)
    for k, end in enumerate(np.cumsum(count)):
        if not count[k]:
            continue
        i = slice(end - count[k], end)
        unit = s.unit[k].astype(np.float32)
        x = unit @ (points[:, i] - np.float32(s.centre[k] + frame * s.speed[k])[:, None])
        q[:, i] = x * s.half[k][:, None]
        if s.shape[k] == BOX:
            x *= abs(x) == abs(x).max(0)
        if s.shape[k] == TUBE:
            lid = abs(x[1]) > np.hypot(x[0], x[2])
            x *= np.stack([~lid, lid, ~lid])
        n[:, i] = unit.T @ x
    return q, n


def look(s, frame, rays, width):
    """Camera rays (3,N) of one frame, of a picture `width` pixels wide -> dict of depth (N,), solid (N,), normal (3,N)
    in world axes, albedo (3,N), shading (N,)."""
    eye, axes = np.float32(s.C[frame])[:, None], s.R[frame].astype(np.float32)
    depth, hit = trace(s, frame, s.C[frame], s.R[frame], rays, np.arange(len(s.shape)))
    # group the rays by solid, sky first, so that each solid is one slice
    order = np.argsort(hit, kind="stable")
    sky, *count = np.bincount(hit + 1, minlength=len(s.shape) + 1)
    d, t = axes @ rays.take(order, 1), depth.take(order)
    albedo, shading, normal = np.empty_like(d), np.ones_like(t), np.zeros_like(d)
    up = np.clip(-2 * d[1, :sky] / np.sqrt((d[:, :sky] ** 2).sum(0)), 0, 1)
    albedo[:, :sky] = np.float32(s.sky[:1].T) + up * np.float32(s.sky[1:] - s.sky[:1]).T

    d, t = d[:, sky:], t[sky:]
    points = eye + t * d
    q, n = own_axes(s, frame, points, count)
    n /= np.sqrt((n * n).sum(0))
    slope = (n * d).sum(0)
    n *= -np.sign(slope)
    normal[:, sky:] = n
    # a pixel covers more of a slanted surface
    pixel = t / np.float32(s.focal * width) / np.sqrt(np.maximum(abs(slope), np.float32(0.02)))

    def each(x):
        """One row per solid, (...,K) -> one per ray."""
        return np.repeat(x, count, axis=-1)

    share, period, pattern = np.zeros_like(t), each(s.period), each(s.pattern)
    for kind in set(s.pattern) - {PLAIN}:
        i = slice(*np.searchsorted(pattern, (kind, kind + 1)))  # solids are sorted by pattern
        share[i] = paint(kind, q[:, i], period[i], pixel[i])
    colour, other = each(s.colour.T), each(s.other.T)
    grain = 1 + each(s.grain) * fractal(q + each(s.offset), pixel)
    albedo[:, sky:] = np.clip((colour + share * (other - colour)) * grain, 0.01, 0.99)
    shading[sky:] = shade(s, frame, points, n)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return {"depth": depth, "solid": hit, "normal": normal.take(back, 1), "albedo": albedo.take(back, 1),
            "shading": shading.take(back)}


# ---- pictures ----

def tonemap(linear):
    """Linear [0,1] -> display [0,1]."""
    return np.clip(linear, 0, 1) ** np.float32(1 / 2.2)


def photo(s, frame, size, n, rng):
    """The picture (H,W,3) uint8 of one frame: the mean of n x n tone-mapped rays per pixel, with camera defects."""
    h, w = size
    rays, colours = pixel_rays(s.focal, h, w, n), []
    for part in np.array_split(rays, -(-rays.shape[1] // CHUNK), axis=1):
        seen = look(s, frame, part, w)
        colours.append(tonemap(seen["albedo"] * seen["shading"]))
    image = np.concatenate(colours, 1).reshape(3, h, n * n, w).mean(2).transpose(1, 2, 0)
    if s.noise:
        y, x = np.mgrid[-1:1:h * 1j, -1:1:w * 1j]
        dark = 1 - s.vignette * (x * x + y * y)[..., None] / 2
        image = image * s.cast * dark + rng.normal(0, s.noise, (h, w, 3))
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
