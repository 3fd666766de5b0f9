"""train.py: one task per step, micro-batches that change nothing, losses and gradients by their definitions, and what
the flags of the ablations do."""
import copy
import json
import math
import shutil
from contextlib import nullcontext

import pytest
import tiny
import torch
from kill import log_lines
from made import Made
from runs import THREE, TINY, close, same
from safetensors.torch import load_file

import data
import settings
import train
from data import Mixture, train_readers, whole_cells
from model import StableMTL, from_base, load_base
from readers.toyworld import ALL
from tasks import TASKS, registry
from training import losses
from training.pictures import samples, save_picture

pytestmark = pytest.mark.usefixtures("quick")
CPU, PLAIN = torch.device("cpu"), (nullcontext, None)       # device and (autocast, scaler) of float32 training
SIZE = (16, 24)


@pytest.fixture(scope="module")
def readers():
    return train_readers(size=SIZE, scenes=2)


@pytest.fixture(scope="module")
def model(tiny_base):
    """Stage 1 of all tasks, untrained. Shared: only its gradients may change."""
    return from_base(str(tiny_base), tuple(TASKS))


def gradients(model, batches, kinds, encode=True):
    """({kind: loss}, {parameter: gradient}) of one step."""
    model.zero_grad(set_to_none=True)
    found = losses.accumulate(losses.LatentObjective(model, kinds, encode), batches, CPU, *PLAIN)
    params = [named for own in train.trainable(model).values() for named in own.items()]
    return found, {n: p.grad.clone() for n, p in params if p.grad is not None}


# ---- samples held out ----

def test_a_picture_of_what_can_be_read(tiny_model, tmp_path):
    """With --skip-bad a picture shows the first sample that is whole, and there is none where none is; else a sentence
    names what is not."""
    path, bad = tmp_path / "pictures" / "a.png", Made(n=3, broken=0)
    with pytest.raises(ValueError, match="for a picture, made sample 0: made/0.png is truncated.*--skip-bad"):
        save_picture(tiny_model, [bad], path)
    save_picture(tiny_model, [Made(n=1, broken=0)], path, skip_bad=True)
    assert not path.exists()
    save_picture(tiny_model, [bad], path, skip_bad=True)
    assert path.is_file() and 1 in bad.loads and 2 not in bad.loads
    tiny_model.eval()


def test_a_picture_shows_every_task_that_has_labels(tiny_model):
    """Of partial labels it showed those of the first sample alone, and explained the others below."""
    made = Made(labelled={"normal": [1], "depth": [2], "optical_flow": [2, 3]})
    found = samples([made], tiny_model, False)
    assert [tasks for _, tasks, _ in found] == [("normal",), ("depth", "optical_flow")]


def test_labels_left_out_are_not_held_out_either(go, monkeypatch):
    """A task that the held-out samples have in a dataset alone where it is dropped is not looked for."""
    monkeypatch.setattr(train, "train_readers", lambda *args: train_readers(*args)[:1 if "val" in args else 3])
    few = "--tasks depth,normal --drop rooms:depth"
    code, _, error = go(few, TINY.replace("--val-samples 0", "--val-samples 1"))
    assert code == 0, error


# ---- one task at a time ----

def test_a_step_leaves_other_tasks_alone(go, second, tmp_path, monkeypatch):
    """Stage 2: after a step on task A the query projections of the other tasks are bit-identical, momentum or not, and
    Adam has no state of a task before its first step."""
    tasks, names, history = THREE.split(","), [], []
    trainable, step = train.trainable, torch.optim.Adam.step

    def named(model):
        parts = trainable(model)
        names[:] = [n for own in parts.values() for n in own]
        return parts

    def queries(params):
        return {t: [p.detach().clone() for n, p in params if f"task_to_q.{t}." in n] for t in tasks}

    def spy(self, *args, **options):
        params = list(zip(names, [p for group in self.param_groups for p in group["params"]], strict=True))
        before = queries(params)
        result = step(self, *args, **options)
        known = {t for n, p in params for t in tasks if f"task_to_q.{t}." in n and self.state.get(p)}
        history.append((before, queries(params), known))
        return result
    monkeypatch.setitem(train.RECIPES, "stablemtl", train.RECIPES["stablemtl"]._replace(parts=named))
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    assert go("--stage 2 --steps 6 --lr 0.01 --batch 2")[0] == 0
    trained = [entry["task"][0] for entry in log_lines(tmp_path / "out") if entry["stage"] == 2]
    assert [sorted(trained[i:i + 3]) for i in (0, 3)] == [sorted(tasks)] * 2
    assert len(history) == 6 and all(history[0][0].values())
    for s, (before, after, known) in enumerate(history):
        moved = {t for t in tasks if not all(map(torch.equal, before[t], after[t]))}
        # the output projection starts at zero: nothing reaches the queries in the first step
        assert moved == ({trained[s]} if s else set())
        assert known == set(trained[:s + 1])


