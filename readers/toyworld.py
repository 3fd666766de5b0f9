"""Toy worlds: small procedural scenes with exact labels for all seven tasks, the embedded default dataset.

    world    scenes                                           labelled tasks
    rooms    closed rooms with furniture and lamps            normal, depth, shading, albedo
    streets  road, buildings, poles, trees, moving vehicles   semantic, normal, depth, optical flow, scene flow
    things   textured solids flying through a textured box    optical flow, scene flow
    real     streets and rooms in another look                everything; for testing, never for training

No download. The same (world, split, index, seed) always gives the same sample, ray-cast (raycast.py) when it is asked
for, at any size. Labels are those of tasks.py: OpenCV axes (x right, y down, z forward), depth and scene flow in
metres, optical flow in pixels, normals pointing away from the camera, linear albedo and shading. They are exact; where
a ray meets nothing (sky) there is no depth, normal or motion: 0 and invalid. Class 255 (ignore) is invalid, too.
"""
import zlib
from types import SimpleNamespace as Style

import numpy as np

from readers.raycast import (
    BALL,
    BLOBS,
    BOX,
    CHECKS,
    LANES,
    PLAIN,
    STRIPES,
    TUBE,
    WINDOWS,
    Scene,
    look,
    photo,
    pixel_rays,
    rotation,
    trace,
)
from tasks import CLASSES, IGNORE, TASKS

ROAD, BUILDING, POLE, LIGHT, SIGN, VEGETATION, SKY, VEHICLE = range(len(CLASSES))
ALL = ("semantic", "normal", "depth", "optical_flow", "scene_flow", "shading", "albedo")
FLOWS = ("optical_flow", "scene_flow")
WORLDS = {"rooms": ("normal", "depth", "shading", "albedo"),
          "streets": ("semantic", "normal", "depth", "optical_flow", "scene_flow"), "things": FLOWS, "real": ALL}
SPLITS = {"train": 4000, "val": 100, "test": 200}  # default number of samples

# What sets `real` apart from the worlds of training: camera, light, patterns and (hue, saturation, value) of colours.
SYNTHETIC = Style(
    focal=(0.7, 0.95), eye=(1.3, 2.0), sun=(0.8, 1.8),
    patterns=(CHECKS, PLAIN), facades=(WINDOWS, WINDOWS, CHECKS), interior=(CHECKS, PLAIN, WINDOWS),
    horizon=((0.5, 0.6), (0.05, 0.15), (0.8, 0.95)), zenith=((0.55, 0.62), (0.3, 0.7), (0.5, 0.9)),
    grass=((0.1, 0.3), (0.2, 0.5), (0.25, 0.45)), leaf=((0.18, 0.4), (0.4, 0.8), (0.15, 0.5)),
    facade=((0.0, 0.15), (0.1, 0.6), (0.3, 0.75)), coat=(0.0, 0.6))
REAL = Style(
    focal=(0.62, 0.8), eye=(2.0, 2.8), sun=(0.35, 0.8),
    patterns=(STRIPES, BLOBS), facades=(WINDOWS, STRIPES), interior=(STRIPES, BLOBS, PLAIN),
    horizon=((0.05, 0.12), (0.05, 0.3), (0.75, 0.95)), zenith=((0.5, 0.58), (0.2, 0.5), (0.5, 0.8)),
    grass=((0.07, 0.12), (0.2, 0.5), (0.25, 0.45)), leaf=((0.08, 0.32), (0.4, 0.8), (0.15, 0.5)),
    facade=((0.5, 1.05), (0.1, 0.6), (0.3, 0.75)), coat=(0.4, 0.95))


def hsv(rng, hue, saturation, value):
    """A random linear RGB colour with hue, saturation, value drawn from the (low, high) ranges."""
    h, s, v = (rng.uniform(*x) for x in (hue, saturation, value))
    k = (np.array([5, 3, 1]) + 6 * h) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def grey(rng, saturation, value):
    """A random colour of any hue and little saturation."""
    return hsv(rng, (0, 1), (0, saturation), value)


def pick(rng, options):
    """One of the options."""
    return options[rng.integers(len(options))]


# ---- streets ----

