"""baselines/diffusionmtl.py: the schedule by hand, the steps against diffusers, what is conditioned on what, and noise
that belongs to its sample."""
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDPMScheduler
from runs import close
from test_trunk import batch, gradients, part

from baselines.diffusionmtl import DiffusionMTL, posterior, schedule
from baselines.trunk import MTL
from training.losses import accumulate

CPU = torch.device("cpu")
THREE = "semantic", "normal", "depth"


def new(tasks=THREE, **options):
    torch.manual_seed(0)
    return DiffusionMTL(tasks, **options).train()


def test_the_schedule_by_hand():
    """S = 2: betas 0.001 and 0.01, abar 0.999 and 0.98901, noise of deviation 0.105; S = 1 and 3 likewise."""
    betas, abar = schedule(2)
    assert betas == pytest.approx([1e-3, 1e-2]) and abar == pytest.approx([1, 0.999, 0.999 * 0.99])
    assert (1 - abar[2]) ** 0.5 == pytest.approx(0.1048, abs=1e-4)
    assert schedule(1)[0] == pytest.approx([1e-3])
    assert schedule(3)[0][1] == pytest.approx(((1e-3 ** 0.5 + 1e-2 ** 0.5) / 2) ** 2)
    assert schedule(0) == ([], [1.0])


def test_a_step_is_that_of_diffusers():
    """The posterior of DDPM for an estimate of x_0, given the same noise; with the exact x_0, its mean is right."""
    betas, abar = schedule(2)
    stock = DDPMScheduler(2, trained_betas=betas, prediction_type="sample", clip_sample=False,
                          variance_type="fixed_small")
    stock.set_timesteps(2)
    x, x0 = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    g = torch.Generator().manual_seed(3)
    theirs = stock.step(x0, 1, x, generator=g).prev_sample
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(posterior(x, x0, 2, betas, abar, e), theirs, atol=1e-5)
    clean = abar[2] ** 0.5 * x0     # x_2 without noise
    assert torch.allclose(posterior(clean, x0, 2, betas, abar, 0 * e), abar[1] ** 0.5 * x0, atol=1e-5)


def test_first_maps_count_half():
    """The last layer of a first decoder is refined no further: its gradient is that of the first map's loss, with 0.5
    of the weight, 1/T, that a final map's has."""
    model, b = new(), batch(("normal",))
    _, grads = gradients(model, [b])
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)        # as `gradients`
    ready = model.ready(b)
    (0.5 / 3 * model.errors(ready, model.forward(ready))["first normal"] / model.counts(ready)["normal"]).backward()
    assert torch.allclose(model.heads["normal"].out.weight.grad, grads["heads.normal.out.weight"], rtol=1e-4)


def test_blocks_of_the_denoiser():
    """Four heads, as the published code has; at toy scale two blocks for its four."""
    assert [block.attention.num_heads for block in new().denoiser.blocks] == [4, 4]


def test_no_step_is_the_first_decoder():
    """S = 0: an mtl, with its losses and gradients."""
    torch.manual_seed(0)
    plain, model, b = MTL(THREE), new(steps=0), batch(("normal",))
    (loss, grads), (loss_0, grads_0) = gradients(model, [b]), gradients(plain, [b])
    assert loss == loss_0 and grads.keys() == grads_0.keys() and close(grads, grads_0, 1e-6)


@pytest.mark.parametrize("diffuse", ["features", "predictions"])
def test_who_gets_gradient(diffuse):
    """The condition leads no gradient into the first predictions: of an unlabelled task neither head nor denoiser has
    any. The final loss alone reaches the labelled task's features through all steps."""
    model, b = new(diffuse=diffuse), batch(("normal",))
    found, grads = gradients(model, [b])
    assert found.keys() == {"normal", "first normal"}
    own = {n for n in grads if any(f".{t}." in n for t in THREE)}
    assert own and all(".normal." in n for n in own)
    assert {"condition.weight", "denoiser.blocks.0.attention.in_proj_weight"} <= grads.keys()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    b = model.ready(b)
    model.errors(b, model.forward(b))["normal"].backward()
    assert model.heads["normal"].body[0][0].weight.grad.abs().max() > 0
    head = model.heads["normal"].out.weight.grad
    assert (head is None) == (diffuse == "features")     # there the first prediction is only a condition


@pytest.mark.parametrize("condition, seen", {"all": {0, 1, 2}, "own": {1}, "none": set()}.items())
def test_what_is_conditioned_on_what(condition, seen):
    """A task's refinement changes with the first predictions of all tasks, of its own, or of none."""
    model = new(condition=condition).eval()
    shared = model.trunk(*model.pair(*batch(THREE)["frames"]))
    feature = model.heads["normal"].body(shared)
    first = {t: model.heads[t].out(model.heads[t].body(shared)) for t in THREE}
    plain = model.refine("normal", feature, first, [0, 1])
    for i, t in enumerate(THREE):
        other = model.refine("normal", feature, first | {t: first[t] + 1}, [0, 1])
        assert torch.equal(plain, other) == (i not in seen)


def test_noise_belongs_to_the_sample():
    """A batch is its samples one by one, in training, where it follows from step and key, and in prediction, where it
    is always the same; without noise no seed matters."""
    model, b = new(), batch(("normal", "depth"), n=3)
    whole, pieces = (gradients(model, x) for x in ([b], [part(b, slice(0, 1)), part(b, slice(1, 3))]))
    assert whole[0] == pytest.approx(pieces[0], rel=1e-4) and close(whole[1], pieces[1], 1e-4)
    model.eval()
    maps = [model.predict(*b["frames"]) for _ in range(2)]
    alone = model.predict(*part(b, slice(2, 3))["frames"])
    for t in THREE[1:]:
        assert torch.equal(maps[0][t], maps[1][t]) and torch.allclose(maps[0][t][2:], alone[t], atol=1e-5)
    quiet, ready = new(noise=False), model.ready(b)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append((model.train().forward(ready)[0]["depth"], quiet.forward(ready)[0]["depth"]))
    assert not torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])


def test_held_out_samples_are_judged_by_their_labels_alone():
    """And draw nothing."""
    model, b = new().eval(), batch(("normal",))
    state = torch.get_rng_state()
    losses = [accumulate(model, [b], CPU, nullcontext) for _ in range(2)]
    assert losses[0] == losses[1] and losses[0].keys() == {"normal"}
    assert torch.equal(state, torch.get_rng_state())
