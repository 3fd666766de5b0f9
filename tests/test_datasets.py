"""How training and evaluation take the public datasets, as the paper states it or their pages do: sizes, crops, colour
jitter, the mixture, and which frames and pixels count. Expected numbers are written out, or found by a naive loop."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import raw
from made import mixture

import data
from data import picture, prepare
from evaluate import PAPER_TASKS
from readers import found
from readers.cityscapes import Cityscapes
from readers.diode import Diode
from readers.flyingthings3d import FlyingThings3D
from readers.hypersim import Hypersim
from readers.kitti import Kitti2015, KittiEigen
from readers.mid import Mid
from readers.reader import Reader
from readers.virtual_kitti_2 import VirtualKitti2
from tasks import TASKS

SCENES = ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20")
VARIATIONS = ("clone", "fog", "morning", "overcast", "rain", "sunset", "15-deg-left", "15-deg-right", "30-deg-left",
              "30-deg-right")
VIRTUAL = [f"virtual_kitti_2/{scene}/{variation}/frames/rgb/Camera_{camera}/rgb_0000{t}.jpg"
           for scene in SCENES for variation in VARIATIONS for camera in (0, 1) for t in (0, 1)]
EMPTY = ("flyingthings3d/train/flow/left/into_future/0000003.flo",
         "cityscapes/leftImg8bit/val/lindau/lindau_000010_000019_leftImg8bit.png",
         "kitti_eigen/2011_09_26/2011_09_26_drive_0010_sync/image_02/data/0000000010.png",
         "kitti_eigen/val/2011_09_26_drive_0010_sync/proj_depth/groundtruth/image_02/0000000010.png",
         "kitti_2015/training/flow_occ/000010_10.png", "diode/val/outdoor/scene/scan/one.png",
         "mid/everett/dir_3_mip2.exr", *VIRTUAL)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All datasets, with empty files in the place of those that are listed. Do not write there."""
    top = tmp_path_factory.mktemp("datasets")
    raw.hypersim(top)
    for name in EMPTY:
        Path(top, name).parent.mkdir(parents=True, exist_ok=True)
        Path(top, name).touch()
    return top


