"""Released weights: random ones under the released names, run by a plain implementation written here, equal what convert.py makes of them."""
import io
import re

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model import StableMTL, TaskAttention, transformer_blocks
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
        self.net = nn.ModuleDict({"0": nn.Linear(a, b), "2": nn.Linear(b, b), "4": nn.Linear(b, b), "6": nn.Linear(b, a)})


class PlainTaskAttention(nn.Module):
    """The task attention under its released names; one batched matrix product per head, sequences of T keys for every pixel."""

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
                    m = getattr(self, f"task_to_{kind}")[t]
                    row.append(mlp([m.fc1, m.fc2], getattr(self, f"task_norm_{kind}")[t](feats[t])).reshape(b * n, 1, c))
        k, v, out = torch.cat(rows["k"], 1), torch.cat(rows["v"], 1), []                  # (B*N, T, C)
        for qh, kh, vh in zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2)):
            out.append(torch.bmm(F.softmax(torch.bmm(qh, kh.transpose(1, 2)) / (c // heads) ** 0.5, 2), vh))
        return self.to_out_task(torch.cat(out, 2).reshape(b, n, c))


class PlainSelfAttention(PlainTaskAttention):
    """Takes the place of a block's attn1: spatial self-attention written out; `role` "auxiliary" leaves its result in `feature`."""

    def __init__(self, attn, role, hidden):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.heads, self.role = attn.to_q, attn.to_k, attn.to_v, attn.heads, role
        self.to_out = nn.ModuleList([attn.to_out[0]])
        if role == "main":
            self.add(attn.to_q.in_features, hidden)

    def forward(self, x, encoder_hidden_states=None, attention_mask=None):
        parts = [layer(x).chunk(self.heads, 2) for layer in (self.to_q, self.to_k, self.to_v)]
        a = torch.cat([F.softmax(q @ k.transpose(1, 2) / q.shape[2] ** 0.5, 2) @ v for q, k, v in zip(*parts)], 2)
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
    """The plain networks hold the 686 names of the single stream and, under each of 16 attn1, exactly the names of the specification."""
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
    """Leaving out one auxiliary task, or swapping the projections of two, moves the result by far more than the tolerance above."""
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
    """A task-attention layer of Stable Diffusion 2's widths (hidden 640, 4 heads) equals the plain one on the same state dict."""
    torch.manual_seed(0)
    plain, ours = PlainTaskAttention(), TaskAttention(width, TASKS, heads=4, hidden=640)
    plain.add(width, 640)
    ours.load_state_dict(plain.state_dict())
    a, feats = torch.randn(2, pixels, width), {t: torch.randn(2, pixels, width) for t in NAMES}
    kv = ours.keys_values({t: feats[t] for t in TASKS})
    for task in ("normal", "scene_flow"):
        close(ours(a, task, kv)[0], plain.attend(a, task, feats))


def test_command_line_round_trip(world, imported, tmp_path, capsys):
    """Import writes a folder that loads and predicts; export gives back the same files tensor by tensor; neither overwrites a checkpoint."""
    folder, _, _ = world
    flags = ["--base", str(folder / "base"), "--single", str(folder / "single.pth"), "--multi", str(folder / "multi.pth"), "--out", str(tmp_path / "out")]
    convert.main(flags)
    loaded, pair = StableMTL.load(tmp_path / "out"), torch.rand(2, 1, 3, 16, 16)
    a, b = loaded.predict(*pair), imported.predict(*pair)
    assert all(torch.equal(a[t], b[t]) for t in TASKS) and (tmp_path / "out" / "config.json").is_file()
    convert.main(["--export", str(tmp_path / "back"), "--ckpt", str(tmp_path / "out")])
    for name in ("single.pth", "multi.pth"):
        before, after = torch.load(folder / name), torch.load(tmp_path / "back" / name, weights_only=True)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        convert.main(flags)
    with pytest.raises(ValueError, match="--base and --single"):
        convert.main(["--out", str(tmp_path / "other")])


def test_single_stream_alone(world, tmp_path):
    """Without --multi the result is stage 1 with all seven tasks; its export writes single.pth only."""
    folder, _, _ = world
    model = convert.import_released(folder / "base", folder / "single.pth")
    assert model.main is None and model.tasks == tuple(TASKS)
    model.save(tmp_path / "out")
    assert [p.name for p in convert.export(tmp_path / "out", tmp_path / "back")] == ["single.pth"]


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "step": 3}, lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"state_dict": {f"module.{k}": v.half() for k, v in s.items()}}])
def test_wrapped_files(world, tmp_path, capsys, wrap):
    """A "state_dict" around the weights and a "module." before every key are taken off and said."""
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
    """Missing, unexpected and wrongly shaped keys come grouped in one ValueError; nothing is loaded in part."""
    folder, auxiliary, _ = world
    state = dict(auxiliary.state_dict())
    del state["conv_out.bias"]
    state |= {"extra.weight": torch.ones(1), "conv_in.weight": state["conv_in.weight"][:, :4]}
    torch.save(state, tmp_path / "single.pth")
    with pytest.raises(ValueError, match=r"1 missing \(conv_out.bias\); 1 unexpected \(extra.weight\); 1 of the wrong shape "
                                         r"\(conv_in.weight is \(16, 4, 3, 3\) instead of \(16, 12, 3, 3\)\)"):
        convert.import_released(folder / "base", tmp_path / "single.pth")


def test_wrong_files_end_in_a_sentence(world, imported, tmp_path):
    """Swapped files, an unknown task, a missing file, a damaged one, a pickle with code, and not a state dict at all."""
    folder, auxiliary, main = world
    with pytest.raises(ValueError, match="multi.pth does not fit .* 2496 unexpected .*swapped"):
        convert.check(main.state_dict(), imported.unet.state_dict(), "multi.pth")
    with pytest.raises(ValueError, match="2496 missing .*task_to_q"):
        convert.check(auxiliary.state_dict(), convert.multi_state(imported), "single.pth")
    renamed = {k.replace("_q.depth.", "_q.edges."): v for k, v in main.state_dict().items()}
    assert convert.attention_tasks(renamed) == tuple(t for t in TASKS if t != "depth")
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


def test_what_the_format_cannot_hold_is_not_exported(tmp_path):
    """Ablations (other heads, shared projections, ...) are refused by name instead of being written as something else."""
    tiny.model(multi=True, heads=2, shared=True).save(tmp_path / "out")
    with pytest.raises(ValueError, match=r"heads 2 \(released: 4\), shared True"):
        convert.export(tmp_path / "out", tmp_path / "back")
