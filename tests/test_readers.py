"""Raw readers: every test writes files in the public format with numbers it knows, and reads them back."""
import re
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from readers import (
    READERS,
    Cityscapes,
    Diode,
    FlyingThings3D,
    Folder,
    Hypersim,
    Kitti2015,
    KittiEigen,
    Mid,
    VirtualKitti2,
    check,
    formats,
    found,
    geometry,
)
from tasks import TASKS

cv2 = pytest.importorskip("cv2")
h5py = pytest.importorskip("h5py")
formats.opencv()
rng = np.random.default_rng(0)
needs_exr = pytest.mark.skipif(bool(re.search(r"OpenEXR:\s+NO", cv2.getBuildInformation())), reason="this OpenCV is built without OpenEXR")


# ---- writers ----

def write(path, x):
    """Images and arrays by suffix; three channels are given as RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.asarray(x)
    if path.suffix in (".png", ".jpg", ".exr"):
        assert cv2.imwrite(str(path), x[..., ::-1] if x.ndim == 3 else x)
    elif path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as f:
            f.create_dataset("dataset", data=x, compression="gzip")
    elif path.suffix == ".flo":
        path.write_bytes(struct.pack("<fii", 202021.25, x.shape[1], x.shape[0]) + x.astype("<f4").tobytes())
    elif path.suffix == ".pfm":
        path.write_bytes(b"Pf\n%d %d\n-1.0\n" % (x.shape[1], x.shape[0]) + x[::-1].astype("<f4").tobytes())
    return path


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def angle(a, b):
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def two_frames(h, w, f, cx, cy):
    """A random surface and its rigid motion -> flow (H,W,2), z0, z1, motion (H,W,3), by projecting with the textbook formula."""
    v, u = np.mgrid[:h, :w].astype(float)
    z0 = 14 + 4 * np.sin(u / w * 5) + 3 * np.cos(v / h * 4)
    x0 = np.stack([(u - cx) * z0 / f, (v - cy) * z0 / f, z0], -1)
    turn = cv2.Rodrigues(np.array([0.01, -0.02, 0.015]))[0]
    x1 = x0 @ turn.T + (0.2, -0.1, 0.5)
    flow = np.stack([f * x1[..., 0] / x1[..., 2] + cx - u, f * x1[..., 1] / x1[..., 2] + cy - v], -1)
    return flow, z0, x1[..., 2], x1 - x0


# ---- file formats ----

def test_png_gives_stored_numbers_in_rgb_order(tmp_path):
    """16-bit values survive untouched, channels are RGB, and another dtype or channel count is refused by name."""
    x = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    path = write(tmp_path / "a.png", x)
    assert (formats.read_png(path, "uint16", 3) == x).all()
    assert (formats.read_png(write(tmp_path / "b.png", x[..., 0]), "uint16", 1) == x[..., 0]).all()
    for dtype, channels in (("uint8", 3), ("uint16", 1)):
        with pytest.raises(ValueError, match="a.png has 3 channels of uint16"):
            formats.read_png(path, dtype, channels)


def test_image_is_rgb_whatever_the_file(tmp_path):
    """Colour order is RGB; grey, alpha, 16-bit and palette files become (H,W,3) uint8."""
    from PIL import Image
    x = picture(6, 8)
    assert (formats.read_image(write(tmp_path / "a.png", x)) == x).all()
    assert (formats.read_image(write(tmp_path / "g.png", x[..., 0])) == x[..., :1]).all()
    assert (formats.read_image(write(tmp_path / "s.png", x.astype(np.uint16) * 257)) == x).all()
    Image.fromarray(np.dstack([x, np.full((6, 8), 9, np.uint8)])).save(tmp_path / "alpha.png")
    assert (formats.read_image(tmp_path / "alpha.png") == x).all()
    Image.fromarray(x).quantize(4).save(tmp_path / "p.png")
    assert (formats.read_image(tmp_path / "p.png") == np.array(Image.open(tmp_path / "p.png").convert("RGB"))).all()


@pytest.mark.parametrize("scale, order", [(b"-1.0", "<f4"), (b"1.0", ">f4")])
def test_pfm_rows_are_stored_bottom_up(tmp_path, scale, order):
    """The last row of the file is the top of the picture, in either byte order."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "a.pfm").write_bytes(b"Pf\n4 3\n" + scale + b"\n" + x[::-1].astype(order).tobytes())
    assert (formats.read_pfm(tmp_path / "a.pfm") == x).all()


def test_flo_hdf5_npy_round_trip(tmp_path):
    """Flow rows run top to bottom with u before v; HDF5 and NPY keep their dtype; pickled arrays and wrong shapes are refused."""
    flow = rng.normal(size=(4, 5, 2)).astype(np.float32)
    assert (formats.read_flo(write(tmp_path / "a.flo", flow)) == flow).all()
    x = rng.normal(size=(3, 4)).astype(np.float16)
    assert formats.read_hdf5(write(tmp_path / "a.hdf5", x)).dtype == np.float16
    assert (formats.read_npy(write(tmp_path / "a.npy", x), 1) == x[..., None]).all()
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    for name in ("o.npy", "a.npy"):
        with pytest.raises(ValueError, match=name):
            formats.read_npy(tmp_path / name, 3)


@needs_exr
def test_exr_is_rgb_and_unbounded(tmp_path):
    """EXR channels come back as R, G, B, values above 1 included."""
    x = np.float32([[[1, 2, 3], [40, 0.5, 0]]])
    assert (formats.read_exr(write(tmp_path / "a.exr", x)) == x).all()


