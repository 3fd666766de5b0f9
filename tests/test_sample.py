"""sample.py: every kind of input ends in the promised files, and every mistake in one sentence that leaves nothing behind."""
import json
import weakref
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from cli import run
from model import StableMTL
from tasks import TASKS

FLOWS = [t for t in TASKS if TASKS[t].frames == 2]
rng = np.random.default_rng(0)


def picture(path, size=(20, 30), mode="RGB", **options):
    """Write a random image of (H, W) pixels; returns its path."""
    array = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(array).convert(mode).save(path, **options)
    return path


load = lru_cache(StableMTL.load)  # reads each checkpoint once for all tests


@pytest.fixture
def go(tiny_ckpt, tmp_path, capsys, monkeypatch):
    """go(*arguments) -> (exit code, stdout, stderr); results in tmp_path/out."""
    monkeypatch.setattr(StableMTL, "load", load)

    def call(*arguments, ckpt=tiny_ckpt):
        code = run(partial(sample.main, [*map(str, arguments), "--ckpt", str(ckpt), "--output", str(tmp_path / "out")]))
        return (code, *capsys.readouterr())
    return call


def outputs(tmp_path):
    """Names of the result folders that are finished."""
    return sorted(str(p.parent.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("panel.png"))


# ---- reading ----

def test_modes_become_rgb(tmp_path):
    """Grey, palette, 1-bit, CMYK and RGB files give the colours that were stored; transparency is put on white."""
    grey = np.array([[0, 128, 255]], np.uint8)
    expected = np.repeat(grey[..., None], 3, 2)
    for mode, name in (("L", "l.png"), ("P", "p.png"), ("RGB", "rgb.png"), ("CMYK", "cmyk.tif"), ("L", "l.bmp"), ("L", "l.pgm")):
        Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
        assert np.abs(sample.read_image(tmp_path / name).astype(int) - expected).max() <= 1, name
    Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / "1.png")
    assert sample.read_image(tmp_path / "1.png")[0, :, 0].tolist() == [0, 255, 255]
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(grey).convert(mode)
        image.putalpha(Image.fromarray(np.array([[255, 0, 255]], np.uint8)))
        image.save(tmp_path / "a.png")
        assert sample.read_image(tmp_path / "a.png")[0, :, 1].tolist() == [0, 255, 255], mode
    palette = Image.fromarray(grey).convert("RGB").quantize(4)
    palette.save(tmp_path / "t.png", transparency=palette.getpixel((0, 0)))
    assert sample.read_image(tmp_path / "t.png")[0, :, 2].tolist() == [255, 128, 255]


def test_16_bit_grey_is_scaled(tmp_path):
    """16-bit grey uses its full range: 65535 is white, 257 * n is n, in PNG and TIFF; floating-point pixels are refused."""
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(np.array([[0, 257 * 77, 65535]], np.uint16)).save(tmp_path / name)
        assert sample.read_image(tmp_path / name)[0, :, 0].tolist() == [0, 77, 255]
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif.*16-bit"):
        sample.read_image(tmp_path / "float.tif")


def test_exif_rotation(tmp_path):
    """A photo stored on its side is turned upright."""
    stored = np.zeros((4, 8, 3), np.uint8)
    stored[:, :4] = 255                                        # left half white; orientation 6: turn clockwise, left becomes top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    image = sample.read_image(tmp_path / "x.png")
    assert image.shape == (8, 4, 3) and image[:4].min() == 255 and image[4:].max() == 0


