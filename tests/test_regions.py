"""How clean classes are: counted by hand, and as a command."""
from unittest import mock

import pytest
import tiny
import torch

from cli import run
from model import StableMTL
from readers.toyworld import ToyWorld
from tasks import PALETTES, TASKS
from tools import regions


def test_classes_per_region_by_hand():
    """Two regions of class 1, the left one holding two predicted classes, one of class 2, one pixel of class 0. At a
    margin of 1 what touches another region does not count, and a region without an inside is none; the edge of the
    image is no other region."""
    label = torch.tensor([[1, 1, 2, 2, 1, 1], [1, 1, 2, 2, 1, 1], [1, 1, 2, 2, 1, 1], [1, 1, 2, 0, 1, 1]])
    predicted, valid = torch.where(label == 0, 1, label), torch.ones_like(label, dtype=torch.bool)
    predicted[0, 1] = 5
    assert regions.classes_per_region(predicted, label, valid, 0) == [1, 2, 1, 1]
    assert regions.classes_per_region(predicted, label, valid, 1) == [1, 1]
    predicted[2, 0] = 5
    assert regions.classes_per_region(predicted, label, valid, 1) == [2, 1]
    valid[0, 1] = valid[2, 0] = False
    assert regions.classes_per_region(predicted, label, valid, 0) == [1, 1, 1, 1]


@pytest.mark.parametrize("palette", PALETTES)
def test_off_colour_by_hand(palette):
    """A class colour is none, nor what is a little off; the middle of two corners of the cube is."""
    colours = torch.tensor(PALETTES[palette]).float() / 127.5 - 1
    near = min((a - b).norm() for i, a in enumerate(colours) for b in colours[:i])
    code = colours.T[:, None]                                                           # (3,1,8)
    assert not regions.off_colour(code, palette).any()
    toward = torch.nn.functional.normalize(torch.ones(3), dim=0)[:, None, None]
    assert not regions.off_colour(code + 0.49 * near * toward, palette).any()
    assert regions.off_colour(torch.full((3, 1, 1), 9.0), palette).all()


def test_the_command(tmp_path, capsys, monkeypatch):
    """A row per checkpoint and world with classes; models that predict none are refused."""
    classes, task = tiny.model(tasks=("semantic", "depth")), TASKS["semantic"]
    classes.save(tmp_path / "a")
    tiny.model(tasks=("depth",)).save(tmp_path / "b")
    monkeypatch.setattr(regions, "test_readers", lambda *_, limit: [ToyWorld(w, "test", limit, (16, 24))
                                                                    for w in ("rooms", "streets")])
    assert regions.main(f"--ckpt {tmp_path / 'a'} --limit 2".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "streets" in lines[2] and lines[2].count("%") == 2
    assert run(lambda: regions.main(f"--ckpt {tmp_path / 'b'}".split())) == 2
    assert "predicts no classes" in capsys.readouterr().err
    broken = ValueError("not to be read")
    with monkeypatch.context() as m:
        m.setattr(ToyWorld, "load", mock.Mock(side_effect=broken))
        assert run(lambda: regions.main(f"--ckpt {tmp_path / 'a'} --device cpu".split())) == 2
    assert capsys.readouterr().err.endswith("streets:0: not to be read\n")      # --skip-bad is no flag of this tool
    model = StableMTL.load(tmp_path / "a")
    regions.read_out(model, ToyWorld("streets", "test", 1, (16, 24)), "semantic", 1)
    assert model.codecs["semantic"].decode(torch.zeros(1, 3, 2, 2)).shape == (1, 1, 2, 2) and task.categorical
