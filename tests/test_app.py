"""tools/app.py: what the page shows is what model.infer gives, and bad input is one sentence. The page itself where
gradio is installed."""
import io
import os
import socket
import sys
import types
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from cli import run
from model import StableMTL
from tasks import TASKS
from tools import app

MOTION = [t for t in TASKS if TASKS[t].frames == 2]
rng = np.random.default_rng(0)


def photo(path, height=32, width=48):
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tiny_ckpt):
    return StableMTL.from_pretrained(tiny_ckpt)


@pytest.fixture
def pair(tmp_path):
    return [photo(tmp_path / "a.png"), photo(tmp_path / "b.png")]


def arrays(archive):
    """{name: array} of a zip."""
    with zipfile.ZipFile(archive) as z:
        return {name: np.load(io.BytesIO(z.read(name))) for name in z.namelist()}


# ---- what is shown ----

def test_the_arrays_are_those_of_the_commands(model, tiny_ckpt, pair, tmp_path):
    """Names and bits of model.infer(pixels=True), and of sample.py --pixels."""
    shown = app.show(model, pair)
    found, maps = arrays(shown.archive), model.infer(*pair, pixels=True)
    assert sample.main([*pair, "--ckpt", str(tiny_ckpt), "--pixels", "--output", str(tmp_path / "samples")]) == 0
    assert found.keys() == {f"a/{t}.npy" for t in TASKS}
    for name, x in found.items():
        assert x.tobytes() == maps[Path(name).stem].tobytes() == np.load(tmp_path / "samples" / name).tobytes()


def test_one_image_has_no_motion(model, pair):
    """What is left out is said; the size of the network's input is that of --size."""
    shown = app.show(model, pair[:1], size=64, rows=2)
    assert shown.frames[0].tasks == [t for t in TASKS if TASKS[t].frames == 1]
    assert app.note(model, shown.frames) == f"Without a second frame there is no {', '.join(MOTION)}."
    expected = model.infer(pair[0], size=64, rows=2)
    assert all((x == expected[Path(name).stem]).all() for name, x in arrays(shown.archive).items())


def test_clips_are_short(model, clip, monkeypatch):
    """The first frames of a video, each with the motion to the next; colours hold over the clip."""
    monkeypatch.setattr(app, "FRAMES", 3)
    shown = app.show(model, [clip])
    assert [f.folder.name for f in shown.frames] == ["000000", "000001", "000002"]
    assert all(f.tasks == list(TASKS) and f.pictures.keys() == {app.INPUT, *TASKS} for f in shown.frames)
    assert {Path(n).parent.as_posix() for n in arrays(shown.archive)} == {f"clip/00000{k}" for k in range(3)}
    assert app.note(model, shown.frames).startswith("3 frames: of a clip the first 3 at most")


def test_nothing_stays(model, pair, tmp_path):
    """The folder of what is shown goes with it."""
    shown = app.show(model, pair, home=tmp_path / "..")
    folder = Path(shown.folder.name)
    assert folder.is_dir()
    del shown
    assert not folder.exists()


# ---- numbers under the pointer ----

def test_numbers_under_the_pointer(tmp_path):
    """A frame of 2x4 pixels by hand: the pixel that the fractions meet, in the words of its task."""
    semantic = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    flow = np.zeros((2, 4, 2), np.float32)
    flow[1, 2] = 1.5, -0.25
    np.save(tmp_path / "semantic.npy", semantic)
    np.save(tmp_path / "optical_flow.npy", flow)
    frame = app.Frame(tmp_path, ["semantic", "optical_flow"], {"optical_flow"}, None)
    assert app.under(frame, 0.5, 0.5) == {"pixel": "x 2, y 1", "semantic": "sky",
                                          "optical_flow": "u +1.50, v -0.25 pixels"}
    assert app.under(frame, 0.0, 0.499)["semantic"] == "road" and app.under(frame, 0.999, 0.999)["pixel"] == "x 3, y 1"
    frame.scaled.clear()
    assert app.under(frame, 0.5, 0.5)["optical_flow"] == "u +1.50, v -0.25, up to scale"


def test_the_pointer_reads_the_shown_maps(model, pair):
    """All tasks at a pixel, from what model.infer gives there."""
    shown, maps = app.show(model, pair), model.infer(*pair, pixels=True)
    words = app.under(shown.frames[0], 10.5 / 48, 20.5 / 32)
    assert words.pop("pixel") == "x 10, y 20"
    for t, said in words.items():
        assert said == TASKS[t].say(np.atleast_1d(maps[t][20, 10]).tolist(), bool(maps.get(f"scale_{t}")))
    assert list(words) == list(TASKS)


# ---- which model ----

def test_it_says_which_model(model, tiny_ckpt, tiny_ckpt_1):
    told = app.describe(model, tiny_ckpt)
    assert "stablemtl, stage 2" in told and str(tiny_ckpt) in told and "32x48" in told and "toy" not in told
    assert "stage 1" in app.describe(StableMTL.load(tiny_ckpt_1), tiny_ckpt_1)