def test_exr_without_the_codec_says_what_to_install(tmp_path, monkeypatch):
    """An OpenCV built without OpenEXR (5.0 wheels) is named as the cause, with the remedy, instead of blaming the file."""
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "    OpenEXR:                     NO")
    with pytest.raises(ValueError, match="opencv-python-headless<5"):
        formats.read_exr(tmp_path / "a.exr")


@pytest.mark.parametrize("name, read", [("a.png", formats.read_image), ("a.jpg", formats.read_image), ("a.pfm", formats.read_pfm), ("a.flo", formats.read_flo),
                                        ("a.hdf5", formats.read_hdf5), ("a.npy", lambda p: formats.read_npy(p, 3)),
                                        pytest.param("a.exr", formats.read_exr, marks=needs_exr)])
def test_broken_and_missing_files_name_themselves(tmp_path, name, read):
    """A truncated, an empty and a missing file of every format raise an error that holds the path."""
    x = {"pfm": np.ones((20, 30)), "flo": np.ones((20, 30, 2)), "exr": np.ones((20, 30, 3), np.float32)}.get(name[2:], picture(20, 30))
    path = write(tmp_path / name, x)
    read(path)
    data = path.read_bytes()
    for part in (data[:len(data) * 2 // 3], data[:5], b"", b"nonsense" * 40):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=name):
            read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(path)


# ---- geometry and light ----

def test_scene_flow_inverts_projection():
    """Projecting a moving surface gives flow and depths from which the 3-D motion returns."""
    flow, z0, z1, motion = two_frames(40, 60, 50.0, 31.0, 18.0)
    assert np.allclose(geometry.scene_flow(flow, z0, z1, 50.0, 31.0, 18.0), motion, atol=1e-5)


@pytest.mark.parametrize("shape", ["wall", "ground", "slanted", "sphere"])
def test_normals_from_depth_in_centimetre_steps(shape):
    """On planes and a sphere, depth rounded to 1 cm, the median error is below 4 degrees and the normals point away from the camera."""
    f, cx, cy, h, w = 725.0087, 620.5, 187.0, 200, 300
    v, u = np.mgrid[100:100 + h, 500:500 + w].astype(float)
    ray = np.stack([(u - cx) / f, (v - cy) / f, np.ones((h, w))], -1)
    if shape == "sphere":
        centre, radius = np.array([0, 0, 9.0]), 1.0
        a, b = (ray ** 2).sum(-1), ray @ centre
        inside = b * b - a * (81 - radius ** 2)
        hit = inside > 0.1 * b * b * (radius / 9) ** 2  # away from the rim
        z = np.where(hit, (b - np.sqrt(np.maximum(inside, 0))) / a, 9)
        n = (centre - z[..., None] * ray) / radius
    else:
        n, distance = {"wall": ((0, 0, 1), 10), "ground": ((0, 1, 0), 1.6), "slanted": ((0.6, 0.1, 0.8), 12)}[shape]
        n = np.array(n) / np.linalg.norm(n)
        z = distance / np.maximum(ray @ n, 1e-6)
        hit, n = (z < 80), np.broadcast_to(n, ray.shape)
    out = geometry.normals_from_depth((np.round(z * 100) / 100).astype(np.float32), f, cx - 500, cy - 100)
    assert hit.sum() > 5000 and np.median(angle(out, n)[hit]) < 4
    assert ((out * ray).sum(-1) > 0).all() and np.allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-4)


def test_normals_do_not_smear_across_depth_edges():
    """A pole two metres before a wall keeps the wall's pixels beside it right: the window moves away from the edge."""
    z = np.full((60, 80), 10, np.float32)
    z[:, 30:50] = 8
    n = geometry.normals_from_depth(z, 100.0, 40, 30)
    assert (angle(n, np.array([0, 0, 1.0])) < 1).mean() > 0.99


def test_exposure_and_tone_map():
    """The 90th percentile of brightness lands at 0.8 of the picture; nothing counted gives scale 1, darkness 0; 8 bits are truncated."""
    x = np.random.default_rng(1).gamma(2, 3, (50, 60, 3)).astype(np.float32)
    where = np.zeros((50, 60), bool)
    where[10:40] = True
    s = geometry.exposure(x, where)
    p = np.percentile((x * [0.3, 0.59, 0.11]).sum(-1)[where], 90)
    assert s == pytest.approx(0.8 ** 2.2 / p, rel=1e-5)
    assert geometry.tonemap(np.full((1, 1, 3), s * p, np.float32))[0, 0, 0] in (203, 204)
    assert geometry.exposure(x, where & False) == 1 and geometry.exposure(x * 1e-6, where) == 0
    assert (geometry.tonemap(np.float32([[[-1, 0.5, 7]]])) == [[[0, int(0.5 ** (1 / 2.2) * 255), 255]]]).all()


# ---- Hypersim ----

H, W = 12, 16


def hypersim(root, frames=(("ai_001_001", "cam_00", 0, "train"),), depth_nan=(), scale=2.0):
    """A wall seen frontally at 5 m; entity -1 in the first row; normals of the left half face away from the camera."""
    folder = root / "hypersim"
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    f = 886.81 * W / 1024
    y, x = np.mgrid[:H, :W] - np.array([(H - 1) / 2, (W - 1) / 2])[:, None, None]
    for scene, camera, frame, split in frames:
        rows.append(f"{scene},{camera},{frame},True,,{split}")
        entity = np.ones((H, W), np.int16)
        entity[0] = -1
        distance = (5 * np.sqrt(x * x + y * y + f * f) / f).astype(np.float16)
        if (scene, camera, frame) in depth_nan:
            distance[5, 5] = np.nan
        reflectance = np.full((H, W, 3), (0.2, 0.4, 0.1), np.float16)
        reflectance[3, 3] = 0.001
        normal = np.tile(np.float16([0, 0, 1]), (H, W, 1))  # to the viewer
        normal[:, :W // 2] *= -1                             # stored facing away
        normal[4, 4] = 0
        point = np.tile(np.float16([0, 0, -5 * 10]), (H, W, 1))  # asset units; the camera looks along -z of the world
        point[6, 6] = np.nan
        final, geometry = (folder / scene / "images" / f"scene_{camera}_{k}_hdf5" for k in ("final", "geometry"))
        for what, value in {"color": reflectance * np.float16(scale), "diffuse_reflectance": reflectance}.items():
            write(final / f"frame.{frame:04d}.{what}.hdf5", value)
        for what, value in {"render_entity_id": entity, "depth_meters": distance, "normal_cam": normal, "normal_world": normal,
                            "position": point}.items():
            write(geometry / f"frame.{frame:04d}.{what}.hdf5", value)
        write(folder / scene / "_detail" / camera / "camera_keyframe_positions.hdf5", np.zeros((frame + 1, 3)))
    rows += ["ai_001_001,cam_00,7,False,bad,train", "ai_999_001,cam_00,0,True,,train"]  # not public; not downloaded
    (folder / "metadata_images_split_scene_v1.csv").write_text("\n".join(rows))
    return folder


def test_hypersim_depth_is_plane_depth(tmp_path):
    """Distance to the optical centre becomes z: the frontal wall is flat; entity -1 is invalid."""
    hypersim(tmp_path)
    s = Hypersim(tmp_path, "train").load(0, ["depth"])
    assert s["labels"]["depth"].shape == (H, W, 1) and s["labels"]["depth"].dtype == np.float32
    assert np.allclose(s["labels"]["depth"], 5, rtol=2e-3)
    assert not s["valid"]["depth"][0].any() and s["valid"]["depth"][1:].all()
    assert s["name"] == "hypersim/train/ai_001_001/cam_00/0000"


def test_hypersim_normals_point_away_whatever_side_is_stored(tmp_path):
    """Both sides of the stored wall become (0,0,1), y and z change sign from the y-up axes, bad pixels are invalid and finite."""
    folder = hypersim(tmp_path)
    reader = Hypersim(tmp_path, "train")
    s = reader.load(0, ["normal"])
    n, valid = s["labels"]["normal"], s["valid"]["normal"]
    assert np.allclose(n[valid], (0, 0, 1)) and np.isfinite(n).all()
    assert not valid[0].any() and not valid[4, 4] and not valid[6, 6] and valid.sum() == (H - 1) * W - 2
    geometry = folder / "ai_001_001/images/scene_cam_00_geometry_hdf5"
    floor = np.tile(np.float16([0.6, 0.8, 0]), (H, W, 1))  # y up: a slope facing the camera above it
    write(geometry / "frame.0000.normal_cam.hdf5", floor)
    write(geometry / "frame.0000.normal_world.hdf5", floor)
    write(geometry / "frame.0000.position.hdf5", np.tile(np.float16([0, -1, -5]), (H, W, 1)))
    assert np.allclose(reader.load(0, ["normal"])["labels"]["normal"][1:], (-0.6, 0.8, 0), atol=1e-3)


def test_hypersim_light(tmp_path):
    """The exposure counts pixels with geometry only, albedo shares it, shading is colour over reflectance, dark pixels are invalid."""
    folder = hypersim(tmp_path, scale=0.5)
    final = folder / "ai_001_001/images/scene_cam_00_final_hdf5"
    color = formats.read_hdf5(final / "frame.0000.color.hdf5")
    color[:4] = 1000  # where nothing was hit: must not count for the exposure
    entity = np.repeat(np.int16([-1, 2, 3]), 4)[:, None].repeat(W, 1)
    write(folder / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.render_entity_id.hdf5", entity)
    color[7, 7] = np.inf
    write(final / "frame.0000.color.hdf5", color)
    s = Hypersim(tmp_path, "train").load(0, ["albedo", "shading"])
    linear = np.nan_to_num(color.astype(np.float32), posinf=65504)
    exposure = 0.8 ** 2.2 / np.percentile((linear[4:] * [0.3, 0.59, 0.11]).sum(-1), 90)
    assert (s["image"] == (np.clip(exposure * linear, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)).mean() > 0.99  # float32 rounding
    assert np.allclose(s["labels"]["albedo"][5, 5], np.clip(exposure * np.array([0.2, 0.4, 0.1]), 0, 1), rtol=1e-3)
    assert s["labels"]["shading"][5, 5] == pytest.approx(0.5, rel=1e-3) and s["labels"]["shading"].max() <= 1
    for task in ("albedo", "shading"):
        assert not s["valid"][task][3, 3] and s["valid"][task][0].all() and s["valid"][task].sum() == H * W - 1


def test_hypersim_training_list(tmp_path, capsys):
    """Public train frames of downloaded scenes, less the six; frames with NaN depth only serve normals; the scan is remembered."""
    frames = [("ai_001_001", "cam_00", 0, "train"), ("ai_001_001", "cam_00", 1, "train"), ("ai_001_001", "cam_01", 0, "train"),
              ("ai_004_009", "cam_01", 0, "train"), ("ai_002_001", "cam_00", 0, "val")]
    folder = hypersim(tmp_path, frames, depth_nan=[("ai_001_001", "cam_00", 1), ("ai_002_001", "cam_00", 0)])
    reader = Hypersim(tmp_path, "train")
    assert [key[1:] for key in reader.samples] == [("cam_00", "0000"), ("cam_00", "0001"), ("cam_01", "0000")]
    assert not (folder / "nan_frames.json").exists()  # listing opens no file
    assert list(reader.indices("normal")) == [0, 1, 2] and list(reader.indices("depth")) == [0, 2] == list(reader.indices("albedo"))
    assert "2 of 3" in capsys.readouterr().out
    assert list(reader.indices("semantic")) == []
    (folder / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0001.depth_meters.hdf5").unlink()
    assert list(Hypersim(tmp_path, "train").indices("shading")) == [0, 2]  # from nan_frames.json
    assert list(Hypersim(tmp_path, "val").indices("depth")) == [0]
    (folder / "nan_frames.json").write_text("{")
    with pytest.raises(ValueError, match="nan_frames.json"):
        Hypersim(tmp_path, "train").indices("depth")


def test_hypersim_scan_on_a_read_only_disk(tmp_path, capsys):
    """If the answer cannot be written beside the data, the scan still counts for this run and says so."""
    (hypersim(tmp_path) / "nan_frames.tmp").mkdir()
    assert list(Hypersim(tmp_path, "train").indices("depth")) == [0]
    assert "cannot be written" in capsys.readouterr().out


# ---- Virtual KITTI 2 ----

def virtual_kitti(root, top="", frames=3, h=16, w=11, scenes=("Scene02",), variations=("clone", "fog")):
    folder = root / "virtual_kitti_2"
    colours = list(VirtualKitti2.colours)
    made = {}
    for scene in scenes:
        for variation in variations:
            for camera in (0, 1):
                for t in range(frames):
                    at = lambda m, stem: folder / top.format(m) / scene / variation / "frames" / m / f"Camera_{camera}" / f"{stem}_{t:05d}"
                    write(at("rgb", "rgb").with_suffix(".jpg"), np.full((h, w, 3), (200, 100, 10 * t), np.uint8))
                    z = np.full((h, w), 1234, np.uint16)
                    z[0], z[1], z[2] = 65535, 8000, 7999
                    write(at("depth", "depth").with_suffix(".png"), z)
                    ids = rng.integers(0, len(colours), (h, w))
                    made[variation, camera, t] = ids
                    write(at("classSegmentation", "classgt").with_suffix(".png"), np.uint8(colours)[ids])
                    if t < frames - 1:
                        flow = np.empty((h, w, 3), np.uint16)
                        flow[:] = 49151, 21845, 1  # 0.5 of W-1 right, a third of H-1 up
                        flow[0] = 7, 9, 0          # sky
                        write(at("forwardFlow", "flow").with_suffix(".png"), flow)
                        write(at("forwardSceneFlow", "sceneFlow").with_suffix(".png"), np.tile(np.uint16([65535, 32768, 0]), (h, w, 1)))
    return made


def test_virtual_kitti_values(tmp_path):
    """Centimetres, 80 m limit and sky; flow scaled by (W-1), (H-1) from R, G; scene flow in [-10,10] m; zero where there is no flow."""
    virtual_kitti(tmp_path)
    reader = VirtualKitti2(tmp_path, "train")
    s = reader.load(0, ["depth", "normal", "optical_flow", "scene_flow"])
    assert s["labels"]["depth"][5, 5, 0] == np.float32(12.34) and not s["valid"]["depth"][:2].any() and s["valid"]["depth"][2:].all()
    assert (s["valid"]["normal"] == s["valid"]["depth"]).all() and np.allclose(s["labels"]["normal"][-1], (0, 0, 1), atol=1e-3)
    flow, valid = s["labels"]["optical_flow"], s["valid"]["optical_flow"]
    assert np.allclose(flow[1:], (0.5 * 10, -5), atol=1e-3) and not valid[0].any() and valid[1:].all() and not flow[0].any()
    assert np.allclose(s["labels"]["scene_flow"][1:], (10, 0, -10), atol=1e-3) and (s["valid"]["scene_flow"] == valid).all()
    assert s["name"] == "virtual_kitti_2/train/Scene02/clone/Camera_0/00000"
    assert abs(s["image"][0, 0].astype(int) - (200, 100, 0)).max() < 6 and abs(s["next"][0, 0].astype(int) - (200, 100, 10)).max() < 6


def test_virtual_kitti_classes(tmp_path):
    """Each of the 15 colours becomes its class or 255, and a colour of no class is reported with the file."""
    made = virtual_kitti(tmp_path)
    reader = VirtualKitti2(tmp_path, "train")
    i = reader.samples.index(("Scene02", "clone", "Camera_1", "00001"))
    s = reader.load(i, ["semantic"])
    ids = np.array(list(VirtualKitti2.colours.values()))[made["clone", 1, 1]]
    assert (s["labels"]["semantic"][..., 0] == ids).all() and s["labels"]["semantic"].dtype == np.uint8 and "next" not in s
    assert (s["valid"]["semantic"] == (ids != 255)).all() and (ids == 255).any()
    known = {(210, 0, 200): 255, (255, 255, 0): 4, (200, 200, 0): 3, (0, 139, 139): 7, (255, 130, 0): 2, (90, 200, 255): 6}
    assert known.items() <= VirtualKitti2.colours.items()
    write(tmp_path / "virtual_kitti_2/Scene02/clone/frames/classSegmentation/Camera_1/classgt_00001.png", np.full((16, 11, 3), 7, np.uint8))
    with pytest.raises(ValueError, match=r"classgt_00001.png .*\[7, 7, 7\]"):
        reader.load(i, ["semantic"])


def test_virtual_kitti_pairs_end_one_frame_early(tmp_path):
    """The last frame of each camera has no flow and no next frame; only the six variations and the split's scenes are listed."""
    virtual_kitti(tmp_path, scenes=("Scene02", "Scene01"), frames=3)
    reader = VirtualKitti2(tmp_path, "train")
    assert len(reader) == 6 and {k[:2] for k in reader.samples} == {("Scene02", "clone")}
    assert [reader.samples[i][2:] for i in reader.indices("optical_flow")] == [(f"Camera_{c}", f"0000{t}") for c in (0, 1) for t in (0, 1)]
    assert list(reader.indices("depth")) == list(range(6)) and list(reader.indices("albedo")) == []
    assert "next" not in reader.load(2, ["depth"], with_next=True) and "next" in reader.load(1, ["depth"], with_next=True)
    assert "next" not in reader.load(1, ["depth"])
    assert {k[0] for k in VirtualKitti2(tmp_path, "test").samples} == {"Scene01"}


def test_archives_may_bring_a_folder_of_their_own(tmp_path):
    """Each modality is found in a folder of its own too, as some unpack one folder per archive."""
    virtual_kitti(tmp_path, top="vkitti_2.0.3_{}")
    s = VirtualKitti2(tmp_path, "train").load(0, ["semantic", "depth", "scene_flow"])
    assert s["valid"]["depth"].any() and s["valid"]["scene_flow"].any()


# ---- FlyingThings3D ----

def test_flyingthings(tmp_path):
    """Negated disparities, bottom-up PFM and flow give back the 3-D motion of a synthetic surface; centre crop; pairs by flow file."""
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
    assert (s["image"] == picture(540, 960, 3)[2:-2]).all() and (s["next"] == picture(540, 960, 4)[2:-2]).all()
    assert np.allclose(s["labels"]["optical_flow"], flow[2:-2], atol=1e-4)
    far, fast, none = (98, 100), (198, 200), (298, 300)
    bad = np.zeros((536, 960), bool)
    bad[far] = bad[fast] = bad[none] = True
    assert np.allclose(s["labels"]["scene_flow"][~bad], motion[2:-2][~bad], atol=2e-3)
    assert np.isfinite(s["labels"]["scene_flow"]).all() and not s["labels"]["scene_flow"][none].any()
    valid = s["valid"]["scene_flow"]
    assert not valid[far] and not valid[none] and valid[fast] and valid.sum() == valid.size - 2
    assert not s["valid"]["optical_flow"][fast] and s["valid"]["optical_flow"].sum() == valid.size - 1
    write(top / "image_clean/left/0000003.png", picture(300, 960))
    with pytest.raises(ValueError, match="300x960, smaller than the crop of 536x960"):
        reader.load(0, ["optical_flow"])


# ---- Cityscapes ----

def test_cityscapes_classes_and_rows(tmp_path):
    """Full label ids map to the eight classes, all others are ignored, and nearest-exact halving keeps rows and columns 3, 7, 11."""
    ids = rng.integers(0, 35, (64, 128)).astype(np.uint8)
    ids[0, 0] = 255
    image = picture(64, 128)
    write(tmp_path / "cityscapes/leftImg8bit/val/lindau/lindau_000010_000019_leftImg8bit.png", image)
    write(tmp_path / "cityscapes/gtFine/val/lindau/lindau_000010_000019_gtFine_labelIds.png", ids)
    write(tmp_path / "cityscapes/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png", image)
    reader = Cityscapes(tmp_path, "val")
    assert len(reader) == 1
    s = reader.load(0, ["semantic"])
    want = np.full(256, 255)
    for names, cls in (((7,), 0), ((11,), 1), ((17,), 2), ((19,), 3), ((20,), 4), ((21,), 5), ((23,), 6), ((26, 28), 7)):
        want[list(names)] = cls
    halve = lambda x: F.interpolate(torch.from_numpy(x).permute(2, 0, 1)[None].float(), (16, 32), mode="nearest-exact")[0].permute(1, 2, 0)
    assert (halve(s["labels"]["semantic"])[..., 0].numpy() == want[ids[3::4, 3::4]]).all()
    assert (halve(s["image"]).numpy() == image[3::4, 3::4]).all()
    assert (s["valid"]["semantic"] == (s["labels"]["semantic"][..., 0] != 255)).all()


# ---- KITTI ----

def eigen(root, sizes, level="val/", top=""):
    keys = []
    for k, (h, w) in enumerate(sizes):
        drive, frame = f"2011_09_2{6 + k}_drive_0010_sync", f"{10 + k:010d}"
        write(root / f"kitti_eigen/{top}2011_09_2{6 + k}/{drive}/image_02/data/{frame}.png", picture(h, w, k))
        z = np.full((h, w), 2560 + k, np.uint16)
        z[200] = 0
        z[210] = 80 * 256
        write(root / f"kitti_eigen/{top}{level}{drive}/proj_depth/groundtruth/image_02/{frame}.png", z)
        keys.append((f"2011_09_2{6 + k}", drive, frame))
    return keys


@pytest.mark.parametrize("level, top", [("val/", ""), ("", ""), ("train/", "kitti_eigen_split_test/")])
def test_kitti_eigen(tmp_path, capsys, level, top):
    """1/256 m depth, bottom centre crop of images of two sizes, the Eigen window measured on the uncropped image, three layouts."""
    sizes = [(375, 1242), (370, 1226)]
    eigen(tmp_path, sizes, level, top)
    reader = KittiEigen(tmp_path, "test")
    assert "stand in for the Eigen split" in capsys.readouterr().out and len(reader) == 2
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
    """The list sets the samples and their order, lines with None are skipped, a listed file that is missing is reported, not dropped."""
    keys = eigen(tmp_path, [(375, 1242), (370, 1226)])
    line = lambda date, drive, frame, depth: f"{date}/{drive}/image_02/data/{frame}.png {depth} 721.5377"
    path = tmp_path / "kitti_eigen/eigen_test_files_with_gt.txt"
    path.write_text("\n".join([line(*keys[1], "x/y.png"), line(*keys[0], "None")]))
    assert KittiEigen(tmp_path, "test").samples == [keys[1]]
    path.write_text(line(*keys[1], "x/y.png") + "\n" + line("2011_09_26", "2011_09_26_drive_0002_sync", "0000000069", "x/z.png"))
    with pytest.raises(FileNotFoundError, match="1 of the 2 samples .*drive_0002_sync/0000000069"):
        KittiEigen(tmp_path, "test")


def kitti_2015(root, h=375, w=1242, scene="000010", f=721.5, cx=609.6, cy=172.9, baseline=0.5327):
    top = root / "kitti_2015/training"
    flow, z0, z1, motion = two_frames(h, w, f, cx, cy)
    code = np.dstack([np.round(flow * 64) + 32768, np.ones((h, w))]).astype(np.uint16)
    code[100, :, 2] = 0
    d0, d1 = (np.round(f * baseline / z * 256).astype(np.uint16) for z in (z0, z1))
    d0[150], d1[160] = 0, 0
    write(top / f"flow_occ/{scene}_10.png", code)
    write(top / f"disp_occ_0/{scene}_10.png", d0)
    write(top / f"disp_occ_1/{scene}_10.png", d1)
    write(top / f"image_2/{scene}_10.png", picture(h, w, 1))
    write(top / f"image_2/{scene}_11.png", picture(h, w, 2))
    rows = {c: f"P_rect_0{c}: {f} 0 {cx} {x} 0 {f} {cy} 0.2 0 0 1 0.003" for c, x in ((2, 44.9), (3, 44.9 - f * baseline))}
    (top / "calib_cam_to_cam").mkdir(parents=True, exist_ok=True)
    (top / f"calib_cam_to_cam/{scene}.txt").write_text("calib_time: 09-Jan-2012 13:57:47\nS_rect_02: 1 2\n" + "\n".join(rows.values()))
    return flow, motion, code


@pytest.mark.parametrize("h, w", [(375, 1242), (370, 1224)])
def test_kitti_2015(tmp_path, h, w):
    """Flow /64 and disparities /256 give back a synthetic 3-D motion with the uncropped image's camera; masks; a scene id with 10 in it."""
    flow, motion, _ = kitti_2015(tmp_path, h, w)
    reader = Kitti2015(tmp_path, "training")
    s = reader.load(0, ["optical_flow", "scene_flow"])
    left = (w - 1216) // 2
    cut = lambda x: x[h - 352:, left:left + 1216]
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
    """Depth validity is the mask alone; normals turn from y up, z to the viewer into outward OpenCV; (0,0,0) is invalid."""
    stem = tmp_path / "diode/val/outdoor/scene_00022/scan_00193/00022_00193_outdoor_010_040"
    path = lambda suffix: stem.with_name(stem.name + suffix)
    write(path(".png"), picture(6, 8))
    z, mask = rng.uniform(1, 500, (6, 8, 1)).astype(np.float32), np.ones((6, 8))
    mask[0, 0], z[1, 1] = 0, np.nan
    n = np.tile([0.36, 0.48, 0.8], (6, 8, 1))
    n[2, 2] = 0
    write(path("_depth.npy"), z), write(path("_depth_mask.npy"), mask), write(path("_normal.npy"), n)
    s = Diode(tmp_path, "val").load(0, ["depth", "normal"])
    assert (s["labels"]["depth"] == np.nan_to_num(z)).all() and s["valid"]["depth"].sum() == 46
    assert not s["valid"]["depth"][0, 0] and not s["valid"]["depth"][1, 1]
    assert np.allclose(s["labels"]["normal"][s["valid"]["normal"]], (-0.36, 0.48, 0.8)) and s["valid"]["normal"].sum() == 47
    assert Diode.depth_range == (0.6, 350) and KittiEigen.depth_range == (1e-5, 80)
    write(path("_normal.npy"), n[..., :2])
    with pytest.raises(ValueError, match="_normal.npy"):
        Diode(tmp_path, "val").load(0, ["normal"])


def test_mid(tmp_path, monkeypatch):
    """Exposure over all pixels; shading is exposed light over albedo, per channel and then grey; albedo of 0 is guarded and invalid."""
    monkeypatch.setattr("readers.mid.read_exr", lambda path: np.load(path.open("rb")))  # arrays under the names of EXR files
    albedo = np.full((6, 8, 3), (0.5, 0.8, 1.5), np.float32)
    albedo[0, 0, 1], albedo[1, 1] = 0, 0.003
    hdr = np.random.default_rng(3).gamma(2, 5, (6, 8, 3)).astype(np.float32)
    for name, x in (("dir_3_mip2.exr", hdr), ("dir_10_mip2.exr", hdr), ("albedo.exr", albedo), ("probes/dir_0_mip2.exr", hdr)):
        path = tmp_path / "mid/everett" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.open("wb"), x)
    reader = Mid(tmp_path, "test")
    assert sorted(reader.samples) == [("everett", "10"), ("everett", "3")]
    with np.errstate(all="raise"):
        s = reader.load(1, ["albedo", "shading"])
    lit = hdr * 0.8 ** 2.2 / np.percentile((hdr * [0.3, 0.59, 0.11]).sum(-1), 90)
    assert (np.abs(s["image"].astype(int) - (np.clip(lit, 0, 1) ** (1 / 2.2) * 255).astype(int)) <= 1).all()
    assert np.allclose(s["labels"]["albedo"][2:], (0.5, 0.8, 1))
    shading = (np.clip(np.clip(lit, 0, 1) / [0.5, 0.8, 1], 0, 1) * [0.3, 0.59, 0.11]).sum(-1)
    assert np.allclose(s["labels"]["shading"][2:, :, 0], shading[2:], atol=1e-5) and np.isfinite(s["labels"]["shading"]).all()
    for task in ("albedo", "shading"):
        assert not s["valid"][task][0, 0] and not s["valid"][task][1, 1] and s["valid"][task].sum() == 46


# ---- one's own folder ----

def own(root, n=2, h=6, w=8):
    values = {"normal": np.tile(np.float32([0, 0.6, 0.8]), (h, w, 1)), "depth": np.arange(h * w, dtype=np.float32).reshape(h, w),
              "scene_flow": rng.normal(size=(h, w, 3)), "shading": rng.uniform(size=(h, w)), "albedo": rng.uniform(size=(h, w, 3)),
              "optical_flow": rng.normal(size=(h, w, 2)).astype(np.float32)}
    for i in range(n):
        write(root / f"images/p{i}.png", picture(h, w, i))
        write(root / f"next/p{i}.png", picture(h, w, i + 50))
        write(root / f"semantic/p{i}.png", np.array([*range(8), 255], np.uint8)[np.arange(h * w).reshape(h, w) % 9])
        for task, x in values.items():
            write(root / f"{task}/p{i}.{'flo' if task == 'optical_flow' else 'npy'}", x)
    return values


def test_folder_reads_all_tasks(tmp_path):
    """Files one wrote oneself come back as they are, in every accepted array format; size defaults to the first image's."""
    values = own(tmp_path)
    values["optical_flow"][0, 0] = np.nan
    write(tmp_path / "optical_flow/p0.flo", values["optical_flow"])
    reader = Folder(tmp_path, "train")
    assert set(reader.tasks) == set(TASKS) and reader.size == (6, 8) and len(reader) == 2
    s = reader.load(0, list(TASKS))
    for task, x in values.items():
        assert np.allclose(s["labels"][task], np.nan_to_num(x.reshape(6, 8, -1)), atol=1e-6)
        assert s["labels"][task].dtype == np.float32 and s["labels"][task].shape[2] == TASKS[task].channels
    assert s["labels"]["semantic"][0, :, 0].tolist() == list(range(8)) and s["valid"]["semantic"].sum() == 43
    assert not s["valid"]["optical_flow"][0, 0] and not s["valid"]["depth"][0, 0] and s["valid"]["depth"].sum() == 47
    assert (s["next"] == picture(6, 8, 50)).all()


def test_folder_pictures_as_labels(tmp_path):
    """16-bit millimetres, 8- and 16-bit linear shading and albedo, and class colours; a foreign colour or id is named with its file."""
    own(tmp_path, 1)
    for task in ("depth", "shading", "albedo"):
        (tmp_path / task / "p0.npy").unlink()
    write(tmp_path / "depth/p0.png", np.array([[0, 1500]] * 24, np.uint16).reshape(6, 8))
    write(tmp_path / "shading/p0.png", np.full((6, 8), 51, np.uint8))
    write(tmp_path / "albedo/p0.png", np.tile(np.uint16([65535, 13107, 0]), (6, 8, 1)))
    colours = np.array([(128, 64, 128), (250, 170, 30), (0, 0, 142), (0, 0, 0)], np.uint8)
    write(tmp_path / "semantic/p0.png", colours[np.arange(48).reshape(6, 8) % 4])
    s = Folder(tmp_path, "train").load(0, ["semantic", "depth", "shading", "albedo"])
    assert (s["labels"]["semantic"][0, :4, 0] == (0, 3, 7, 255)).all() and not s["valid"]["semantic"][0, 3]
    assert s["labels"]["depth"][0, 1, 0] == 1.5 and not s["valid"]["depth"][0, 0]
    assert np.allclose(s["labels"]["shading"], 0.2) and np.allclose(s["labels"]["albedo"], (1, 0.2, 0))
    for bad, message in ((np.full((6, 8), 9, np.uint8), "id 9"), (np.full((6, 8, 3), 9, np.uint8), r"\[9, 9, 9\]")):
        write(tmp_path / "semantic/p0.png", bad)
        with pytest.raises(ValueError, match=f"semantic/p0.png .*{message}"):
            Folder(tmp_path, "train").load(0, ["semantic"])


def test_folder_subsets_and_splits(tmp_path):
    """Samples may lack labels, <split>.txt picks stems, and a label without its picture or a flow without its second frame is refused."""
    own(tmp_path, 3)
    (tmp_path / "albedo/p1.npy").unlink()
    (tmp_path / "val.txt").write_text("p2\np1\n")
    assert list(Folder(tmp_path, "train").indices("albedo")) == [0, 2] and len(Folder(tmp_path, "test")) == 3
    val = Folder(tmp_path, "val")
    assert val.samples == [("p2",), ("p1",)] and list(val.indices("albedo")) == [0] and list(val.indices("depth")) == [0, 1]
    with pytest.raises(ValueError, match="p1 .*no albedo label"):
        val.load(1, ["albedo"])
    (tmp_path / "val.txt").write_text("p9")
    with pytest.raises(ValueError, match="val.txt names 'p9'"):
        Folder(tmp_path, "val")
    (tmp_path / "next/p0.png").unlink()
    with pytest.raises(ValueError, match="next/p0"):
        Folder(tmp_path, "train")


def test_folder_rejects_labels_that_cannot_be_right(tmp_path):
    """Values outside [0,1], wrong sizes, wrong channels and doubled stems are named with their file."""
    own(tmp_path, 1)
    for task, x, message in (("albedo", np.full((6, 8, 3), 200.0), "albedo/p0.npy ranges"),
                             ("depth", np.ones((5, 8)), "p0 .*depth label is 5x8"), ("normal", np.ones((6, 8)), "normal/p0.npy")):
        write(tmp_path / f"{task}/p0.npy", x)
        with pytest.raises(ValueError, match=message):
            Folder(tmp_path, "train").load(0, [task])
    write(tmp_path / "images/p0.jpg", picture(6, 8))
    with pytest.raises(ValueError, match="same sample twice"):
        Folder(tmp_path, "train")


# ---- what is there ----

@pytest.mark.parametrize("name", [n for n in READERS if n != "folder"])
def test_missing_and_empty_folders_say_what_was_expected(tmp_path, name):
    """One sentence: which files, in which folder, what is there instead, where to get them."""
    reader = READERS[name]
    for there in ("is empty or does not exist", "holds 1 entries"):
        with pytest.raises(FileNotFoundError) as e:
            reader(tmp_path, reader.splits[0])
        assert all(part in str(e.value) for part in (there, str(tmp_path / name), reader.page, "README: Data"))
        (tmp_path / name / "stray").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match="no split 'nope'"):
        reader(tmp_path, "nope")


def test_wrong_use_is_refused(tmp_path):
    """A task without labels, a label of another size and a file missing from a half-extracted archive are named."""
    virtual_kitti(tmp_path)
    reader = VirtualKitti2(tmp_path, "train")
    with pytest.raises(ValueError, match="no labels for albedo"):
        reader.load(0, ["albedo"])
    depth = tmp_path / "virtual_kitti_2/Scene02/clone/frames/depth/Camera_0/depth_00000.png"
    write(depth, np.ones((16, 12), np.uint16))
    with pytest.raises(ValueError, match="Camera_0/00000 .*depth label is 16x12, but the image 16x11"):
        reader.load(0, ["depth"])
    depth.unlink()
    with pytest.raises(FileNotFoundError, match="depth_00000.png is missing"):
        reader.load(0, ["depth"])


def test_found_and_check(tmp_path):
    """found() returns the readers that are there, in their role; check() reports every dataset and the first file that does not load."""
    virtual_kitti(tmp_path)
    own(tmp_path / "folder")
    kitti_2015(tmp_path)
    assert [r.name for r in found(tmp_path, "train")] == ["virtual_kitti_2", "folder"]
    assert [(r.name, r.split) for r in found(tmp_path, "test")] == [("kitti_2015", "training"), ("folder", "test")]
    write(tmp_path / "virtual_kitti_2/Scene02/clone/frames/depth/Camera_1/depth_00001.png", np.ones((16, 11), np.uint8))
    quick, full = "\n".join(check(tmp_path)), "\n".join(check(tmp_path, full=True))
    for text in (quick, full):
        for part in ("virtual_kitti_2 train: 6 samples", "hypersim: not here", "virtual_kitti_2 test: no virtual_kitti_2 test",
                     "optical_flow      4  ", "kitti_2015 training: 1 samples"):
            assert part in text
    assert "depth_00001.png" in full and "depth_00001.png" not in quick
    with pytest.raises(FileNotFoundError, match="no train dataset"):
        found(tmp_path / "folder" / "images", "train")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        check(tmp_path / "nothing")


def test_mixture_facts():
    """The weights of each task add up to one over its datasets, and every fact names a task the dataset labels."""
    training = [Hypersim, VirtualKitti2, FlyingThings3D]
    for task in TASKS:
        assert sum(r.mix[task] for r in training if task in r.tasks) == pytest.approx(1)
    for r in READERS.values():
        assert {*r.mix, *r.jitter, *r.train_crop} <= set(r.tasks) and set(r.use.values()) <= set(r.splits)
        assert r.page and set(r.tasks) <= set(TASKS) and tuple(t for t in TASKS if t in r.tasks) == r.tasks
