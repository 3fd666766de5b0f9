"""train.py: one task per step, micro-batches that change nothing, resume that equals an uninterrupted run, and a sentence for every mistake."""
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from kill import log_lines
from runs import THREE, TINY, close, same
from safetensors.torch import load_file

import data
import settings
import train
from data import Mixture, train_readers, whole_cells
from model import StableMTL, from_base, load_base
from tasks import TASKS, registry

CPU, PLAIN = torch.device("cpu"), (nullcontext, None)       # device and (autocast, scaler) of float32 training


@pytest.fixture(scope="module")
def readers():
    return train_readers(size=(16, 24), scenes=2)


def gradients(model, batches, kinds, encode=True):
    """({kind: loss}, {parameter: gradient}) of one step."""
    model.zero_grad(set_to_none=True)
    losses = train.step_gradients(model, batches, kinds, encode, CPU, *PLAIN)
    return losses, {n: p.grad.clone() for m in train.trainable(model).values() for n, p in m.named_parameters() if p.grad is not None}


# ---- one task at a time ----

def test_a_step_leaves_other_tasks_alone(go, tmp_path, monkeypatch):
    """Stage 2: after a step on task A the query projections of the other tasks are bit-identical, momentum or not, and Adam has no state of
    a task before its first step."""
    assert go("--tasks semantic,normal,depth --steps 1")[0] == 0
    tasks, history, step = ("semantic", "normal", "depth"), [], torch.optim.Adam.step
    queries = lambda params: {t: [p.detach().clone() for n, p in params if f"task_to_q.{t}." in n] for t in tasks}

    def spy(self, *args, **options):
        params = list(zip(spy.names, self.param_groups[0]["params"]))
        before, result = queries(params), step(self, *args, **options)
        known = {t for n, p in params for t in tasks if f"task_to_q.{t}." in n and self.state[p]} if self.state else set()
        history.append((before, queries(params), known))
        return result
    build = train.trainable

    def names(model):
        spy.names = [n for m in build(model).values() for n, _ in m.named_parameters()]
        return build(model)
    monkeypatch.setattr(train, "trainable", names)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    assert go("--stage 2 --steps 6 --lr 0.01 --batch 2")[0] == 0
    trained = [entry["task"][0] for entry in log_lines(tmp_path / "out") if entry["stage"] == 2]
    assert [sorted(trained[i:i + 3]) for i in (0, 3)] == [sorted(tasks)] * 2
    for s, (before, after, known) in enumerate(history):
        moved = {t for t in tasks if not all(map(torch.equal, before[t], after[t]))}
        assert moved == ({trained[s]} if s else set())      # the output projection starts at zero: nothing reaches the queries before
        assert known == set(trained[:s + 1])


def test_log_of_one_cycle(go, tmp_path):
    """Seven steps train each task once, one per step; the log says which, on which datasets, with a finite loss and the learning rate."""
    assert go("--steps 7 --lr 0.001")[0] == 0
    lines = log_lines(tmp_path / "out")
    assert sorted(e["task"][0] for e in lines) == sorted(TASKS) and all(len(e["task"]) == 1 for e in lines)
    assert [e["step"] for e in lines] == list(range(7)) and [e["lr"] for e in lines[:3]] == [0.0005, 0.001, 0.001]
    assert all(set(e["dataset"]) <= {"rooms", "streets", "things"} and 0 < e["loss"] < 1e3 and e["grad_norm"] > 0 for e in lines)


def test_no_isolation_mixes_tasks(go, tmp_path):
    """--no-isolation: a step holds several tasks."""
    assert go("--no-isolation --steps 2 --batch 8")[0] == 0
    assert all(len(e["task"]) > 1 for e in log_lines(tmp_path / "out"))


def test_drop_tasks_and_datasets(go, tmp_path):
    """--drop removes a dataset's labels of a task; --tasks trains, and keeps, one task alone."""
    assert go("--tasks depth --drop streets:depth --steps 3 --batch 6")[0] == 0
    assert all(e["task"] == ["depth"] and e["dataset"] == ["rooms"] for e in log_lines(tmp_path / "out"))
    assert StableMTL.load(tmp_path / "out").tasks == ("depth",) and set(load_file(tmp_path / "out" / "tokens.safetensors")) == {"depth"}


