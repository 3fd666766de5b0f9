"""baselines/jtr.py: the stacks, the terms by their definitions, and who gets gradient from which."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from runs import close, same
from test_trunk import batch, gradients

from baselines.jtr import JTR, AutoEncoder, distance, label_stacked, stacked
from baselines.trunk import MTL
from evaluate import PAPER_TASKS
from tasks import TASKS
from training.losses import accumulate

CPU = torch.device("cpu")
THREE = "semantic", "normal", "depth"


def new(**options):
    torch.manual_seed(0)
    return JTR(THREE, **options).train()


def test_without_weights_it_is_an_mtl():
    """Bit for bit: initial weights, losses and gradients; the auto-encoder gets none."""
    torch.manual_seed(0)
    plain, b = MTL(THREE), batch(("normal", "depth"))
    model = new(distance=0.0, reconstruction=0.0)
    assert same(plain.state_dict(), {k: v for k, v in model.state_dict().items() if not k.startswith("joint.")})
    (loss, grads), (loss_0, grads_0) = gradients(model, [b]), gradients(plain, [b])
    assert loss == loss_0 and same(grads, grads_0)


def test_stacks():
    """21 channels of all seven tasks in [0,1]; a perfect prediction's part is its label's; where any label of the image
    is unknown all is 0; an unlabelled task's prediction stands in."""
    assert sum(x.shape[1] for x in (label_stacked(TASKS[t], batch((t,))["labels"][t]) for t in PAPER_TASKS)) == 21
    for t in THREE:
        code, valid = batch((t,))["labels"][t], batch((t,))["valid"][t]
        label = label_stacked(TASKS[t], code)
        x = 99 * label if TASKS[t].categorical else code[:, :label.shape[1]]
        ours = stacked(TASKS[t], x)
        assert ours.min() >= 0 and ours.max() <= 1
        if t != "normal":       # not unit vectors in this test
            assert torch.allclose((ours - label) * valid, torch.zeros(()), atol=1e-5)
    model, b = new(), batch(("normal",))
    maps = model.maps(*b["frames"], THREE)
    predicted, wanted = model.stacks(maps, b)
    assert predicted.shape[1] == wanted.shape[1] == 12
    unknown = ~b["valid"]["normal"].expand_as(wanted)
    assert predicted[unknown].abs().max() == 0 == wanted[unknown].abs().max()
    assert torch.equal(predicted[:, :8], wanted[:, :8]) and torch.equal(predicted[:, 11:], wanted[:, 11:])
    assert not torch.equal(predicted[:, 8:11], wanted[:, 8:11])


def test_equal_stacks_have_no_distance():
    """Y = Y^ gives L_dist 0, and an image with no label but its own predictions has none to lose."""
    g = AutoEncoder(4)
    y = torch.rand(2, 4, 13, 18)
    z = g.g1(y)
    assert z.shape == (2, 128, 2, 3) and g.decode(z, (13, 18)).shape == y.shape
    assert distance(z, z).abs() < 1e-4
    assert distance(torch.tensor([1.0, 0]).view(1, 2, 1, 1), torch.tensor([0, 2.0]).view(1, 2, 1, 1)) == 1


def test_who_gets_gradient_from_what():
    """L_dist of view 0 moves the trunk and the heads of unlabelled tasks, nothing else: neither a labelled task's head
    nor g1. View 1 moves g1 and g2, and nothing of the trunk."""
    model, b = new(), batch(("normal",))
    b = model.ready(b)
    terms = model.errors(b, model.forward(b))

    def reached(name):
        model.zero_grad(set_to_none=True)
        terms[name].backward(retain_graph=True)
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        return {".".join(n.split(".")[:2]) for n in moved}
    assert reached("distance") == {"trunk.down", "trunk.up", "heads.semantic", "heads.depth"}
    assert reached("distance of g1") == {"joint.g1"}
    assert reached("reconstruction") == {"joint.g1", "joint.up", "joint.out"}
    assert reached("normal") == {"trunk.down", "trunk.up", "heads.normal"}


def test_the_terms_by_their_definition():
    """Means over positions of the bottleneck, and over pixels, tasks and the two stacks; weights w_d, w_d w_r, w_r."""
    model, b = new(), batch(("normal",))
    found, grads = gradients(model, [b])
    assert {n: w for n, w in model.weights.items() if n not in THREE} == {
        "distance": 4, "distance of g1": 8, "reconstruction": 2}
    torch.manual_seed(5)
    b = model.ready(b)
    pair = model.stacks(model.maps(*b["frames"], THREE), b)
    assert found["distance"] == pytest.approx(
        (1 - F.cosine_similarity(*(model.joint.g1(y) for y in pair), dim=1)).mean().item(), rel=1e-4)
    pair = model.stacks(model.maps(*b["again"], THREE), b)
    codes = [model.joint.g1(y) for y in pair]
    assert found["distance of g1"] == pytest.approx((1 - F.cosine_similarity(*codes, dim=1)).mean().item(), rel=1e-4)
    errors = []
    for z, y in zip(codes, pair, strict=True):
        x = model.joint.decode(z, y.shape[-2:])
        p = x.sigmoid()
        errors += [F.binary_cross_entropy(p[:, :8], y[:, :8]), (p[:, 11:] - y[:, 11:]).abs().mean(),
                   1 - F.cosine_similarity(2 * p[:, 8:11] - 1, 2 * y[:, 8:11] - 1).mean()]
    assert found["reconstruction"] == pytest.approx(sum(errors).item() / 6, rel=1e-4)


def test_micro_batches_change_nothing():
    """Terms are pooled over the step, and the light of view 1 belongs to the sample."""
    from test_trunk import part
    model, b = new(), batch(("normal", "depth"), n=3)
    whole, pieces = (gradients(model, x) for x in ([b], [part(b, slice(0, 1)), part(b, slice(1, 3))]))
    assert whole[0] == pytest.approx(pieces[0], rel=1e-4) and close(whole[1], pieces[1], 1e-4)


def test_held_out_samples_are_judged_by_their_labels_alone():
    assert accumulate(new().eval(), [batch(("normal",))], CPU, nullcontext).keys() == {"normal"}
