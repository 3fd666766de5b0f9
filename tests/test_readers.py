"""The public datasets: every test has files in their formats (raw.py) with numbers it knows, and reads them back."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from raw import hypersim, kitti_2015, kitti_eigen, own_folder, picture, rng, two_frames, virtual_kitti, write

import evaluate
from readers import formats, found
from readers.cityscapes import Cityscapes
from readers.diode import Diode
from readers.flyingthings3d import FlyingThings3D
from readers.hypersim import Hypersim
from readers.kitti import Kitti2015, KittiEigen
from readers.mid import Mid
from readers.virtual_kitti_2 import VirtualKitti2

H, W = 12, 16   # of Hypersim's made frames
FINAL, GEOMETRY = (f"ai_001_001/images/scene_cam_00_{kind}_hdf5" for kind in ("final", "geometry"))


# ---- Hypersim ----

def test_hypersim_depth_is_plane_depth(tmp_path):
    """Distance to the optical centre becomes z: the frontal wall is flat; entity -1 is invalid."""
    hypersim(tmp_path)
    s = Hypersim(tmp_path, "train").load(0, ["depth"])
    assert s["labels"]["depth"].shape == (H, W, 1) and s["labels"]["depth"].dtype == np.float32
    assert np.allclose(s["labels"]["depth"], 5, rtol=2e-3)
    assert not s["valid"]["depth"][0].any() and s["valid"]["depth"][1:].all()
    assert s["name"] == "hypersim/train/ai_001_001/cam_00/0000"


def test_hypersim_normals_point_away_whatever_side_is_stored(tmp_path):
    """Both sides of the stored wall become (0,0,1), y and z change sign from the y-up axes, bad pixels are invalid."""
    folder = hypersim(tmp_path)
    reader = Hypersim(tmp_path, "train")
    s = reader.load(0, ["normal"])
    n, valid = s["labels"]["normal"], s["valid"]["normal"]
    assert np.allclose(n[valid], (0, 0, 1)) and np.isfinite(n).all()
    assert not valid[0].any() and not valid[4, 4] and not valid[6, 6] and valid.sum() == (H - 1) * W - 2
    floor = np.tile(np.float16([0.6, 0.8, 0]), (H, W, 1))  # y up: a slope facing the camera above it
    write(folder / GEOMETRY / "frame.0000.normal_cam.hdf5", floor)
    write(folder / GEOMETRY / "frame.0000.normal_world.hdf5", floor)
    write(folder / GEOMETRY / "frame.0000.position.hdf5", np.tile(np.float16([0, -1, -5]), (H, W, 1)))
    assert np.allclose(reader.load(0, ["normal"])["labels"]["normal"][1:], (-0.6, 0.8, 0), atol=1e-3)


def test_hypersim_light(tmp_path):
    """The exposure counts pixels with geometry only, albedo shares it, shading is colour over reflectance; dark and
    unknown pixels are invalid, infinite light is over-exposed."""
    folder = hypersim(tmp_path, scale=0.5)
    color = formats.read_hdf5(folder / FINAL / "frame.0000.color.hdf5")
    color[:4] = 1000  # where nothing was hit: must not count for the exposure
    entity = np.repeat(np.int16([-1, 2, 3]), 4)[:, None].repeat(W, 1)
    write(folder / GEOMETRY / "frame.0000.render_entity_id.hdf5", entity)
    color[7, 7], color[8, 8] = np.inf, np.nan
    write(folder / FINAL / "frame.0000.color.hdf5", color)
    reflectance = formats.read_hdf5(folder / FINAL / "frame.0000.diffuse_reflectance.hdf5")
    reflectance[9, 9, 0], reflectance[9, 8, 1] = np.inf, np.nan
    write(folder / FINAL / "frame.0000.diffuse_reflectance.hdf5", reflectance)
    s = Hypersim(tmp_path, "train").load(0, ["albedo", "shading"])
    linear = np.nan_to_num(color.astype(np.float32), posinf=65504)
    exposure = 0.8 ** 2.2 / np.percentile((linear[4:] * [0.3, 0.59, 0.11]).sum(-1), 90)
    image = (np.clip(exposure * linear, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)
    assert (s["image"] == image).mean() > 0.99  # float32 rounding
    albedo = np.clip(exposure * np.array([0.2, 0.4, 0.1]), 0, 1)
    assert np.allclose(s["labels"]["albedo"][5, 5], albedo, rtol=1e-3)
    assert s["labels"]["shading"][5, 5] == pytest.approx(0.5, rel=1e-3) and s["labels"]["shading"].max() <= 1
    valid = np.ones((H, W), bool)
    valid[3, 3] = valid[9, 8] = valid[9, 9] = False
    assert (s["valid"]["albedo"] == valid).all()
    valid[8, 8] = False
    assert (s["valid"]["shading"] == valid).all()


def test_hypersim_training_list(tmp_path, capsys):
    """Public train frames of downloaded scenes, less the six; frames with NaN depth only serve normals; the scan is
    remembered."""
    frames = [("ai_001_001", "cam_00", 0, "train"), ("ai_001_001", "cam_00", 1, "train"),
              ("ai_001_001", "cam_01", 0, "train"), ("ai_004_009", "cam_01", 0, "train"),
              ("ai_002_001", "cam_00", 0, "val")]
    folder = hypersim(tmp_path, frames, depth_nan=[("ai_001_001", "cam_00", 1), ("ai_002_001", "cam_00", 0)])
    reader = Hypersim(tmp_path, "train")
    assert [key[1:] for key in reader.samples] == [("cam_00", "0000"), ("cam_00", "0001"), ("cam_01", "0000")]
    assert list(reader.indices("normal")) == [0, 1, 2]
    assert not (folder / "nan_frames.json").exists()  # neither listing nor normals look at depth
    assert list(reader.indices("depth")) == [0, 2] == list(reader.indices("albedo"))
    assert "2 of 3" in capsys.readouterr().err
    assert list(reader.indices("semantic")) == []
    (folder / GEOMETRY / "frame.0001.depth_meters.hdf5").unlink()
    assert list(Hypersim(tmp_path, "train").indices("shading")) == [0, 2]  # from nan_frames.json
    assert list(Hypersim(tmp_path, "val").indices("depth")) == [0]
    for damaged in ("{", "[1, 2]"):
        (folder / "nan_frames.json").write_text(damaged)
        with pytest.raises(ValueError, match="nan_frames.json.*delete it, it is made again"):
            Hypersim(tmp_path, "train").indices("depth")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_hypersim_scan_leaves_damaged_files_to_who_loads_them(tmp_path, capsys, damage):
    """The scan for NaN stopped at a depth file that cannot be read, out of reach of --skip-bad, even where only another
    task or dataset was wanted. Now the frame stays in the list, and loading its depth is the error that names it."""
    frames = [("ai_001_001", "cam_00", t, "train") for t in range(3)]
    folder = hypersim(tmp_path, frames, depth_nan=[frames[2][:3]])
    path = folder / GEOMETRY / "frame.0001.depth_meters.hdf5"
    whole = path.read_bytes()
    path.write_bytes(whole[:300]) if damage == "truncated" else path.unlink()
    reader = Hypersim(tmp_path, "train")
    assert list(reader.indices("depth")) == [0, 1] == list(reader.indices("shading"))
    told = capsys.readouterr().err
    assert "the depth of 1 of them cannot be read" in told and str(path) in told
    with pytest.raises((OSError, ValueError), match="frame.0001.depth_meters.hdf5"):
        reader.load(1, ["depth"])
    assert reader.load(1, ["shading"])["valid"]["shading"].any()
    assert list(json.loads((folder / "nan_frames.json").read_text()).values()) == [False, True]
    path.write_bytes(whole)     # downloaded again: it was not remembered as anything
    assert list(Hypersim(tmp_path, "train").indices("depth")) == [0, 1]
    assert "cannot be read" not in capsys.readouterr().err


def test_hypersim_is_scanned_only_where_its_labels_are_needed(tmp_path):
    """Evaluating another dataset under the same root read all of Hypersim's depth, even where no trivial row needed it:
    that of a dataset with training labels of its own does not, and classes have none here."""
    folder = hypersim(tmp_path, [("ai_001_001", "cam_00", 0, "train"), ("ai_001_001", "cam_00", 0, "val")])
    own_folder(tmp_path / "folder", 3)
    train = found(tmp_path, "train")
    own, val = found(tmp_path, "val")[::-1]
    labels = evaluate.TrainingLabels(train, 4, 0)
    assert set(labels.guesses(own, ["depth", "shading"])[0]) == {"depth", "shading"}
    assert evaluate.TrainingLabels(train[:1], 4, 0).guesses(val, ["semantic"])[0] == {}
    assert not (folder / "nan_frames.json").exists()
    assert set(labels.guesses(val, ["depth"])[0]) == {"depth"}
    assert (folder / "nan_frames.json").exists()


def test_hypersim_scan_on_a_read_only_disk(tmp_path, capsys):
    """If the answer cannot be written beside the data, the scan still counts for this run and says so."""
    (hypersim(tmp_path) / "nan_frames.json.tmp").mkdir()
    assert list(Hypersim(tmp_path, "train").indices("depth")) == [0]
    assert "cannot be written" in capsys.readouterr().err


# ---- Virtual KITTI 2 ----

def test_virtual_kitti_values(tmp_path):
    """Centimetres, 80 m limit and sky; flow scaled by (W-1), (H-1) from R, G; scene flow in [-10,10] m; zero where
    there is no flow."""
    virtual_kitti(tmp_path)
    s = VirtualKitti2(tmp_path, "train").load(0, ["depth", "normal", "optical_flow", "scene_flow"])
    labels, valid = s["labels"], s["valid"]
    assert labels["depth"][5, 5, 0] == np.float32(12.34)
    assert not valid["depth"][:2].any() and valid["depth"][2:].all() and (valid["normal"] == valid["depth"]).all()
    assert np.allclose(labels["normal"][-1], (0, 0, 1), atol=1e-3)
    assert np.allclose(labels["optical_flow"][1:], (0.5 * 10, -5), atol=1e-3) and not labels["optical_flow"][0].any()
    assert not valid["optical_flow"][0].any() and valid["optical_flow"][1:].all()
    assert np.allclose(labels["scene_flow"][1:], (10, 0, -10), atol=1e-3)
    assert (valid["scene_flow"] == valid["optical_flow"]).all()
    assert s["name"] == "virtual_kitti_2/train/Scene02/clone/Camera_0/00000"
    for frame, blue in (("image", 0), ("next", 10)):
        assert abs(s[frame][0, 0].astype(int) - (200, 100, blue)).max() < 6


def test_virtual_kitti_classes(tmp_path):
    """Each of the 15 colours of colors.txt becomes its class or 255: road, building, pole, light, sign, tree and
    vegetation, sky, truck, car and van. A colour of no class is reported with the file."""
    made = virtual_kitti(tmp_path)
    reader = VirtualKitti2(tmp_path, "train")
    i = reader.samples.index(("Scene02", "clone", "Camera_1", "00001"))
    s = reader.load(i, ["semantic"])
    ids = np.array(list(VirtualKitti2.colours.values()))[made["clone", 1, 1]]
    assert (s["labels"]["semantic"][..., 0] == ids).all() and s["labels"]["semantic"].dtype == np.uint8
    assert (s["valid"]["semantic"] == (ids != 255)).all() and (ids == 255).any() and "next" not in s
    page = {"terrain": (210, 0, 200), "guard rail": (250, 100, 255), "misc": (80, 80, 80), "undefined": (0, 0, 0)}
    assert {VirtualKitti2.colours[colour] for colour in page.values()} == {255}
    assert {colour: i for colour, i in VirtualKitti2.colours.items() if i != 255} == {
        (100, 60, 100): 0, (140, 140, 140): 1, (255, 130, 0): 2, (200, 200, 0): 3, (255, 255, 0): 4, (0, 199, 0): 5,
        (90, 240, 0): 5, (90, 200, 255): 6, (160, 60, 60): 7, (255, 127, 80): 7, (0, 139, 139): 7}
    path = "virtual_kitti_2/Scene02/clone/frames/classSegmentation/Camera_1/classgt_00001.png"
    write(tmp_path / path, np.full((16, 11, 3), 7, np.uint8))
    with pytest.raises(ValueError, match=r"classgt_00001.png .*\[7, 7, 7\]"):
        reader.load(i, ["semantic"])


def test_virtual_kitti_pairs_end_one_frame_early(tmp_path):
    """The last frame of each camera has no flow and no next frame; only the six variations and the split's scenes are
    listed."""
    virtual_kitti(tmp_path, scenes=("Scene02", "Scene01"), frames=3)
    reader = VirtualKitti2(tmp_path, "train")
    assert len(reader) == 6 and {k[:2] for k in reader.samples} == {("Scene02", "clone")}
    paired = [(f"Camera_{c}", f"0000{t}") for c in (0, 1) for t in (0, 1)]
    assert [reader.samples[i][2:] for i in reader.indices("optical_flow")] == paired
    assert list(reader.indices("depth")) == list(range(6)) and list(reader.indices("albedo")) == []
    assert "next" not in reader.load(2, ["depth"], with_next=True)
    assert "next" in reader.load(1, ["depth"], with_next=True) and "next" not in reader.load(1, ["depth"])
    assert {k[0] for k in VirtualKitti2(tmp_path, "test").samples} == {"Scene01"}


def test_archives_may_bring_a_folder_of_their_own(tmp_path):
    """Each modality is found in a folder of its own too, as some unpack one folder per archive. The folder that macOS
    adds to archives, which sorts first and holds files of the same names, is none."""
    virtual_kitti(tmp_path, top="vkitti_2.0.3_{}")
    virtual_kitti(tmp_path, top="__MACOSX")
    reader = VirtualKitti2(tmp_path, "train")
    s = reader.load(0, ["semantic", "depth", "scene_flow"])
    assert s["valid"]["depth"].any() and s["valid"]["scene_flow"].any()
    assert reader.top("image").name == "vkitti_2.0.3_rgb"


# ---- FlyingThings3D ----

def test_flyingthings(tmp_path):
    """Negated disparities, bottom-up PFM and flow give back the 3-D motion of a synthetic surface; centre crop; pairs
    by flow file."""
    top = tmp_path / "flyingthings3d/FlyingThings3D_subset/train"
    flow, z0, z1, motion = two_frames(540, 960, 1050.0, 479.5, 269.5)
    z0[100, 100], flow[200, 200, 1] = 50, -600
    d0, d1 = 1050 / z0, 1050 / z1
    d0[300, 300] = 0
    write(top / "flow/left/into_future/0000003.flo", flow)
    write(top / "disparity/left/0000003.pfm", -d0)
    write(top / "disparity_change/left/into_future/0000003.pfm", -(d1 - d0))
    for t in (3, 4, 9):
        write(top / f"image_clean/left/{t:07d}.png", picture(540, 960, t))
    reader = FlyingThings3D(tmp_path, "train")
    assert len(reader) == 1 and list(reader.indices("scene_flow")) == [0] and reader.vflip
    s = reader.load(0, ["optical_flow", "scene_flow"])
    labels, valid = s["labels"], s["valid"]
    assert (s["image"] == picture(540, 960, 3)[2:-2]).all() and (s["next"] == picture(540, 960, 4)[2:-2]).all()
    assert np.allclose(labels["optical_flow"], flow[2:-2], atol=1e-4)
    far, fast, none = (98, 100), (198, 200), (298, 300)
    bad = np.zeros((536, 960), bool)
    bad[far] = bad[fast] = bad[none] = True
    assert np.allclose(labels["scene_flow"][~bad], motion[2:-2][~bad], atol=2e-3)
    assert np.isfinite(labels["scene_flow"]).all() and not labels["scene_flow"][none].any()
    assert not valid["scene_flow"][far] and not valid["scene_flow"][none] and valid["scene_flow"][fast]
    assert valid["scene_flow"].sum() == bad.size - 2
    assert not valid["optical_flow"][fast] and valid["optical_flow"].sum() == bad.size - 1
    write(top / "image_clean/left/0000003.png", picture(300, 960))
    with pytest.raises(ValueError, match="300x960, smaller than the crop of 536x960"):
        reader.load(0, ["optical_flow"])


# ---- Cityscapes ----

def test_cityscapes_classes_and_rows(tmp_path):
    """Full label ids map to the eight classes, all others are ignored, and nearest-exact halving keeps rows and columns
    3, 7, 11."""
    ids = rng.integers(0, 35, (64, 128)).astype(np.uint8)
    ids[0, 0] = 255
    image, stem = picture(64, 128), "lindau/lindau_000010_000019"
    write(tmp_path / f"cityscapes/leftImg8bit/val/{stem}_leftImg8bit.png", image)
    write(tmp_path / f"cityscapes/gtFine/val/{stem}_gtFine_labelIds.png", ids)
    write(tmp_path / "cityscapes/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png", image)
    reader = Cityscapes(tmp_path, "val")
    assert len(reader) == 1
    s = reader.load(0, ["semantic"])
    want = np.full(256, 255)
    classes = ((7,), 0), ((11,), 1), ((17,), 2), ((19,), 3), ((20,), 4), ((21,), 5), ((23,), 6), ((26, 28), 7)
    for names, cls in classes:
        want[list(names)] = cls

    def halve(x):
        x = torch.from_numpy(x).permute(2, 0, 1)[None].float()
        return F.interpolate(x, (16, 32), mode="nearest-exact")[0].permute(1, 2, 0).numpy()

    assert (halve(s["labels"]["semantic"])[..., 0] == want[ids[3::4, 3::4]]).all()
    assert (halve(s["image"]) == image[3::4, 3::4]).all()
    assert (s["valid"]["semantic"] == (s["labels"]["semantic"][..., 0] != 255)).all()


# ---- KITTI ----

@pytest.mark.parametrize("level, top", [("val/", ""), ("", ""), ("train/", "kitti_eigen_split_test/")])
def test_kitti_eigen(tmp_path, capsys, level, top):
    """1/256 m depth, bottom centre crop of images of two sizes, the Eigen window measured on the uncropped image, three
    layouts; hidden copies that macOS makes are no samples."""
    sizes = [(375, 1242), (370, 1226)]
    for _, drive, frame in kitti_eigen(tmp_path, sizes, level, top):
        truth = tmp_path / f"kitti_eigen/{top}{level}{drive}/proj_depth/groundtruth/image_02"
        (truth / f"._{frame}.png").write_bytes(b"Mac OS X")
    reader = KittiEigen(tmp_path, "test")
    assert "stand in for the Eigen split" in capsys.readouterr().err and len(reader) == 2 == len(reader.truth)
    for i, (h, w) in enumerate(sizes):
        s = reader.load(i, ["depth"])
        left = (w - 1216) // 2
        assert (s["image"] == picture(h, w, i)[h - 352:, left:left + 1216]).all()
        assert s["labels"]["depth"][50, 50, 0] == 10 + i / 256
        full = np.zeros((h, w), bool)
        full[int(0.3324324 * h):int(0.91351351 * h), int(0.0359477 * w):int(0.96405229 * w)] = True
        full[200] = full[210] = False
        assert (s["valid"]["depth"] == full[h - 352:, left:left + 1216]).all()


def test_kitti_eigen_list(tmp_path):
    """The list sets the samples and their order, lines with None are skipped, a listed file that is missing is
    reported, not dropped."""
    keys = kitti_eigen(tmp_path, [(375, 1242), (370, 1226)])

    def line(date, drive, frame, depth):
        return f"{date}/{drive}/image_02/data/{frame}.png {depth} 721.5377"

    path = tmp_path / "kitti_eigen/eigen_test_files_with_gt.txt"
    path.write_text("\n".join([line(*keys[1], "x/y.png"), line(*keys[0], "None")]))
    assert KittiEigen(tmp_path, "test").samples == [keys[1]]
    missing = line("2011_09_26", "2011_09_26_drive_0002_sync", "0000000069", "x/z.png")
    path.write_text(line(*keys[1], "x/y.png") + "\n" + missing)
    with pytest.raises(FileNotFoundError, match="1 of the 2 samples .*drive_0002_sync/0000000069"):
        KittiEigen(tmp_path, "test")


@pytest.mark.parametrize("h, w", [(375, 1242), (370, 1224)])
def test_kitti_2015(tmp_path, h, w):
    """Flow /64 and disparities /256 give back a synthetic 3-D motion with the uncropped image's camera; masks; a scene
    id with 10 in it."""
    flow, motion, _ = kitti_2015(tmp_path, h, w)
    s = Kitti2015(tmp_path, "training").load(0, ["optical_flow", "scene_flow"])
    left = (w - 1216) // 2

    def cut(x):
        return x[h - 352:, left:left + 1216]

    assert s["name"] == "kitti_2015/training/000010/10"
    assert (s["image"] == cut(picture(h, w, 1))).all() and (s["next"] == cut(picture(h, w, 2))).all()
    valid = np.ones((h, w), bool)
    valid[[100, 150, 160]] = False
    assert (s["valid"]["optical_flow"] == cut(valid)).all() and (s["valid"]["scene_flow"] == cut(valid)).all()
    valid[[150, 160]] = True
    assert (s["extra"]["optical_flow:flow_occ"] == cut(valid)).all()
    assert np.abs(s["labels"]["optical_flow"] - cut(flow))[cut(valid)].max() <= 0.5 / 64 + 1e-4
    error = np.linalg.norm(s["labels"]["scene_flow"] - cut(motion), axis=-1)[s["valid"]["scene_flow"]]
    assert np.median(error) < 0.01 and error.max() < 0.01  # disparity has steps of 1/256
    paper = Kitti2015(tmp_path, "training", baseline="paper").load(0, ["scene_flow"])
    assert "extra" not in paper
    assert np.allclose(paper["labels"]["scene_flow"], s["labels"]["scene_flow"] * 0.54 / 0.5327, atol=1e-4)
    with pytest.raises(ValueError, match="baseline"):
        Kitti2015(tmp_path, "training", baseline="0.54")


def test_kitti_2015_broken_calibration(tmp_path):
    """A calibration without the right camera names its file."""
    kitti_2015(tmp_path)
    path = tmp_path / "kitti_2015/training/calib_cam_to_cam/000010.txt"
    path.write_text(path.read_text().split("P_rect_03")[0])
    with pytest.raises(ValueError, match="calib_cam_to_cam/000010.txt"):
        Kitti2015(tmp_path, "training").load(0, ["scene_flow"])


# ---- DIODE, MID ----

def test_diode(tmp_path):
    """Depth validity is the mask, less what is no number; normals turn from y up, z to the viewer into outward OpenCV;
    (0,0,0) is invalid."""
    stem = "diode/val/outdoor/scene_00022/scan_00193/00022_00193_outdoor_010_040"
    z, mask = rng.uniform(1, 500, (6, 8, 1)).astype(np.float32), np.ones((6, 8))
    mask[0, 0], mask[0, 1], z[1, 1], z[1, 2] = 0, np.nan, np.nan, np.inf
    n = np.tile([0.36, 0.48, 0.8], (6, 8, 1))
    n[2, 2], n[3, 3], n[4, 4] = 0, np.nan, np.inf
    for suffix, x in ((".png", picture(6, 8)), ("_depth.npy", z), ("_depth_mask.npy", mask), ("_normal.npy", n)):
        write(tmp_path / (stem + suffix), x)
    s = Diode(tmp_path, "val").load(0, ["depth", "normal"])
    valid = np.ones((6, 8), bool)
    valid[0, :2] = valid[1, 1:3] = False
    assert (s["valid"]["depth"] == valid).all() and np.isfinite(s["labels"]["depth"]).all()
    assert (s["labels"]["depth"][valid] == z[valid]).all()
    assert np.allclose(s["labels"]["normal"][s["valid"]["normal"]], (-0.36, 0.48, 0.8))
    assert s["valid"]["normal"].sum() == 45 and np.isfinite(s["labels"]["normal"]).all()
    assert Diode.depth_range == (0.6, 350) and KittiEigen.depth_range == (1e-5, 80)
    write(tmp_path / (stem + "_normal.npy"), n[..., :2])
    with pytest.raises(ValueError, match="_normal.npy"):
        Diode(tmp_path, "val").load(0, ["normal"])


def test_mid(tmp_path, monkeypatch):
    """Exposure over all pixels; shading is exposed light over albedo, per channel and then grey; albedo that is 0 or no
    number is guarded and invalid."""
    monkeypatch.setattr("readers.mid.read_exr", lambda path: np.load(path.open("rb")))  # arrays named as EXR files
    albedo = np.full((6, 8, 3), (0.5, 0.8, 1.5), np.float32)
    albedo[0, 0, 1], albedo[1, 1], albedo[1, 2], albedo[1, 3] = 0, 0.003, np.nan, np.inf
    hdr = np.random.default_rng(3).gamma(2, 5, (6, 8, 3)).astype(np.float32)
    hdr[1, 4] = np.nan
    files = ("dir_3_mip2.exr", hdr), ("dir_10_mip2.exr", hdr), ("albedo.exr", albedo), ("probes/dir_0_mip2.exr", hdr)
    for name, x in files:
        path = tmp_path / "mid/everett" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.open("wb"), x)
    reader = Mid(tmp_path, "test")
    assert sorted(reader.samples) == [("everett", "10"), ("everett", "3")]
    with np.errstate(all="raise"):
        s = reader.load(1, ["albedo", "shading"])
    hdr = np.nan_to_num(hdr)
    lit = hdr * 0.8 ** 2.2 / np.percentile((hdr * [0.3, 0.59, 0.11]).sum(-1), 90)
    assert (np.abs(s["image"].astype(int) - (np.clip(lit, 0, 1) ** (1 / 2.2) * 255).astype(int)) <= 1).all()
    assert np.allclose(s["labels"]["albedo"][2:], (0.5, 0.8, 1))
    shading = (np.clip(np.clip(lit, 0, 1) / [0.5, 0.8, 1], 0, 1) * [0.3, 0.59, 0.11]).sum(-1)
    assert np.allclose(s["labels"]["shading"][2:, :, 0], shading[2:], atol=1e-5)
    assert np.isfinite(s["labels"]["shading"]).all()
    valid = np.ones((6, 8), bool)
    valid[0, 0] = valid[1, 1:4] = False
    assert (s["valid"]["albedo"] == valid).all()
    valid[1, 4] = False
    assert (s["valid"]["shading"] == valid).all()
