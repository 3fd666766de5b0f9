"""The toy worlds: labels agree with one another and the images, motion and classes are learnable, the reader keeps its
protocol."""
from functools import lru_cache

import numpy as np
import pytest

from data import TOY_TEST, TOY_TRAIN
from evaluate import PAPER_TASKS
from readers import toyworld
from readers.raycast import look, pixel_rays
from readers.toyworld import WORLDS, ToyWorld
from tasks import CLASSES, IGNORE, TASKS

EVERY = pytest.mark.parametrize("world", WORLDS)
scene = lru_cache(toyworld.render)  # renders each scene once for all tests


@lru_cache
def survey(world, n=32):
    """The training samples 0..n-1 at low cost: one ray per pixel."""
    return [toyworld.render(world, "train", i, supersample=1) for i in range(n)]


def points(depth, intrinsics, u, v):
    f, cx, cy = intrinsics
    return np.stack([(u - cx) / f, (v - cy) / f, np.ones_like(u)], -1) * depth


def grid(shape):
    v, u = np.mgrid[:shape[0], :shape[1]].astype(float)
    return u, v


def warp(image, u, v):
    """Bilinear samples of image (H,W,3) at pixel positions inside it."""
    h, w = image.shape[:2]
    x, y = np.clip(np.floor(u), 0, w - 2).astype(int), np.clip(np.floor(v), 0, h - 2).astype(int)
    a, b = (u - x)[..., None], (v - y)[..., None]
    above = image[y, x] * (1 - a) + image[y, x + 1] * a
    below = image[y + 1, x] * (1 - a) + image[y + 1, x + 1] * a
    return above * (1 - b) + below * b


def test_world_table():
    """Rooms, streets and things carry only their own labels, and `real`, the test world, is no training world."""
    counts = {world: len({*tasks} & {*PAPER_TASKS}) for world, tasks in WORLDS.items()}
    assert counts == {"rooms": 4, "streets": 5, "things": 2, "real": 7} and set(WORLDS["real"]) == set(toyworld.ALL)
    assert "real" not in TOY_TRAIN and {*TOY_TRAIN, "real"} == set(TOY_TEST) == set(WORLDS)


# What scenes looked like when ToyWorld.version was last changed: brightness of six parts of the picture, contrast of
# these parts, and of each label in the order of PAPER_TASKS the mean absolute value of its valid pixels.
RECORDED = {
    ("rooms", "train", 0): ([104.2, 96.8, 94.3, 108.9, 138.0, 119.4],
                            [24.8, 26.0, 19.0, 23.3, 39.1, 45.2],
                            [0, 0.4, 5.488, 0.999, 0.094, 0.446, 0.403]),
    ("streets", "train", 0): ([130.9, 204.5, 97.9, 105.4, 102.9, 85.7],
                              [44.5, 52.3, 56.5, 20.6, 23.1, 28.7],
                              [2.671, 0.366, 11.08, 1.364, 0.258, 0.622, 0.366]),
    ("streets", "val", 4): ([186.7, 190.5, 78.8, 131.1, 115.9, 86.8],
                            [47.9, 47.7, 51.9, 32.9, 40.1, 20.1],
                            [3.172, 0.39, 11.937, 1.389, 0.301, 0.624, 0.416]),
    ("things", "train", 0): ([113.4, 116.6, 123.7, 114.7, 105.8, 112.2],
                             [24.8, 37.7, 36.3, 25.4, 28.1, 30.7],
                             [0, 0.419, 6.98, 0.747, 0.104, 0.893, 0.218]),
    ("real", "test", 0): ([125.0, 182.6, 104.8, 90.1, 98.8, 82.4],
                          [50.0, 14.4, 45.2, 23.2, 28.3, 18.3],
                          [2.679, 0.359, 12.941, 1.143, 0.28, 0.76, 0.385]),
    ("real", "test", 3): ([74.6, 99.0, 113.7, 124.3, 101.3, 109.7],
                          [19.5, 38.3, 17.8, 23.1, 26.5, 21.2],
                          [0, 0.436, 4.158, 1.562, 0.162, 0.541, 0.413]),
}


def summary(world, split, index):
    """Numbers that hardly depend on the last bit of the arithmetic, and on everything else."""
    s = toyworld.render(world, split, index, (32, 48))
    parts = s["image"].astype(float).reshape(2, 16, 3, 16, 3)
    labels = [abs(s["labels"][t][s["valid"][t]].astype(float)) for t in PAPER_TASKS]
    return (parts.mean((1, 3, 4)).ravel().round(1).tolist(), parts.std((1, 3, 4)).ravel().round(1).tolist(),
            [round(float(x.mean()), 3) if x.size else 0 for x in labels])


