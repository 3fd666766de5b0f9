"""tools/fullsize.py: its commands, on a base of a few thousand weights in place of a billion."""
from pathlib import Path

import pytest
import raw
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

import evaluate
import sample
import train
from cli import run
from model import StableMTL
from network.loading import load_part, read_base
from tools import convert, fullsize

MAINS = {"train.py": train.main, "sample.py": sample.main, "evaluate.py": evaluate.main, "tools.convert": convert.main}


@pytest.fixture
def in_process(monkeypatch):
    """The commands without a new interpreter each, on a small picture. -> the list of what was run"""
    started = []

    def launch(argv):
        name, *rest = argv[1:] if argv[0] == "-m" else argv
        started.append(name)
        return run(lambda: MAINS[name](rest)), 1.0, 2.0, 1.5
    monkeypatch.setattr(fullsize, "launch", launch)
    monkeypatch.setattr(fullsize, "make_photo", lambda path: Image.new("RGB", (48, 32), (90, 60, 30)).save(path))
    return started


def test_every_command_runs(in_process, tiny_base, tmp_path, capsys):
    """All of them in turn, on a folder of one's own; what was exported is what comes in again. Those that write a
    checkpoint replace it when they run once more."""
    raw.own_folder(tmp_path / "data", h=16, w=24)
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--base", str(tiny_base)]
    assert run(lambda: fullsize.main(argv)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "2.00 GB at most, 1.50 GB" in line]
    assert [line.split()[:2] for line in lines] == [[name, "done"] for name in fullsize.COMMANDS]
    assert len(in_process) == len(fullsize.COMMANDS)
    ours, theirs = (StableMTL.load(tmp_path / "out" / name).state_dict() for name in ("run", "imported"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert run(lambda: fullsize.main([*argv, "--only", "import,stage-1,cache"])) == 0


def test_failures_and_a_lack_of_memory_are_told(in_process, monkeypatch, tmp_path, capsys):
    """A command that fails, or needs more than is free, is named, the others run, and the exit code says so."""
    monkeypatch.setattr(fullsize, "free_memory", lambda: 13.0)
    (tmp_path / "base" / "unet").mkdir(parents=True)
    with open(tmp_path / "base" / "unet" / "weights", "wb") as file:
        file.truncate(2 * 10 ** 9)      # a hole, which takes no room
    argv = ["--data", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--only", "stage-2,evaluate"]
    assert run(lambda: fullsize.main([*argv, "--base", str(tmp_path / "base")])) == 1
    out = capsys.readouterr().out
    assert "stage-2       left out: it should take 28 GB, and 13.0 GB are free" in out
    assert "evaluate      failed (2)" in out
    assert run(lambda: fullsize.main([*argv, "--only", "all"])) == 2
    assert "--only all: choose from stage-1, resume" in capsys.readouterr().err


def test_what_is_there_is_not_touched(in_process, tmp_path, capsys):
    """Folders that are not there are named before anything is made, and a folder of something else is left alone."""
    data, mine = tmp_path / "data", tmp_path / "mine"
    for folder in (data, mine / "imported"):
        folder.mkdir(parents=True)
    for flags, says in ((["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")], "none: no such folder"),
                        (["--data", str(data), "--out", str(tmp_path / "out"), "--base", str(tmp_path / "slip")],
                         "slip: no such folder"),
                        (["--data", str(data), "--out", str(mine)], "holds other things")):
        assert run(lambda given=flags: fullsize.main(given)) == 2
        assert says in capsys.readouterr().err
    assert not in_process and sorted(p.name for p in tmp_path.iterdir()) == ["data", "mine"]
    assert (mine / "imported").is_dir()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells it there")
def test_memory_of_files_is_told_apart(tmp_path):
    """A process that fills 100 MB and reads as much of a mapped file has both at most, and one of its own."""
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    program = (f"import mmap, time; x = bytearray(100_000_000); f = open({str(tmp_path / 'file')!r}, 'rb'); "
               "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096]); time.sleep(1); "
               "raise SystemExit(3)")
    code, _, peak, own = fullsize.launch(["-c", program])
    assert code == 3 and peak > 0.2 and 0.1 < own < peak - 0.09


def test_the_base_is_a_base(monkeypatch, tmp_path):
    """Random parts in fp16 files, whole, finite, and of a UNet whose output has about the size of its input."""
    small = dict(block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
    monkeypatch.setattr(fullsize, "SD2_UNET", fullsize.SD2_UNET | small | dict(attention_head_dim=(2, 2, 2, 2)))
    monkeypatch.setattr(fullsize, "SD2_VAE", fullsize.SD2_VAE | small)
    monkeypatch.setattr(fullsize, "TEXT", fullsize.TEXT | dict(num_hidden_layers=1, intermediate_size=64))
    fullsize.make_base(tmp_path)
    assert len(list(tmp_path.glob("*/*.fp16.safetensors"))) == 3
    vae, unet, _, _ = read_base(str(tmp_path))
    assert isinstance(vae, AutoencoderKL) and unet.config.cross_attention_dim == 1024
    assert load_part(UNet2DConditionModel, tmp_path, "unet").dtype == torch.float32
    with torch.no_grad():
        out = unet.eval()(torch.randn(1, 4, 16, 16), 999, torch.randn(1, 3, 1024)).sample
    assert 0.05 < out.std() < 20