def street(rng, style):
    """A road seen from a vehicle or pavement: buildings, trees, bushes, poles with signs or lights, moving vehicles."""
    eye = rng.uniform(*style.eye)
    s = Scene(rng.uniform(*style.focal), (rng.uniform(-1.5, 1.5), -eye, 0), rng.normal(0, (0.1, 0.04, 0.01)))
    sun = np.array([rng.uniform(-1, 1), -rng.uniform(*style.sun), rng.uniform(-1.2, 0.4)])
    s.lights = [(150 * sun, np.array([0, 0, 15]), rng.uniform(0.6, 0.75), np.inf)]
    s.ambient = rng.uniform(0.25, 0.4)
    s.sky = np.array([hsv(rng, *style.horizon), hsv(rng, *style.zenith)])
    wide = rng.uniform(2.8, 4.5)  # half the width of the road
    grass, tar = hsv(rng, *style.grass), grey(rng, 0.1, (0.12, 0.3))
    ground = pick(rng, style.patterns)
    s.add(BOX, (0, 1.05, 26), (40, 1, 40), grass, grass * 0.6, ground, 1.5, casts=False, grain=0.5)  # ends before 80 m
    s.add(BOX, (0, 1, 26), (wide, 1, 39), tar, tar + 0.45, LANES, wide, ROAD, casts=False, grain=0.4)
    for side in (-1, 1):
        add_buildings(s, rng, style, side, wide)
        for _ in range(rng.integers(0, 3)):
            add_tree(s, rng, style, side, wide)
        for _ in range(rng.integers(0, 3)):
            add_bush(s, rng, style, side, wide)
    for i in range(rng.integers(3, 6)):
        add_pole(s, rng, style, (-1, 1)[i % 2], wide, eye)
    for lane in rng.permutation((-1, 1))[:rng.integers(1, 3)]:
        add_vehicle(s, rng, style, lane, wide)
    return s


def add_buildings(s, rng, style, side, wide):
    """A row of boxes with gaps along one side of the road."""
    z = rng.uniform(3, 8)
    while z < 45:
        deep, far, tall = rng.uniform(3, 6), rng.uniform(3, 6), rng.uniform(2, 6)
        if rng.random() < 0.75:
            wall = hsv(rng, *style.facade)
            centre = side * (wide + rng.uniform(1.8, 4.5) + far), -tall, z + deep
            s.add(BOX, centre, (far, tall, deep), wall, pick(rng, (wall * 0.3, wall * 0.4 + 0.5)),
                  pick(rng, style.facades), rng.uniform(1.4, 2.6), BUILDING)
        z += 2 * deep + pick(rng, (0, rng.uniform(1, 6)))


def add_tree(s, rng, style, side, wide):
    z, r, leaf = rng.uniform(6, 18), rng.uniform(0.9, 1.8), hsv(rng, *style.leaf)
    x, y = side * (wide + rng.uniform(0.8, 2) + r * 0.6), -rng.uniform(1.6, 2.6) - r
    s.add(TUBE, (x, y / 2, z), (0.18, -y / 2, 0.18), leaf * (1.2, 0.6, 0.5), cls=VEGETATION)
    s.add(BALL, (x, y, z), (r, r * rng.uniform(0.9, 1.5), r), leaf, leaf * 0.5, BLOBS, 0.8, VEGETATION, grain=0.5)


def add_bush(s, rng, style, side, wide):
    z, r, leaf = rng.uniform(5, 14), rng.uniform(0.4, 0.9), hsv(rng, *style.leaf)
    x = side * (wide + rng.uniform(0.6, 2) + r)
    s.add(BALL, (x, -r * 0.6, z), (r, r, r), leaf, leaf * 0.5, BLOBS, 0.5, VEGETATION, grain=0.5)


