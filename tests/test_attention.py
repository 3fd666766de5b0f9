"""What stage 2's attention does is seen while it trains, and its streams can be taken away."""
import json
import math
import shutil

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from kill import log_lines
from runs import THREE
from test_model import ALL, attention_layer, close, naive, stock
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import settings
import train
from cli import run
from model import StableMTL
from network.attention import WATCHED, Query, watch, watched
from tasks import TASKS

pytestmark = pytest.mark.usefixtures("quick")


# ---- seen while it trains ----

def seen(out):
    """[(entropy, largest weight, share of the term)] of the steps of stage 2 in a log."""
    return [[e[f"attention_{k}"] for k in ("entropy", "largest", "term")] for e in log_lines(out) if e["stage"] == 2]


@torch.no_grad()
def test_what_is_seen_by_its_definition():
    """Entropy and largest weight of every pixel and head by hand; norms over all of a layer; even attention is 1."""
    layer, a, feats = attention_layer()
    y, weights = layer(a, "depth", layer.keys_values(feats))
    found = watched(dict(zip(WATCHED, watch(weights, a, y).tolist(), strict=True)))
    rows = weights.permute(1, 2, 3, 0).flatten(0, 2).tolist()
    entropies = [-sum(w * math.log(w) for w in row) / math.log(len(row)) for row in rows]
    assert found["attention_entropy"] == pytest.approx(sum(entropies) / len(rows), rel=1e-5)
    assert found["attention_largest"] == pytest.approx(sum(map(max, rows)) / len(rows), rel=1e-5)
    assert found["attention_term"] == pytest.approx((y.norm() / a.norm()).item(), rel=1e-5)
    even = watch(torch.full((6, 2, 3, 4), 1 / 6), a, 0 * y).tolist()
    assert list(watched(dict(zip(WATCHED, even, strict=True))).values()) == pytest.approx([1, 1 / 6, 0], abs=1e-6)


def test_nothing_seen_is_told_as_such():
    """A step without any image, or of infinite numbers, has no entropy."""
    assert set(watched(dict.fromkeys(WATCHED, 0.0)).values()) == {None}
    assert watched(dict.fromkeys(WATCHED, 0.0) | {"term": math.inf, "main": 1.0})["attention_term"] is None


@pytest.mark.parametrize("checkpointing", [False, True])
@torch.enable_grad()
def test_watching_changes_nothing(checkpointing):
    """The same output and gradients; a mask that leaves a task out does not look like attention that has chosen; nor
    do blocks that run again in the backward pass count for more."""
    m, z, grads, found = tiny.model(multi=True), tiny.latents(), [], []
    if checkpointing:
        m.main.enable_gradient_checkpointing()
    m.training, keys = True, [("rooms", k, False) for k in range(len(z[0]))]
    for watching, rho in (False, 0.0), (True, 0.0), (True, 1.0):
        m.rho, m.watch = rho, torch.zeros(len(WATCHED)) if watching else None
        m.zero_grad()
        m(*z, ["depth"], keys=keys)["depth"].square().mean().backward()
        grads.append([p.grad for p in m.main.parameters()])
        found.append(watching and watched(dict(zip(WATCHED, m.watch.tolist(), strict=True)))["attention_entropy"])
    assert all(map(torch.equal, *grads[:2])) and not all(map(torch.equal, *grads[1:]))
    assert 0.5 < found[1] < 1 and found[2] == pytest.approx(found[1], rel=0.01)
    m = tiny.model(multi=True)
    m.watch = torch.zeros(len(WATCHED))
    m(*z, ["depth"])
    assert found[1] == pytest.approx((m.watch[1] / m.watch[0]).item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["n-to-1", "n-to-n"])
def test_the_log_of_stage_2_tells_it(go, stage1, tmp_path, attention):
    """Step 0 adds nothing, later steps something; micro-batches of another size and held-out samples in between change
    no number; stage 1 has none."""
    flags = f"--stage 2 --attention {attention} --rho 0.7 --steps 4 --lr 0.01 --attention-lr 1 --batch 4"
    for name, more in ("a", "--micro 4"), ("b", "--micro 1 --val-samples 2"):
        out = shutil.copytree(stage1, tmp_path / name)
        assert go(f"{flags} {more} --out {out}")[0] == 0
    one, other = seen(tmp_path / "a"), seen(tmp_path / "b")
    assert len(one) == 4
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert one[0][2] == 0 and 0 < one[-1][2] < 1
    assert all(0 < entropy <= 1.001 and 0.5 <= largest <= 1 for entropy, largest, _ in one)
    assert not any("attention_entropy" in e for e in log_lines(tmp_path / "a") if e["stage"] == 1)


# ---- fewer streams ----

