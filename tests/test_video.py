"""Videos: films hold one scale of colours, memory does not grow, and the flicker is what its definition says."""
import json
import re
import shutil
from functools import lru_cache, partial

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from cli import run
from inference import video
from inference.video import Flicker, Place, changed, clip_scale, films, runs
from model import StableMTL
from tasks import TASKS

rng = np.random.default_rng(0)
load = lru_cache(StableMTL.load)
FLOWS = ("--tasks", "depth,optical_flow", "--stage", 1)


def pictures(path):
    """Every picture of an MP4 file, (H,W,3) RGB."""
    reader, out = cv2.VideoCapture(str(path)), []
    while (frame := reader.read()[1]) is not None:
        out.append(frame[..., ::-1])
    return out


@pytest.fixture
def shots(tmp_path):
    """Five numbered frames of a moving texture, in a folder."""
    wall = cv2.resize(rng.integers(0, 256, (20, 30, 3), np.uint8), (120, 80), interpolation=cv2.INTER_CUBIC)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(wall[8:40, 3 * i:3 * i + 48]).save(folder / f"f{i}.png")
    return folder


@pytest.fixture
def go(tiny_ckpt, tmp_path, capsys, monkeypatch):
    """go(*arguments) -> (exit code, stdout, stderr); results in tmp_path/out."""
    monkeypatch.setattr(StableMTL, "load", load)

    def call(*arguments):
        argv = [*map(str, arguments), "--ckpt", str(tiny_ckpt), "--output", str(tmp_path / "out")]
        return (run(partial(sample.main, argv)), *capsys.readouterr())
    return call


# ---- the command ----

def test_a_sequence_becomes_films(go, shots, tmp_path):
    """One film per task and one of the panel, at the rate asked for; the last frame has no motion."""
    code, said, _ = go(shots, *FLOWS, "--video", "--fps", 5)
    folder = tmp_path / "out/f0_to_f4"
    assert code == 0 and f"5 frames, in {folder / 'panel.mp4'}; flicker over " in said
    assert {p.name for p in folder.iterdir()} == {"depth.mp4", "optical_flow.mp4", "panel.mp4"}
    assert [len(pictures(folder / f"{t}.mp4")) for t in ("depth", "optical_flow", "panel")] == [5, 4, 5]
    assert cv2.VideoCapture(str(folder / "depth.mp4")).get(cv2.CAP_PROP_FPS) == 5
    assert pictures(folder / "depth.mp4")[0].shape == (32 * 6, 48 * 6, 3)        # as in panels
    assert go(shots, *FLOWS, "--video")[1].startswith("0 predicted")        # what is there is filmed anew
    assert cv2.VideoCapture(str(folder / "depth.mp4")).get(cv2.CAP_PROP_FPS) == video.FPS