def test_broken_files_are_named(tmp_path, monkeypatch):
    """Missing, empty, cut-off, not-an-image and dangerously large files each raise one sentence with the file's name."""
    cut = picture(tmp_path / "cut.png", (64, 64))
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    for name in ("cut.png", "empty.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=name) as caught:
            sample.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent.png"):
        sample.read_image(tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((11, 10), (40, 40)):                          # Pillow's warning, and its error
        with pytest.raises(ValueError, match="large.png.*100 pixels"):
            sample.read_image(picture(tmp_path / "large.png", size))


# ---- what is an input ----

def pairs(paths, **options):
    return [(i.name, i.next is not None) for i in sample.find(paths, **options)]


def test_files_form_a_pair_or_a_sequence(tmp_path):
    """One file is alone, two are one pair, three are a sequence in the given order, --single makes them unrelated."""
    a, b, c = (picture(tmp_path / f"{n}.png") for n in "abc")
    assert pairs([a]) == [("a", False)]
    assert pairs([b, a]) == [("b", True)]
    assert pairs([c, a, b]) == [("c", True), ("a", True), ("b", False)]
    assert pairs([c, a, b], stride=2) == [("c", True), ("b", False)]
    assert pairs([a, b], single=True) == [("a", False), ("b", False)]
    pair, = sample.find([b, a])
    assert np.array_equal(pair.image(), sample.read_image(b)) and np.array_equal(pair.next(), sample.read_image(a))


def test_folder_pairs_consecutive_numbers(tmp_path):
    """In a folder only files of one name with consecutive numbers are paired, in natural order; gaps and other names are not."""
    for name in ("f_9.png", "f_10.png", "f_11.png", "f_13.png", "g12.png", "tree.jpg", "house.jpg", "000_10.png", "000_11.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._f_12.png").write_text("what macOS leaves behind")
    found = dict(pairs([tmp_path]))
    assert found == {"000_10": True, "000_11": False, "f_9": True, "f_10": True, "f_11": False, "f_13": False, "g12": False,
                     "house": False, "tree": False}
    assert list(found) == ["000_10", "000_11", "f_9", "f_10", "f_11", "f_13", "g12", "house", "tree"]
    assert not any(dict(pairs([tmp_path], single=True)).values())
    assert dict(pairs([tmp_path], stride=2))["f_9"] and "f_10" not in dict(pairs([tmp_path], stride=2))


def test_animation_frames(tmp_path):
    """The frames of an animated GIF are a sequence with their own colours; a GIF of one frame is an image."""
    frames = [Image.new("RGB", (12, 10), (80 * i, 0, 255 - 80 * i)) for i in range(4)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    found = list(sample.find([tmp_path / "moves.gif"]))
    assert [i.name for i in found] == [f"moves/00000{i}" for i in range(4)] and [bool(i.next) for i in found] == [True] * 3 + [False]
    for i, item in enumerate(found):
        assert np.abs(item.image()[0, 0].astype(int) - (80 * i, 0, 255 - 80 * i)).max() <= 3
    assert np.array_equal(found[1].next(), found[2].image())
    assert pairs([tmp_path / "moves.gif"], stride=3) == [("moves/000000", True), ("moves/000003", False)]
    assert pairs([tmp_path / "still.gif"]) == [("still", False)]


@pytest.fixture
def clip(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write MJPG")
    for i in range(5):
        writer.write(np.full((32, 48, 3), (0, 0, 50 * i), np.uint8))   # OpenCV's order: blue, green, red
    writer.release()
    return path


def test_video_is_streamed(clip, monkeypatch):
    """A video's frames come in order, in RGB, with their numbers, and no more of them are decoded than were asked for."""
    decoded, original = [], sample.read_video
    monkeypatch.setattr(sample, "read_video", lambda *a: (decoded.append(f[0]) or f for f in original(*a)))
    inputs = sample.find([clip], stride=2)
    first = next(inputs)
    assert decoded == [0, 2] and first.name == "clip/000000"
    second, last = inputs
    assert second.name == "clip/000002" and np.abs(second.image()[0, 0].astype(int) - (100, 0, 0)).max() <= 4
    assert np.array_equal(first.next(), second.image()) and last.next is None


# ---- sizes ----

def test_network_size():
    """The shorter side becomes the trained one, --size sets the longer, 0 keeps; at least 8 cells, by default at most 8 trained areas."""
    size = sample.network_size
    assert size(480, 640, None, (64, 96), 4) == (64, 85)
    assert size(640, 480, None, (64, 96), 4) == (85, 64)
    assert size(480, 640, 320, (64, 96), 4) == (240, 320)
    assert size(480, 641, 0, (64, 96), 4) == size(480, 641, None, None, 4) == (480, 641)
    assert size(1, 1, 0, None, 8) == (64, 64) and min(size(17, 2000, 500, None, 4)) == 32
    h, w = size(17, 20000, None, (64, 96), 4)
    assert h == 32 and w * 17 / 20000 * w <= 8.1 * 64 * 96


def test_restore_keeps_classes_and_directions():
    """Going back to the input's size invents no class, keeps normals at unit length and leaves flow values alone."""
    ids = torch.tensor([[[[0, 7], [3, 0]]]])
    assert set(sample.restore(ids, TASKS["semantic"], (7, 9)).unique().tolist()) == {0, 3, 7}
    normal = torch.nn.functional.normalize(torch.randn(1, 3, 5, 6), dim=1)
    assert torch.allclose(sample.restore(normal, TASKS["normal"], (11, 4)).norm(dim=0), torch.ones(11, 4), atol=1e-5)
    assert torch.equal(sample.restore(torch.full((1, 2, 4, 4), 5.0), TASKS["optical_flow"], (8, 12)), torch.full((2, 8, 12), 5.0))
    x = torch.randn(1, 1, 6, 7)
    assert torch.equal(sample.restore(x, TASKS["depth"], (6, 7)), x[0])


# ---- whole runs ----

def test_pair_writes_every_task(go, tmp_path, tiny_model):
    """A pair gives all seven arrays in the promised shape, type and range, equal to the model's own prediction, and one panel."""
    a, b = picture(tmp_path / "a.png", (32, 48)), picture(tmp_path / "b.png", (32, 48))
    assert go(a, b)[0] == 0
    folder = tmp_path / "out" / "a"
    frames = [torch.from_numpy(sample.read_image(p)).permute(2, 0, 1)[None] / 127.5 - 1 for p in (a, b)]
    maps = tiny_model.predict(*frames)
    for t, task in TASKS.items():
        array = np.load(folder / f"{t}.npy")
        expected = maps[t][0].permute(1, 2, 0).numpy()
        if task.categorical:
            assert array.dtype == np.uint8 and array.shape == (32, 48) and np.array_equal(array, expected[..., 0])
        else:
            assert array.dtype == np.float32 and array.shape == (32, 48, task.channels)
            np.testing.assert_allclose(array, expected, atol=1e-4)
        assert Image.open(folder / f"{t}.png").size == (48, 32)
    assert np.allclose(np.linalg.norm(np.load(folder / "normal.npy"), axis=2), 1, atol=1e-4)
    assert all(np.load(folder / f"{t}.npy").min() >= 0 and np.load(folder / f"{t}.npy").max() <= 1 for t in ("depth", "shading", "albedo"))
    panel = Image.open(folder / "panel.png")
    assert panel.width > 3 * 48 * 6 and panel.height > 3 * 32 * 6     # three columns and rows, each enlarged sixfold
    assert sorted(p.name for p in folder.iterdir()) == sorted(["panel.png", *(f"{t}.{e}" for t in TASKS for e in ("png", "npy"))])


@pytest.mark.parametrize("name, mode, size", [
    ("grey.png", "L", (20, 30)), ("grey_alpha.png", "LA", (20, 30)), ("rgba.png", "RGBA", (20, 30)), ("palette.png", "P", (20, 30)),
    ("cmyk.jpg", "CMYK", (20, 30)), ("sixteen.png", "I;16", (20, 30)), ("rotated.jpg", "RGB", (20, 30)), ("moves.gif", "RGB", (20, 30)),
    ("pixel.png", "RGB", (1, 1)), ("odd.png", "RGB", (13, 29)), ("large.jpg", "L", (3000, 4000)), ("strip.png", "RGB", (17, 2000))])
def test_any_image(go, tmp_path, name, mode, size):
    """Every mode, an EXIF rotation, an animation, one pixel, 12 megapixels and strips end in arrays of the size that a viewer shows."""
    path, options = tmp_path / name, {}
    if name == "rotated.jpg":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif name == "moves.gif":
        options = {"save_all": True, "append_images": [Image.new("RGB", size[::-1], "red")]}
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, size, np.uint16)).save(path)
    else:
        picture(path, size, mode, **options)
    assert go(path, "--tasks", "shading", "--stage", 1, "--size", 64)[0] == 0
    found, shown = list((tmp_path / "out").rglob("shading.npy")), size[::-1] if "exif" in options else size
    assert len(found) == (2 if "save_all" in options else 1)
    for array in map(np.load, found):
        assert array.shape == (*shown, 1) and np.isfinite(array).all()


def test_memory_stays_level(go, tmp_path, monkeypatch):
    """However many images a folder holds, only a few of them are in memory at a time."""
    (tmp_path / "in").mkdir()
    for i in range(12):
        picture(tmp_path / "in" / f"f{i:02}.png", (8, 8))
    seen, most, read = [], [], sample.read_image

    def counted(path):
        image = read(path)
        seen.append(weakref.ref(image))
        most.append(sum(r() is not None for r in seen))
        return image
    monkeypatch.setattr(sample, "read_image", counted)
    assert go(tmp_path / "in", "--tasks", "optical_flow", "--stage", 1)[0] == 0
    assert len(seen) == 12 and max(most) <= 4


def test_single_image_says_what_it_skips(go, tmp_path):
    """Without a second frame the tasks about motion are not written, and the output says so."""
    code, said, _ = go(picture(tmp_path / "x.png"), "--stage", 1)
    assert code == 0 and "without a second frame: optical_flow, scene_flow skipped" in said
    assert {p.stem for p in (tmp_path / "out/x").glob("*.npy")} == set(TASKS) - set(FLOWS)


def test_finished_inputs_are_kept(go, tmp_path, monkeypatch):
    """A second run computes only what is missing, --overwrite everything, and a run killed before its panel counts as unfinished."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in (1, 2, 3):
        picture(folder / f"f{i}.png")
    flags = (folder, "--tasks", "depth,optical_flow", "--stage", 1)
    assert go(*flags, "--limit", 2)[0] == 0 and outputs(tmp_path) == ["f1", "f2"]
    assert {p.name for p in (tmp_path / "out/f2").glob("*.npy")} == {"depth.npy", "optical_flow.npy"}    # its next is beyond the limit
    stamp = (tmp_path / "out/f1/panel.png").stat().st_mtime_ns
    code, said, _ = go(*flags)
    assert code == 0 and said.startswith("1 predicted") and "2 already finished" in said and outputs(tmp_path) == ["f1", "f2", "f3"]
    assert (tmp_path / "out/f1/panel.png").stat().st_mtime_ns == stamp and not (tmp_path / "out/f3/optical_flow.npy").exists()
    assert go(*flags, "--overwrite")[1].startswith("3 predicted")
    assert (tmp_path / "out/f1/panel.png").stat().st_mtime_ns != stamp
    monkeypatch.setattr(sample, "draw_panel", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(*flags, "--overwrite")
    monkeypatch.undo()
    assert go(*flags)[1].startswith("1 predicted")


def test_same_name_in_two_folders(go, tmp_path):
    """Files of one name do not overwrite each other's results."""
    for name in "ab":
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "1.png")
    assert go(tmp_path / "a", tmp_path / "b", "--tasks", "depth", "--stage", 1)[0] == 0
    assert outputs(tmp_path) == ["1", "1-2"]


def test_video_run(go, tmp_path, clip):
    """A video gives one folder per frame, and the last frame has no flow."""
    code, said, _ = go(clip, "--tasks", "optical_flow,albedo", "--stage", 1, "--stride", 2)
    assert code == 0 and outputs(tmp_path) == ["clip/000000", "clip/000002", "clip/000004"] and "1 without a second frame" in said
    assert [(tmp_path / "out/clip" / f / "optical_flow.npy").exists() for f in ("000000", "000002", "000004")] == [True, True, False]


def test_toy_sample_shows_labels(go, tmp_path, monkeypatch):
    """A toy sample's panel has a label beside each prediction."""
    titles, draw = [], sample.draw_panel
    monkeypatch.setattr(sample, "draw_panel", lambda cells, *rest: titles.extend(t for t, _ in cells) or draw(cells, *rest))
    assert go("--toy", "real:3", "--tasks", "depth,albedo", "--stage", 1)[0] == 0
    assert titles[:2] == ["image", "second frame"] and titles[2].startswith("depth label, ") and titles[2].endswith(" m")
    assert titles[3:] == ["depth predicted", "albedo label", "albedo predicted"] and outputs(tmp_path) == ["real-3"]


def test_attention_rows_sum_to_one(go, tmp_path):
    """--attention reports, per main task and block, weights over the other tasks that sum to one, in the blocks' running order."""
    assert go(picture(tmp_path / "x.png"), "--attention", "--tasks", "depth,normal")[0] == 0
    table = json.loads((tmp_path / "out/x/attention.json").read_text())
    assert set(table["attention"]) == set(table["mean"]) == {"depth", "normal"}
    for main, rows in table["attention"].items():
        assert len(rows) == 16 and list(rows)[0] == "down.0.0" and list(rows)[6] == "mid.0" and list(rows)[-1] == "up.3.2"
        for row in [*rows.values(), table["mean"][main]]:
            assert set(row) == set(TASKS) - {main} and sum(row.values()) == pytest.approx(1, abs=1e-4)
        assert table["mean"][main]["albedo"] == pytest.approx(np.mean([row["albedo"] for row in rows.values()]))
    assert Image.open(tmp_path / "out/x/attention.png").width > 600


def test_rows_change_nothing(go, tmp_path):
    """--rows 1 gives the arrays of an unlimited run."""
    x = picture(tmp_path / "x.png")
    go(x, "--tasks", "depth,albedo")
    first = np.load(tmp_path / "out/x/albedo.npy")
    go(x, "--tasks", "depth,albedo", "--rows", 1, "--overwrite")
    np.testing.assert_allclose(np.load(tmp_path / "out/x/albedo.npy"), first, atol=1e-5)


# ---- mistakes ----

def test_skip_bad_goes_on(go, tmp_path):
    """--skip-bad names and counts an unreadable file and predicts the others."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture(folder / "good.png")
    (folder / "bad.png").write_bytes(b"")
    code, said, error = go(folder, "--tasks", "depth", "--stage", 1, "--skip-bad")
    assert code == 0 and outputs(tmp_path) == ["good"] and "bad.png" in error and "1 unreadable" in said


def test_interrupt_says_how_to_go_on(go, tmp_path, monkeypatch):
    """Ctrl-C keeps what is done and says how much that is."""
    write, calls = sample.write, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)
    monkeypatch.setattr(sample, "write", stopped)
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    code, _, error = go(a, b, "--single", "--tasks", "depth", "--stage", 1)
    assert code == 130 and "1 finished" in error and outputs(tmp_path) == ["a"]


def test_help_states_units(capsys):
    """--help lists every array with its unit."""
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"{t.name}.npy" in said and t.unit in said for t in TASKS.values())