@torch.no_grad()
def test_no_streams_is_the_main_unet_alone(tiny_model, monkeypatch):
    """attends = (): diffusers' own forward of the main UNet, without a processor of ours; no stream is computed."""
    z, main = tiny.latents(), UNet2DConditionModel.from_config(tiny_model.main.config)
    main.load_state_dict({k: v for k, v in tiny_model.main.state_dict().items() if k in main.state_dict()})
    monkeypatch.setattr(tiny_model, "attends", ())
    monkeypatch.setattr(tiny_model.unet, "forward", None)
    found = tiny_model(*z, ["optical_flow"])["optical_flow"]
    close(found, stock(main.eval(), *z, tiny_model.token_optical_flow))
    assert set(tiny_model(*z, list(ALL), rows=3)) == set(ALL)


@torch.no_grad()
def test_all_streams_listed_is_the_default(tiny_model, monkeypatch):
    """Bit for bit."""
    z = tiny.latents()
    before = tiny_model(*z, ["depth", "albedo"])
    monkeypatch.setattr(tiny_model, "attends", ALL)
    assert all(map(torch.equal, before.values(), tiny_model(*z, ["depth", "albedo"]).values()))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["n-to-1", "n-to-n"])
def test_a_subset_equals_a_naive_loop(attention, monkeypatch):
    """The softmax runs over the listed streams; a task whose only listed stream is its own gets no term. Every call of
    a layer, against one image, pixel, head and task at a time."""
    m, calls = tiny.model(multi=True, attention=attention), []
    m.attends = ("depth",)
    for block, layer in m.attention.items():
        layer.register_forward_hook(lambda layer, args, result, b=block: calls.append((b, layer, args, result)))
    z = tiny.latents(1, (4, 4))
    alone = m(*z, ["depth"])["depth"]
    if attention == "n-to-1":
        assert not calls
    both = m(*z, ["depth", "shading"])
    close(both["depth"], alone)
    feats = m.streams(*z, ALL)
    assert calls and {args[1] for _, _, args, _ in calls} == set(ALL if attention == "n-to-n" else ["shading"]) - {
        "depth"}
    assert all(args[2][0] == ("depth",) for _, _, args, _ in calls)
    calls.clear()
    m.attends = ("normal", "depth", "shading")
    m(*z, ["shading"])
    for block, layer, (a, task, *_), (y, weights) in [c for c in calls if c[2][1] == "shading"][:3]:
        if attention == "n-to-1":
            close(y, naive(layer, a, task, {t: feats[block.replace("/", ".")][t] for t in m.attends}))
        assert len(weights) == 2


def test_evaluation_without_streams(tiny_ckpt, tmp_path, capsys):
    """--streams: files of their own, other numbers; refused of what has no such streams."""
    out = shutil.copytree(tiny_ckpt, tmp_path / "out")

    def go(flags):
        argv = f"--ckpt {out} --limit 1 --trivial 0 --workers 0 --data toy {flags}".split()
        return run(lambda: evaluate.main(argv)), capsys.readouterr().err
    for flags in ("", "--streams off", "--streams depth,normal", "--streams all"):      # all: as without the flag
        assert go(flags)[0] == 0
    assert len([*out.glob("results*.json")]) == 3
    reports = [json.loads((out / f"results{name}.json").read_text()) for name in ("", "_streams-off",
                                                                                  "_streams-normal-depth")]
    for kind in ("results", "made_from"):
        assert len({json.dumps(r[kind]) for r in reports}) == 3
    for flags, says in (("--streams off --stage 1", "--streams would do nothing here"), ("--streams=", "unknown task"),
                        ("--streams off --codec", "--streams would do nothing"), ("--streams x", "unknown task x")):
        code, error = go(flags)
        assert code == 2 and says in error and error.count("\n") == 1


def test_evaluation_of_one_frame(tiny_ckpt, tiny_ckpt_1, tmp_path, capsys):
    """--one-frame: a file of its own; what has a second frame gets other numbers, but for the tasks of motion."""
    out = shutil.copytree(tiny_ckpt, tmp_path / "out")

    def go(ckpt, flags):
        return run(lambda: evaluate.main(f"--ckpt {ckpt} --limit 2 --trivial 0 --workers 0 --data toy {flags}".split()))
    assert go(out, "") == go(out, "--one-frame") == 0
    pair, one = (json.loads((out / f"results{name}.json").read_text())["results"] for name in ("", "_one-frame"))
    for world, tasks in pair.items():
        for t, metrics in tasks.items():
            same = metrics == pytest.approx(one[world][t], rel=1e-6 if tiny.OWN else 0, abs=0)
            assert same == (TASKS[t].frames == 2 or "optical_flow" not in tasks), (world, t, metrics, one[world][t])
    for ckpt, flags in ((tiny_ckpt_1, "--one-frame"), (out, "--codec --one-frame")):
        capsys.readouterr()
        assert go(ckpt, flags) == 2 and "--one-frame would do nothing here" in capsys.readouterr().err


