"""What makes training fit a smaller GPU: it trains, saves and resumes as everything else does."""
import shutil
import sys

import pytest
import tiny
import torch
from kill import compare, log_lines
from made import Made
from runs import THREE, same, state, stop_at
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import read_state, restore, save_state
from cli import run
from inference import infer
from model import StableMTL
from network import memory
from tools import study, study_cost
from training import pictures

pytestmark = pytest.mark.usefixtures("quick")
CHOICES = ("--optimizer adam-bf16", "--frozen bf16", "--lora 2", "--lora 2 --frozen bf16 --optimizer adam-bf16")


def part_files(folder, *parts):
    return [p for part in parts for p in sorted((folder / part).iterdir())]


@pytest.mark.parametrize("flags", CHOICES)
def test_resume_equals_uninterrupted(go, stage1, tmp_path, monkeypatch, flags):
    """Stage 2 of each choice, stopped within a step and resumed, is the undisturbed run bit for bit; the parts that it
    does not train stay stage 1's files, in best/, too."""
    outs = [shutil.copytree(stage1, tmp_path / name) for name in ("whole", "out")]
    given = f"--stage 2 --rho 1 --steps 4 --val-samples 1 {flags}"
    assert go(f"{given} --out {outs[0]}")[0] == 0
    stop_at(monkeypatch, "within", 2)
    assert go(given)[0] == 130
    assert go("--resume")[0] == 0
    assert compare(*outs) == []
    for folder in (outs[1], outs[1] / "best"):
        for a, b in zip(part_files(stage1, "vae", "unet"), part_files(folder, "vae", "unet"), strict=True):
            assert a.name == b.name and a.read_bytes() == b.read_bytes()
    plain, model = StableMTL.load(stage1).unet.state_dict(), StableMTL.load(outs[1])
    assert model.main.state_dict().keys() == plain.keys()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not same(model.main.state_dict(), plain)


@pytest.mark.parametrize("flags", CHOICES)
def test_losses_are_close_to_those_of_plain_training(go, stage1, tmp_path, flags):
    """The first step's loss is that of float32, to what bfloat16 resolves; so is the second's, but for LoRA."""
    logs = []
    for name, extra in (("plain", ""), ("less", flags)):
        out = shutil.copytree(stage1, tmp_path / name)
        assert go(f"--stage 2 --rho 0 --steps 2 --out {out} {extra}")[0] == 0
        logs.append([entry["loss"] for entry in log_lines(out) if entry["stage"] == 2])
    assert logs[1][0] == pytest.approx(logs[0][0], rel=1e-2 if "frozen" in flags else 1e-6)
    assert "lora" in flags or logs[1] == pytest.approx(logs[0], rel=2e-2)


def test_streams_of_bf16_have_a_cache_of_their_own(go, stage1, tmp_path):
    """The latents are those of the float32 VAE, whoever made them; streams in bfloat16 are kept apart from others."""
    cache = tmp_path / "cache"
    for name, extra in (("plain", ""), ("less", "--frozen bf16")):
        out = shutil.copytree(stage1, tmp_path / name)
        assert go(f"--stage 2 --rho 0 --cache {cache} --out {out} {extra}")[0] == 0
        arrays = {p: p.read_bytes() for p in sorted(cache.glob("*/*.npy"))}
        assert len(list(cache.glob("streams-*"))) == 1 + bool(extra)
    assert arrays and arrays == {p: p.read_bytes() for p in sorted(cache.glob("*/*.npy"))}


# ---- LoRA ----

@pytest.fixture
def adapted():
    """A main UNet with LoRA whose B is not zero, and the same before."""
    unet = tiny.unet()
    plain = {k: v.clone() for k, v in unet.state_dict().items()}
    memory.add_lora(unet, 2)
    for name, p in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    return unet.eval(), plain


def test_merged_lora_is_the_same_function(adapted):
    """Diffusers' own names, and what the adapted UNet predicts; the base is not touched."""
    unet, plain = adapted
    x, text = torch.randn(2, 12, 8, 8), torch.randn(2, 5, 24)
    whole = memory.merged(unet)
    assert whole.state_dict().keys() == plain.keys() and memory.merged(whole) is whole
    assert all(torch.equal(p, plain[k.replace(".base_layer", "")]) for k, p in unet.state_dict().items()
               if ".lora_" not in k)
    with torch.no_grad():
        assert torch.allclose(unet(x, 999, text).sample, whole.eval()(x, 999, text).sample, atol=1e-5)
    changed = {k for k, v in whole.state_dict().items() if not torch.equal(v, plain[k])}
    assert all(k.rsplit(".", 1)[0].endswith(tuple(memory.LORA_LAYERS)) for k in changed)
    assert len(changed) == 16 * (2 * 4 + 2)      # blocks x (two attentions of four layers, two feed-forward layers)


def test_only_low_ranks_are_trained(go, stage1, tmp_path):
    """The state holds A and B of the main UNet and the task attention, nothing of what is frozen."""
    out = shutil.copytree(stage1, tmp_path / "lora")
    assert go(f"--stage 2 --lora 2 --out {out}")[0] == 0
    mains = [k for k in state(out) if k.startswith("weight/main_unet/")]
    assert mains and all(".lora_A." in k or ".lora_B." in k for k in mains)