def add_pole(s, rng, style, side, wide, eye):
    """A pole, perhaps with a sign or traffic lights.

    These thin things are sized in pixels of an image 64 pixels wide, so that one of 48 pixels resolves them.
    """
    z, colour = rng.uniform(4.5, 11), grey(rng, 0.25, (0.15, 0.7))
    px = z / (64 * s.focal)
    x, top = side * (wide + rng.uniform(0.2, 0.6)), -eye - px * rng.uniform(5, 16)
    r = px * rng.uniform(1.0, 1.7)
    s.add(TUBE, (x, top / 2, z), (r, -top / 2, r), colour, colour * 0.5, pick(rng, style.patterns), 0.6, POLE,
          grain=0.2)
    kind, front = pick(rng, (SIGN, SIGN, SIGN, LIGHT, LIGHT, POLE)), z - r - px
    if kind == SIGN:
        a, hue = px * rng.uniform(2.6, 4.6), pick(rng, ((0, 0.02), (0.58, 0.66), (0.12, 0.16)))
        s.add(pick(rng, (BOX, BALL)), (x, top + rng.uniform(-0.5, 1) * a, front), (a, a, px),
              hsv(rng, hue, (0.8, 1), (0.6, 0.95)), 0.9 * np.ones(3), pick(rng, (PLAIN, STRIPES)), a, SIGN, grain=0.1)
    if kind == LIGHT:
        a, b = px * rng.uniform(2.2, 3.2), px * rng.uniform(4, 6)
        x, y = x - side * px * pick(rng, (0, 3)), top + px * rng.uniform(-2, 5)
        hue, up = pick(rng, (((0, 0.02), -0.5), ((0.33, 0.42), 0.5)))  # red above, green below
        s.add(BOX, (x, y, front), (a, b, a), grey(rng, 0.3, (0.03, 0.1)), cls=LIGHT, grain=0.1)
        s.add(BALL, (x, y + up * b, front - a), (a * 0.8, a * 0.8, a * 0.4), hsv(rng, hue, (0.8, 1), (0.9, 1)),
              cls=LIGHT, grain=0.1)


def add_vehicle(s, rng, style, lane, wide):
    """A body and a cabin that drive along the road, or cross it."""
    z, across, paint = rng.uniform(6.5, 16), rng.random() < 0.25, hsv(rng, (0, 1), (0.3, 1), (0.2, 0.9))
    w, tall, long = rng.uniform(0.8, 1), rng.uniform(0.35, 0.5), rng.uniform(1.7, 2.3)
    glass = hsv(rng, (0.5, 0.6), (0, 0.3), (0.05, 0.2))
    if across:
        go = pick(rng, (-1, 1)) * rng.uniform(2, 5) * z / (96 * s.focal), 0, 0
    else:
        go = 0, 0, rng.uniform(-0.8, 0.8)
    at, yaw = np.array([lane * wide * 0.5, -0.25 - tall, z]), np.pi / 2 if across else rng.normal(0, 0.05)
    how = {"cls": VEHICLE, "yaw": yaw, "speed": go, "grain": 0.2}
    s.add(BOX, at, (w, tall, long), paint, paint * 0.6, pick(rng, style.patterns), 0.7, **how)
    s.add(BOX, at - (0, tall + 0.3, 0), (w * 0.85, 0.3, long * 0.55), glass, paint, WINDOWS, 1.1, **how)


# ---- rooms and things ----

def room(rng, style):
    """A closed room: six walls, furniture on the floor, one or two lamps. Nothing in it moves but the camera."""
    w, h, long = rng.uniform(1.8, 3.2), rng.uniform(1.2, 1.6), rng.uniform(2.5, 5)  # half of each, in m
    s = Scene(rng.uniform(*style.focal), (rng.uniform(-0.5, 0.5) * w, -rng.uniform(1, 1.6), 0.4 - long),
              rng.normal((0, -0.12, 0), (0.25, 0.06, 0.02)))
    s.ambient = rng.uniform(0.08, 0.3)
    for _ in range(rng.integers(1, 3)):
        x, y = rng.uniform(-0.8, 0.8) * w, -2 * h + rng.uniform(0.1, 0.8)
        lamp = np.array([x, y, rng.uniform(-0.7, 0.7) * long])
        s.lights.append((lamp, lamp + (0, 1, 0), rng.uniform(0.4, 0.9), rng.uniform(1.5, 3.5)))

    def coat(low=0.25, high=0.85):
        colour = hsv(rng, style.coat, (0.05, 0.7), (low, high))
        return {"colour": colour, "other": colour * rng.uniform(0.3, 0.8), "pattern": pick(rng, style.interior),
                "period": rng.uniform(0.3, 0.9)}

    s.add(BOX, (0, 0.1, 0), (w, 0.1, long), **coat(0.2, 0.6), casts=False, grain=0.45)
    s.add(BOX, (0, -2 * h - 0.1, 0), (w, 0.1, long), **coat(0.7, 0.9), casts=False)
    for side in (-1, 1):
        s.add(BOX, (side * (w + 0.1), -h, 0), (0.1, h, long), **coat(0.4), casts=False)
        s.add(BOX, (0, -h, side * (long + 0.1)), (w, h, 0.1), **coat(0.4), casts=False)
    for _ in range(rng.integers(3, 8)):
        a, b, c, yaw = rng.uniform(0.15, 0.5), rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.5), rng.uniform(0, 3)
        x, z = rng.uniform(-0.85, 0.85) * w, rng.uniform(2.2 - long, long - 0.4)
        kind = pick(rng, (BOX, BALL, TUBE, "table"))
        if kind != "table":
            s.add(kind, (x, -b, z), (a, b, c), yaw=yaw, **coat())
            continue
        wood, top = coat(), -rng.uniform(0.5, 0.8)
        s.add(BOX, (x, top, z), (a + 0.3, 0.06, c + 0.2), yaw=yaw, **wood)
        s.add(TUBE, (x, top / 2, z), (0.09, -top / 2, 0.09), **wood)
        s.add(BALL, (x, top - 0.06 - b / 2, z), (b / 2, b / 2, b / 2), **coat())
    return s


