"""Maps as files: what is written comes back, as a map and as a label of one's own data."""
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from raw import picture, write

from evaluate import PAPER_TASKS
from readers.exports import FORMATS, decode, encode, fits, note_of, parse_formats, save
from readers.folder import Folder
from tasks import TASKS

CELLS = [(name, form) for name in PAPER_TASKS for form in FORMATS if fits(TASKS[name], form)]
STEP = {"depth": (9 - 0.5) / 65534, "optical_flow": 20 / 32767, "normal": 2 / 65535, "shading": 1 / 65535,
        "albedo": 1 / 65535, "semantic": 0}     # of the 16-bit numbers below


def a_map(name):
    """Some label of a task, (6,8,C), which spans what the formats must hold, and its mask."""
    g, valid = np.random.default_rng(3), np.ones((6, 8), bool)
    if name == "semantic":
        ids = g.integers(0, 8, (6, 8, 1), np.uint8)
        ids[0, 0] = 255
        return ids, ids[..., 0] != 255
    x = g.standard_normal((6, 8, TASKS[name].channels))
    if name == "normal":
        x[..., 2] = abs(x[..., 2])
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
    elif name == "depth":
        x = np.clip(abs(x) * 5, 0.5, 9)
        x[1, 1], x[2, 2] = 0.5, 9
    elif "flow" in name:
        x = np.clip(x * 10, -20, 20)
        x[3, 3], x[4, 4] = -20, 0
    else:
        x = g.random(x.shape)
    return x.astype(np.float32), valid


def put(folder, stem, x, name, form):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{FORMATS[form]}"
    save(path, x, TASKS[name], form)
    return path


def test_formats_follow_from_what_a_task_is():
    """Classes, vectors, motion, intensities: each as promised, and for a new task nothing need be told."""
    assert {name: [f for n, f in CELLS if n == name] for name in PAPER_TASKS} == {
        "semantic": ["npy", "png16"], "normal": ["npy", "png16", "exr"], "depth": ["npy", "png16", "exr"],
        "optical_flow": ["npy", "png16", "flo"], "scene_flow": ["npy", "exr"],
        "shading": ["npy", "png16", "exr"], "albedo": ["npy", "png16", "exr"]}
    new = replace(TASKS["shading"], name="new", channels=5)
    assert [f for f in FORMATS if fits(new, f)] == ["npy"]


@pytest.mark.parametrize("name, form", CELLS)
def test_what_is_written_is_read_as_a_label(tmp_path, name, form):
    """Every format of every task, put into a folder of one's own with the note beside it: the same within half a step
    of the 16 bits, exactly elsewhere; the mask survives where the format has a mark."""
    x, valid = a_map(name)
    marks = name != "semantic" and (form != "png16" or name in ("depth", "optical_flow"))
    if marks:
        x[5, 5], valid[5, 5] = np.nan, False
    write(tmp_path / "images/p.png", picture(6, 8))
    write(tmp_path / "next/p.png", picture(6, 8))
    path = put(tmp_path / name, "p", x, name, form)
    assert note_of(path).exists() == (form != "npy")
    s = Folder(tmp_path, "train").load(0, [name])
    label, mask = s["labels"][name], s["valid"][name]
    assert (mask == valid).all()
    error = np.abs(label.astype(float) - x)[mask].max()
    if form == "png16":
        assert error <= 0.51 * STEP[name] + 1e-6
    else:
        assert error == 0 if name != "normal" else error < 1e-6     # which the reader makes unit vectors again
    raw = decode(path, TASKS[name])
    assert (np.isfinite(raw).all(-1) & (raw[..., 0] != 255) == valid).all()


@pytest.mark.parametrize("name, form", [c for c in CELLS if c[1] == "png16" and c[0] != "semantic"])
def test_notes_say_how_to_get_the_values_back(tmp_path, name, form):
    """value = stored x scale + offset, with nothing but OpenCV and the note; unit and task stand beside it."""
    x, _ = a_map(name)
    path = put(tmp_path, "p", x, name, form)
    note, stored = json.loads(note_of(path).read_text()), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16 and note["task"] == name and note["unit"] == TASKS[name].unit
    stored = stored[..., None] if stored.ndim == 2 else stored[..., ::-1]
    values = stored[..., :x.shape[-1]] * note["scale"] + note["offset"]
    assert np.abs(values - x).max() <= 0.51 * STEP[name] + 1e-6


def test_a_flow_is_in_the_layout_of_kitti(tmp_path):
    """Zero is exactly 32768, u is red, B = 1 marks what is known: a reader of KITTI's files gets it up to one scale."""
    x, _ = a_map("optical_flow")
    x[5, 5] = np.nan
    stored = cv2.imread(str(put(tmp_path, "p", x, "optical_flow", "png16")), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert (stored[4, 4] == (32768, 32768, 1)).all() and (stored[5, 5, 2] == 0) and stored[..., 2].sum() == 47
    kitti = (stored[..., :2].astype(float) - 32768) / 64
    known = stored[..., 2] > 0
    ratio = kitti[known] / np.where(x[known] == 0, np.nan, x[known])
    assert np.nanmax(ratio) == pytest.approx(np.nanmin(ratio), rel=0.02) and (np.nanmin(ratio) > 0)


@pytest.mark.parametrize("name", ["depth", "optical_flow"])
@pytest.mark.parametrize("what", ["constant", "zero", "unknown"])
def test_maps_without_a_range(tmp_path, name, what):
    """A constant, a zero and a wholly unknown map keep their values: no division by their range."""
    x = np.full((3, 4, TASKS[name].channels), {"constant": 2.5, "zero": 0, "unknown": np.nan}[what], np.float32)
    back = decode(put(tmp_path, "p", x, name, "png16"), TASKS[name])
    assert np.allclose(back, x, atol=1e-6, equal_nan=True)


def test_unknown_pixels_without_a_mark_are_refused():
    """A 16-bit albedo has no number to spare: it says which formats have a mark."""
    x, _ = a_map("albedo")
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="albedo with unknown pixels does not fit png16.*use exr or npy"):
        encode(x, TASKS["albedo"], "png16")