def test_log_of_one_cycle(go, tmp_path):
    """As many steps as tasks train each once, one per step; the log says which, on which datasets, with a finite loss
    and the learning rate."""
    assert go(f"--steps {len(ALL)} --lr 0.001")[0] == 0
    lines = log_lines(tmp_path / "out")
    assert sorted(e["task"][0] for e in lines) == sorted(ALL)
    assert all(len(e["task"]) == 1 for e in lines)
    assert [e["step"] for e in lines] == list(range(len(ALL)))
    assert [e["lr"] for e in lines[:3]] == [0.0005, 0.001, 0.001]
    assert all(set(e["dataset"]) <= {"rooms", "streets", "things"} for e in lines)
    assert all(0 < e["loss"] < 1e3 and e["grad_norm"] > 0 for e in lines)


STANDIN = """
import json, pathlib
calls = []
def init(**options): calls.append(["init", options])
def log(numbers, step): calls.append(["log", numbers, step])
def finish(): calls.append(["finish"]); pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(calls))
"""


def test_track_hands_the_log_to_a_module(go, tmp_path, monkeypatch):
    """--track names a module by its name: it is told the settings, each line of the log with the loss once more under
    its task, and the end; a resumed run, which keeps the flag, goes on at its step."""
    (tmp_path / "standin.py").write_text(STANDIN)
    monkeypatch.syspath_prepend(tmp_path)
    assert go(f"--tasks {THREE} --steps 2 --track standin")[0] == 0
    assert go("--resume --steps 3")[0] == 0
    calls = json.loads((tmp_path / "standin.json").read_text())
    assert [c[0] for c in calls] == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert calls[0][1]["config"]["steps"] == 2 and calls[4][1]["config"]["steps"] == 3
    told, log = [c[1:] for c in calls if c[0] == "log"], log_lines(tmp_path / "out")
    for (numbers, step), entry in zip(told, log, strict=True):
        task, = entry["task"]
        assert step == entry["step"] and numbers.pop(f"loss/{task}") == entry["loss"] and numbers.pop("img_per_s") > 0
        assert numbers == entry | {"task": task, "dataset": "+".join(entry["dataset"])}


def test_no_isolation_mixes_tasks(go, tmp_path):
    """--no-isolation: a step holds several tasks."""
    assert go("--no-isolation --steps 2 --batch 8")[0] == 0
    assert all(len(e["task"]) > 1 for e in log_lines(tmp_path / "out"))


