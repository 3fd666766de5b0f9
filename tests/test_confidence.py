"""Confidence: the mirror's maps come back as they should, and the error of the surest pixels is what it says."""
import math

import pytest
import torch
import torch.nn.functional as F

import sample
from evaluate import PAPER_TASKS
from inference import confidence
from inference.confidence import SHARES, Sparsification, agreement, difference, turned
from inference.infer import mirror_maps
from metrics import METRICS
from tasks import MOTION, MOTION_3D, TASKS

EVERYWHERE = torch.ones(12, 18, dtype=torch.bool)


def example(task, seed=0):
    """A plausible map (C,12,18) of a task."""
    g = torch.Generator().manual_seed(seed)
    if task.categorical:
        return torch.randint(0, 8, (1, 12, 18), generator=g)
    x = 0.9 * torch.rand(task.channels, 12, 18, generator=g) + 0.1
    if task.dense_loss == "cosine":
        return F.normalize(x - 0.6, dim=0)
    return x - 0.6 * (task.geometry in (MOTION, MOTION_3D))


# ---- the mirror ----

@pytest.mark.parametrize("name", TASKS)
def test_maps_turn_back_as_their_codes_do(name):
    """Decoding a code flipped with the registry's signs gives the turned map, and turning twice is the identity."""
    task = TASKS[name]
    code = torch.rand(2, 3, 6, 8) * 2 - 1
    code = code.mean(1, keepdim=True).expand(-1, 3, -1, -1) if task.channels == 1 and not task.categorical else code
    code = code[:, [0, 1, 0]] if task.channels == 2 else code       # as the task's own codes are
    flipped = code.flip(-1) * torch.tensor(task.hflip).view(1, 3, 1, 1)
    torch.testing.assert_close(turned(task, task.decode(code)), task.decode(flipped))
    x = task.decode(code)
    assert torch.equal(turned(task, turned(task, x)), x)


class Mirrorproof:
    """A model without a fault: what it says of a mirror image is the mirror image of what it says."""

    @staticmethod
    def predict(image, next_image, tasks, rows):
        slope = F.pad(image[:, :1, :, 2:] - image[:, :1, :, :-2], (1, 1, 0, 0))     # changes sign in a mirror
        moved = torch.cat([slope, next_image[:, 1:2]], 1)
        maps = {"depth": image.mean(1, keepdim=True), "optical_flow": moved, "albedo": image,
                "scene_flow": torch.cat([moved, slope ** 2], 1),
                "normal": F.normalize(torch.cat([slope, image[:, 1:]], 1), dim=1)}
        return {t: maps[t] for t in tasks}


def test_a_model_that_no_mirror_deceives_is_sure():
    """Its maps come back equal; one that always says "to the right" is unsure of exactly that."""
    frames = torch.rand(2, 3, 12, 18), torch.rand(2, 3, 12, 18)
    tasks = ["depth", "optical_flow", "scene_flow", "normal", "albedo"]
    there, back = Mirrorproof.predict(*frames, tasks, None), mirror_maps(Mirrorproof, *frames, tasks=tasks)
    for t in tasks:
        torch.testing.assert_close(back[t], there[t])
        assert agreement(TASKS[t], there[t][0], back[t][0]).min() > 0.999
    right = torch.stack([torch.ones(12, 18), torch.zeros(12, 18)])
    assert agreement(TASKS["optical_flow"], right, turned(TASKS["optical_flow"], right[None])[0]).max() == 0.5


def test_attention_is_not_the_mirror_images(tiny_ckpt, tmp_path):
    """Beside --confidence, --attention wrote the weights of that second prediction."""
    flags, table = f"--ckpt {tiny_ckpt} --toy real:3 --attention", "real-3/attention.json"
    for out, more in (("alone", ""), ("both", "--confidence")):
        assert sample.main(f"{flags} --output {tmp_path / out} {more}".split()) == 0
    assert (tmp_path / "both" / table).read_text() == (tmp_path / "alone" / table).read_text()


def test_what_a_task_leaves_open_is_no_disagreement():
    """Another scale and shift of depth, other scales of flow, another scale of shading; but not another sign."""
    for name, factor, shift in (("depth", 0.4, 0.3), ("optical_flow", 5, 0), ("scene_flow", 0.1, 0), ("shading", 2, 0)):
        x = example(TASKS[name])
        assert agreement(TASKS[name], x, factor * x + shift).min() > 0.99, name
    x = example(TASKS["optical_flow"])
    assert agreement(TASKS["optical_flow"], x, -x).max() < 0.8