@pytest.mark.parametrize("key", RECORDED, ids=lambda key: "-".join(map(str, key)))
def test_version_stands_for_the_scenes(key):
    """Latent caches are kept from run to run as long as ToyWorld.version stays the same: so it must change with the
    scenes, and only with them. (Once it hung on the wording of the file, and every edit threw all caches away.)"""
    now, was = summary(*key), RECORDED[key]
    limits = (0.15, 0), (0.15, 0), (0.0015, 0.003)  # absolute and relative; a silhouette may move by a pixel's corner
    same = [np.allclose(a, b, rtol, atol) for a, b, (atol, rtol) in zip(now, was, limits, strict=True)]
    assert all(same), (f"the scenes changed: give ToyWorld.version another value, so that latent caches of the old "
                       f"ones are refused, and record here {key}: {now}")


@EVERY
def test_deterministic(world):
    """The same (world, split, index) gives the same bits; another index, split or seed gives another scene."""
    a, b = scene(world, "train", 3), toyworld.render(world, "train", 3)
    assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["next"], b["next"])
    assert all(np.array_equal(a["labels"][t], b["labels"][t]) for t in a["labels"])
    keys = ("train", 7), ("val", 3), ("test", 3), ("train", 3, (64, 96), 2, 1)
    others = [toyworld.render(world, *key, second=False) for key in keys]
    assert all((a["image"] != o["image"]).mean() > 0.5 for o in others)


@EVERY
def test_geometry_of_flows(world):
    """A pixel back-projected by depth, moved by the scene flow and projected lands where the optical flow says."""
    for i in (0, 3):
        s = scene(world, "train", i)
        u, v = grid(s["image"].shape)
        moved = points(s["labels"]["depth"], s["intrinsics"], u, v) + s["labels"]["scene_flow"]
        f, cx, cy = s["intrinsics"]
        there = f * moved[..., :2] / np.maximum(moved[..., 2:], 0.1) + (cx, cy)
        error = abs(there - np.stack([u, v], -1) - s["labels"]["optical_flow"])
        assert error[s["valid"]["optical_flow"]].max() < 1e-3


@EVERY
def test_normals_match_depth(world):
    """Normals are unit, point away from the camera and are perpendicular to the surface that the depth map spans."""
    for i in (1, 3):
        s = scene(world, "train", i)
        n, ok = s["labels"]["normal"], s["valid"]["normal"]
        u, v = grid(ok.shape)
        p = points(s["labels"]["depth"], s["intrinsics"], u, v)
        assert np.allclose(np.linalg.norm(n[ok], axis=-1), 1, atol=1e-4) and ((n * p).sum(-1)[ok] > 0).mean() > 0.999
        right, down = p[1:-1, 2:] - p[1:-1, :-2], p[2:, 1:-1] - p[:-2, 1:-1]
        flat = np.cross(right, down)
        flat /= np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
        m, z = n[1:-1, 1:-1], p[..., 2]
        smooth = ok[1:-1, 2:] & ok[1:-1, :-2] & ok[2:, 1:-1] & ok[:-2, 1:-1]
        smooth &= abs(z[1:-1, 2:] + z[1:-1, :-2] - 2 * z[1:-1, 1:-1]) < 0.05
        angle = np.degrees(np.arccos(np.clip((flat * m).sum(-1), -1, 1)))[smooth]
        assert np.median(angle) < 2 and smooth.mean() > 0.3


@EVERY
def test_warping_reproduces_the_first_frame(world):
    """Where visible, the second frame warped by the flow is the first one; unwarped it is not."""
    warped, still = [], []
    for i in range(4):
        s = scene(world, "train", i)
        u, v = grid(s["visible"].shape)
        a, b, flow = s["image"].astype(float), s["next"].astype(float), s["labels"]["optical_flow"]
        warped.append(abs(warp(b, u + flow[..., 0], v + flow[..., 1]) - a)[s["visible"]].mean())
        still.append(abs(b - a)[s["visible"]].mean())
    assert np.mean(warped) < 9 and np.mean(warped) < 0.4 * np.mean(still)


@pytest.mark.parametrize("world", ["streets", "things"])
def test_moving_solids_arrive_where_their_flow_says(world):
    """Solids move by themselves: most of their points are seen in the second frame where the labels say, texture
    included."""
    share, error = [], []
    for i in range(8):
        s, built, (h, w) = scene(world, "train", i), toyworld.build(world, "train", i), (64, 96)
        solid = look(built, 0, pixel_rays(built.focal, h, w, 1), w)["solid"]
        moving = ((abs(built.speed[solid]).sum(1) > 0) & (solid >= 0)).reshape(h, w)
        assert moving.any()
        u, v = grid((h, w))
        u, v = u + s["labels"]["optical_flow"][..., 0], v + s["labels"]["optical_flow"][..., 1]
        inside = moving & (u >= 0) & (u <= w - 1) & (v >= 0) & (v <= h - 1)
        share.append(s["visible"][inside].mean())
        error.append(abs(warp(s["next"].astype(float), u, v) - s["image"])[moving & s["visible"]].mean())
    assert np.mean(share) > 0.8 and np.mean(error) < 9, (share, error)