# ---- the loss and its gradient ----

def uneven(batches):
    """The same four samples with other, very uneven masks: each keeps some columns on the left, the first one none."""
    widths = iter((0, 20, 5, 12))
    for b in batches:
        for m in b["valid"].values():
            m.zero_()
            for x in m:
                x[..., :next(widths)] = True
    return batches


@pytest.mark.parametrize("kinds", ["latent", "latent,pixel:0.5,task:2"])
def test_micro_batches_change_nothing(tiny_base, readers, kinds):
    """The gradient of a step is the same in one, two or four micro-batches, although their valid areas differ: the mean over all valid cells.
    Same to float32 rounding, which is 2e-6 of the largest gradient in latent space and 2e-5 behind the decoder."""
    tolerance = 1e-5 if kinds == "latent" else 1e-4
    model, kinds = from_base(str(tiny_base), ("normal",)), settings.parse_loss(kinds)
    steps = [uneven(Mixture(readers, ("normal",), TASKS, 4, micro, seed=3)[0]["batches"]) for micro in (4, 2, 1)]
    (loss, whole), *others = [gradients(model, b, kinds) for b in steps]
    assert len(steps[0]) < len(steps[1]) <= len(steps[2]) == 4
    for other, split in others:
        assert other == pytest.approx(loss, rel=1e-5) and close(whole, split, tolerance)
    with torch.no_grad():       # the latent loss by its definition
        pairs = [(model(model.encode(b["frames"][0]), model.encode(b["frames"][1]), ["normal"])["normal"], model.encode(b["labels"]["normal"]),
                  whole_cells(b["valid"]["normal"], 2)) for b in steps[0]]
        error = torch.cat([(p - z).square().permute(0, 2, 3, 1)[c[:, 0]].flatten() for p, z, c in pairs])
    assert loss["latent"] == pytest.approx(error.mean().item(), rel=1e-5)


def test_nothing_valid_contributes_nothing(tiny_base, readers):
    """A step without a valid cell has no loss and leaves every gradient None; scattered valid pixels that fill no cell count as none."""
    model = from_base(str(tiny_base), ("depth",))
    batches = Mixture(readers, ("depth",), TASKS, 4, 2, seed=1)[0]["batches"]
    for b in batches:
        b["valid"]["depth"][:] = False
    assert gradients(model, batches, {"latent": 1.0, "pixel": 1.0, "task": 1.0}) == ({}, {})
    for b in batches:
        b["valid"]["depth"][..., ::2] = True
    assert gradients(model, batches, {"latent": 1.0}) == ({}, {})


def test_nan_outside_the_masks_is_harmless(tiny_base, readers):
    """NaN or infinity in native labels where they are invalid, and in latents or codes outside the mask, changes neither loss nor gradient."""
    model, codecs = from_base(str(tiny_base), tuple(TASKS)), registry()
    for name, codec in codecs.items():      # native labels
        g = torch.Generator().manual_seed(2)
        label, valid = torch.rand(1, codec.channels, 8, 12, generator=g).mul(7).floor() / (1 if codec.categorical else 7), torch.rand(1, 1, 8, 12, generator=g) < 0.7
        label = torch.where(valid, label, torch.zeros(()))
        for poison in (float("nan"), float("inf")):
            assert torch.equal(codec.encode(torch.where(valid, label, torch.tensor(poison)), valid), codec.encode(label, valid)), (name, poison)
    batches = uneven(Mixture(readers, ("normal",), TASKS, 4, 4, seed=3)[0]["batches"])
    with torch.no_grad():                   # latents, as a cache would hold them, and codes for the pixel loss
        cached = [{**b, "frames": [model.encode(f) for f in b["frames"]], "labels": {"normal": model.encode(b["labels"]["normal"])},
                   "valid": {"normal": whole_cells(b["valid"]["normal"], 2)}} for b in batches]
    loss, plain = gradients(model, cached, {"latent": 1.0}, encode=False)
    for b in cached:
        b["labels"]["normal"].masked_fill_(~b["valid"]["normal"], float("nan"))
    other, poisoned = gradients(model, cached, {"latent": 1.0}, encode=False)
    assert math.isfinite(loss["latent"]) and other == loss and same(plain, poisoned)


