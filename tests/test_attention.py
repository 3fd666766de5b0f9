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

import evaluate
from attention import WATCHED, watch, watched
from cli import run

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
    rows = weights.permute(1, 2, 3, 0).reshape(-1, 6).tolist()
    entropies = [-sum(w * math.log(w) for w in row) / math.log(6) for row in rows]
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
    m.training = True
    for watching, rho in (False, 0.0), (True, 0.0), (True, 1.0):
        m.rho, m.watch = rho, torch.zeros(len(WATCHED)) if watching else None
        m.zero_grad()
        m(*z, ["depth"])["depth"].square().mean().backward()
        grads.append([p.grad for p in m.main.parameters()])
        found.append(watching and watched(dict(zip(WATCHED, m.watch.tolist(), strict=True)))["attention_entropy"])
    assert all(map(torch.equal, *grads[:2])) and not all(map(torch.equal, *grads[1:]))
    assert 0.5 < found[1] < 1 and found[2] == pytest.approx(found[1], rel=0.01)
    m = tiny.model(multi=True)
    m.watch = torch.zeros(len(WATCHED))
    m(*z, ["depth"])
    assert found[1] == pytest.approx((m.watch[1] / m.watch[0]).item(), rel=1e-5)


def test_the_log_of_stage_2_tells_it(go, stage1, tmp_path):
    """Step 0 adds nothing, later steps something; micro-batches of another size and held-out samples in between change
    no number; stage 1 has none."""
    flags = "--stage 2 --rho 0 --steps 4 --lr 0.01 --batch 4"
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
    for flags in ("", "--streams off", "--streams depth,normal"):
        assert go(flags)[0] == 0
    reports = [json.loads((out / f"results{name}.json").read_text()) for name in ("", "_streams-off",
                                                                                  "_streams-normal-depth")]
    for kind in ("results", "made_from"):
        assert len({json.dumps(r[kind]) for r in reports}) == 3
    for flags, says in (("--streams off --stage 1", "--streams would do nothing here"), ("--streams=", "unknown task"),
                        ("--streams off --oracle", "it does not go with --oracle"), ("--streams x", "unknown task x")):
        code, error = go(flags)
        assert code == 2 and says in error and error.count("\n") == 1


def test_streams_that_a_model_does_not_have(second, go, tmp_path, capsys):
    """A model of three tasks has three streams."""
    assert go("--stage 2")[0] == 0
    assert run(lambda: evaluate.main(f"--ckpt {second} --streams albedo,depth".split())) == 2
    assert f"no albedo, only {THREE.replace(',', ', ')}" in capsys.readouterr().err
