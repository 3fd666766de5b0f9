"""inference/infer.py: the call in Python takes what people have, and gives what sample.py writes."""
import io
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
from cli import Parser
from inference import infer
from model import StableMTL
from tasks import MOTION, MOTION_3D, TASKS

rng = np.random.default_rng(0)


def array(height=32, width=48):
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def cut():
    """A Pillow image whose file is truncated: it opens."""
    buffer = io.BytesIO()
    Image.fromarray(array()).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:1000]))


def same(a, b):
    """Equal names, types, shapes and bits."""
    facts = [{t: (x.dtype, x.shape, x.tobytes()) for t, x in maps.items()} for maps in (a, b)]
    return facts[0] == facts[1]


# ---- sizes ----

def test_network_size():
    """The shorter side becomes the trained one, --size sets the longer, 0 keeps; at least 8 cells."""
    size = infer.network_size
    assert size(480, 640, None, (64, 96), 4) == (64, 85)
    assert size(640, 480, None, (64, 96), 4) == (85, 64)
    assert size(480, 640, 320, (64, 96), 4) == (240, 320)
    assert size(480, 641, 0, (64, 96), 4) == size(480, 641, None, None, 4) == (480, 641)
    assert size(1, 1, 0, None, 8) == (64, 64) and min(size(17, 2000, 500, None, 4)) == 32


@pytest.mark.parametrize("height, width", [(17, 20000), (1, 65000), (65000, 1), (2, 3), (100, 3000)])
def test_thin_images_do_not_grow(height, width):
    """At most 8 times the trained area by default: the 8 cells that a thin image needs made it hundreds of these."""
    h, w = infer.network_size(height, width, None, (64, 96), 4)
    assert min(h, w) >= 32 and h * w <= 8.1 * 64 * 96 and (h > w) == (height > width)


def test_restore_keeps_classes_and_directions():
    """Going back to the input's size invents no class, keeps normals at unit length and leaves flow values alone."""
    ids = torch.tensor([[[[0, 7], [3, 0]]]])
    assert set(infer.restore(ids, TASKS["semantic"], (7, 9)).unique().tolist()) == {0, 3, 7}
    normal = infer.restore(torch.nn.functional.normalize(torch.randn(2, 3, 5, 6), dim=1), TASKS["normal"], (11, 4))
    assert torch.allclose(normal.norm(dim=1), torch.ones(2, 11, 4), atol=1e-5)
    flow = infer.restore(torch.full((1, 2, 4, 4), 5.0), TASKS["optical_flow"], (8, 12))
    assert torch.equal(flow, torch.full((1, 2, 8, 12), 5.0))
    x = torch.randn(1, 1, 6, 7)
    assert torch.equal(infer.restore(x, TASKS["depth"], (6, 7)), x)


# ---- the call ----

def test_the_files_of_sample_are_the_arrays_of_infer(tiny_ckpt, tmp_path):
    """Bit for bit, at an odd size that the network does not see, of a JPEG pair and of a single image."""
    paths = [tmp_path / "photo.jpg", tmp_path / "next.jpg"]
    for path in paths:
        Image.fromarray(array(75, 101)).save(path)
    model = StableMTL.load(tiny_ckpt)
    for given, options in ((paths, {}), (paths[:1], {"size": 40, "tasks": "depth,normal,semantic"})):
        flags = [part for k, v in options.items() for part in (f"--{k}", str(v))]
        output = tmp_path / f"out{len(given)}"
        assert sample.main([*map(str, given), *flags, "--ckpt", str(tiny_ckpt), "--output", str(output)]) == 0
        maps = model.infer(*given, **options)
        assert same(maps, {p.stem: np.load(p) for p in (output / "photo").glob("*.npy")})
        assert set(maps) == ({"depth", "normal", "semantic"} if options else set(TASKS))
    for t, x in model.infer(*paths).items():
        channels = () if TASKS[t].channels == 1 else (TASKS[t].channels,)
        assert x.shape == (75, 101, *channels) and x.dtype == (np.uint8 if TASKS[t].categorical else np.float32)