# ---- files of other programs ----

def test_pictures_without_a_note_are_in_the_usual_convention(tmp_path):
    """Millimetres, KITTI's 1/64 pixel, normals of 8 and 16 bits; 0, B = 0 and black are unknown."""
    def read(name, stored):
        return decode(write(tmp_path / f"{name}.png", stored), TASKS[name])
    assert np.allclose(read("depth", np.uint16([[0, 1500]]))[..., 0], [[np.nan, 1.5]], equal_nan=True)
    flow = read("optical_flow", np.uint16([[[32768 + 96, 32768 - 640, 1], [0, 0, 0]]]))
    assert (flow[0, 0] == (1.5, -10)).all() and np.isnan(flow[0, 1]).all()
    assert np.allclose(read("normal", np.uint8([[[255, 0, 51]]])), (1, -1, -0.6))
    assert np.allclose(read("normal", np.uint16([[[65535, 0, 13107]]])), (1, -1, -0.6))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("nothing", [0, 0.5])
def test_pictures_of_normals_are_labels(tmp_path, kind, nothing):
    """Most programs write normals so, and sky as black or as grey: unit vectors, sky invalid, even if it prevails."""
    most = np.iinfo(kind).max
    stored = np.tile(np.round(np.array([0.5, 0.5, 1]) * most), (6, 8, 1)).astype(kind)
    stored[:4] = nothing * most
    write(tmp_path / "images/p.png", picture(6, 8))
    write(tmp_path / "normal/p.png", stored)
    s = Folder(tmp_path, "train").load(0, ["normal"])
    valid = s["valid"]["normal"]
    assert not valid[:4].any() and valid[4:].all() and np.allclose(s["labels"]["normal"][valid], (0, 0, 1), atol=0.01)


@pytest.mark.parametrize("ending", [".npy", ".exr"])
def test_unknown_depth_is_invalid(tmp_path, ending):
    """Renderers write 1e10 m for sky: it set the scale of the whole map."""
    x = np.full((6, 8), 3, np.float32)
    x[0, 0], x[0, 1], x[0, 2] = 1e10, np.inf, 0
    write(tmp_path / "images/p.png", picture(6, 8))
    write(tmp_path / f"depth/p{ending}", x)
    s = Folder(tmp_path, "train").load(0, ["depth"])
    assert s["valid"]["depth"].sum() == 45 and s["labels"]["depth"].max() == 3


def test_exr_of_one_channel_may_have_three(tmp_path):
    """Many programs write grey as RGB. Colour is refused where one channel is expected."""
    x, _ = a_map("depth")
    assert (decode(write(tmp_path / "a.exr", x.repeat(3, -1)), TASKS["depth"]) == x).all()
    with pytest.raises(ValueError, match="b.exr holds a colour picture: expected one channel"):
        decode(write(tmp_path / "b.exr", np.arange(144, dtype=np.float32).reshape(6, 8, 3)), TASKS["depth"])
    with pytest.raises(ValueError, match="c.exr .*no colour picture in it"):
        decode(write(tmp_path / "c.exr", x[..., 0]), TASKS["normal"])


@pytest.mark.parametrize("note, message", [
    ("{", "p.png.json is damaged"), ("{}", "scale is missing or null, expected a number"),
    ('{"scale": "1", "offset": 0}', 'scale is "1", expected a number')])
def test_damaged_notes_are_named(tmp_path, note, message):
    path = write(tmp_path / "p.png", np.ones((6, 8), np.uint16))
    note_of(path).write_text(note)
    with pytest.raises(ValueError, match=message):
        decode(path, TASKS["depth"])


def test_notes_are_no_labels(tmp_path, capsys):
    """In a folder of one's own they lie beside their files and are not told as files that are not read."""
    write(tmp_path / "images/p.png", picture(6, 8))
    put(tmp_path / "depth", "p", a_map("depth")[0], "depth", "png16")
    (tmp_path / "depth/other.json").write_text("{}")
    Folder(tmp_path, "train")
    assert "depth: 1 files are not read, first other.json" in capsys.readouterr().err


# ---- the flag ----

def test_exr_without_a_codec_is_refused_before_any_work(monkeypatch):
    """OpenCV's wheels of 5.0 have none: the flag says so, with the remedy, not the first file after a prediction."""
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "    OpenEXR:                     NO")
    with pytest.raises(ValueError, match="--format exr needs OpenEXR, which OpenCV .* is built without: pip install"):
        parse_formats("npy,exr", TASKS.values())
    assert parse_formats("npy,flo", TASKS.values()) == ("npy", "flo")


def test_formats_that_do_not_fit_are_refused():
    """One that fits some task asked for is taken, one that fits none says what would."""
    assert parse_formats(" exr,npy,exr ", TASKS.values()) == ("exr", "npy")
    with pytest.raises(ValueError, match="unknown format tiff: choose from npy, png16, flo, exr"):
        parse_formats("npy,tiff", TASKS.values())
    with pytest.raises(ValueError, match="unknown format ''"):
        parse_formats("", TASKS.values())
    with pytest.raises(ValueError, match="format flo fits no task asked for, .*: depth as npy, png16, exr"):
        parse_formats("npy,flo", [TASKS["depth"]])
