"""baselines/trunk.py: losses by their definitions, who gets gradient, and that stl and mtl are what they say."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from made import Made, mixture
from runs import close, same

from baselines.diffusionmtl import DiffusionMTL
from baselines.hitts import HiTTs
from baselines.jtr import JTR
from baselines.trunk import MTL, STL, outputs, task_errors, to_code
from tasks import TASKS, registry
from training.losses import accumulate

CPU = torch.device("cpu")
THREE = "semantic", "normal", "optical_flow"


def gradients(model, batches):
    """({term: loss}, {parameter: gradient}) of one step, which draws the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    found = accumulate(model, batches, CPU, nullcontext)
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(tasks=THREE, n=2, seed=0, size=(8, 12)):
    """A micro-batch of random images and labels, of which about nine tenths of the pixels are valid."""
    g = torch.Generator().manual_seed(seed)
    native = {t: torch.randn(n, TASKS[t].channels, *size, generator=g) for t in tasks}
    native |= {t: torch.randint(0, 8, (n, 1, *size), generator=g).float() for t in tasks if TASKS[t].categorical}
    valid = {t: torch.rand(n, 1, *size, generator=g) < 0.9 for t in tasks}
    return {"tasks": tuple(tasks), "keys": [("made", i, False) for i in range(n)],
            "frames": [torch.rand(n, 3, *size, generator=g) * 2 - 1 for _ in range(2)],
            "labels": {t: TASKS[t].encode(x, valid[t]) for t, x in native.items()}, "valid": valid}


def part(b, rows):
    """Some of the samples of a micro-batch."""
    maps = {key: {t: x[rows] for t, x in b[key].items()} for key in ("labels", "valid")}
    return b | maps | {"frames": [f[rows] for f in b["frames"]], "keys": b["keys"][rows]}


@pytest.fixture
def mtl():
    torch.manual_seed(0)
    return MTL(THREE)


def test_the_loss_by_its_definition(mtl):
    """The mean over tasks of the mean over valid pixels: cross-entropy, 1 - cosine, and L1 of u and v; a task that no
    image of the step has counts as nothing. NaN in a label's native values, outside its mask, is nowhere in it."""
    b = batch()
    found, _ = gradients(mtl, [b])
    maps = mtl.maps(*b["frames"], THREE)
    semantic, normal, flow = (b["labels"][t] for t in THREE)
    pixels = {"semantic": F.cross_entropy(maps["semantic"], TASKS["semantic"].decode(semantic)[:, 0],
                                          reduction="none")[:, None],
              "normal": 1 - (F.normalize(maps["normal"], dim=1) * F.normalize(normal, dim=1)).sum(1, keepdim=True),
              "optical_flow": (maps["optical_flow"] - flow[:, :2]).abs().mean(1, keepdim=True)}
    for t in THREE:
        assert found[t] == pytest.approx(pixels[t][b["valid"][t]].mean().item(), rel=1e-5)
    mtl.zero_grad()
    (sum(pixels[t][b["valid"][t]].mean() for t in THREE) / 3).backward()
    expected = {n: p.grad.clone() for n, p in mtl.named_parameters()}
    assert close(expected, gradients(mtl, [b])[1], 1e-5)


def test_micro_batches_change_nothing(mtl):
    """Sums and counts are pooled over the step: split anyhow, a valid pixel weighs the same."""
    b = batch(n=4)
    b["valid"]["normal"][0] = False
    whole, pieces = (gradients(mtl, x) for x in ([b], [part(b, slice(0, 1)), part(b, slice(1, 4))]))
    assert whole[0] == pytest.approx(pieces[0], rel=1e-5) and close(whole[1], pieces[1], 1e-5)


def test_a_label_without_a_valid_pixel_contributes_nothing(mtl):
    """Neither to the loss nor to a gradient; a step of such labels alone leaves every gradient as it was."""
    b, other = batch(), batch(seed=1)
    for m in other["valid"].values():
        m[:] = False
    alone, beside = gradients(mtl, [b]), gradients(mtl, [b, other])
    assert alone[0] == beside[0] and close(alone[1], beside[1], 1e-7)
    assert gradients(mtl, [other])[0] == {}


