"""File formats, and what the readers compute from them: every test knows the numbers it wrote."""
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from raw import picture, rng, two_frames, write

from readers import formats, geometry

formats.opencv()
NO_EXR = bool(re.search(r"OpenEXR:\s+NO", cv2.getBuildInformation()))
needs_exr = pytest.mark.skipif(NO_EXR, reason="this OpenCV is built without OpenEXR")


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
    x = picture(6, 8)
    assert (formats.read_image(write(tmp_path / "a.png", x)) == x).all()
    assert (formats.read_image(write(tmp_path / "g.png", x[..., 0])) == x[..., :1]).all()
    assert (formats.read_image(write(tmp_path / "s.png", x.astype(np.uint16) * 257)) == x).all()
    Image.fromarray(np.dstack([x, np.full((6, 8), 9, np.uint8)])).save(tmp_path / "alpha.png")
    assert (formats.read_image(tmp_path / "alpha.png") == x).all()
    Image.fromarray(x).quantize(4).save(tmp_path / "p.png")
    assert (formats.read_image(tmp_path / "p.png") == np.array(Image.open(tmp_path / "p.png").convert("RGB"))).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, None])
def test_image_size_is_that_of_the_turned_image(tmp_path, name, orientation):
    """The header alone tells the size that read_image gives, EXIF rotation included; odd metadata does no harm."""
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    path, exif = tmp_path / name, exif if orientation else b"Exif\0\0II*\0\xff\xff\xff\xff"
    Image.fromarray(picture(6, 8)).save(path, exif=exif)
    assert formats.image_size(path) == formats.read_image(path).shape[:2]
    path.write_bytes(path.read_bytes()[:-20])     # the header is all it looks at
    assert formats.image_size(path) in ((6, 8), (8, 6))


def grey_png(bits, ids):
    """A grey PNG of 1, 2, 4 or 8 bits per pixel, which Pillow does not write."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = ["".join(f"{i:0{bits}b}" for i in row) for row in ids]
    rows = [row.ljust(-(-len(row) // 8) * 8, "0") for row in rows]
    data = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    header = struct.pack(">2I5B", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_class_numbers_of_any_depth(tmp_path, bits):
    """Grey label pictures of few bits hold the ids themselves. (Decoders stretch them to 0..255: in one of a single
    bit, class 1 became 255, which is ignored.)"""
    ids = np.arange(48).reshape(6, 8) % min(8, 2 ** bits)
    (tmp_path / "a.png").write_bytes(grey_png(bits, ids))
    numbers, colours, opaque = formats.read_classes(tmp_path / "a.png")
    assert (numbers == ids).all() and colours is None and opaque.all()


@pytest.mark.parametrize("scale, order", [(b"-1.0", "<f4"), (b"1.0", ">f4")])
def test_pfm_rows_are_stored_bottom_up(tmp_path, scale, order):
    """The last row of the file is the top of the picture, in either byte order."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "a.pfm").write_bytes(b"Pf\n4 3\n" + scale + b"\n" + x[::-1].astype(order).tobytes())
    assert (formats.read_pfm(tmp_path / "a.pfm") == x).all()


def test_flo_hdf5_npy_round_trip(tmp_path):
    """Flow rows run top to bottom with u before v; HDF5 and NPY keep their dtype; pickled arrays and wrong shapes are
    refused."""
    flow = rng.normal(size=(4, 5, 2)).astype(np.float32)
    assert (formats.read_flo(write(tmp_path / "a.flo", flow)) == flow).all()
    x = rng.normal(size=(3, 4)).astype(np.float16)
    assert formats.read_hdf5(write(tmp_path / "a.hdf5", x)).dtype == np.float16
    assert (formats.read_npy(write(tmp_path / "a.npy", x), 1) == x[..., None]).all()
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    for name in ("o.npy", "a.npy"):
        with pytest.raises(ValueError, match=name):
            formats.read_npy(tmp_path / name, 3)


def test_unknown_flow_is_nan(tmp_path):
    """Middlebury marks pixels without flow by values beyond 1e9, of either sign: they are no motion."""
    flow = np.zeros((4, 5, 2), np.float32)
    flow[0, 0], flow[1, 1, 0], flow[2, 2, 1], flow[3, 3] = 1666666752, -1e10, np.inf, 9e8
    read = formats.read_flo(write(tmp_path / "a.flo", flow))
    assert np.isnan(read).sum() == 4 and (read[3, 3] == 9e8).all()