@pytest.mark.parametrize("fps, own", [(66.667, 66.67), (999.99, 1000), (59.94, 59.94)])
def test_films_at_any_rate(tmp_path, fps, own):
    """MPEG-4 cannot tell 66.667: to make room, it was said, when all was predicted."""
    with films(tmp_path, ["a"], fps) as reels:
        for value in (40, 200):
            reels["a"].add(np.full((32, 48, 3), value, np.uint8))
    assert cv2.VideoCapture(str(tmp_path / "a.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(own, abs=1e-3)


def test_films_of_long_names(go, shots, tmp_path):
    """The name of their folder was longer than file systems take: Errno 36, when all was predicted."""
    long = "ä" * 100
    for i in range(5):
        (shots / f"f{i}.png").rename(shots / f"{long}{i}.png")
    code, said, _ = go(shots, "--tasks", "depth", "--stage", 1, "--video")
    film, = (tmp_path / "out").rglob("depth.mp4")
    assert code == 0 and str(film.parent) in said and len(pictures(film)) == 5
    assert video.clip_name(f"{long}0", f"{long}4") == film.parent.name != video.clip_name(f"{long}0", f"{long}3")


def test_a_video_is_filmed_beside_its_frames_at_its_own_rate(go, clip, tmp_path):
    """Films come to the folder of the video's frames; every second frame at half the rate."""
    assert go(clip, "--tasks", "albedo", "--stage", 1, "--stride", 2, "--video")[0] == 0
    film = tmp_path / "out/clip/albedo.mp4"
    assert len(pictures(film)) == 3
    own = cv2.VideoCapture(str(clip)).get(cv2.CAP_PROP_FPS)
    assert cv2.VideoCapture(str(film)).get(cv2.CAP_PROP_FPS) == pytest.approx(own / 2)


def test_gaps_divide_clips(go, shots, tmp_path):
    """Frames that do not follow one another are no clip: an unreadable file and a gap divide; one frame is no film."""
    (shots / "f2.png").write_bytes(b"")
    for i in (7, 8):
        shutil.copy(shots / "f0.png", shots / f"f{i}.png")
    code, said, _ = go(shots, "--tasks", "depth", "--stage", 1, "--video", "--skip-bad")
    filmed = sorted(p.parent.name for p in (tmp_path / "out").rglob("panel.mp4"))
    assert code == 0 and filmed == ["f0_to_f1", "f3_to_f4", "f7_to_f8"] and said.count("flicker") == 3


def test_another_size_divides_clips(go, shots, tmp_path):
    """With --skip-bad a frame before one of another size is predicted alone, and its film ends there."""
    for i in (3, 4):
        Image.open(shots / f"f{i}.png").resize((32, 24)).save(shots / f"f{i}.png")
    code, said, error = go(shots, "--tasks", "depth", "--stage", 1, "--video", "--skip-bad")
    filmed = sorted(p.parent.name for p in (tmp_path / "out").rglob("panel.mp4"))
    assert code == 0 and filmed == ["f0_to_f2", "f3_to_f4"] and said.startswith("5 predicted")
    assert "f2 without its next frame: f2 has " in error


@pytest.mark.parametrize("flags, why", [
    (["--video", "--single"], "--video films a sequence"), (["--toy", "real:3", "--video"], "--video films a sequence"),
    (["--fps", "5"], "--fps would do nothing here: it goes with --video"),
    (["--camera", "1,2,3,4,5"], "--camera would do nothing here: it goes with --pixels"),
    (["--pixels", "--camera", "1,2,3"], "expected five number"), (["--pixels", "--camera", "a,2,3,4,5"], "a,2,3"),
    (["--pixels", "--camera", "0,1,1,1,2"], "expected focal length"),
    (["--pixels", "--camera", "40,nan,1,1,2"], "all finite")])
def test_mistakes_end_in_a_sentence(go, shots, flags, why):
    """Flags that would do nothing are refused, and no camera is invented."""
    code, said, error = go(*([] if "--toy" in flags else [shots]), *flags)
    assert code == 2 and why in error and not said


@pytest.mark.parametrize("names, flags", [
    (["f0.png"], []), (["f0.png", "f1.png"], []), ([""], ["--limit", "1"]),
    ([""], ["--tasks", "optical_flow"])])
def test_nothing_to_film_is_said_before_the_work(go, shots, tmp_path, names, flags):
    """It was said when all was predicted. A pair makes one map, and two frames one of motion."""
    for k in (2, 3, 4):
        (shots / f"f{k}.png").unlink()
    code, said, error = go(*(shots / name for name in names), "--video", *flags)
    assert code == 2 and "nothing to film" in error and not said and not (tmp_path / "out").exists()


def test_what_turns_out_to_be_alone_is_kept(go, shots):
    """Where the next frame cannot be read, what is predicted stays; that there is nothing to film is said."""
    (shots / "f1.png").write_bytes(b"no image")
    code, said, error = go(shots, "--limit", 2, "--tasks", "depth", "--stage", 1, "--video", "--skip-bad")
    assert code == 2 and "nothing to film" in error and said.startswith("1 predicted")


def test_memory_does_not_grow(go, shots, monkeypatch):
    """While films are made, only a few frames' maps are in memory, however long the clip is."""
    for i in range(5, 14):
        shutil.copy(shots / "f0.png", shots / f"f{i}.png")
    import weakref
    seen, most, read = [], [], video.read_map

    def counted(*arguments):
        x = read(*arguments)
        if x is not None:
            seen.append(weakref.ref(x))
        most.append(sum(r() is not None for r in seen))
        return x
    monkeypatch.setattr(video, "read_map", counted)
    assert go(shots, *FLOWS, "--video")[0] == 0
    assert len(seen) == 2 * (14 + 13) and max(most) <= 5


# ---- confidence and pixels on the command line ----

def test_confidence_is_written_beside_each_map(go, shots, tmp_path):
    """confidence_<task>.npy of the input's size in [0,1] and its picture; the maps are those without it."""
    pair = shots / "f0.png", shots / "f1.png"
    assert go(*pair, *FLOWS)[0] == 0
    plain = {p.name: p.read_bytes() for p in (tmp_path / "out/f0").glob("*.npy")}
    assert go(*pair, *FLOWS, "--confidence")[1].startswith("1 predicted")
    for t in ("depth", "optical_flow"):
        certain = np.load(tmp_path / f"out/f0/confidence_{t}.npy")
        assert certain.shape == (32, 48) and certain.dtype == np.float32 and 0 <= certain.min() < certain.max() <= 1
        shown = np.asarray(Image.open(tmp_path / f"out/f0/confidence_{t}.png"))
        assert np.abs(shown / 255 - certain).max() <= 0.51 / 255
    assert all((tmp_path / "out/f0" / name).read_bytes() == data for name, data in plain.items())
    assert "1 already finished" in go(*pair, *FLOWS, "--confidence")[1]


def test_pixels_scale_the_array_or_say_why_not(go, shots, tmp_path, monkeypatch):
    """The written flow is the predicted one times scales.json; where these are not found, it says so and stays."""
    pair = shots / "f0.png", shots / "f1.png"
    go(*pair, *FLOWS)
    plain = np.load(tmp_path / "out/f0/optical_flow.npy")
    # an untrained network finds no motion
    monkeypatch.setattr("inference.photometric._unsure", lambda level, pixels: "")
    assert "stays up to scale" not in go(*pair, *FLOWS, "--pixels")[1]
    scales = json.loads((tmp_path / "out/f0/scales.json").read_text())["optical_flow"]["scales"]
    np.testing.assert_allclose(np.load(tmp_path / "out/f0/optical_flow.npy"), plain * scales, rtol=1e-5)
    monkeypatch.setattr("inference.photometric._unsure", lambda level, pixels: "it is dark")
    assert "1 x optical_flow stays up to scale: it is dark" in go(*pair, *FLOWS, "--pixels", "--overwrite")[1]
    assert json.loads((tmp_path / "out/f0/scales.json").read_text())["optical_flow"]["scales"] is None
    assert np.array_equal(np.load(tmp_path / "out/f0/optical_flow.npy"), plain)
    go(*pair, *FLOWS)
    assert not (tmp_path / "out/f0/scales.json").exists()


def test_maps_of_other_settings_go_with_a_notice(go, shots, clip, tmp_path):
    """Without --pixels, the maps, confidences and scales made with it were deleted without a word. One notice for all
    inputs names the folder; what is only added to, or made again, gives none."""
    inputs = shots, clip
    for flags in (("--pixels",), ("--pixels", "--confidence"), ("--pixels", "--overwrite")):
        code, _, told = go(*inputs, *FLOWS, *flags)
        assert code == 0 and "notice" not in told
    assert go(clip, *FLOWS, "--pixels", "--video")[0] == 0
    names = "f0/scales.json", "clip/000001/confidence_depth.npy", "clip/depth.mp4"
    lost = [tmp_path / "out" / name for name in names]
    assert all(path.exists() for path in lost)
    _, said, told = go(*inputs, *FLOWS)
    assert said.startswith("10 predicted") and not any(path.exists() for path in lost)
    assert told.count("notice") == 1 and re.search(f"notice: maps in {tmp_path / 'out'} were .*another --output", told)
    assert "notice" not in go(*inputs, *FLOWS)[2]


def test_the_note_of_a_flow_states_its_unit(go, shots, tmp_path, monkeypatch):
    """Other formats have a note beside them: up to scale, or pixels; films need the arrays as NPY."""
    pair, form = (shots / "f0.png", shots / "f1.png"), ("--tasks", "optical_flow", "--stage", 1, "--format", "flo")
    note = tmp_path / "out/f0/optical_flow.flo.json"
    go(*pair, *form)
    assert json.loads(note.read_text())["unit"] == TASKS["optical_flow"].unit
    monkeypatch.setattr("inference.photometric._unsure", lambda level, pixels: "")
    go(*pair, *form, "--pixels")
    assert json.loads(note.read_text())["unit"] == "pixels (u, v)"
    assert "name npy as well" in go(shots, *form, "--video")[2]


# ---- colours ----

@pytest.mark.parametrize("name", TASKS)
def test_a_scale_holds_for_other_maps(name):
    """A map coloured in its own scale, given or not, looks the same; half of it in the whole one's scale does not look
    like the whole, unless its colours never change."""
    task = TASKS[name]
    x = torch.rand(task.channels, 6, 8, generator=torch.Generator().manual_seed(1)) * (7 if task.categorical else 1)
    everywhere = torch.ones(6, 8, dtype=torch.bool)
    scale = task.scale(x, everywhere)
    assert np.array_equal(task.colour(x, everywhere), task.colour(x, everywhere, scale))
    own, held = task.colour(x / 2, everywhere), task.colour(x / 2, everywhere, scale)
    assert np.array_equal(own, held) == (not scale)
    np.testing.assert_allclose(clip_scale(task, iter([x, x, None])), scale, rtol=1e-6)


def test_most_frames_keep_their_contrast():
    """One frame in twenty with a huge vector does not make all others pale."""
    flow = torch.ones(2, 4, 4)
    frames = [flow * (100 if i == 7 else 1) for i in range(20)]
    (_, longest), _ = clip_scale(TASKS["optical_flow"], frames)
    assert longest == pytest.approx(2 ** 0.5)


# ---- flicker ----

def test_flicker_follows_the_motion():
    """A map that moves with the image does not flicker, although it changes at every pixel; one that stays does."""
    ramp = torch.linspace(1, 2, 40).expand(1, 20, 40) ** 2
    later = torch.roll(ramp, 3, -1)
    motion = torch.tensor([3.0, 0]).view(2, 1, 1).expand(2, 20, 40)
    assert changed(TASKS["shading"], ramp, later, motion) == pytest.approx(0, abs=1e-6)
    assert changed(TASKS["shading"], ramp, later, 0 * motion) > 0.05
    ids = (ramp * 2).long()
    assert changed(TASKS["semantic"], ids, torch.roll(ids, 3, -1), motion) == 0
    assert changed(TASKS["semantic"], ids, ids, motion) == pytest.approx(
        (ids[..., :-3] != ids[..., 3:]).float().mean().item())


def test_flicker_of_a_clip():
    """The mean over pairs whose motion is found, or without flow over all, unwarped."""
    flicker, still = Flicker(), np.full((8, 9, 3), 128, np.uint8)
    for value in (1.0, 1.0, 3.0):
        flicker.add(still, {"shading": torch.full((1, 8, 9), value)})
    figures, counted, pairs = flicker.figures()
    assert figures == {"shading": pytest.approx((0 + 2 / 3) / 2)} and (counted, pairs) == (2, 2)
    lost = Flicker()
    for _ in range(3):
        lost.add(still, {"shading": torch.ones(1, 8, 9), "optical_flow": torch.ones(2, 8, 9)})
    assert lost.figures() == ({}, 0, 2)


# ---- parts ----

def test_runs_of_frames(tmp_path):
    """An input without maps, or without a next one, ends a run."""
    def places(text):
        return [Place(None if c == "x" else tmp_path, c == "-", "") for c in text]
    assert runs(places("--.")) == [(0, 3)] and runs(places(".")) == [(0, 1)]
    assert runs(places("-x-.--")) == [(0, 1), (1, 2), (2, 4), (4, 6)]


def test_films_are_whole_or_not_there(tmp_path):
    """An odd size is filmed; what fails, or cannot be written, leaves the film that was there."""
    with films(tmp_path, ["a", "none"], 10) as reels:
        for value in (40, 200):
            reels["a"].add(np.full((31, 45, 3), value, np.uint8))
    before = (tmp_path / "a.mp4").read_bytes()
    assert [round(p.mean() / 40) for p in pictures(tmp_path / "a.mp4")] == [1, 5]
    assert {p.name for p in tmp_path.iterdir()} == {"a.mp4"}
    with pytest.raises(ZeroDivisionError), films(tmp_path, ["a"], 10) as reels:
        reels["a"].add(np.full((31, 45, 3), 90, np.uint8))
        reels["a"].add(1 / 0)
    with pytest.raises(OSError, match="cannot be written"), films(tmp_path / "absent", ["a"], 10) as reels:
        reels["a"].add(np.full((31, 45, 3), 90, np.uint8))
    assert {p.name for p in tmp_path.iterdir()} == {"a.mp4"} and (tmp_path / "a.mp4").read_bytes() == before