def test_infer_equals_predict_by_hand(tiny_model):
    """At the network's own size nothing is resized: the maps are those of StableMTL.predict."""
    a, b = array(), array()
    frames = [torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in (a, b)]
    expected = tiny_model.predict(*frames)
    for t, x in tiny_model.infer(a, b, size=0).items():
        tiny.close(x, expected[t][0].permute(1, 2, 0).squeeze(-1 if x.ndim == 2 else ()))


def test_kinds_of_image_are_one(tiny_model, tmp_path):
    """A path, as text or not, a Pillow image and an array of the same pixels give the same maps; a rotated photo comes
    as a viewer shows it."""
    x = array(32, 40)
    Image.fromarray(x).save(tmp_path / "x.png")
    kinds = [x, tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(x)]
    first, *others = (tiny_model.infer(kind, tasks=["albedo"]) for kind in kinds)
    assert all(same(first, other) for other in others)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x).convert("L").save(tmp_path / "x.jpg", exif=exif)
    for kind in (tmp_path / "x.jpg", Image.open(tmp_path / "x.jpg")):
        assert tiny_model.infer(kind, tasks=["depth"])["depth"].shape == (40, 32)


def test_a_list_is_a_batch(tiny_model, monkeypatch):
    """In order, of any sizes, with or without a next frame: as one by one, but one pass for all that are alike."""
    images, after = [array(), array(40, 56), array(), array()], [array(), None, array(), None]
    alone = [tiny_model.infer(a, next=b) for a, b in zip(images, after, strict=True)]
    passes, predict = [], StableMTL.predict

    def counted(self, image, *args, **options):
        passes.append(len(image))
        return predict(self, image, *args, **options)
    monkeypatch.setattr(StableMTL, "predict", counted)
    batch = tiny_model.infer(images, next=after, rows=3)
    assert passes == [2, 1, 1] and len(batch) == 4
    for one, other in zip(alone, batch, strict=True):
        assert one.keys() == other.keys()
        for t, x in one.items():
            if TASKS[t].categorical:
                assert (x == other[t]).mean() > 0.999       # a tie between two colours may fall either way
            else:
                tiny.close(x, other[t])
    assert tiny_model.infer([]) == [] and isinstance(tiny_model.infer(images[:1]), list)


def test_the_model_knows_its_size(tiny_ckpt, monkeypatch):
    """A photo passes the network at the size of training, as in sample.py: in Python it went through as it was."""
    seen, model, predict = [], StableMTL.load(tiny_ckpt), StableMTL.predict

    def looked(self, image, *args, **options):
        seen.append(tuple(image.shape[-2:]))
        return predict(self, image, *args, **options)
    monkeypatch.setattr(StableMTL, "predict", looked)
    x = array(96, 144)
    for size in (None, 60, 0):
        assert model.infer(x, tasks=["depth"], size=size)["depth"].shape == (96, 144)
    assert seen == [(32, 48), (40, 60), (96, 144)] and tuple(model.size) == (32, 48)


