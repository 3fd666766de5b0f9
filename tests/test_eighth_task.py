"""An eighth task: one entry in TASKS, one metric, one reader that delivers it. All else takes it like the seven."""
import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kill import log_lines
from PIL import Image
from safetensors.torch import load_file

import evaluate
import metrics
import sample
import train
from model import StableMTL
from readers.folder import Folder
from readers.formats import read_exr, read_npy
from readers.toyworld import ALL, ToyWorld
from tasks import TASKS, Task, registry
from tools import study

TINY = "--batch 2 --micro 2 --save-every 9 --picture-every 3 --workers 0 --warmup 1 --threads 1 --val-samples 0"


# ---- what one writes for a new task: inverse depth, 0 = infinitely far ----

def encode(label, valid):
    """1 / m over its largest value, to [-1,1], three times the same."""
    x = torch.where(valid, label.float(), 0.0).clamp(min=0)
    return (x / x.amax((2, 3), keepdim=True).clamp(min=1e-9) * 2 - 1).expand(-1, 3, -1, -1)


INVERSE = Task("inverse_depth", "inverse depth", 1, 1, "1 / metres, up to scale", "inverse_depth", encode,
               TASKS["shading"].decode, TASKS["shading"].colour)


class InverseDepth(metrics.Accumulator):
    """Mean absolute error after one scale per image."""

    def score(self, pred, label, valid):
        return {"MAE": (metrics.align_scale(pred, label, valid, 0, math.inf) - label)[:, valid].abs().mean().item()}


def read(frame):
    """<root>/inverse_depth/<stem>.npy, (H,W), zero or negative where there is none -> label, mask."""
    x = read_npy(frame.file("inverse_depth"), 1)[..., 0]
    return x, x >= 0


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "inverse_depth", INVERSE)
    monkeypatch.setitem(metrics.METRICS, "inverse_depth", metrics.Metric(InverseDepth, "MAE", True))
    monkeypatch.setitem(Folder.suffixes, "inverse_depth", (".npy",))
    monkeypatch.setattr(Folder.Frame, "inverse_depth", read, raising=False)


# ---- what comes of it ----

@pytest.fixture
def data(tmp_path):
    """Two street scenes with the labels of three tasks as a folder of one's own."""
    world, root = ToyWorld("streets", "train", 2, (16, 24)), tmp_path / "data"
    for i in range(2):
        s = world.load(i, ("depth", "optical_flow"))
        for folder, image in (("images", s["image"]), ("next", s["next"])):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / f"{i}.png")
        depth = s["labels"]["depth"]
        maps = s["labels"] | {"inverse_depth": 1 / np.where(depth > 0, depth, np.inf)}
        for folder, x in maps.items():
            (root / folder).mkdir(exist_ok=True)
            np.save(root / folder / f"{i}.npy", x)
    return root