def test_drop_tasks_and_datasets(go, tmp_path):
    """--drop removes a dataset's labels of a task; --tasks trains, and keeps, one task alone."""
    out = tmp_path / "out"
    assert go("--tasks depth --drop streets:depth --steps 3 --batch 6")[0] == 0
    assert all(e["task"] == ["depth"] and e["dataset"] == ["rooms"] for e in log_lines(out))
    assert StableMTL.load(out).tasks == ("depth",)
    assert set(load_file(out / "tokens.safetensors")) == {"depth"}


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
def test_micro_batches_change_nothing(model, readers, kinds):
    """The gradient of a step is the same in one, two or four micro-batches, although their valid areas differ: the mean
    over all valid cells. Same to float32 rounding, which is 2e-6 of the largest gradient in latent space and 2e-5
    behind the decoder."""
    tolerance = 1e-5 if kinds == "latent" else 1e-4
    steps = [uneven(Mixture(readers, ("normal",), TASKS, 4, micro, seed=3)[0]["batches"]) for micro in (4, 2, 1)]
    (loss, whole), *others = [gradients(model, batches, settings.parse_loss(kinds)) for batches in steps]
    assert len(steps[0]) < len(steps[1]) <= len(steps[2]) == 4
    for other, split in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert close(whole, split, tolerance)
    errors = []
    with torch.no_grad():       # the latent loss by its definition
        for b in steps[0]:
            predicted = model(*map(model.encode, b["frames"]), ["normal"])["normal"]
            squares = (predicted - model.encode(b["labels"]["normal"])).square().permute(0, 2, 3, 1)
            errors.append(squares[whole_cells(b["valid"]["normal"], 2)[:, 0]].flatten())
    assert loss["latent"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_nothing_valid_contributes_nothing(model, readers):
    """A step without a valid cell has no loss and leaves every gradient None; scattered valid pixels that fill no cell
    count as none."""
    batches = Mixture(readers, ("depth",), TASKS, 4, 2, seed=1)[0]["batches"]
    for b in batches:
        b["valid"]["depth"][:] = False
    assert gradients(model, batches, {"latent": 1.0, "pixel": 1.0, "task": 1.0}) == ({}, {})
    for b in batches:
        b["valid"]["depth"][..., ::2] = True
    assert gradients(model, batches, {"latent": 1.0}) == ({}, {})


@pytest.mark.parametrize("task", TASKS)
def test_nan_in_invalid_labels_is_harmless(task):
    """NaN or infinity where a native label is invalid does not change its code."""
    codec, g = registry()[task], torch.Generator().manual_seed(2)
    label = torch.rand(1, codec.channels, 8, 12, generator=g).mul(7).floor() / (1 if codec.categorical else 7)
    valid = torch.rand(1, 1, 8, 12, generator=g) < 0.7
    plain, *poisoned = (torch.where(valid, label, torch.tensor(value)) for value in (0.0, math.nan, math.inf))
    for other in poisoned:
        assert torch.equal(codec.encode(other, valid), codec.encode(plain, valid))


@pytest.mark.parametrize("kinds", ["latent", "pixel,task"])
def test_nan_outside_the_masks_is_harmless(model, readers, kinds):
    """NaN outside the mask changes neither loss nor gradient: in label latents, as a cache might hold it, and in the
    codes that the losses on images look at."""
    batches, on_latents = uneven(Mixture(readers, ("normal",), TASKS, 4, 4, seed=3)[0]["batches"]), kinds == "latent"
    if on_latents:
        with torch.no_grad():
            for b in batches:
                b["frames"] = [model.encode(f) for f in b["frames"]]
                b["labels"]["normal"] = model.encode(b["labels"]["normal"])
                b["valid"]["normal"] = whole_cells(b["valid"]["normal"], model.factor)
    kinds = settings.parse_loss(kinds)
    loss, plain = gradients(model, batches, kinds, encode=not on_latents)
    for b in batches:
        b["labels"]["normal"].masked_fill_(~b["valid"]["normal"], math.nan)
    other, poisoned = gradients(model, batches, kinds, encode=not on_latents)
    assert loss.keys() == kinds.keys() and all(map(math.isfinite, loss.values()))
    assert other == loss
    assert same(plain, poisoned)


@pytest.mark.parametrize("task", ALL)
def test_every_loss_of_every_task(model, readers, task):
    """latent, pixel and task are positive, finite and differ in their gradients; decoding the label itself costs
    nothing (cross-entropy: little)."""
    batch = Mixture(readers, (task,), TASKS, 2, 2, seed=5)[0]["batches"][0]
    results = [gradients(model, [batch], settings.parse_loss(kind)) for kind in ("latent", "pixel", "task")]
    assert all(math.isfinite(v) and v > 0 for losses, _ in results for v in losses.values())
    latent, pixel, dense = (gradient for _, gradient in results)
    assert not close(latent, pixel, 1e-2)
    assert not close(pixel, dense, 1e-2)
    code, valid = batch["labels"][task], batch["valid"][task]
    error = losses.DENSE[TASKS[task].dense_loss](code, code, valid, model.codecs[task])
    assert error.shape == valid.shape
    assert error[valid].max() < (0.2 if TASKS[task].categorical else 1e-4)


@pytest.mark.parametrize("task, multi, frames", [("depth", False, 1), ("optical_flow", False, 2), ("depth", True, 2)])
def test_a_frame_seen_twice_is_encoded_once(readers, task, multi, frames):
    """Without a cache: the second frame of a single stream is the first but for motion; streams of motion need it."""
    model, encoded = tiny.model(multi=multi), []
    batch = Mixture(readers, (task,), TASKS, 2, 2, seed=5, with_next=multi)[0]["batches"][0]
    expected = gradients(model, [batch], {"latent": 1.0})
    encode = model.encode_frame
    model.encode_frame = lambda frame: encoded.append(frame) or encode(frame)
    assert same(gradients(model, [batch], {"latent": 1.0})[1], expected[1])
    assert len(encoded) == frames


def test_loss_flag(go, tmp_path):
    """--loss takes a weighted sum, needs images rather than the cache for pixel and task, and names what it cannot
    read."""
    assert settings.parse_loss("latent") == {"latent": 1.0}
    assert settings.parse_loss("pixel:0.5,task") == {"pixel": 0.5, "task": 1.0}
    for text in ("", "latent:x", "dense", "latent:0", "latent:-1", "latent,,task", "latent:nan"):
        with pytest.raises(ValueError, match="--loss"):
            settings.parse_loss(text)
    code, _, error = go(f"--loss pixel --cache {tmp_path / 'cache'} --steps 1")
    assert code == 2 and "--cache none" in error
    assert not (tmp_path / "cache").exists()
    assert go("--loss latent:1,pixel:0.5,task:0.5 --steps 2")[0] == 0
    assert all(math.isfinite(e["loss"]) for e in log_lines(tmp_path / "out"))


def test_a_batch_overfits(tiny_base, readers):
    """Thirty steps on one batch bring the loss of a tiny network below a third."""
    torch.manual_seed(0)
    model = from_base(str(tiny_base), ("depth",))
    batch = Mixture(readers, ("depth",), TASKS, 2, 2, seed=1)[0]["batches"]
    optimizer, values = torch.optim.Adam(model.unet.parameters(), 1e-2), []
    objective = losses.LatentObjective(model, {"latent": 1.0}, True)
    for _ in range(30):
        values.append(losses.accumulate(objective, batch, CPU, *PLAIN)["latent"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert values[-1] < values[0] / 3, values[::5]


def test_learning_rate():
    """Linear warm-up to the peak; exponential decay reaches 1% after 25,000 steps and stays there; cosine ends at 0;
    --warmup 0 starts at the peak."""
    cfg = settings.parse_args("--lr 2 --warmup 100 --schedule exponential --steps 20000".split())

    def rates(*steps):
        return [train.learning_rate(cfg, s) for s in steps]
    assert rates(0, 49, 99, 100) == pytest.approx([0.02, 1, 2, 2])
    assert rates(100 + 12500, 100 + 25000, 60000) == pytest.approx([0.2, 0.02, 0.02])
    cfg.schedule = "cosine"
    assert rates(100, 10050, 20000) == pytest.approx([2, 1, 0], abs=1e-9)
    cfg.warmup = 0
    assert rates(0) == [2]


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_is_close_to_fp32(go, stage1, tmp_path, stage):
    """--precision bf16: the first step's loss and gradient norm within a few percent of float32, in both stages."""
    first = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        if stage == 2:
            shutil.copytree(stage1, out)
        assert go(f"--stage {stage} --tasks {THREE} --steps 1 --precision {precision} --out {out}")[0] == 0
        first.append(log_lines(out)[-1])
    exact, rounded = first
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.03)
    assert rounded["loss"] != exact["loss"]
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_fp16_steps_without_anything_valid(model):
    """GradScaler insists on gradients and on having scaled a loss: a step in which nothing is valid passes without it,
    and so does the first of a process that only the others gave a gradient."""
    cfg = settings.check(settings.Config(lr=0.01, precision="fp16"))
    model = copy.deepcopy(model)
    objective = losses.LatentObjective(model, {"latent": 1.0}, encode=True)
    optimizer, (autocast, scaler) = train.make_optimizer(cfg, train.trainable(model)), train.precision(cfg, CPU)
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    done = train.optimizer_step(cfg, 0, model, objective, [], optimizer, autocast, scaler)
    assert (done.losses, done.norm, done.finite) == ({}, 0, True) and same(model.unet.state_dict(), before)
    model.unet.conv_out.bias.grad = torch.full((4,), 2.0 * scaler.get_scale())
    done = train.optimizer_step(cfg, 1, model, objective, [], optimizer, autocast, scaler)
    assert done.norm == 4 and not torch.equal(model.unet.conv_out.bias, before["conv_out.bias"])


# ---- what the flags of the ablations do ----

def config(tiny_base, out, text):
    return settings.parse_args([*f"--base {tiny_base} --out {out} {TINY}".split(), *text.split()])


def test_a_seed_settles_every_weight(tiny_base, second, tmp_path):
    """Whatever was drawn before, also of a fresh UNet: processes of one run start alike, and a run again as it did."""
    fresh, main = "--stage 1 --widths 8,8,16,16", "--stage 2 --main-init base"
    for flags, out in ((fresh, tmp_path), (f"{fresh} --space pixel", tmp_path), (main, second)):
        found = []
        for drawn in (1, 2):
            torch.manual_seed(drawn)
            cfg = config(tiny_base, out, f"{flags} --seed 5")
            found.append(train.build_model(cfg, THREE.split(","), 1).state_dict())
        assert same(*found)


def test_main_stream_starts_where_asked(tiny_base, second):
    """--main-init stage1 copies stage 1's UNet, --main-init base the base's; --shared-qkv has one projection, else one
    per task."""
    plain = train.build_model(config(tiny_base, second, "--stage 2"), (), 1)
    other = train.build_model(config(tiny_base, second, "--stage 2 --main-init base --shared-qkv"), (), 1)
    trained, untrained = plain.unet.state_dict(), load_base(str(tiny_base))[1].state_dict()
    assert not same(trained, untrained)
    assert same(plain.main.state_dict(), trained)
    assert same(other.main.state_dict(), untrained)
    assert same(other.unet.state_dict(), trained)
    assert {tuple(layer.task_to_q) for layer in other.attention.values()} == {("shared",)}
    assert {tuple(layer.task_to_v) for layer in plain.attention.values()} == {tuple(THREE.split(","))}


@pytest.mark.parametrize("flags,depends", [("concat", True), ("average", True), ("none", False)])
def test_second_frame(go, tmp_path, flags, depends):
    """--second-frame none trains a flow that does not depend on the second frame; concat and average do; single-frame
    tasks never."""
    assert go(f"--tasks depth,optical_flow --second-frame {flags} --steps 2")[0] == 0
    model = StableMTL.load(tmp_path / "out")
    a, b, c = torch.rand(3, 1, 3, *SIZE) * 2 - 1
    one, two = model.predict(a, b), model.predict(a, c)
    assert torch.equal(one["optical_flow"], two["optical_flow"]) == (not depends)
    assert torch.equal(one["depth"], two["depth"])


def test_n_to_n_supervises_all_labels_of_an_image(go, tiny_base, second):
    """--attention n-to-n: a step trains every task its images are labelled for, and every query of them moves."""
    flags = "--stage 2 --attention n-to-n --rho 0 --steps 3 --lr 0.01 --batch 2"
    before = train.build_model(config(tiny_base, second, flags), (), 1).attention.state_dict()
    assert go(flags)[0] == 0
    after = StableMTL.load(second).attention.state_dict()
    labelled = {r.name: set(r.tasks) & set(THREE.split(",")) for r in train_readers(size=SIZE, scenes=2)}
    steps = log_lines(second)[-3:]
    for e in steps:
        assert set(e["task"]) == set().union(*(labelled[d] for d in e["dataset"]))
    for t in steps[-1]["task"]:     # nothing reaches the queries before the output projections, then the values, moved
        own = [n for n in before if f"task_to_q.{t}." in n]
        assert own and not any(torch.equal(before[n], after[n]) for n in own)


@pytest.mark.parametrize("mask", ["score", "score-k", "argmax", "uniform"])
def test_masks_train(go, second, tmp_path, mask):
    """Every kind of attention-guided masking trains, and what is saved is complete."""
    assert go(f"--stage 2 --mask {mask} --rho 1 --heads 2 --steps 1")[0] == 0
    model = StableMTL.load(tmp_path / "out")
    assert model.multi == {"heads": 2, "shared": False, "attention": "n-to-1"}


@pytest.mark.parametrize("stage", [1, 2])
def test_held_out_loss_by_its_definition(tiny_base, second, stage):
    """The mean over tasks of the masked squared error in latent space on unseen samples, without masking or randomness,
    leaving no trace."""
    rho = "--rho 1" if stage == 2 else ""
    cfg = config(tiny_base, second, f"--stage {stage} --tasks {THREE} {rho} --overwrite")
    model = train.build_model(cfg, tuple(THREE.split(",")), stage - 1)
    unseen = train_readers(size=SIZE, scenes=3, split="val")
    assert {r.split for r in unseen} == {"val"}
    assert {r.name for r in unseen} == set(data.TOY_TRAIN)
    held_out = Mixture(unseen, model.tasks, TASKS, 3, 2, 0, with_next=True)
    objective = train.latent_objective(model, cfg, held_out, None)
    train.set_mode(model, True)
    before = torch.get_rng_state()
    given = model, objective, held_out, 0, CPU, nullcontext
    (loss, skipped), again = (train.held_out_loss(*given) for _ in range(2))
    assert (loss, skipped) == again and skipped == []
    assert torch.equal(before, torch.get_rng_state())
    assert (model.main or model.unet).training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    errors = []
    with torch.no_grad():
        for s in range(3):
            squares = []
            for b in held_out[s]["batches"]:
                (t, label), = b["labels"].items()
                predicted = model(*map(model.encode, b["frames"]), [t])[t]
                error = (predicted - model.encode(label)).square().permute(0, 2, 3, 1)
                squares.append(error[whole_cells(b["valid"][t], model.factor)[:, 0]].flatten())
            errors.append(torch.cat(squares).mean().item())
    assert loss == pytest.approx(sum(errors) / 3, rel=1e-5)
