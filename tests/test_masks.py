"""Attention-guided masking: what is left out, how often, and that a sample's masks are its own."""
import pytest
import tiny
import torch
from test_model import close

from network.attention import draw_mask

SCORES = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])


def draws(how, n=3000, rho=1.0, scores=SCORES):
    """n masks, (n,T)"""
    numbers = torch.rand(len(scores) + 2, n, generator=torch.Generator().manual_seed(11))
    return draw_mask(scores[:, None].expand(-1, n), numbers, rho, how).T


@pytest.mark.parametrize("how, expected", [
    ("score", SCORES), ("uniform", torch.full((6,), 1 / 6)), ("argmax", torch.eye(6)[0])])
def test_mask_distribution(how, expected):
    """One task per draw: in proportion to the score, evenly, or always the highest (chi-square, 5 degrees of freedom,
    p > 0.001)."""
    d = draws(how)
    assert (d.sum(1) == 1).all()
    counts, chosen = d.sum(0), expected > 0
    assert (counts[~chosen] == 0).all()
    assert (((counts - expected * len(d)) ** 2)[chosen] / (expected * len(d))[chosen]).sum() < 20.5


def test_mask_of_several_tasks():
    """score-k leaves out 1..5 of 6 tasks, each number equally often, high scores more often; one is always left."""
    d = draws("score-k")
    counts = torch.bincount(d.sum(1), minlength=7)
    assert counts[0] == counts[6] == 0
    assert ((counts[1:6] - len(d) / 5) ** 2 / (len(d) / 5)).sum() < 18.5     # 4 degrees of freedom, p > 0.001
    assert d.float().mean(0).diff().lt(0).all()


@pytest.mark.parametrize("how", ["score", "score-k", "argmax", "uniform"])
def test_mask_probability(how):
    """rho = 0 never masks, 1 always, 0.4 in four of ten draws; a single auxiliary task is never taken away."""
    assert not draws(how, 200, 0.0).any()
    assert draws(how, 200, 1.0).any(1).all()
    assert draws(how, 2000, 0.4).any(1).float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert not draws(how, 50, 1.0, torch.ones(1)).any()
    assert (draws(how, 50, 1.0, torch.tensor([1.0, 0.0])).sum(1) == 1).all()


@torch.no_grad()
def test_masking_acts_in_training_only(tiny_model, monkeypatch):
    """rho = 1 changes nothing in eval mode and something in train mode, drawn anew in each layer; rho = 0 nothing in
    either."""
    z, drawn = tiny.latents(1), []
    plain = tiny_model(*z, ["depth"])["depth"]

    def draw(*args, **options):
        drawn.append(draw_mask(*args, **options))
        return drawn[-1]

    def learnt():
        return tiny_model(*z, ["depth"], keys=[("rooms", 0, False)])["depth"]

    monkeypatch.setattr("network.attention.draw_mask", draw)
    monkeypatch.setattr(tiny_model, "rho", 1.0)
    assert torch.equal(learnt(), plain) and not drawn
    monkeypatch.setattr(tiny_model, "training", True)
    torch.manual_seed(0)
    assert (learnt() - plain).abs().max() > 1e-4
    assert len(drawn) == len(tiny_model.attention) and len({d[:, 0].tolist().index(True) for d in drawn}) > 1
    monkeypatch.setattr(tiny_model, "rho", 0.0)
    assert torch.equal(learnt(), plain)


@torch.no_grad()
@pytest.mark.parametrize("attention, how", [("n-to-1", "score"), ("n-to-1", "score-k"), ("n-to-1", "argmax"),
                                            ("n-to-1", "uniform"), ("n-to-n", "score")])
def test_masks_belong_to_a_sample(attention, how):
    """An image gets the same masks whatever is beside it in the pass, others in the next step, and two images do not
    get the same."""
    m, z = tiny.model(multi=True, attention=attention), tiny.latents(3)
    m.rho, m.mask, m.training = 0.7, how, True
    keys, tasks = [("rooms", 0, False), ("rooms", 0, True), ("streets", 7, False)], ["depth", "normal"]

    def masked(step, chosen):
        torch.manual_seed(step)
        return m(*(x[chosen] for x in z), tasks, keys=[keys[k] for k in chosen])
    together, other = masked(4, [0, 1, 2]), masked(5, [0, 1, 2])
    for t in tasks:
        for k in range(3):
            close(masked(4, [k])[t], together[t][k:k + 1])
        if how != "argmax":
            assert (other[t] - together[t]).abs().amax((1, 2, 3)).min() > 1e-5
    same = [x[:1].repeat(2, 1, 1, 1) for x in z]
    torch.manual_seed(4)
    a, b = m(*same, tasks, keys=keys[:2])["depth"]
    assert how == "argmax" or (a - b).abs().max() > 1e-5