def test_it_says_what_a_toy_cannot_do(stage1):
    assert "**It is a toy**" in app.describe(StableMTL.load(stage1), stage1)


def test_attention_is_of_stage_2(model, tiny_ckpt_1, pair):
    table = app.show(model, pair).frames[0].attention
    assert all(sum(row.values()) == pytest.approx(1) for row in table["mean"].values()) and list(table["mean"]) == list(
        TASKS)
    assert app.show(StableMTL.load(tiny_ckpt_1), pair).frames[0].attention is None


# ---- mistakes ----

def keep_environment(monkeypatch):
    """What read_gradio sets is undone after the test."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")


def mistake(model, paths, home, **options):
    with pytest.raises(ValueError) as error:
        app.show(model, paths, home=home, **options)
    assert not list(Path(home).iterdir()) and str(Path(paths[0]).parent) not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_sentence(model, tmp_path, monkeypatch):
    """It names the file, not the folder it was put in, and leaves nothing."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "clip.mp4").write_text("not a video")
    small, large = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 40)
    assert mistake(model, [str(tmp_path / "notes.png")], home).startswith("notes.png cannot be read as an image")
    assert mistake(model, [str(tmp_path / "clip.mp4")], home).startswith("clip.mp4 cannot be decoded as a video")
    assert "48x32 pixels and its next frame 48x40" in mistake(model, [small, large], home)
    monkeypatch.setattr(app, "PIXELS", 1000)
    assert mistake(model, [small], home).startswith("a has too many pixels")


def test_without_gradio(tiny_ckpt, monkeypatch, capsys):
    """One sentence with the line that installs it."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    keep_environment(monkeypatch)
    assert run(lambda: app.main(["--ckpt", str(tiny_ckpt)])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "gradio>=6"' in said


def test_an_address_that_is_taken(capsys):
    """One sentence, before the model is read."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert run(lambda: app.main(["--port", str(other.getsockname()[1])])) == 2
        assert run(lambda: app.main(["--host", "300.1.2.3"])) == 2
        assert run(lambda: app.main(["--host", "ü" * 99])) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "cannot listen on 127.0.0.1, port" in first and "cannot listen on 300.1.2.3 (" in second
    assert all(said.endswith("give another --host or --port") for said in (first, second, third))


def test_it_listens_here_alone(tiny_ckpt, monkeypatch, capsys):
    """On 127.0.0.1 unless told, never by a public link; on its way out it leaves no folder."""
    calls, homes = [], []

    def launch(**options):
        calls.append(options)
        raise KeyboardInterrupt

    def build(gr, model, folder, size, rows, home):
        homes.append(home)
        return types.SimpleNamespace(launch=launch)
    monkeypatch.setattr(app, "read_gradio", lambda home: None)
    monkeypatch.setattr(app, "build", build)
    for flags in ([], ["--host", "0.0.0.0"]):
        assert run(lambda flags=flags: app.main(["--ckpt", str(tiny_ckpt), *flags])) == 130
    assert [c["server_name"] for c in calls] == ["127.0.0.1", "0.0.0.0"] and not any(c["share"] for c in calls)
    assert not any(map(os.path.exists, homes))


# ---- the page ----

@pytest.fixture
def page(model, tiny_ckpt, tmp_path, monkeypatch):
    """A client of the page, launched here. Whatever asks for another machine fails, and is noted in `page.asked`."""
    if not find_spec("gradio"):
        pytest.skip('needs gradio: pip install "gradio>=6"')
    keep_environment(monkeypatch)
    home = tmp_path / "home"
    home.mkdir()
    connect, asked = socket.socket.connect, []

    def here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            asked.append(address)
            raise OSError("no network")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", here)
    blocks = app.build(app.read_gradio(str(home)), model, tiny_ckpt, home=home)
    _, address, _ = blocks.launch(server_name="127.0.0.1", share=False, ssr_mode=False, quiet=True,
                                  prevent_thread_lock=True)
    from gradio_client import Client
    client = Client(address, verbose=False, analytics_enabled=False)
    client.asked = asked
    yield client
    blocks.close()


def test_a_call_to_the_page(page, model, pair, tmp_path):
    """By its API: all maps, the arrays; then mistakes, after which it goes on."""
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError
    files = [handle_file(path) for path in pair]
    remark, fetched, number, numbers, maps, compare, chart = page.predict(files, api_name="/predict")
    assert [m["caption"] for m in maps] == list(TASKS) and len(compare) == 2 and "plot" in chart
    expected = model.infer(*pair, pixels=True)
    found = arrays(fetched["value"] if isinstance(fetched, dict) else fetched)
    assert all((x == expected[Path(name).stem]).all() for name, x in found.items()) and len(found) == len(TASKS)
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(AppError, match="notes.txt cannot be read as an image"):
        page.predict([handle_file(str(tmp_path / "notes.txt"))], api_name="/predict")
    assert f"no {', '.join(MOTION)}" in page.predict(files[:1], api_name="/predict")[0]
    assert not page.asked