def test_streams_that_a_model_does_not_have(second, go, tmp_path, capsys):
    """A model of three tasks has three streams."""
    assert go("--stage 2")[0] == 0
    assert run(lambda: evaluate.main(f"--ckpt {second} --streams albedo,depth".split())) == 2
    assert f"no albedo, only {THREE.replace(',', ', ')}" in capsys.readouterr().err


# ---- recipes ----

@torch.no_grad()
def test_queries_that_start_with_unit_gain(second, tiny_base):
    """--query-init unit: queries of about unit variance where the released ones are a tenth of it; the same key names,
    everything else starts as before, and step 0 equals stage 1."""
    spread, states, z = {}, {}, tiny.latents(1)
    for how in settings.QUERY_INITS:
        cfg = settings.parse_args(f"--stage 2 --base {tiny_base} --out {second} --query-init {how}".split())
        m = train.build_model(cfg, THREE.split(","), settings.stages_in(cfg)).eval()
        query = Query(256, 640)
        if how == "unit":
            query.unit_gain()
        spread[how] = query(torch.randn(500, 256)).std().item()
        states[how] = m.state_dict()
        assert torch.equal(m(*z, ["depth"])["depth"], StableMTL.load(second, stage=1)(*z, ["depth"])["depth"])
    assert spread["released"] < 0.1 and spread["unit"] == pytest.approx(1, rel=0.1)
    differs = {k for k in states["unit"] if not torch.equal(states["unit"][k], states["released"][k])}
    assert states["unit"].keys() == states["released"].keys() and differs
    assert all("task_to_q" in k for k in differs)


def test_the_main_unet_frozen_and_slower(go, stage1, tmp_path):
    """--freeze-main 1: after one step the main UNet is stage 1's bit for bit, the attention as without; then it learns.
    --main-lr 0.5: Adam's first step moves it half as far."""
    ends = {}
    for name, flags in {"plain": "", "frozen": "--freeze-main 1", "then": "--freeze-main 1 --steps 2",
                        "slow": "--main-lr 0.5"}.items():
        out = shutil.copytree(stage1, tmp_path / name)
        assert go(f"--stage 2 --rho 0 --clip 1e9 --lr 1e-3 --warmup 0 {flags} --out {out}")[0] == 0
        ends[name] = StableMTL.load(out)
    start = ends["plain"].unet.state_dict()

    def moved(name):
        return {k: v - start[k] for k, v in ends[name].main.state_dict().items()}
    assert not any(x.any() for x in moved("frozen").values()) and any(x.any() for x in moved("then").values())
    for layer, other in zip(ends["plain"].attention.parameters(), ends["frozen"].attention.parameters(), strict=True):
        assert torch.equal(layer, other)
    plain, slow = moved("plain"), moved("slow")
    assert all(torch.allclose(0.5 * plain[k], slow[k], rtol=1e-2, atol=1e-6) for k in plain)
    assert any(x.any() for x in slow.values())


@pytest.mark.parametrize("apart, expected", [(False, (0.6, 0.8)), (True, (1.0, 1.0))])
def test_clipping_apart(apart, expected):
    """Gradients of norm 3 and 4 clipped at 1: together to 5, or each by itself; the norm told is that of both."""
    parts = {"main_unet": torch.nn.Linear(2, 1, bias=False), "task_attention": torch.nn.Linear(2, 1, bias=False)}
    cfg = settings.check(settings.Config(stage=2, clip=1.0, clip_apart=apart, attention_lr=3.0, warmup=0, lr=0.1))
    optimizer = train.make_optimizer(cfg, {name: dict(m.named_parameters()) for name, m in parts.items()})
    for module, size in zip(parts.values(), (3.0, 4.0), strict=True):
        module.weight.grad = torch.tensor([[size, 0.0]])
    lr, norm = train.clip_gradients(cfg, optimizer, 0)
    assert norm == pytest.approx(5) and lr == 0.1
    assert [m.weight.grad.norm().item() for m in parts.values()] == pytest.approx(expected, rel=1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])


def test_masking_that_starts_later(go, second, monkeypatch):
    """--rho-after 2: nothing is left out in the first two steps."""
    seen, step = [], train.accumulate

    def spy(objective, *args):
        seen.append(objective.model.rho)
        return step(objective, *args)
    monkeypatch.setattr(train, "accumulate", spy)
    assert go("--stage 2 --rho 0.7 --rho-after 2 --steps 3")[0] == 0
    assert seen == [0, 0, 0.7]


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **kwargs or {})


def test_a_pass_takes_nothing_from_the_host():
    """No index or number goes to a GPU or comes from it within the passes of all tasks: each would wait for it, and a
    CUDA graph, which cannot record that, failed on one."""
    model, z = tiny.model(multi=True), torch.rand(1, 4, 4, 6)
    with torch.no_grad(), Operations() as seen:
        model(z, z, model.tasks)
    assert not {name for name in seen.names if name.split(".")[1] in ("index", "lift_fresh", "_local_scalar_dense",
                                                                      "nonzero", "index_select")}
    assert "aten.baddbmm.default" in seen.names