def numbered(h, w):
    """(H,W,3) uint8, every pixel another colour."""
    y, x = np.mgrid[:h, :w]
    return np.stack([y % 251, x % 241, y // 251 + 8 * (x // 241)], -1).astype(np.uint8)


def nearest(x, size):
    """(H,W,...) -> (*size,...): row i of n is floor((i + 0.5) H / n), columns likewise."""
    rows, columns = ([(2 * i + 1) * whole // (2 * n) for i in range(n)]
                     for whole, n in zip(x.shape[:2], size, strict=True))
    return x[rows][:, columns]


# ---- sizes and crops ----

ALL, ODD = slice(None), slice(1, None, 2)


@pytest.mark.parametrize("reader, split, native, window, size", [
    (Hypersim, "train", (768, 1024), (ALL, ALL), (288, 384)),
    (VirtualKitti2, "train", (375, 1242), (ALL, ALL), (187, 621)),
    (FlyingThings3D, "train", (540, 960), (slice(2, 538), ALL), (268, 480)),
    (Cityscapes, "val", (1024, 2048), (ODD, ODD), (256, 512)),       # halved first: rows 3, 7, 11, ... remain
    (KittiEigen, "test", (375, 1242), (slice(23, 375), slice(13, 1229)), (176, 608)),
    (Kitti2015, "training", (370, 1226), (slice(18, 370), slice(5, 1221)), (176, 608)),
    (Diode, "val", (768, 1024), (ALL, ALL), (384, 512)),
    (Mid, "test", (1000, 1500), (ALL, ALL), (256, 384)),
], ids=lambda x: getattr(x, "__name__", None))
def test_size_after_preparation(root, monkeypatch, reader, split, native, window, size):
    """The size that training and evaluation see, of the native one, cut to the dataset's fixed crop; pixels are picked
    by nearest-exact."""
    monkeypatch.setattr(reader.Frame, "image", lambda frame, t: numbered(*native))
    frame = prepare(reader(root, split), 0, (), {}, with_next=False)["frames"][0]
    assert frame.shape == (3, *size) and (picture(frame) == nearest(numbered(*native)[window], size)).all()


@pytest.fixture
def drawn(monkeypatch):
    """drawn(h, w): from then on every dataset's frames are `numbered`, and its labels zero."""
    def call(h, w):
        def load(reader, i, tasks, with_next=False):
            labels = {t: np.zeros((h, w, TASKS[t].channels), np.float32) for t in tasks}
            return {"image": numbered(h, w), "next": numbered(h, w), "labels": labels,
                    "valid": {t: np.ones((h, w), bool) for t in tasks}}
        monkeypatch.setattr(Reader, "load", load)
    return call


def test_optical_flow_of_virtual_kitti_is_trained_on_crops(root, drawn):
    """256x1024 of 375x1242, here the one in the middle, at 187x621; nothing else is cropped."""
    drawn(375, 1242)
    reader, whole = VirtualKitti2(root, "train"), numbered(375, 1242)
    seen = {t: picture(prepare(reader, 0, (t,), TASKS)["frames"][1]) for t in ("optical_flow", "scene_flow", "depth")}
    assert (seen["optical_flow"] == nearest(whole[59:315, 109:1133], (187, 621))).all()
    assert all((seen[t] == nearest(whole, (187, 621))).all() for t in ("scene_flow", "depth"))


# ---- jitter and mixture ----

def test_colour_jitter(root, drawn, monkeypatch):
    """Brightness, contrast, saturation and hue, of both frames alike: for both flows of FlyingThings3D, for optical
    flow of Virtual KITTI 2, and nowhere else."""
    drawn(8, 16)
    seen, now = {}, []
    monkeypatch.setattr(data, "jitter", lambda images, strength, rng: now.append((len(images), strength)) or images)
    for reader in found(root, "train"):
        for t in reader.tasks:
            now.clear()
            prepare(reader, 0, (t,), TASKS, rng=np.random.default_rng(0))
            seen |= {(reader.name, t): tuple(now)} if now else {}
    assert seen == {("flyingthings3d", "optical_flow"): ((2, (0.3, 0.3, 0.3, 0.159)),),
                    ("flyingthings3d", "scene_flow"): ((2, (0.3, 0.3, 0.3, 0.159)),),
                    ("virtual_kitti_2", "optical_flow"): ((2, (0.4, 0.4, 0.2, 0.127)),)}


def test_how_often_a_dataset_is_drawn(root):
    """Normals and depth 0.9 from Hypersim and 0.1 from Virtual KITTI 2, both flows half and half, by the names of the
    datasets; the other tasks have one dataset."""
    mixed, counts = mixture(found(root, "train"), PAPER_TASKS, batch=300), {t: Counter() for t in PAPER_TASKS}
    for step in range(8 * len(PAPER_TASKS)):
        for (t,), reader, *_ in mixed.draw(step):
            counts[t][reader.name] += 1 / (300 * 8)
    indoors, flows = {"hypersim": 0.9, "virtual_kitti_2": 0.1}, {"virtual_kitti_2": 0.5, "flyingthings3d": 0.5}
    shares = {"semantic": {"virtual_kitti_2": 1}, "normal": indoors, "depth": indoors, "optical_flow": flows,
              "scene_flow": flows, "shading": {"hypersim": 1}, "albedo": {"hypersim": 1}}
    assert counts == {t: pytest.approx(share, abs=0.03) for t, share in shares.items()}


# ---- which frames count ----

def test_the_training_list_of_virtual_kitti(root):
    """Six of the ten variations and both cameras: of Scene02, 06, 18 and 20 in training, of Scene01, which is held
    out, in validation."""
    six = {"clone", "morning", "overcast", "sunset", "15-deg-left", "15-deg-right"}
    for split, scenes in (("train", SCENES[1:]), ("test", SCENES[:1])):
        wanted = {(s, v, f"Camera_{c}", f"0000{t}") for s in scenes for v in six for c in (0, 1) for t in (0, 1)}
        samples = VirtualKitti2(root, split).samples
        assert set(samples) == wanted and len(samples) == len(wanted)


def test_six_frames_of_hypersim_are_left_out(tmp_path):
    """Those six, and no other of the same cameras."""
    six = [("ai_004_009", "cam_01", 0), ("ai_008_001", "cam_01", 0), ("ai_008_001", "cam_02", 0),
           ("ai_011_005", "cam_01", 0), ("ai_016_009", "cam_00", 0), ("ai_052_002", "cam_01", 21)]
    after = [(scene, camera, t + 1) for scene, camera, t in six]
    raw.hypersim(tmp_path, [(*key, "train") for key in six + after])
    samples = Hypersim(tmp_path, "train").samples
    assert {(scene, camera, int(t)) for scene, camera, t in samples} == set(after) and len(samples) == 6


# ---- which pixels count ----

def test_depth_of_hypersim_counts_below_65_m(tmp_path):
    """Float16 along the ray: walls at 64.8 and 65.2 m are told apart."""
    folder, h, w, f = raw.hypersim(tmp_path), 12, 16, 886.81 * 16 / 1024
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    z = np.full((h, w), 5.0)
    z[7], z[8] = 64.8, 65.2
    distance = (z * np.sqrt(x * x + y * y + f * f) / f).astype(np.float16)
    raw.write(folder / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5", distance)
    valid = Hypersim(tmp_path, "train").load(0, ["depth"])["valid"]["depth"]
    assert valid[1:8].all() and not valid[8].any() and valid[9:].all()


def test_limits_of_flyingthings(tmp_path, monkeypatch):
    """Optical flow counts below 500 pixels in either direction, scene flow where the first depth is below 35."""
    monkeypatch.setattr(FlyingThings3D, "crop", None)
    top = tmp_path / "flyingthings3d/train"
    flow = np.array([[(499.5, 0), (500.5, 0), (0, -499.5), (0, -500.5)]] * 2, np.float32)
    disparity = 1050 / np.array([[34.9, 35.1, 5, 20]] * 2)      # depth z = 1050 / d; stored negated
    raw.write(top / "flow/left/into_future/0000003.flo", flow)
    raw.write(top / "disparity/left/0000003.pfm", -disparity)
    raw.write(top / "disparity_change/left/into_future/0000003.pfm", 0 * disparity)
    for t in (3, 4):
        raw.write(top / f"image_clean/left/{t:07}.png", raw.picture(2, 4))
    valid = FlyingThings3D(tmp_path, "train").load(0, ["optical_flow", "scene_flow"])["valid"]
    assert valid["optical_flow"].tolist() == [[True, False, True, False]] * 2
    assert valid["scene_flow"].tolist() == [[True, False, True, True]] * 2


def test_normals_of_diode_count_by_their_length(tmp_path):
    """From 0.5 to 1.5, whatever their direction: what is much shorter or longer than a unit vector is none."""
    stem, lengths = tmp_path / "diode/val/outdoor/scene/scan/one", [0.45, 0.55, 1, 1.45, 1.55]
    raw.write(stem.with_suffix(".png"), raw.picture(1, 5))
    raw.write(Path(f"{stem}_normal.npy"), np.float32([[np.multiply(x, (0, -0.6, 0.8)) for x in lengths]]))
    sample = Diode(tmp_path, "val").load(0, ["normal"])
    assert sample["valid"]["normal"].tolist() == [[False, True, True, True, False]]
    assert np.allclose(sample["labels"]["normal"][0, 1:4], (0, -0.6, 0.8))     # stored with y up