def flight(rng):
    """Solids of any orientation, each flying its own way, inside a large textured box."""
    s = Scene(rng.uniform(0.7, 1.0), (0, 0, 0), rng.normal(0, 0.2, 3))
    s.lights = [(rng.normal((0, -3, -4), (4, 2, 1)), np.array([0, 0, 6]), rng.uniform(0.5, 0.7), np.inf)]
    s.ambient = rng.uniform(0.25, 0.4)

    def coat():
        colour, other = (hsv(rng, (0, 1), (0.1, 0.9), (low, 0.9)) for low in (0.25, 0.1))
        return {"colour": colour, "other": pick(rng, (other, colour * 0.4)),
                "pattern": pick(rng, (PLAIN, CHECKS, WINDOWS, BLOBS)), "yaw": rng.uniform(-3, 3),
                "tilt": rng.uniform(-3, 3, 2)}

    s.add(BOX, (0, 0, 0), rng.uniform(7, 11, 3), period=rng.uniform(1.5, 3), casts=False, grain=0.5, **coat())
    for _ in range(rng.integers(4, 9)):
        z, way = rng.uniform(3, 8), rng.normal(0, 1, 3)
        at = z * np.array([rng.uniform(-0.5, 0.5) / s.focal, rng.uniform(-0.33, 0.33) / s.focal, 1])
        go = way / np.linalg.norm(way) * rng.uniform(1, 6) * z / (96 * s.focal)
        s.add(pick(rng, (BOX, BALL, TUBE)), s.R[0] @ at, rng.uniform(0.05, 0.17, 3) * z, speed=go,
              period=rng.uniform(0.4, 1), grain=0.4, **coat())
    return s


# ---- one sample ----

def indoor(index):
    """Whether sample `index` of `real` is a room; the others are streets."""
    return index % 4 == 3


def build(world, split, index, seed=0):
    """The frozen Scene of one sample, with its camera motion."""
    rng = np.random.default_rng([zlib.crc32(f"{world}/{split}".encode()), index, seed])
    real = world == "real"
    closed = indoor(index) if real else world == "rooms"
    if world == "things":
        s = flight(rng)
    else:
        s = (room if closed else street)(rng, REAL if real else SYNTHETIC)
    s.freeze(rng)
    if real:
        s.cast, s.vignette, s.noise = rng.uniform(0.85, 1.05, 3), rng.uniform(0.1, 0.3), rng.uniform(0.01, 0.025)
    move_camera(s, rng)
    return s


def move_camera(s, rng):
    """The second frame's camera. Motion is scaled so that the flow is about one latent cell (4 of 96 pixels): that is
    what makes it learnable. Up, down and sideways alike, but forwards only, as vehicles drive, and turning little:
    whether a small motion along the optical axis comes or goes is hardly visible."""
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