def test_without_peft_a_sentence(go, second, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, error = go(f"--stage 2 --tasks {THREE} --lora 4")
    assert code == 2 and "--lora needs the package peft" in error and "pip install peft" in error
    code = run(lambda: study.main(["--only", "single,lora", "--out", str(second / "study")]))
    assert code == 2 and not (second / "study").exists()       # at once, not after hours of other models


# ---- Adam ----

def test_rounding_at_random_keeps_the_mean():
    """Each value goes to one of its two neighbours in bfloat16, on average to itself; what is one already stays."""
    noise = torch.Generator().manual_seed(0)
    for value in (1.001, -3.3e-9, 2.7e20):
        x, out = torch.full((20_000,), value), torch.empty(20_000, dtype=torch.bfloat16)
        memory.round_at_random(out, x, noise)
        found = out.double().unique()
        low, high = found.tolist()
        assert low < x[0].double() < high and high - low <= abs(value) / 128
        assert out.double().mean() == pytest.approx(x[0].item(), abs=4 * (high - low) / 2 / 20_000 ** 0.5)
    x, out = torch.tensor([0.0, 1.0, -2.5]), torch.empty(3, dtype=torch.bfloat16)
    memory.round_at_random(out, x, noise)
    assert torch.equal(out.float(), x)


def test_adam_of_bf16_moments_follows_adam():
    """The moments of a constant gradient grow as Adam's do; to the nearest, the second would stop at 0.25 of it."""
    results = []
    for kind in (torch.optim.Adam, memory.AdamBf16):
        p = torch.nn.Parameter(torch.zeros(1000))
        optimizer = kind([p], lr=1e-3)
        for _ in range(2000):
            p.grad = torch.full_like(p, 0.1)
            optimizer.step()
        results.append((p.detach(), *(optimizer.state[p][k].float().mean().item() for k in ("exp_avg", "exp_avg_sq"))))
    (p, mean, square), (p16, mean16, square16) = results
    assert mean16 == pytest.approx(mean, rel=2e-3) and square16 == pytest.approx(square, rel=5e-3)
    assert torch.allclose(p16, p, rtol=0.05) and p16.mean().item() == pytest.approx(p.mean().item(), rel=2e-3)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].dtype == torch.bfloat16


def test_adam_of_bf16_moments_leaves_unused_weights_alone():
    """A weight without gradient gets no state and does not move, as isolation wants it; two groups, two rates."""
    a, b, c = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = memory.AdamBf16([{"params": [a, b], "lr": 1e-2}, {"params": [c], "lr": 1e-3}], lr=1.0)
    a.grad, c.grad = torch.ones(3), -torch.ones(3)
    optimizer.step()
    assert not optimizer.state[b] and not b.any()
    assert a.tolist() == pytest.approx([-1e-2] * 3, rel=1e-2) and c.tolist() == pytest.approx([1e-3] * 3, rel=1e-2)


def test_a_low_rank_costs_less_than_all(go, stage1, tmp_path):
    """Files hold LoRA merged, and its row in a study had the operations of all weights' gradients."""
    outs = [shutil.copytree(stage1, tmp_path / name) for name in ("all", "low")]
    for out, flags in zip(outs, ("", "--lora 2"), strict=True):
        assert go(f"--stage 2 --steps 1 --val-samples 0 {flags} --out {out}")[0] == 0
    assert study_cost.alike(outs[0]) != study_cost.alike(outs[1])
    every, low = (study_cost.step(out, 2) for out in outs)
    assert 0.5 * every < low < 0.95 * every


def test_a_picture_takes_a_task_at_a_time(tiny_model, tmp_path, monkeypatch):
    """It took all tasks of a dataset at once, in float32, beside a training that fills the GPU."""
    rows, kinds = [], []
    monkeypatch.setattr(infer, "half", lambda device: torch.autocast("cpu", torch.bfloat16))

    def note(module, args):
        rows.append(len(args[0]))
        kinds.append(torch.is_autocast_enabled("cpu"))
    hooks = [m.register_forward_pre_hook(note) for m in (tiny_model.main, tiny_model.vae.decoder)]
    pictures.save_picture(tiny_model, [Made()], tmp_path / "a.png")
    for hook in hooks:
        hook.remove()
    assert set(rows) == {1} and len(rows) == 2 * 3 and all(kinds)


class Widest(TorchDispatchMode):
    """Notes the largest new float32 tensor."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if torch.is_tensor(out) and out.dtype == torch.float32 and out is not args[0]:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_resuming_keeps_moments_in_bf16(tmp_path):
    """What is read back is what was, and no moment is float32 on the way: all of them, as torch's own load_state_dict
    has it, take more memory than the training that fitted a card."""
    parts = {"unet": {name: torch.nn.Parameter(torch.randn(50)) for name in "ab"}}
    params = [*parts["unet"].values()]
    optimizers = [memory.AdamBf16([{"params": params, "name": "unet"}], lr=0.1) for _ in range(2)]
    for p in params:
        p.grad = torch.randn(50)
    optimizers[0].step()
    about = {"train": {"stage": 1, "steps": 9, "batch": 1, "seed": 0}}
    save_state(tmp_path, about, 1, parts, optimizers[0])
    tensors = read_state(tmp_path)[1]
    with torch.no_grad(), Widest() as widest:
        restore(tensors, parts, optimizers[1])
    assert widest.numbers < 50
    for p in params:
        old, new = (optimizer.state[p] for optimizer in optimizers)
        assert same(old, new) and new["exp_avg"].dtype == new["exp_avg_sq"].dtype == torch.bfloat16 and new["step"] == 1
