"""What the tests of training share: tiny runs of both stages, and how to compare and disturb them. A pytest plugin."""
import copy
import functools
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from cli import run
from data import Mixture
from readers import toyworld

TINY = ("--steps 1 --scenes 2 --size 16x24 --batch 4 --micro 4 --save-every 2 --val-samples 0 --picture-every 0 "
        "--workers 0 --warmup 2 --threads 1 --cache none")
THREE = "semantic,depth,optical_flow"
_rendered = functools.cache(toyworld.render)


@pytest.fixture(scope="module")
def quick():
    """For modules of many runs: a toy scene is rendered once, each run gets a copy, and nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(toyworld, "render", lambda *args, **options: copy.deepcopy(_rendered(*args, **options)))
        m.setattr(os, "fsync", lambda descriptor: None)     # only a loss of power would tell
        yield


@pytest.fixture
def go(tiny_base, tmp_path, capsys):
    """go("--stage 1 ...") -> (exit code, stdout, stderr); the run is in tmp_path/out unless --out says otherwise."""
    def call(text, tiny=TINY):
        argv = [*f"--base {tiny_base} --out {tmp_path / 'out'} {tiny}".split(), *text.split()]
        if "--resume" in argv:
            argv = [*text.split(), "--out", str(tmp_path / "out")]
        try:
            code = run(lambda: train.main(argv))
        except SystemExit as stop:      # argparse's own
            code = stop.code
        return (code, *capsys.readouterr())
    return call


def trained(base, factory, flags):
    """Folder of a finished stage 1. Do not write there."""
    out = factory.mktemp("trained") / "out"
    assert train.main(f"--base {base} --out {out} {TINY} {flags}".split()) == 0
    return out


def unfinished(folder, copy):
    """A copy of a checkpoint whose run was to have nine steps."""
    shutil.copytree(folder, copy)
    path = copy / "state" / "state.json"
    about = json.loads(path.read_text())
    about["train"]["steps"] = 9
    path.write_text(json.dumps(about))
    return copy


@pytest.fixture(scope="session")
def stage1(tiny_base, tmp_path_factory):
    """`trained` for three tasks."""
    return trained(tiny_base, tmp_path_factory, f"--tasks {THREE}")


@pytest.fixture(scope="session")
def another(tiny_base, tmp_path_factory):
    """`trained` with another seed."""
    return trained(tiny_base, tmp_path_factory, f"--tasks {THREE} --seed 5")


@pytest.fixture
def second(stage1, tmp_path):
    """tmp_path/out with that stage 1 in it."""
    return shutil.copytree(stage1, tmp_path / "out")


def state(out):
    return load_file(out / "state" / "state.safetensors")


def saved(out):
    """config.json"""
    return json.loads((out / "config.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, tolerance=1e-6):
    """Equal gradients, relative to the largest of all."""
    peak = max(g.abs().max() for g in a.values())
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= tolerance * peak for n in a)


def stop_at(monkeypatch, place, step, how=lambda: signal.raise_signal(signal.SIGINT)):
    """Interrupt the run between two steps, in the middle of one (its random numbers are drawn by then), or while a
    checkpoint is written."""
    def intercept(owner, name, now):
        original = getattr(owner, name)

        def call(*args, **options):
            if now(*args):
                monkeypatch.setattr(owner, name, original)
                how()
            return original(*args, **options)
        monkeypatch.setattr(owner, name, call)

    def saving(folder):
        return folder.name == "state.tmp" and json.loads((folder / "state.json").read_text())["step"] == step
    if place == "between":
        intercept(Mixture, "__getitem__", lambda mixture, s: s == step)
    elif place == "within":
        intercept(train, "learning_rate", lambda cfg, s: s == step)
    else:
        intercept(checkpoint, "settle", saving)