@pytest.mark.parametrize("arguments, said", [
    (dict(image="absent.jpg"), "no image file absent.jpg"),
    (dict(image=3), "not int"),
    (dict(image=np.zeros((8, 8, 3), np.float32)), r"found \(8, 8, 3\) of float32"),
    (dict(image=np.zeros((8, 8), np.uint8)), r"found \(8, 8\) of uint8"),
    (dict(image=np.zeros((0, 8, 3), np.uint8)), r"found \(0, 8, 3\)"),
    (dict(image=array(), next=array(40, 48)), "has 48x32 pixels and its next frame 48x40"),
    (dict(image=[array()], next=array()), "a list of as many next ones"),
    (dict(image=[array()] * 2, next=[array()]), "2 images in a list"),
    (dict(image=array(), tasks="depht"), "unknown task depht"),
    (dict(image=array(), tasks=["depht"]), "unknown task depht"),
    (dict(image=array(), tasks=["optical_flow"]), "about motion"),
    (dict(image=array(), tasks=[]), "unknown task .none.: choose from semantic"),
    *((dict(image=array(), size=x), f"size {re.escape(repr(x))}: expected the longer side in pixels")
      for x in (-1, "64", (32, 48), 1e300, float("inf"), float("nan"))),
    *((dict(image=array(), rows=x), f"rows {x!r}: expected a whole number from 1") for x in ("1", 0, -1, 1.5)),
    *((dict(image=array(), next=array(), pixels=True, camera=x), "camera .*: expected focal length.* all finite")
      for x in ((40, float("nan"), 1, 1, 2), (float("inf"), 1, 1, 1, 2))),
    (dict(image=cut()), "the Pillow image cannot be read .image file is truncated.*: give another, or a path"),
    (dict(image=Image.new("F", (8, 8)), tasks="depth"), "neither 8-bit nor 16-bit"),
])
def test_mistakes_are_one_sentence(tiny_model, arguments, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        tiny_model.infer(**arguments)
    assert "\n" not in str(error.value)


def test_a_lack_of_memory_names_the_remedy(tiny_model, monkeypatch):
    """In the words of a program of one's own, or the flags of the command. Other errors of torch stay what they are."""
    said = ["CPU: could not allocate memory"] * 2 + ["something else"]

    def fail(*args, **options):
        raise RuntimeError(said.pop(0))
    monkeypatch.setattr(StableMTL, "predict", fail)
    for usage, remedy in ("", "rows=1, smaller images or"), ("[--rows ROWS]", "smaller images, or lower --rows$"):
        monkeypatch.setattr(Parser, "usage_at_hand", usage)
        with pytest.raises(ValueError, match=f"out of memory at 48x32 pixels: use {remedy}"):
            tiny_model.infer(array(), size=48)
    with pytest.raises(RuntimeError, match="something else"):
        tiny_model.infer(array())


def test_confidence_and_pixels_are_the_files_of_sample(tiny_ckpt, tmp_path, monkeypatch):
    """Arrays beside the maps, bit for bit what --confidence --pixels writes; the map times its scale is in pixels. A
    still image has no scale to find; what would do nothing is refused."""
    # an untrained network finds no motion
    monkeypatch.setattr("inference.photometric._unsure", lambda level, pixels: "")
    paths = [tmp_path / "photo.png", tmp_path / "next.png"]
    for path in paths:
        Image.fromarray(array(75, 101)).save(path)
    camera = 80, 50, 37, 1, 20
    argv = [*map(str, paths), "--ckpt", str(tiny_ckpt), "--output", str(tmp_path / "out"), "--confidence", "--pixels"]
    assert sample.main([*argv, "--camera", ",".join(map(str, camera))]) == 0
    model = StableMTL.load(tiny_ckpt)
    maps, plain = (model.infer(*paths, **options) for options in (
        {"confidence": True, "pixels": True, "camera": camera}, {}))
    scales = {t: maps.pop(f"scale_{t}") for t in TASKS if f"scale_{t}" in maps}
    assert same(maps, {p.stem: np.load(p) for p in (tmp_path / "out/photo").glob("*.npy")})
    assert maps.keys() == {*TASKS, *(f"confidence_{t}" for t in TASKS)} and set(scales) == {
        t for t in TASKS if TASKS[t].geometry in (MOTION, MOTION_3D)}
    for t, x in plain.items():
        np.testing.assert_allclose(maps[t], x * np.float32(scales.get(t, 1)) if t in scales else x, rtol=1e-5)
    alone, = model.infer([paths[0]], pixels=True, confidence=True, tasks="depth")
    assert set(alone) == {"depth", "confidence_depth"}
    with pytest.raises(ValueError, match="expected focal length"):
        model.infer(*paths, pixels=True, camera=(80, 50, 37, 20, 1))
    for wrong in ((80, 50, 37), (80, 50, 37, 1, 20, 5), ("a", "b", "c", "d", "e")):
        with pytest.raises(ValueError, match="expected five numbers"):
            model.infer(*paths, pixels=True, camera=wrong)
    with pytest.raises(ValueError, match="it goes with pixels=True"):
        model.infer(*paths, camera=camera)