def render(world, split, index, size=(64, 96), supersample=2, seed=0, second=True):
    """One complete sample: name, image, next (if `second`), all seven labels and masks (see ToyWorld.load).

    For checks also intrinsics (focal length, cx, cy) in pixels and visible (H,W) bool: whether the pixel's point is
    seen in the second frame.
    """
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
    labels = {"semantic": cls.astype(np.uint8), "normal": -s.R[0].T @ seen["normal"],
              "depth": np.where(hit, seen["depth"], 0), "optical_flow": flow,
              "scene_flow": np.where(moved, there - here, 0), "shading": seen["shading"], "albedo": seen["albedo"]}
    everywhere = np.ones_like(hit)
    valid = {"semantic": cls != IGNORE, "normal": hit, "depth": hit, "optical_flow": moved, "scene_flow": moved,
             "shading": everywhere, "albedo": everywhere}

    def picture(x):
        """(C,H*W) -> (H,W,C), float32 but for class ids."""
        x = x if x.dtype == np.uint8 else x.astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(x.reshape(-1, h, w), 0, 2))

    rng = np.random.default_rng([zlib.crc32(f"{world}/{split}/noise".encode()), index, seed])
    sample = {"name": f"{world}/{split}/{index}", "image": photo(s, 0, size, supersample, rng),
              "labels": {t: picture(x) for t, x in labels.items()},
              "valid": {t: x.reshape(h, w) for t, x in valid.items()},
              "intrinsics": (focal, (w - 1) / 2, (h - 1) / 2)}
    if second:
        sample["next"] = photo(s, 1, size, supersample, rng)
        t, _ = trace(s, 1, s.C[1], s.R[1], there.astype(np.float32), np.arange(len(s.shape)))
        inside = ((target >= 0) & (target <= [[w - 1], [h - 1]])).all(0)
        sample["visible"] = (moved & inside & (t > 0.998)).reshape(h, w)
    return sample


# ---- the reader ----

class ToyWorld:
    """Reader of one world. name, split, tasks (those labelled), size; len(); indices(task); load(i, tasks).

    world: one of WORLDS; split: train, val or test; n: number of samples (default SPLITS); size: (H, W) pixels;
    all_labels: every task of every world, for evaluation. ValueError: an unknown world, split or task.
    """

    crop = folder = None                                # no files
    train_crop, jitter, mix, vflip = {}, {}, {}, False  # as data.py reads them: flips only, evenly mixed
    independent = True                                  # each scene is drawn by itself
    depth_range = (0.1, 80.0)                           # metres, to which aligned depth is clipped in evaluation
    # Of the scenes: a latent cache made from others is refused. Change it with them (tests/test_toyworld.py tells).
    version = "37082f39"

    def __init__(self, world, split, n=None, size=(32, 48), seed=0, all_labels=False):
        if world not in WORLDS or split not in SPLITS:
            raise ValueError(f"toy world {world!r}, split {split!r}: expected one of {', '.join(WORLDS)} "
                             f"and one of {', '.join(SPLITS)}")
        self.name, self.split, self.size, self.seed = world, split, tuple(size), seed
        self.n = SPLITS[split] if n is None else n
        self.tasks = ALL if all_labels else WORLDS[world]
        self.paired = all_labels or world != "rooms"  # rooms train as Hypersim does, without a second frame

    def complete(self):
        """The same scenes and frames, with the labels of every task."""
        full = ToyWorld(self.name, self.split, self.n, self.size, self.seed, all_labels=True)
        full.paired = self.paired
        return full

    def __len__(self):
        return self.n

    def identity(self):
        """As of a reader: nothing beyond `version`, for a scene follows from its index."""
        return None

    def stem(self, i):
        """The name of a sample, for files about it."""
        return str(i)

    def indices(self, task):
        """Numbers of the samples that carry the task's label. Indoors no class is defined: no semantic label there."""
        if task not in self.tasks or (task == "semantic" and self.name in ("rooms", "things")):
            return range(0)
        if task == "semantic" and self.name == "real":
            return [i for i in range(self.n) if not indoor(i)]
        return range(self.n)

    def load(self, i, tasks=(), with_next=False):
        """Sample i -> {"name": str, "image": (H,W,3) uint8, "labels": {task: (H,W,C)}, "valid": {task: (H,W) bool}}.

        "next", like the image, if a flow is asked for or with_next (rooms: only with all_labels). Labels are float32,
        semantic uint8 with 255 = ignore; units as at the top of this file. ValueError: a task without labels here.
        """
        unknown = set(tasks) - set(self.tasks)
        if unknown:
            raise ValueError(f"{self.name} has no labels for {', '.join(sorted(unknown))}: "
                             f"it has {', '.join(self.tasks)}")
        if not 0 <= i < self.n:
            raise IndexError(f"{self.name}/{self.split} has {self.n} samples, asked for number {i}")
        second = self.paired and (with_next or any(TASKS[t].frames == 2 for t in tasks))
        whole = render(self.name, self.split, i, self.size, seed=self.seed, second=second)
        sample = {key: whole[key] for key in ("name", "image", "next") if key in whole}
        return sample | {key: {t: whole[key][t] for t in tasks} for key in ("labels", "valid")}