@needs_exr
def test_exr_is_rgb_and_unbounded(tmp_path):
    """EXR channels come back as R, G, B, values above 1 included."""
    x = np.float32([[[1, 2, 3], [40, 0.5, 0]]])
    assert (formats.read_exr(write(tmp_path / "a.exr", x)) == x).all()


def test_exr_without_the_codec_says_what_to_install(tmp_path, monkeypatch):
    """An OpenCV built without OpenEXR (5.0 wheels) is named as the cause, with the remedy, instead of the file."""
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "    OpenEXR:                     NO")
    with pytest.raises(ValueError, match="opencv-python-headless<5"):
        formats.read_exr(tmp_path / "a.exr")


def read_vectors(path):
    return formats.read_npy(path, 3)


@pytest.mark.parametrize("name, read", [
    ("a.png", formats.read_image), ("b.png", formats.read_classes), ("a.jpg", formats.read_image),
    ("a.pfm", formats.read_pfm), ("a.flo", formats.read_flo), ("a.hdf5", formats.read_hdf5), ("a.npy", read_vectors),
    pytest.param("a.exr", formats.read_exr, marks=needs_exr)])
def test_broken_and_missing_files_name_themselves(tmp_path, name, read):
    """A truncated, an empty and a missing file of every format raise an error that holds the path."""
    maps = {"pfm": np.ones((20, 30)), "flo": np.ones((20, 30, 2)), "exr": np.ones((20, 30, 3), np.float32)}
    path = write(tmp_path / name, maps.get(name[2:], picture(20, 30)))
    read(path)
    data = path.read_bytes()
    for part in (data[:len(data) * 2 // 3], data[:5], b"", b"nonsense" * 40):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=name):
            read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(path)


def test_leftovers_of_systems_are_not_data(tmp_path):
    """What macOS, Windows and file managers leave in folders matches patterns, but is never listed."""
    for name in ("0.png", "._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/0.png", "a/0.png", ".b/0.png"):
        write(tmp_path / name, picture(2, 2)) if name.endswith(".png") else (tmp_path / name).write_bytes(b"x")
    assert sorted(formats.visible(tmp_path, "*")) == ["0.png", "a"]
    assert sorted(formats.visible(tmp_path, "*/*.png")) == ["a/0.png"]


# ---- geometry and light ----

def angle(a, b):
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def test_scene_flow_inverts_projection():
    """Projecting a moving surface gives flow and depths from which the 3-D motion returns."""
    flow, z0, z1, motion = two_frames(40, 60, 50.0, 31.0, 18.0)
    assert np.allclose(geometry.scene_flow(flow, z0, z1, 50.0, 31.0, 18.0), motion, atol=1e-5)


@pytest.mark.parametrize("shape", ["wall", "ground", "slanted", "sphere"])
def test_normals_from_depth_in_centimetre_steps(shape):
    """On planes and a sphere, depth rounded to 1 cm, the median error is below 4 degrees and the normals point away
    from the camera."""
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
        planes = {"wall": ((0, 0, 1), 10), "ground": ((0, 1, 0), 1.6), "slanted": ((0.6, 0.1, 0.8), 12)}
        n, distance = planes[shape]
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
    """The 90th percentile of brightness lands at 0.8 of the picture; nothing counted gives scale 1, darkness 0; 8 bits
    are truncated."""
    x = np.random.default_rng(1).gamma(2, 3, (50, 60, 3)).astype(np.float32)
    where = np.zeros((50, 60), bool)
    where[10:40] = True
    s = geometry.exposure(x, where)
    p = np.percentile((x * [0.3, 0.59, 0.11]).sum(-1)[where], 90)
    assert s == pytest.approx(0.8 ** 2.2 / p, rel=1e-5)
    assert geometry.tonemap(np.full((1, 1, 3), s * p, np.float32))[0, 0, 0] in (203, 204)
    assert geometry.exposure(x, where & False) == 1 and geometry.exposure(x * 1e-6, where) == 0
    assert (geometry.tonemap(np.float32([[[-1, 0.5, 7]]])) == [[[0, int(0.5 ** (1 / 2.2) * 255), 255]]]).all()