def test_differences_in_the_tasks_own_terms():
    """By hand: a class, 45 and 180 degrees, and 3 against a mean of 5."""
    ids = torch.tensor([[[1, 2]]])
    assert difference(TASKS["semantic"], ids, torch.tensor([[[1, 3]]])).tolist() == [[0, 1]]
    front, aside = torch.tensor([0.0, 0, 1]).view(3, 1, 1), torch.tensor([0, 1.0, 1]).view(3, 1, 1)
    assert difference(TASKS["normal"], front, aside).item() == pytest.approx(0.5, abs=1e-4)
    assert difference(TASKS["normal"], front, -front).item() == 1
    a, b = torch.tensor([[[3.0, 3]], [[4, 4]]]), torch.tensor([[[3.0, 3]], [[4, 1]]])
    torch.testing.assert_close(difference(TASKS["optical_flow"], a, b), torch.tensor([[0, 3 / 8]]))
    assert difference(TASKS["shading"], torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (4, 4)])
def test_small_maps(size):
    """A map smaller than the neighbourhood has a confidence of its own size."""
    for task in TASKS.values():
        x = torch.rand(task.channels, *size) if not task.categorical else torch.zeros(1, *size).long()
        certain = agreement(task, x, x.clone())
        assert certain.shape == size and 0 <= certain.min() <= certain.max() <= 1


# ---- what it is worth ----

@pytest.mark.parametrize("name", TASKS)
def test_all_pixels_have_the_error_of_the_metric(name):
    """100% is the metric's own number; the oracle is never worse; a confidence that knows the error is the oracle."""
    task = TASKS[name]
    metric, label, predicted = METRICS[task.metric].accumulator(), example(task, 1), example(task, 2)
    valid = torch.rand(12, 18, generator=torch.Generator().manual_seed(3)) < 0.8
    metric.add(predicted, label, valid)
    result, error = metric.result(), METRICS[task.metric].accumulator.error
    own = {"% wrong": 100 - result["accuracy"]} if task.categorical else result
    assert error in own or name not in PAPER_TASKS      # another's metric need not be a mean of its pixels' errors
    for certain in (torch.rand(12, 18), torch.ones(12, 18)):
        counted = Sparsification(task, (1e-5, math.inf))
        counted.add(predicted, label, valid, certain)
        scores = counted.result()
        assert scores["surest 100%"] == pytest.approx(own.get(error, scores["oracle 100%"])) == scores["oracle 100%"]
        assert all(scores[f"oracle {s}%"] <= scores[f"surest {s}%"] + 1e-9 for s in SHARES)
    aligned = counted.measure.align(predicted.double(), label.double(), valid)
    truth = torch.zeros(12, 18, dtype=torch.float64)
    truth[valid] = counted.measure.errors(aligned, label.double(), valid)
    known = Sparsification(task, (1e-5, math.inf))
    known.add(predicted, label, valid, -truth)
    scores = known.result()
    assert all(scores[f"oracle {s}%"] == pytest.approx(scores[f"surest {s}%"]) for s in SHARES)
    assert confidence.gained(scores) == pytest.approx(1)


def test_shares_by_hand():
    """Four pixels with errors 1, 2, 3, 10 px, trusted in the order 2, 10, 1, 3; images are averaged, halves merge."""
    counted, other = Sparsification(TASKS["scene_flow"], (1e-5, 80)), Sparsification(TASKS["scene_flow"], (1e-5, 80))
    label = torch.tensor([[[1.0, 2, 3, 10, 99]], [[0] * 5], [[0] * 5]])
    valid = torch.tensor([[True] * 4 + [False]])
    for each, certain in ((counted, [0.3, 0.9, 0.2, 0.8, 1]), (other, [0.9, 0.8, 0.7, 0.6, 1])):
        each.add(torch.zeros(3, 1, 5), label, valid, torch.tensor([certain]))      # a zero stays zero in any scale
    assert [counted.result()[f"surest {s}%"] for s in SHARES] == [2, 6, pytest.approx(13 / 3), 4]
    assert [counted.result()[f"oracle {s}%"] for s in SHARES] == [1, 1.5, 2, 4]
    assert confidence.gained(counted.result()) == pytest.approx(-2 / 2.5)
    both = counted.merge(other).result()
    assert both["surest 50%"] == (6 + 1.5) / 2 and both["images"] == 2
    row = confidence.sparsification_table({"here": {"scene_flow": both, "scene_flow:all": {"EPE": 1.0}}})[-1]
    assert row == "| here | scene_flow | EPE | 1.5 | 3.75 | 3.167 | 4 | 1 | 1.5 | 2 | 0.10 |"
    assert not confidence.sparsification_table({"here": {"scene_flow": {"EPE": 1.0}}})