def test_an_eighth_task_trains_evaluates_and_samples(registered, data, tiny_base, tmp_path, capsys):
    """Both stages, evaluation with Delta_m, sampling, and every loss, with nothing else told about the task."""
    out = tmp_path / "out"
    common = f"--data {data} --base {tiny_base} --out {out} {TINY} --tasks depth,optical_flow,inverse_depth".split()
    assert train.main(["--stage", "1", "--steps", "3", "--loss", "latent,pixel,task", *common]) == 0
    assert train.main(["--stage", "2", "--steps", "3", "--cache", str(tmp_path / "cache"), *common]) == 0
    for stage in (1, 2):
        losses = {e["task"][0]: e["loss"] for e in log_lines(out) if e["stage"] == stage}
        assert set(losses) == {"depth", "optical_flow", "inverse_depth"}
        assert all(math.isfinite(x) and x > 0 for x in losses.values())
    assert (out / "pictures" / "stage2_000003.png").exists()
    model, keys = StableMTL.load(out), load_file(out / "task_attention.safetensors")
    assert model.tasks == ("depth", "optical_flow", "inverse_depth")
    assert any("task_to_q.inverse_depth" in k for k in keys)

    argv = ["--ckpt", str(out), "--data", str(data), "--workers", "0", "--json"]
    assert evaluate.main([*argv, str(tmp_path / "a.json")]) == 0
    assert evaluate.main([*argv, str(tmp_path / "b.json"), "--baseline", str(tmp_path / "a.json")]) == 0
    a, b = (json.loads((tmp_path / n).read_text()) for n in ("a.json", "b.json"))
    assert a["results"]["folder"]["inverse_depth"]["MAE"] > 0
    assert a["trivial"]["folder"]["constant"]["inverse_depth"]["images"] == 2
    assert b["delta_m"] == 0 and "| folder | inverse_depth | MAE ↓ |" in capsys.readouterr().out

    assert sample.main(f"--toy streets:1 --ckpt {out} --output {tmp_path}".split()) == 0      # without such a label
    assert Image.open(tmp_path / "streets-1/panel.png").width > 4 * 288   # of 3: 904
    argv = [str(data / "images/0.png"), "--ckpt", str(out), "--output", str(tmp_path / "maps"), "--attention",
            "--format", "npy,exr"]
    assert sample.main(argv) == 0
    array = np.load(tmp_path / "maps/0/inverse_depth.npy")
    assert array.shape == (16, 24) and 0 <= array.min() <= array.max() <= 1
    assert (read_exr(tmp_path / "maps/0/inverse_depth.exr", 1)[..., 0] == array).all()
    assert Image.open(tmp_path / "maps/0/inverse_depth.png").size == (24, 16)
    attention = json.loads((tmp_path / "maps/0/attention.json").read_text())["mean"]
    assert set(attention["inverse_depth"]) == {"depth", "optical_flow"} and "inverse_depth" in attention["depth"]


def test_a_task_without_labels_is_left_out_or_refused(tiny_base, tmp_path, monkeypatch, capsys):
    """The toy worlds do not have it: training on all leaves it out, as with --data, where it ended in an error; asked
    for by name it is refused."""
    known = tuple(t for t in TASKS if t in ALL)
    monkeypatch.setitem(TASKS, "unlabelled", replace(INVERSE, name="unlabelled"))
    flags = f"--base {tiny_base} --out {tmp_path / 'out'} --scenes 1 --size 16x24 {TINY} --cache none --steps 1".split()
    assert train.main(flags) == 0
    assert f"tasks with labels in the toy worlds: {', '.join(known)}\n" in capsys.readouterr().err
    assert StableMTL.load(tmp_path / "out").tasks == known == study.parse(["--out", str(tmp_path / "study")]).tasks
    with pytest.raises(ValueError, match="no training labels for unlabelled: choose other --tasks"):
        train.main([*flags, "--overwrite", "--tasks", "depth,unlabelled"])


def test_palettes_leave_it_alone(registered):
    """The choice of class colours changes the codec of the classes and of nothing else."""
    corners, classes = registry("corners"), TASKS["semantic"]
    assert corners["inverse_depth"] is INVERSE and [t for t in TASKS if corners[t] != TASKS[t]] == ["semantic"]
    assert corners["semantic"] == replace(classes, encode=corners["semantic"].encode, decode=corners["semantic"].decode)


def test_no_other_file_names_a_task():
    """Outside the registry, the metrics, the readers, and the diet of the toy VAE, no code contains a task's name."""
    root = Path(train.__file__).parent
    allowed = {"tasks.py", "metrics.py", "evaluate.py", "toy/make.py"}
    for path in [*root.glob("*.py"), *root.glob("*/*.py")]:
        place = path.relative_to(root)
        if place.parts[0] in ("tests", "readers") or str(place) in allowed:
            continue
        constants = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        named = {f"{path.name}:{n.lineno} {n.value}" for n in constants if n.value in tuple(TASKS)}
        assert not named, named
