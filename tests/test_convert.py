"""Released weights: random ones under the released names, run by a plain implementation written here, equal what
tools/convert.py makes of them; and what it makes can be trained on, evaluated and predicted with."""
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import evaluate
import sample
import train
from checkpoint import read_config, read_json
from cli import run
from evaluate import PAPER_TASKS
from model import StableMTL, TaskAttention, transformer_blocks
from network.generalist import Generalist
from settings import parse_args
from tasks import TASKS
from tools import convert
from toy.make import new_text

NAMES = ("normal", "depth", "semantic", "optical_flow", "scene_flow", "albedo", "shading")     # the released order


# ---- a plain implementation ----

def mlp(layers, x):
    """Linear layers with exact GELU, x/2 (1 + erf(x / sqrt 2)), between them."""
    for i, layer in enumerate(layers):
        x = layer(x)
        if i < len(layers) - 1:
            x = 0.5 * x * (1 + torch.erf(x / 2 ** 0.5))
    return x


class Mlp(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(a, b), nn.Linear(b, a)


class Net(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.net = nn.ModuleDict({
            "0": nn.Linear(a, b), "2": nn.Linear(b, b), "4": nn.Linear(b, b), "6": nn.Linear(b, a)})


class PlainTaskAttention(nn.Module):
    """The task attention under its released names; one batched matrix product per head, T keys for every pixel."""

    def add(self, width, hidden):
        self.task_to_q = nn.ModuleDict({t: Net(width, hidden) for t in NAMES})
        for kind in ("task_to_k", "task_to_v"):
            setattr(self, kind, nn.ModuleDict({t: Mlp(width, width // 2) for t in NAMES}))
        for kind in ("task_norm_q", "task_norm_k", "task_norm_v"):
            setattr(self, kind, nn.ModuleDict({t: nn.LayerNorm(width) for t in NAMES}))
        self.to_out_task = nn.Linear(width, width)

    def attend(self, a, task, feats, heads=4):
        b, n, c = a.shape
        q = mlp(self.task_to_q[task].net.values(), self.task_norm_q[task](a)).reshape(b * n, 1, c)
        rows = {"k": [], "v": []}
        for t in NAMES:
            if t != task:
                for kind, row in rows.items():
                    m, norm = getattr(self, f"task_to_{kind}")[t], getattr(self, f"task_norm_{kind}")[t]
                    row.append(mlp([m.fc1, m.fc2], norm(feats[t])).reshape(b * n, 1, c))
        k, v, out = torch.cat(rows["k"], 1), torch.cat(rows["v"], 1), []                  # (B*N, T, C)
        for qh, kh, vh in zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2), strict=True):
            out.append(torch.bmm(F.softmax(torch.bmm(qh, kh.transpose(1, 2)) / (c // heads) ** 0.5, 2), vh))
        return self.to_out_task(torch.cat(out, 2).reshape(b, n, c))


class PlainSelfAttention(PlainTaskAttention):
    """In place of a block's attn1: spatial self-attention written out, its result left in `feature`."""

    def __init__(self, attn, role, hidden):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.heads, self.role = attn.to_q, attn.to_k, attn.to_v, attn.heads, role
        self.to_out = nn.ModuleList([attn.to_out[0]])
        if role == "main":
            self.add(attn.to_q.in_features, hidden)

    def forward(self, x, encoder_hidden_states=None, attention_mask=None):
        parts = [layer(x).chunk(self.heads, 2) for layer in (self.to_q, self.to_k, self.to_v)]
        a = torch.cat([F.softmax(q @ k.transpose(1, 2) / q.shape[2] ** 0.5, 2) @ v
                       for q, k, v in zip(*parts, strict=True)], 2)
        self.feature = a = self.to_out[0](a)
        return a if self.role == "auxiliary" else a + self.attend(a, self.task, self.feats)


def plain_unet(role):
    unet = tiny.unet()
    for block in transformer_blocks(unet).values():
        block.attn1 = PlainSelfAttention(block.attn1, role, hidden=2 * tiny.WIDTHS[0])
    return unet.eval()


@torch.no_grad()
def plain_forward(auxiliary, main, z_i, z_j, tokens, wanted=NAMES):
    """One UNet pass after the other, nothing batched over tasks -> {wanted task: (B,4,h,w)}."""
    def run(unet, task):
        other = z_j if "flow" in task else z_i
        token = tokens[task].expand(len(z_i), -1, -1)
        return unet(torch.cat([z_i, other, z_i * 0], 1), 999, encoder_hidden_states=token).sample
    feats, out = {}, {}
    for task in NAMES:
        run(auxiliary, task)
        feats[task] = [block.attn1.feature for block in transformer_blocks(auxiliary).values()]
    for task in wanted:
        for i, block in enumerate(transformer_blocks(main).values()):
            block.attn1.task, block.attn1.feats = task, {t: f[i] for t, f in feats.items()}
        out[task] = run(main, task)
    return out


# ---- fixtures ----

def close(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 2e-5 * max(1, b.abs().max().item())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base folder, released-style weights of both stages, and the plain networks they came from."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tokenizer, text_encoder = new_text(24)
    parts = {"vae": tiny.vae(), "unet": tiny.unet(in_channels=4), "text_encoder": text_encoder, "tokenizer": tokenizer}
    for name, part in parts.items():
        part.save_pretrained(folder / "base" / name)
    auxiliary, main = plain_unet("auxiliary"), plain_unet("main")
    torch.save(auxiliary.state_dict(), folder / "single.pth")
    torch.save(main.state_dict(), folder / "multi.pth")
    return folder, auxiliary, main


@pytest.fixture(scope="module")
def imported(world):
    folder, _, _ = world
    return convert.import_released(folder / "base", folder / "single.pth", folder / "multi.pth")


# ---- tests ----

def test_the_weights_have_the_released_names(world):
    """The plain networks hold the 686 names of the single stream and, under each of 16 attn1, exactly those that the
    authors' code has."""
    _, auxiliary, main = world
    single, multi = set(auxiliary.state_dict()), set(main.state_dict())
    assert single == set(tiny.unet().state_dict()) and len(single) == 686 and single < multi
    name = (rf"\.attn1\.(task_to_[kv]\.({'|'.join(NAMES)})\.fc[12]|task_to_q\.({'|'.join(NAMES)})\.net\.[0246]"
            rf"|task_norm_[qkv]\.({'|'.join(NAMES)})|to_out_task)\.(weight|bias)$")
    assert all(re.search(name, k) for k in multi - single)
    assert len(multi - single) == 16 * 2 * (7 * (2 * 2 + 4 + 3) + 1)


@pytest.mark.parametrize("size, wanted", [((11, 13), NAMES), ((23, 77), ("scene_flow",))])
def test_imported_weights_give_the_same_numbers(world, imported, size, wanted):
    """Stage 2 equals the plain implementation for every task, at latent sizes that no level divides evenly."""
    _, auxiliary, main = world
    z = tiny.latents(1, size)
    tokens = {t: getattr(imported, f"token_{t}") for t in NAMES}
    expected = plain_forward(auxiliary, main, *z, tokens, wanted)
    with torch.no_grad():
        out = imported(*z, wanted)
    for t in wanted:
        close(out[t], expected[t])


@torch.no_grad()
def test_every_projection_matters(imported):
    """Leaving out one auxiliary task, or swapping the projections of two, moves the result by far more than that."""
    z = tiny.latents(1, (8, 8))
    before = imported(*z, ["depth"])["depth"]
    for layer in imported.attention.values():
        layer.task_to_v["normal"], layer.task_to_v["albedo"] = layer.task_to_v["albedo"], layer.task_to_v["normal"]
    swapped = imported(*z, ["depth"])["depth"]
    for layer in imported.attention.values():
        layer.task_to_v["normal"], layer.task_to_v["albedo"] = layer.task_to_v["albedo"], layer.task_to_v["normal"]
    assert (swapped - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("width, pixels", [(320, 11 * 13), (1280, 6)])
def test_one_block_at_full_width(width, pixels):
    """A task-attention layer of Stable Diffusion 2's widths (hidden 640, 4 heads) equals the plain one on its state."""
    torch.manual_seed(0)
    plain, ours = PlainTaskAttention(), TaskAttention(width, PAPER_TASKS, heads=4, hidden=640)
    plain.add(width, 640)
    ours.load_state_dict(plain.state_dict())
    a, feats = torch.randn(2, pixels, width), {t: torch.randn(2, pixels, width) for t in NAMES}
    kv = ours.keys_values({t: feats[t] for t in PAPER_TASKS})
    for task in ("normal", "scene_flow"):
        close(ours(a, task, kv)[0], plain.attend(a, task, feats))


def import_flags(folder, out):
    return ["--base", str(folder / "base"), "--single", str(folder / "single.pth"), "--out", str(out)]


def test_command_line_round_trip(world, imported, tmp_path, capsys):
    """Import writes a folder that loads and predicts; export gives back the same files tensor by tensor; neither
    overwrites a checkpoint."""
    folder, _, _ = world
    flags = [*import_flags(folder, tmp_path / "out"), "--multi", str(folder / "multi.pth")]
    convert.main(flags)
    loaded, pair = StableMTL.load(tmp_path / "out"), torch.rand(2, 1, 3, 16, 16)
    a, b = loaded.predict(*pair), imported.predict(*pair)
    assert a.keys() == set(NAMES) and all(torch.equal(a[t], b[t]) for t in NAMES)
    assert (tmp_path / "out" / "config.json").is_file()
    convert.main(["--export", str(tmp_path / "back"), "--ckpt", str(tmp_path / "out")])
    for name in ("single.pth", "multi.pth"):
        before, after = torch.load(folder / name), torch.load(tmp_path / "back" / name, weights_only=True)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert.main(flags)
    with pytest.raises(ValueError, match="back already holds single.pth and multi.pth: name another folder"):
        convert.main(["--export", str(tmp_path / "back"), "--ckpt", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--base and --single"):
        convert.main(["--out", str(tmp_path / "other")])


def test_single_stream_alone(world, tmp_path, monkeypatch):
    """Without --multi the result is stage 1 with all seven tasks; its export writes single.pth only. Where TASKS had
    more, an import was said to know them, and a stage 1 of the seven was not exported."""
    folder, _, _ = world
    monkeypatch.setitem(TASKS, "edges", replace(TASKS["shading"], name="edges", prompt="edges"))
    model = convert.import_released(folder / "base", folder / "single.pth")
    assert model.main is None and model.tasks == PAPER_TASKS
    model.save(tmp_path / "out")
    assert [p.name for p in convert.export(tmp_path / "out", tmp_path / "back")] == ["single.pth"]
    tiny.model(tasks=(*PAPER_TASKS, "edges"), unet=tiny.thin_unet).save(tmp_path / "eight")
    with pytest.raises(ValueError, match=r"no room for a stage 1 of .*, albedo, edges \(released: .*, albedo\)$"):
        convert.export(tmp_path / "eight", tmp_path / "seven")


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "step": 3},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v.half() for k, v in s.items()}}])
def test_wrapped_files(world, tmp_path, capsys, wrap):
    """A "state_dict" around the weights, a "module." or "_orig_mod." before every key are taken off, and said."""
    folder, auxiliary, _ = world
    torch.save(wrap(auxiliary.state_dict()), tmp_path / "single.pth")
    state = convert.read_state(tmp_path / "single.pth")
    assert state.keys() == auxiliary.state_dict().keys()
    assert "taking" in capsys.readouterr().out


def test_safetensors_are_read_too(world, tmp_path):
    """The same weights as .safetensors give the same state."""
    _, auxiliary, _ = world
    save_file(auxiliary.state_dict(), tmp_path / "single.safetensors")
    state = convert.read_state(tmp_path / "single.safetensors")
    assert all(torch.equal(state[k], v) for k, v in auxiliary.state_dict().items())


def test_all_that_does_not_fit_is_reported_at_once(world, tmp_path):
    """Missing, unexpected, wrongly shaped and NaN keys come grouped in one ValueError; nothing is loaded in part."""
    folder, auxiliary, _ = world
    state = dict(auxiliary.state_dict())
    del state["conv_out.bias"]
    state |= {"extra.weight": torch.ones(1), "conv_in.weight": state["conv_in.weight"][:, :4]}
    state["time_embedding.linear_1.bias"] = state["time_embedding.linear_1.bias"] / 0
    torch.save(state, tmp_path / "single.pth")
    with pytest.raises(ValueError, match=r"1 missing \(conv_out.bias\); 1 unexpected \(extra.weight\); 1 of the wrong "
                                         r"shape \(conv_in.weight is \(16, 4, 3, 3\) instead of \(16, 12, 3, 3\)\); "
                                         r"1 not finite \(time_embedding.linear_1.bias\)"):
        convert.import_released(folder / "base", tmp_path / "single.pth")


def test_wrong_files_end_in_a_sentence(world, imported, tmp_path):
    """Swapped files, an unknown task, a missing file, a damaged one, a pickle with code, no state dict at all."""
    folder, auxiliary, main = world
    with pytest.raises(ValueError, match="multi.pth does not fit .* 2496 unexpected .*swapped"):
        convert.check(main.state_dict(), imported.unet.state_dict(), "multi.pth")
    with pytest.raises(ValueError, match="2496 missing .*attn1.task_norm_k"):
        convert.check(auxiliary.state_dict(), convert.multi_state(imported), "single.pth")
    renamed = {k.replace("_q.depth.", "_q.edges."): v for k, v in main.state_dict().items()}
    assert convert.attention_tasks(renamed) == tuple(t for t in PAPER_TASKS if t != "depth")
    with pytest.raises(ValueError, match=r"unexpected \(.*edges"):
        convert.check(renamed, convert.multi_state(imported), "multi.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        convert.read_state(tmp_path / "absent.pth")
    (tmp_path / "short.pth").write_bytes((folder / "single.pth").read_bytes()[:1000])
    (tmp_path / "short.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{}")
    torch.save({"a": io.StringIO}, tmp_path / "code.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    (tmp_path / "empty.pth").touch()
    for name in ("short.pth", "short.safetensors", "code.pth", "empty.pth", "numbers.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a"):
            convert.read_state(tmp_path / name)


def test_what_the_format_cannot_hold_is_not_exported(tmp_path, monkeypatch):
    """Ablations (other heads, shared projections, ...) are refused by name, not written as something else."""
    tiny.model(multi=True, heads=2, shared=True).save(tmp_path / "out")
    with pytest.raises(ValueError, match=r"heads 2 \(released: 4\), shared True"):
        convert.export(tmp_path / "out", tmp_path / "back")
    axes = {"space": "latent", "objective": "diffuse", "condition": "latent", "input_scale": 0.5, "ddim_steps": 2}
    Generalist.fit(tiny.model(tasks=PAPER_TASKS, unet=tiny.thin_unet), **axes).save(tmp_path / "noise")
    with pytest.raises(ValueError, match=r"no room for objective diffuse \(released: regress\)$"):
        convert.export(tmp_path / "noise", tmp_path / "back")
    tiny.model(tasks=("normal", "depth"), unet=tiny.thin_unet).save(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no room for a stage 1 of normal, depth \(released: semantic, normal, "):
        convert.export(tmp_path / "two", tmp_path / "back")     # an import would take it for one of all seven
    several = tiny.model(multi=True)
    several.multi["gate"] = "sigmoid"       # of a fork
    monkeypatch.setattr(convert.StableMTL, "load", lambda folder: several)
    with pytest.raises(ValueError, match=r"no room for gate sigmoid$"):
        convert.export(tmp_path / "fork", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ---- what an import is good for ----

STEPS = ("--steps 1 --scenes 1 --size 16x24 --batch 1 --micro 1 --processes 1 --threads 1 --workers 0 --val-samples 0 "
         "--picture-every 0 --cache none").split()


def test_an_import_is_evaluated_predicted_with_and_trained_on(world, tmp_path, monkeypatch):
    """`train.py --stage 2 --out conv` and `--init conv` ended in KeyError 'train', and sample.py ran a photo at its
    full resolution, since config.json had neither settings nor a size."""
    conv, photo, seen = tmp_path / "conv", tmp_path / "photo.png", []
    convert.main(import_flags(world[0], conv))
    assert read_config(conv)["imported"]["single"] == str(world[0] / "single.pth")
    settings = parse_args(["--stage", "2", "--out", str(conv)])     # as the paper trained on them, not as toys are
    assert (settings.preset, settings.lr, settings.base) == ("paper", 1e-4, str(world[0] / "base"))
    Image.fromarray(np.zeros((450, 600, 3), np.uint8)).save(photo)

    def predict(self, image, *args, **options):
        seen.append(tuple(image.shape[-2:]))
        return plain(self, image[..., :32, :32], *args, **options)

    plain = StableMTL.predict
    monkeypatch.setattr(StableMTL, "predict", predict)
    predicting = [str(photo), "--ckpt", str(conv), "--tasks", "depth", "--device", "cpu", "--output"]
    assert run(lambda: sample.main([*predicting, str(tmp_path / "stage1")])) == 0 and seen == [(288, 384)]
    longer = ["--stage", "1", "--init", str(conv), "--out", str(tmp_path / "longer"), *STEPS]
    assert run(lambda: train.main(longer)) == 0
    assert run(lambda: train.main(["--stage", "2", "--out", str(conv), *STEPS])) == 0
    monkeypatch.setattr(StableMTL, "predict", plain)
    assert run(lambda: sample.main([*predicting, str(tmp_path / "stage2"), "--size", "64"])) == 0
    assert run(lambda: evaluate.main(["--ckpt", str(conv), "--limit", "1", "--trivial", "0", "--workers", "0"])) == 0
    results = read_json(conv / "results.json", "no results")["results"]
    assert set(results["real"]) >= set(NAMES) and StableMTL.load(conv, stage=2).multi["heads"] == 4
    for folder in ("stage1", "stage2"):
        assert np.isfinite(np.load(tmp_path / folder / "photo/depth.npy")).all()


def test_a_full_disk_leaves_nothing_half_written(world, imported, tmp_path, monkeypatch, capsys):
    """While importing and while exporting: one sentence, and no file that looks like a whole one."""
    def no_room(*_):
        raise OSError(28, "No space left on device")

    def cut(_, path):
        Path(path).write_bytes(b"0")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    imported.save(tmp_path / "ckpt")
    monkeypatch.setattr(StableMTL, "save", no_room)
    assert run(lambda: convert.main(import_flags(world[0], tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "make room, then import again" in error and "--resume" not in error
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(torch, "save", cut)
    assert run(lambda: convert.main(["--export", str(tmp_path / "back"), "--ckpt", str(tmp_path / "ckpt")])) == 2
    assert "could not write" in capsys.readouterr().err and not list((tmp_path / "back").iterdir())
