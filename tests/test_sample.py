"""sample.py: every kind of input ends in the promised files, every mistake in one sentence that leaves nothing."""
import json
import os
import re
import resource
import shutil
import weakref
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sample
from cli import run
from inference import results
from model import StableMTL
from tasks import TASKS

FLOWS = [t for t in TASKS if TASKS[t].frames == 2]
rng = np.random.default_rng(0)


def picture(path, size=(20, 30), mode="RGB", **options):
    """Write a random image of (H, W) pixels; returns its path."""
    path.parent.mkdir(exist_ok=True)
    array = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(array).convert(mode).save(path, **options)
    return path


load = lru_cache(StableMTL.load)  # reads each checkpoint once for all tests


@pytest.fixture
def go(tiny_ckpt, tmp_path, capsys, monkeypatch):
    """go(*arguments) -> (exit code, stdout, stderr); results in tmp_path/out."""
    monkeypatch.setattr(StableMTL, "load", load)

    def call(*arguments, ckpt=tiny_ckpt):
        argv = [*map(str, arguments), "--ckpt", str(ckpt), "--output", str(tmp_path / "out")]
        code = run(partial(sample.main, argv))
        return (code, *capsys.readouterr())
    return call


def outputs(tmp_path):
    """Names of the result folders that are finished."""
    return sorted(str(p.parent.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("panel.png"))


def maps(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.npy")}


# ---- what is an input ----

def pairs(paths, **options):
    inputs = sample.find(paths, **options)
    return [(f"{i.name}/{i.frame}".rstrip("/"), i.next is not None) for i in inputs]


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
    """In a folder only files of one name with consecutive numbers are paired, in natural order; gaps and other names,
    of which digits of another script ended in a traceback, are not."""
    expected = {"000_10": True, "000_11": False, "f_9": True, "f_10": True, "f_11": False, "f_13": False, "g12": False,
                "house": False, "tree": False, "٣": False}
    for name in sorted(expected):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "._f_12.png").write_text("what macOS leaves behind")
    found = dict(pairs([tmp_path]))
    assert found == expected and list(found) == list(expected)
    assert not any(dict(pairs([tmp_path], single=True)).values())
    assert dict(pairs([tmp_path], stride=2))["f_9"] and "f_10" not in dict(pairs([tmp_path], stride=2))


def test_what_is_left_out_of_a_folder_is_named(tmp_path, clip, capsys):
    """Videos and animations in a folder were ignored or taken for one still image, other files dropped in silence."""
    folder = tmp_path / "in"
    for name in ("f1.png", "f2.gif", "f3.png", "f4.png"):
        picture(folder / name)
    moves = Image.new("RGB", (12, 10))
    moves.save(folder / "f2.gif", save_all=True, append_images=[Image.new("RGB", (12, 10), "red")])
    shutil.copy(clip, folder)
    for name in ("photo.heic", "notes.txt", ".DS_Store"):
        (folder / name).touch()
    found = [name for name, _ in pairs([folder])]
    assert found == [*(f"clip/00000{i}" for i in range(5)), "f1", "f2/000000", "f2/000001", "f3", "f4"]
    assert capsys.readouterr().err == f"{folder}: 2 other files left out: notes.txt, photo.heic\n"


def test_animation_frames(tmp_path):
    """The frames of an animated GIF are a sequence; a GIF of one frame is an image."""
    frames = [Image.new("RGB", (12, 10), (80 * i, 0, 255 - 80 * i)) for i in range(4)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    found = list(sample.find([tmp_path / "moves.gif"]))
    assert [i.frame for i in found] == [f"00000{i}" for i in range(4)] and {i.name for i in found} == {"moves"}
    assert [bool(i.next) for i in found] == [True] * 3 + [False]
    for i, item in enumerate(found):
        assert np.abs(item.image()[0, 0].astype(int) - (80 * i, 0, 255 - 80 * i)).max() <= 3
    assert np.array_equal(found[1].next(), found[2].image())
    assert pairs([tmp_path / "moves.gif"], stride=3) == [("moves/000000", True), ("moves/000003", False)]
    assert pairs([tmp_path / "still.gif"]) == [("still", False)]


def test_video_is_streamed(clip, monkeypatch):
    """A video's frames come in order, in RGB, with their numbers, and no more are decoded than were asked for."""
    decoded, original = [], sample.frame_reader(clip)

    def counted(*arguments):
        for number, frame in original(*arguments):
            decoded.append(number)
            yield number, frame
    monkeypatch.setattr(sample, "frame_reader", lambda path: counted)
    inputs = sample.find([clip], stride=2)
    first = next(inputs)
    assert decoded == [0, 2] and first.frame == "000000"
    second, last = inputs
    assert second.frame == "000002" and np.abs(second.image()[0, 0].astype(int) - (100, 0, 0)).max() <= 4
    assert np.array_equal(first.next(), second.image()) and last.next is None


# ---- whole runs ----

def test_pair_writes_every_task(go, tmp_path, tiny_model):
    """A pair gives the arrays of all tasks, of the promised shape, type and range, and a panel."""
    a, b = picture(tmp_path / "a.png", (32, 48)), picture(tmp_path / "b.png", (32, 48))
    assert go(a, b)[0] == 0
    folder = tmp_path / "out" / "a"
    frames = [torch.from_numpy(sample.read_image(p)).permute(2, 0, 1)[None] / 127.5 - 1 for p in (a, b)]
    predicted = tiny_model.predict(*frames)
    for t, task in TASKS.items():
        array, expected = np.load(folder / f"{t}.npy"), predicted[t][0].permute(1, 2, 0).numpy()
        if task.categorical:
            assert array.dtype == np.uint8 and np.array_equal(array, expected[..., 0])
        else:
            expected = expected[..., 0] if task.channels == 1 else expected
            assert array.dtype == np.float32 and array.shape == expected.shape
            tiny.close(array, expected)
        assert Image.open(folder / f"{t}.png").size == (48, 32)
    assert np.allclose(np.linalg.norm(np.load(folder / "normal.npy"), axis=2), 1, atol=1e-4)
    for t in ("depth", "shading", "albedo"):
        assert np.load(folder / f"{t}.npy").min() >= 0 and np.load(folder / f"{t}.npy").max() <= 1
    panel = Image.open(folder / "panel.png")
    assert panel.width > 3 * 48 * 6 and panel.height > 3 * 32 * 6     # three columns and rows, each enlarged sixfold
    names = {"panel.png", "made_from.json", *(f"{t}.{e}" for t in TASKS for e in ("png", "npy"))}
    assert {p.name for p in folder.iterdir()} == names


@pytest.mark.parametrize("name, mode, size", [
    ("grey.png", "L", (20, 30)), ("grey_alpha.png", "LA", (20, 30)), ("rgba.png", "RGBA", (20, 30)),
    ("palette.png", "P", (20, 30)), ("cmyk.jpg", "CMYK", (20, 30)), ("sixteen.png", "I;16", (20, 30)),
    ("rotated.jpg", "RGB", (20, 30)), ("moves.gif", "RGB", (20, 30)), ("pixel.png", "RGB", (1, 1)),
    ("odd.png", "RGB", (13, 29)), ("large.jpg", "L", (3000, 4000)), ("strip.png", "RGB", (17, 2000)),
    ("line.png", "RGB", (1, 30000))])
def test_any_image(go, tmp_path, name, mode, size):
    """Every mode, an EXIF rotation, an animation, one pixel, 12 megapixels and strips end in arrays of the size that a
    viewer shows."""
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
    smaller = ("--size", 64) if max(size) < 10000 else ()
    assert go(path, "--tasks", "shading", "--stage", 1, *smaller)[0] == 0
    found = list((tmp_path / "out").rglob("shading.npy"))
    shown = size[::-1] if "exif" in options else size
    assert len(found) == (2 if "save_all" in options else 1)
    for array in map(np.load, found):
        assert array.shape == shown and np.isfinite(array).all()


def test_memory_stays_level(go, tmp_path, monkeypatch):
    """However many images a folder holds, only a few of them are in memory at a time."""
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
    assert code == 0 and f"without a second frame: {', '.join(FLOWS)} skipped" in said
    assert {p.stem for p in (tmp_path / "out/x").glob("*.npy")} == set(TASKS) - set(FLOWS)


def test_video_run(go, tmp_path, clip):
    """A video gives one folder per frame, the last frame has no flow; another video of that name gets its own."""
    flags = ("--tasks", "optical_flow,albedo", "--stage", 1, "--stride", 2)
    code, said, _ = go(clip, *flags)
    frames = [f"clip/{n}" for n in ("000000", "000002", "000004")]
    assert code == 0 and outputs(tmp_path) == frames and "1 without a second frame" in said
    assert [(tmp_path / "out" / f / "optical_flow.npy").exists() for f in frames] == [True, True, False]
    (tmp_path / "other").mkdir()
    shutil.copy(clip, tmp_path / "other")
    assert go(tmp_path / "other" / "clip.avi", *flags)[1].startswith("3 predicted")
    assert outputs(tmp_path) == sorted([*frames, *(f.replace("clip", "clip-2") for f in frames)])


def test_toy_sample_shows_labels(go, tmp_path, monkeypatch):
    """A toy sample's panel has a label beside each prediction."""
    titles, draw = [], results.draw_panel

    def recorded(cells, *arguments):
        titles.extend(title for title, _ in cells)
        return draw(cells, *arguments)
    monkeypatch.setattr(results, "draw_panel", recorded)
    assert go("--toy", "real:3", "--tasks", "depth,albedo", "--stage", 1)[0] == 0
    assert [t.split(",")[0] for t in titles] == ["image", "second frame", "depth label", "depth predicted",
                                                 "albedo label", "albedo predicted"]
    assert outputs(tmp_path) == ["real-3"]


def test_a_toy_sample_is_single_if_asked(go, tmp_path):
    """--single was ignored beside --toy, and the second frame used."""
    code, said, _ = go("--toy", "real:3", "--single", "--tasks", "depth,optical_flow", "--stage", 1)
    assert code == 0 and "without a second frame: optical_flow skipped" in said
    assert maps(tmp_path / "out/real-3").keys() == {"depth.npy"}


def test_attention_rows_sum_to_one(go, tmp_path):
    """--attention reports, per main task and block, weights over the others that sum to one, blocks as they run."""
    assert go(picture(tmp_path / "x.png"), "--attention", "--tasks", "depth,normal")[0] == 0
    table = json.loads((tmp_path / "out/x/attention.json").read_text())
    assert set(table["attention"]) == set(table["mean"]) == {"depth", "normal"}
    for main, rows in table["attention"].items():
        assert list(rows) == ["down.0.0", "mid.0", "up.1.0", "up.1.1"]
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


# ---- what is kept ----

def test_finished_inputs_are_kept(go, tmp_path, monkeypatch):
    """A second run computes only what is missing, --overwrite everything; killed before its end is unfinished."""
    for i in (1, 2, 3):
        picture(tmp_path / "in" / f"f{i}.png")
    flags, panel = (tmp_path / "in", "--tasks", "depth,optical_flow", "--stage", 1), tmp_path / "out/f1/panel.png"
    assert go(*flags, "--limit", 2)[0] == 0 and outputs(tmp_path) == ["f1", "f2"]
    assert set(maps(tmp_path / "out/f2")) == {"depth.npy", "optical_flow.npy"}    # its next is beyond the limit
    stamp = panel.stat().st_mtime_ns
    code, said, _ = go(*flags)
    assert code == 0 and said.startswith("1 predicted") and "2 already finished" in said
    assert outputs(tmp_path) == ["f1", "f2", "f3"] and not (tmp_path / "out/f3/optical_flow.npy").exists()
    assert panel.stat().st_mtime_ns == stamp
    assert go(*flags, "--overwrite")[1].startswith("3 predicted") and panel.stat().st_mtime_ns != stamp
    monkeypatch.setattr(results, "draw_panel", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(*flags, "--overwrite")
    monkeypatch.undo()
    assert go(*flags)[1].startswith("1 predicted")
    note = json.loads((tmp_path / "out/f2/made_from.json").read_text())
    for foreign in ({"input": 3}, [], {"input": note["input"], "key": note["key"]}):
        (tmp_path / "out/f2/made_from.json").write_text(json.dumps(foreign))
        assert go(*flags)[1].startswith("1 predicted")


def test_stale_results_are_not_kept(go, tmp_path, tiny_ckpt_1, monkeypatch):
    """Another picture under the same path, another checkpoint, stage, size, next frame or code gave the old maps,
    reported as finished, because only the files' names were looked at."""
    a, b, c = (picture(tmp_path / f"{n}.png", (32, 48)) for n in "abc")
    folder, flags = tmp_path / "out/a", ("--tasks", "depth,optical_flow")
    copy = shutil.copytree(tiny_ckpt_1, tmp_path / "copy")

    def changes(*arguments, **options):
        before = maps(folder)
        said = go(*arguments, *flags, **options)[1]
        assert said.startswith("1 predicted") == (maps(folder) != before), said
        return maps(folder) != before
    assert changes(a, b) and not changes(a, b)
    assert changes(a, b, "--stage", 1) and changes(a, b, "--size", 64)
    assert changes(a, b, ckpt=copy) and not changes(a, b, ckpt=copy)
    assert changes(a, c, ckpt=copy)
    picture(a, (32, 48))
    assert changes(a, c, ckpt=copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert go(a, c, *flags, ckpt=copy)[1].startswith("1 predicted")
    shutil.copytree(copy / "unet", copy / "decoder")    # of tools.distil: it is no part of the model
    assert "1 already finished" in go(a, c, *flags, ckpt=copy)[1]
    monkeypatch.setattr(sample, "source_files", lambda: [Path(__file__)])       # other code
    assert go(a, c, *flags, ckpt=copy)[1].startswith("1 predicted")


def test_maps_of_two_checkpoints_do_not_mix(go, tmp_path, tiny_ckpt_1):
    """Fewer tasks of another checkpoint leave no map of the first one; fewer or further ones of the same keep all."""
    a = picture(tmp_path / "a.png")
    assert go(a, "--tasks", "depth,normal,albedo")[0] == 0
    assert "1 already finished" in go(a, "--tasks", "depth")[1]
    assert go(a, "--tasks", "shading")[1].startswith("1 predicted")
    assert set(maps(tmp_path / "out/a")) == {"depth.npy", "normal.npy", "albedo.npy", "shading.npy"}
    assert "1 already finished" in go(a, "--tasks", "normal,shading")[1]
    assert go(a, "--tasks", "depth", ckpt=tiny_ckpt_1)[1].startswith("1 predicted")
    assert {p.name for p in (tmp_path / "out/a").iterdir()} == {"depth.npy", "depth.png", "panel.png", "made_from.json"}


def test_inputs_of_one_name_get_folders_of_their_own(go, tmp_path):
    """Files of one name do not overwrite each other's results, in one call or in several."""
    first, second, third = (picture(tmp_path / n / "1.png") for n in "abc")
    flags = ("--tasks", "depth", "--stage", 1)
    assert go(first.parent, second.parent, *flags)[0] == 0 and outputs(tmp_path) == ["1", "1-2"]
    old = maps(tmp_path / "out/1")
    assert go(third, *flags)[1].startswith("1 predicted") and outputs(tmp_path) == ["1", "1-2", "1-3"]
    assert maps(tmp_path / "out/1") == old
    for path in (first, second, third):
        assert "1 already finished" in go(path, *flags)[1]


def test_what_is_not_ours_stays(go, tmp_path, monkeypatch):
    """A folder of the input's name, with the user's own depth.npy, lost it, and a file in its place ended in Errno 17.
    A folder whose first run was killed is taken again, that of a video, too."""
    flags, output, moves = ("--tasks", "depth", "--stage", 1), tmp_path / "out", tmp_path / "z.gif"
    Image.new("L", (12, 10)).save(moves, save_all=True, append_images=[Image.new("L", (12, 10), 255)])
    for name in "xz":
        (output / name).mkdir(parents=True)
    mine = {output / "x/depth.npy": b"a label", output / "x/albedo.png": b"another", output / "y": b"a file"}
    for path, data in mine.items():
        path.write_bytes(data)
    (output / "y-2").symlink_to("nowhere")
    for path in picture(tmp_path / "x.png"), picture(tmp_path / "y.png"), moves:
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(results, "draw_panel", lambda *a: 1 / 0)
            go(path, *flags)
        assert go(path, *flags)[0] == 0 and "already finished" in go(path, *flags)[1]
    assert outputs(tmp_path) == ["x-2", "y-3", "z/000000", "z/000001"]
    assert all(path.read_bytes() == data for path, data in mine.items())


def test_a_file_that_comes_twice_is_refused(go, tmp_path):
    """The later one, which has no second frame, took away the flow of the earlier one. A pair may be of one file."""
    folder, flags = tmp_path / "in", ("--tasks", "depth,optical_flow", "--stage", 1)
    x1, x2 = picture(folder / "x1.png"), picture(folder / "x2.png")
    for paths in (x1, x2, x1), (folder, x1), (folder, folder):
        code, _, error = go(*paths, *flags)
        assert code == 2 and f"{x1} comes twice" in error and not (tmp_path / "out").exists()
    (folder / "x3.png").symlink_to(x2)      # of a name of its own
    assert pairs([folder]) == [("x1", True), ("x2", True), ("x3", False)] and pairs([x1, x1]) == [("x1", True)]


# ---- mistakes ----

def test_skip_bad_goes_on(go, tmp_path):
    """--skip-bad names and counts an unreadable file and predicts the others."""
    picture(tmp_path / "in" / "good.png")
    for name in ("bad.png", "bad.gif", "bad.mp4"):
        (tmp_path / "in" / name).write_bytes(b"GIF89a"[:6 * name.endswith("gif")])
    code, said, error = go(tmp_path / "in", "--tasks", "depth", "--stage", 1, "--skip-bad")
    assert code == 0 and outputs(tmp_path) == ["good"] and "3 unreadable" in said
    assert all(f"{name} " in error for name in ("bad.png", "bad.gif", "bad.mp4"))


def test_a_damaged_video_is_an_error_after_what_can_be_read(go, tmp_path, clip):
    """A video that ends early gave its frames and exit code 0."""
    data = clip.read_bytes()
    clip.write_bytes(data[:[chunk.start() for chunk in re.finditer(b"00dc", data)][3]])     # of five frames
    good = picture(tmp_path / "good.png")
    code, _, error = go(clip, good, "--tasks", "depth", "--stage", 1)
    done = outputs(tmp_path)
    assert code == 2 and f"{clip} is damaged, 2 of 5 frames could be read" in error
    assert done == ["clip/000000", "clip/000001"]
    assert go(clip, "--tasks", "optical_flow", "--stage", 1)[0] == 2
    code, said, error = go(clip, good, "--tasks", "depth", "--stage", 1, "--skip-bad")
    assert code == 0 and outputs(tmp_path) == [*done, "good"] and f"skipped: {clip} is damaged" in error
    assert said.startswith("1 predicted") and "2 already finished" in said and "1 unreadable" in said


def test_a_full_disk_leaves_no_half_file(go, tmp_path):
    """What does not fit is named with the cause, and no truncated picture or array stays behind."""
    x = picture(tmp_path / "x.png", (200, 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))     # a depth map has 240,128 bytes
    try:
        code, _, error = go(x, "--tasks", "depth", "--stage", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and f"{tmp_path}/out/x/depth.npy cannot be written (File too large): make room" in error
    assert {p.name for p in (tmp_path / "out/x").iterdir()} <= {"depth.png", "made_from.json"}
    assert go(x, "--tasks", "depth", "--stage", 1)[1].startswith("1 predicted")


def test_maps_without_numbers_are_refused(go, tmp_path, monkeypatch):
    """A network that gives NaN ended in exit code 0 and a depth.npy full of them."""
    decode = StableMTL.decode
    monkeypatch.setattr(StableMTL, "decode", lambda self, z: decode(self, z) * torch.nan)
    code, _, error = go(picture(tmp_path / "x.png"), "--tasks", "depth,albedo")
    assert code == 2 and "prediction of depth, albedo is not finite" in error and not (tmp_path / "out").exists()


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