def test_every_loss_of_every_task(tiny_base, readers):
    """latent, pixel and task are positive, finite and differ in their gradients; decoding the label itself costs nothing (cross-entropy: little)."""
    model = from_base(str(tiny_base), tuple(TASKS))
    for t in TASKS:
        batch = Mixture(readers, (t,), TASKS, 2, 2, seed=5)[0]["batches"][0]
        results = [gradients(model, [batch], settings.parse_loss(kind)) for kind in ("latent", "pixel", "task")]
        assert all(math.isfinite(v) and v > 0 for losses, _ in results for v in losses.values()), t
        for (_, a), (_, b) in zip(results, results[1:]):
            assert not close(a, b, 1e-2)
        code, valid = batch["labels"][t], batch["valid"][t]
        error = train.DENSE[TASKS[t].dense_loss](code, code, valid, model.codecs[t])
        assert error.shape == valid.shape and error[valid].max() < (0.2 if TASKS[t].categorical else 1e-4), t


def test_loss_flag(go, tmp_path):
    """--loss takes a weighted sum, needs images rather than the cache for pixel and task, and names what it cannot read."""
    assert settings.parse_loss("latent") == {"latent": 1.0} and settings.parse_loss("pixel:0.5,task") == {"pixel": 0.5, "task": 1.0}
    for text in ("", "latent:x", "dense", "latent:0", "latent:-1", "latent,,task", "latent:nan"):
        with pytest.raises(ValueError, match="--loss"):
            settings.parse_loss(text)
    code, _, error = go(f"--loss pixel --cache {tmp_path / 'cache'} --steps 1")
    assert code == 2 and "--cache none" in error and not (tmp_path / "cache").exists()
    assert go("--loss latent:1,pixel:0.5,task:0.5 --steps 2")[0] == 0
    assert all(math.isfinite(e["loss"]) for e in log_lines(tmp_path / "out"))


def test_a_batch_overfits(tiny_base, readers):
    """Thirty steps on one batch bring the loss of a tiny network below a third."""
    torch.manual_seed(0)
    model = from_base(str(tiny_base), ("depth",))
    batch = Mixture(readers, ("depth",), TASKS, 2, 2, seed=1)[0]["batches"]
    optimizer, losses = torch.optim.Adam(model.unet.parameters(), 1e-2), []
    for _ in range(30):
        losses.append(train.step_gradients(model, batch, {"latent": 1.0}, True, CPU, *PLAIN)["latent"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] / 3, losses[::5]


def test_learning_rate():
    """Linear warm-up to the peak; exponential decay reaches 1% after 25,000 steps; cosine ends at 0; --warmup 0 starts at the peak."""
    cfg = settings.parse_args("--lr 2 --warmup 100 --schedule exponential --steps 20000".split())
    assert [train.learning_rate(cfg, s) for s in (0, 49, 99, 100)] == pytest.approx([0.02, 1, 2, 2])
    assert train.learning_rate(cfg, 100 + 12500) == pytest.approx(0.2) and train.learning_rate(cfg, 25100) == pytest.approx(0.02)
    cfg.schedule = "cosine"
    assert [train.learning_rate(cfg, s) for s in (100, 10050, 20000)] == pytest.approx([2, 1, 0], abs=1e-9)
    cfg.warmup = 0
    assert train.learning_rate(cfg, 0) == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_is_close_to_fp32(go, stage1, tmp_path, stage):
    """--precision bf16: the first step's loss and gradient norm within a few percent of float32, in both stages."""
    first = []
    for precision in ("fp32", "bf16"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if stage == 2:
            shutil.copytree(stage1, tmp_path / "out")
        assert go(f"--stage {stage} --steps 1 --precision {precision}")[0] == 0
        first.append(log_lines(tmp_path / "out")[-1])
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=0.03) and first[1]["loss"] != first[0]["loss"]
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=0.1)


# ---- what the flags of the ablations do ----

def config(tiny_base, out, text):
    return settings.parse_args([*f"--base {tiny_base} --out {out} {TINY}".split(), *text.split()])