@pytest.mark.parametrize("world", TOY_TRAIN)
def test_image_is_albedo_times_shading(world):
    """At one ray per pixel the image is tonemap(albedo * shading), up to 8-bit rounding."""
    for s in survey(world)[:3]:
        linear = s["labels"]["albedo"] * s["labels"]["shading"]
        assert abs(255 * linear.clip(0, 1) ** (1 / 2.2) - s["image"]).max() <= 0.51


@pytest.mark.parametrize("world", ["streets", "real"])
def test_every_class_is_frequent(world):
    """Each class covers at least 0.5% of all pixels, and poles, lights and signs each stand in half of the streets."""
    labels = np.stack([s["labels"]["semantic"] for s in survey(world)])
    share = np.bincount(labels.ravel(), minlength=256)[:8] / labels.size
    assert share.min() > 0.005, dict(zip(CLASSES, share, strict=True))
    outdoors = labels[[(x != IGNORE).any() for x in labels]]
    for c in ("pole", "light", "sign"):
        assert ((outdoors == CLASSES.index(c)).sum((1, 2, 3)) >= 10).mean() >= 0.5


@EVERY
def test_motion_is_learnable(world):
    """Typical flow is about one latent cell, rarely more than three, and its direction varies from scene to scene."""
    flows = [s["labels"]["optical_flow"][s["valid"]["optical_flow"]] for s in survey(world)]
    size = np.linalg.norm(np.concatenate(flows), axis=-1)
    assert 2.5 < np.median(size) < 4.5 and np.percentile(size, 95) < 12
    assert np.linalg.norm(np.mean([f.mean(0) / np.linalg.norm(f.mean(0)) for f in flows], 0)) < 0.5


@EVERY
def test_label_ranges(world):
    """Labels are finite, within their ranges where valid, and the sky has no depth, normal or motion but a colour."""
    low, high = {"rooms": (0.3, 12), "streets": (1, 80), "things": (1, 20), "real": (0.3, 80)}[world]
    for s in survey(world):
        labels, valid = s["labels"], s["valid"]
        assert all(np.isfinite(x).all() for x in labels.values())
        depth = labels["depth"][..., 0][valid["depth"]]
        assert low < depth.min() and depth.max() < high
        assert all(0 <= labels[t].min() and labels[t].max() <= 1 and valid[t].all() for t in ("shading", "albedo"))
        assert np.array_equal(valid["semantic"], labels["semantic"][..., 0] != IGNORE)
        sky = labels["semantic"][..., 0] == CLASSES.index("sky")
        assert not any(valid[t][sky].any() for t in ("depth", "normal", "optical_flow", "scene_flow"))
        assert (labels["shading"][sky] == 1).all()
        assert valid["optical_flow"][~sky].mean() > 0.99


@EVERY
def test_reader_protocol(world):
    """The reader yields exactly the tasks asked for, with the promised types, and a second frame only for motion or on
    request; rooms have none, as Hypersim has none, unless all labels are asked for."""
    data = ToyWorld(world, "val", n=5, size=(64, 96))
    assert (data.name, data.split, data.size, len(data), data.tasks) == (world, "val", (64, 96), 5, WORLDS[world])
    for task in data.tasks:
        i = data.indices(task)[-1]
        s = data.load(i, [task])
        assert s["name"] == f"{world}/val/{i}" and set(s["labels"]) == set(s["valid"]) == {task}
        assert s["image"].shape == (64, 96, 3) and s["image"].dtype == np.uint8
        assert ("next" in s) == (TASKS[task].frames == 2)
        assert s["valid"][task].shape == (64, 96) and s["valid"][task].dtype == bool and s["valid"][task].any()
        assert s["labels"][task].dtype == (np.uint8 if TASKS[task].categorical else np.float32)
        assert s["labels"][task].ndim == 3
    assert ("next" in data.load(0, [], with_next=True)) == (world != "rooms") and "next" not in data.load(0, [])
    assert "next" in ToyWorld(world, "val", n=5, all_labels=True).load(0, [], with_next=True)
    assert set(ToyWorld(world, "val", n=5, all_labels=True).load(0, toyworld.ALL)["labels"]) == set(toyworld.ALL)


def test_size_changes_only_resolution():
    """Another image size shows the same scene, with flow in proportion."""
    a, b = scene("streets", "val", 1), toyworld.render("streets", "val", 1, size=(128, 192))
    shrunk = b["image"].reshape(64, 2, 96, 2, 3).mean((1, 3))
    assert abs(shrunk - a["image"]).mean() < 6
    both = a["valid"]["optical_flow"] & b["valid"]["optical_flow"][::2, ::2]
    assert np.median(abs(b["labels"]["optical_flow"][::2, ::2] / 2 - a["labels"]["optical_flow"])[both]) < 0.1


def test_mistakes_are_named():
    """Unknown worlds, splits and tasks raise ValueError with the possible ones."""
    with pytest.raises(ValueError, match="streets"):
        ToyWorld("moon", "train")
    with pytest.raises(ValueError, match="val"):
        ToyWorld("rooms", "dev")
    with pytest.raises(ValueError, match="albedo"):
        ToyWorld("rooms", "train").load(0, ["semantic"])