def test_who_gets_gradient(mtl):
    """An image's labels reach the trunk and their own heads; the head of a task it lacks gets none."""
    _, grads = gradients(mtl, [batch(("normal",))])
    assert {".".join(n.split(".")[:2]) for n in grads if n.startswith("heads")} == {"heads.normal"}
    assert all(g.abs().max() > 0 for n, g in grads.items() if n.startswith("trunk.") and n.endswith("0.weight"))


def test_one_task_alone_is_the_others_deleted(mtl):
    """An mtl of one task, and each part of an stl: loss and gradient of the mtl whose other heads are deleted, from the
    same initial weights; the 1/T before the loss apart. (Frames are alike: alone, such a task sees no second one.)"""
    b, stl = batch(("normal",)), STL(THREE)
    b["frames"] = b["frames"][:1] * 2
    kept = {k: v for k, v in mtl.state_dict().items() if k.startswith(("trunk.", "heads.normal."))}
    alone = MTL(["normal"])
    alone.load_state_dict(kept)
    stl.alone["normal"].load_state_dict(kept)
    (loss, grads), (loss_1, grads_1), (loss_s, grads_s) = (gradients(m, [b]) for m in (mtl, alone, stl))
    assert loss == loss_1 == loss_s
    assert close(grads_1, {n: 3 * g for n, g in grads.items()}, 1e-6)
    assert same({n.removeprefix("alone.normal."): g for n, g in grads_s.items()}, grads)
    pair = batch()["frames"][:1] * 2
    assert torch.equal(mtl.eval().predict(*pair)["normal"], stl.eval().predict(*pair, tasks=["normal"])["normal"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("palette", ["cityscapes", "corners"])
def test_a_prediction_stands_for_its_code(task, palette):
    """The perfect prediction has no error, becomes the label's code, and decodes to what the code decodes to."""
    codec, valid = registry(palette)[task], torch.ones(2, 1, 8, 12, dtype=torch.bool)
    native = torch.randn(2, codec.channels, 8, 12, generator=torch.Generator().manual_seed(0))
    native = native.abs() * 2 % 8 // 1 if codec.categorical else native
    native = F.normalize(native, dim=1) if codec.dense_loss == "cosine" else native
    code = codec.encode(native, valid)
    x = 50.0 * (native == torch.arange(8).view(1, -1, 1, 1)) if codec.categorical else code[:, :outputs(codec)]
    assert x.shape[1] == outputs(codec)
    assert task_errors(codec, x, code).abs().max() < 1e-5
    for found, wanted in ((to_code(codec, x), code), (codec.decode(to_code(codec, x)), codec.decode(code))):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_the_length_of_a_vector_says_nothing(mtl):
    """The loss of normals knows no length, so the prediction knows none: long ones were cut at the unit cube, which
    turned them, and their confidence was that of their length."""
    pair, head = batch()["frames"], mtl.heads["normal"].out
    found = []
    for scale in (1, 30):
        with torch.no_grad():
            head.weight *= scale
            head.bias *= scale
        found.append((mtl.eval().predict(*pair)["normal"], *mtl.guess(*pair, ["normal"])["normal"]))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("system", [MTL, STL, HiTTs, DiffusionMTL, JTR])
def test_who_sees_the_second_frame(system):
    """A trunk with a task of motion; others see the first one twice, in training and at test alike."""
    (first, second), still = batch()["frames"], ("normal", "depth")
    for tasks in (still, (*still, "optical_flow")):
        torch.manual_seed(0)
        model = system(tasks).eval()
        one, other = (model.predict(first, x, still) for x in (first, second))
        assert all(torch.equal(one[t], other[t]) for t in still) == (system is STL or len(tasks) == 2)


def test_a_step_takes_every_label_of_an_image():
    """In a joint mixture, as train.py makes it: two datasets with other labels make micro-batches of their own."""
    readers = [Made("a", ("normal", "optical_flow")), Made("b", ("depth",))]
    steps = [mixture(readers, ("normal", "depth", "optical_flow"), isolation=False, joint=True)[s] for s in range(4)]
    seen = {b["tasks"] for step in steps for b in step["batches"]}
    assert seen == {("normal", "optical_flow"), ("depth",)}
    model = MTL(("normal", "depth", "optical_flow"))
    found, grads = gradients(model, [b for step in steps for b in step["batches"]])
    assert found.keys() == set(model.tasks) and len(grads) == len(list(model.parameters()))