def test_main_stream_starts_where_asked(tiny_base, second):
    """--main-init stage1 copies stage 1's UNet, --main-init base the base's; --shared-qkv has one projection, else one per task."""
    weights = lambda m: m.state_dict()
    stage1 = train.build_model(config(tiny_base, second, "--stage 2"), ())
    base = train.build_model(config(tiny_base, second, "--stage 2 --main-init base --shared-qkv"), ())
    assert same(weights(stage1.main), weights(stage1.unet)) and same(weights(base.unet), weights(stage1.unet))
    assert same(weights(base.main), weights(load_base(str(tiny_base))[1])) and not same(weights(base.main), weights(base.unet))
    assert {tuple(layer.task_to_q) for layer in base.attention.values()} == {("shared",)}
    assert {tuple(layer.task_to_v) for layer in stage1.attention.values()} == {tuple(THREE.split(","))}


@pytest.mark.parametrize("flags,depends", [("concat", True), ("average", True), ("none", False)])
def test_second_frame(go, tmp_path, flags, depends):
    """--second-frame none trains a flow that does not depend on the second frame; concat and average do; single-frame tasks never."""
    assert go(f"--tasks depth,optical_flow --second-frame {flags} --steps 2")[0] == 0
    model, (a, b, c) = StableMTL.load(tmp_path / "out"), torch.rand(3, 1, 3, 16, 24) * 2 - 1
    one, two = model.predict(a, b), model.predict(a, c)
    assert torch.equal(one["optical_flow"], two["optical_flow"]) == (not depends) and torch.equal(one["depth"], two["depth"])


def test_n_to_n_supervises_all_labels_of_an_image(go, tmp_path, second):
    """--attention n-to-n: a step trains every task its images are labelled for, and every query of them moves."""
    assert go("--stage 2 --attention n-to-n --steps 2 --lr 0.01 --batch 2")[0] == 0
    labelled = {r.name: set(r.tasks) & set(THREE.split(",")) for r in train_readers(size=(16, 24), scenes=2)}
    for e in log_lines(tmp_path / "out")[-2:]:
        assert set(e["task"]) == set().union(*(labelled[d] for d in e["dataset"]))


@pytest.mark.parametrize("mask", ["score", "score-k", "argmax", "uniform"])
def test_masks_train(go, second, tmp_path, mask):
    """Every kind of attention-guided masking trains, and what is saved is complete."""
    assert go(f"--stage 2 --mask {mask} --rho 1 --heads 2 --steps 1")[0] == 0
    model = StableMTL.load(tmp_path / "out")
    assert model.multi == {"heads": 2, "shared": False, "attention": "n-to-1"}


@pytest.mark.parametrize("stage", [1, 2])
def test_held_out_loss_by_its_definition(tiny_base, second, stage):
    """The mean over tasks of the masked squared error in latent space on unseen samples, without masking or randomness, leaving no trace."""
    rho = "--rho 1" if stage == 2 else ""
    cfg = config(tiny_base, second, f"--stage {stage} --tasks {THREE} {rho} --overwrite")
    model = train.build_model(cfg, tuple(THREE.split(",")))
    unseen = train_readers(size=(16, 24), scenes=3, split="val")
    held_out = Mixture(unseen, model.tasks, TASKS, 3, 2, 0, with_next=True)
    train.set_mode(model, True)
    before = torch.get_rng_state()
    losses = [train.held_out_loss(model, held_out, 0, CPU, nullcontext) for _ in range(2)]
    assert losses[0] == losses[1] and losses[0][1] == [] and torch.equal(before, torch.get_rng_state())
    assert (model.main or model.unet).training and all(p.grad is None for p in model.parameters())
    assert {r.split for r in unseen} == {"val"} and {r.name for r in unseen} == set(data.TOY_TRAIN)
    model.eval()
    errors = []
    with torch.no_grad():
        for s in range(3):
            squares = []
            for b in held_out[s]["batches"]:
                (t, label), = b["labels"].items()
                error = (model(*map(model.encode, b["frames"]), [t])[t] - model.encode(label)).square().permute(0, 2, 3, 1)
                squares.append(error[whole_cells(b["valid"][t], model.factor)[:, 0]].flatten())
            errors.append(torch.cat(squares).mean().item())
    assert losses[0][0] == pytest.approx(sum(errors) / 3, rel=1e-5)
