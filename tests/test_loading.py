"""What is read from files: json of the expected shape, whole weights, parts that fit each other; else one sentence."""
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import train
from checkpoint import misfit, read_config, read_json, read_lines, read_state, restore, save_state
from cli import run
from model import StableMTL, from_base
from network import loading
from network.loading import read_base
from toy.make import new_text

ROOT = Path(__file__).parent.parent

# ---- json ----


@pytest.mark.parametrize("value, shape, says", [
    ({"a": 1}, {"a": int}, ""),
    ({"a": 1}, {"a": float}, ""),
    ({}, {"a": (None, [int, int])}, ""),
    ({"a": [1, 2]}, {"a": (None, [int, int])}, ""),
    ({"x": {"y": 1}, "z": {}}, {str: {str: float}}, ""),
    (None, dict, "it is missing or null, expected an object"),
    ([3], {"a": int}, "it is [3], expected an object"),
    ({"a": True}, {"a": int}, "a is true, expected a whole number"),
    ({"a": True}, {"a": float}, "a is true, expected a number"),
    ({"a": 1}, {"a": bool}, "a is 1, expected true or false"),
    ({}, {"a": {"b": int}}, "a is missing or null, expected an object"),
    ({"a": {"b": None}}, {"a": {"b": int}}, "a.b is missing or null, expected a whole number"),
    ({"a": [1]}, {"a": (None, [int, int])}, "a has 1 entries, expected 2"),
    ({"a": ["b", 3]}, {"a": [str]}, "a[1] is 3, expected a string"),
    ({"x": {"y": "no"}}, {str: {str: float}}, 'x.y is "no", expected a number'),
])
def test_a_json_is_compared_with_its_shape(value, shape, says):
    """The first thing that is not as expected is named with the way to it; what may be None may be missing."""
    assert misfit(value, shape) == says


@pytest.mark.parametrize("text, says", [
    ("{", "Expecting"), ("", "Expecting"), ("\xff", "Expecting"), ("[" * 100_000, "recursion"),
    ("[]", r"it is \[\], expected an object"), ("null", "it is missing"),
    ('{"a": 1}', "b is missing or null, expected a string"),
], ids=["cut", "empty", "not utf-8", "deep", "list", "null", "missing key"])
def test_a_damaged_json_ends_in_a_sentence(tmp_path, text, says):
    """Malformed or foreign json ended in KeyError, TypeError and AttributeError at nine places."""
    path = tmp_path / "x.json"
    path.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"x.json is damaged, or of another program .*{says}.*: throw it away"):
        read_json(path, "", {"b": str}, "throw it away")
    with pytest.raises(FileNotFoundError, match="^there is none$"):
        read_json(tmp_path / "y.json", "there is none")


def test_lines_of_json(tmp_path):
    """A last line that a kill cut short is left out; any other damaged or foreign line is named."""
    path, shape = tmp_path / "log.jsonl", {"step": int}
    assert read_lines(path, shape) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(path, shape) == [{"step": 1}, {"step": 2}]
    for bad in ("{", '{"step": "x"}', "7"):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="log.jsonl, line 2, is damaged.*: delete this line"):
            read_lines(path, shape)


def test_config_of_a_checkpoint(tmp_path):
    """What is not known is None, as without a config.json; imported weights have the size they were trained at."""
    unknown = {"train": None, "stage1": None, "size": None}
    assert read_config(tmp_path) == unknown
    (tmp_path / "config.json").write_text(json.dumps({"imported": {"base": "x"}}))
    assert read_config(tmp_path) == unknown | {"imported": {"base": "x"}, "size": [288, 384]}
    (tmp_path / "config.json").write_text(json.dumps({"train": {"stage": 1}}))
    with pytest.raises(ValueError, match="config.json is damaged.*train.steps is missing.*copy the whole checkpoint"):
        read_config(tmp_path)


def test_a_state_of_another_run_is_refused(tmp_path, capsys):
    """A foreign state.json, or tensors of another model, ended in a KeyError or a RuntimeError."""
    def run_of(width):
        part = torch.nn.Linear(width, 2)
        optimizer = torch.optim.Adam(part.parameters())
        part(torch.ones(1, width)).sum().backward()
        optimizer.step()
        return {"unet": dict(part.named_parameters())}, optimizer

    about = {"train": {"stage": 1, "steps": 9, "batch": 1, "seed": 0}}
    for step in (3, 4):
        save_state(tmp_path, about, step, *run_of(3))
    _, tensors = read_state(tmp_path)
    restore(tensors, *run_of(3))
    with pytest.raises(ValueError, match="the saved state is of another model .*--overwrite"):
        restore(tensors, *run_of(4))
    with pytest.raises(ValueError, match="the saved state is of another model .*in unet/bias, unet/weight"):
        restore({k: v for k, v in tensors.items() if k.startswith("adam")}, {}, run_of(3)[1])
    for text, says in (("null", "it is missing"), ('{"train": {}}', "train.stage is missing")):
        (tmp_path / "state/state.json").write_text(text)
        assert read_state(tmp_path)[0]["step"] == 3
        said = f"notice: .*state.json is damaged.*{says}.*continuing from .*state.prev, step 3"
        assert re.search(said, capsys.readouterr().err)
    shutil.rmtree(tmp_path / "state.prev")
    with pytest.raises(FileNotFoundError, match="nothing to resume in .*state.json is damaged.*--stage 1"):
        read_state(tmp_path)


# ---- weights ----

UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
BASE = {"vae": f"vae/{UNET}", "unet": f"unet/{UNET}", "text_encoder": f"text_encoder/{TEXT}"}
CHECKPOINT = {"vae": f"vae/{UNET}", "unet": f"unet/{UNET}", "main_unet": f"main_unet/{UNET}",
              "task attention": "task_attention.safetensors", "token": "tokens.safetensors"}


def missing(state):
    return {k: v for k, v in state.items() if k != min(state)}


def unexpected(state):
    return state | {"extra.weight": torch.ones(1, 32)}


def misshapen(state):
    return state | {min(state): torch.cat([state[min(state)]] * 2, -1).contiguous()}


def compiled(state):
    return {f"_orig_mod.{k}": v for k, v in state.items()}


def with_nan(state):
    state[min(state)].view(-1)[0] = torch.nan
    return state


DAMAGES = {missing: "1 missing", unexpected: r"1 unexpected \(extra.weight\)", misshapen: "1 of the wrong shape",
           compiled: r"\d+ missing .* unexpected .*_orig_mod", with_nan: "1 not finite"}
TOKENS = {missing: "albedo only in one of", unexpected: "extra.weight only in one of", misshapen: "differ in width",
          compiled: "_orig_mod.albedo.* only in one of", with_nan: "the token of albedo is"}


@pytest.fixture(scope="module")
def small(tiny_base, tmp_path_factory):
    """Folder of a stage 2 of the tiny base. Do not write there."""
    model = from_base(str(tiny_base), ("normal", "depth", "albedo"))
    model.add_main_stream(copy.deepcopy(model.unet), heads=2)
    folder = tmp_path_factory.mktemp("small")
    model.save(folder)
    return folder


def changed(folder, place, file=None, change=None):
    """A copy of a folder at `place`, with one file of weights changed."""
    shutil.copytree(folder, place)
    if file:
        save_file(change(load_file(place / file)), place / file, {"format": "pt"})
    return str(place)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", BASE)
def test_a_damaged_base_is_refused(tiny_base, tmp_path, part, damage):
    """Keys that a file lacks became uninitialised memory, silently, or with accelerate a "meta tensor" traceback;
    others were ignored. Now one sentence names the part and the keys."""
    with pytest.raises(ValueError, match=f"^could not load --base .*b: {part}: {DAMAGES[damage]}.*diffusers folder"):
        from_base(changed(tiny_base, tmp_path / "b", BASE[part], damage), ("normal", "depth"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", CHECKPOINT)
def test_a_damaged_checkpoint_is_refused(small, tmp_path, part, damage):
    """The same for every part of a checkpoint: sample.py ended with exit code 0 and depth.npy all NaN."""
    says = TOKENS[damage] if part == "token" else f"{part}: {DAMAGES[damage]}"
    folder = changed(small, tmp_path / "c", CHECKPOINT[part], damage)
    with pytest.raises(ValueError, match=f"^the checkpoint in .*c is damaged, .*{says}.*; copy the whole folder again"):
        StableMTL.load(folder)
    if part in ("main_unet", "task attention"):
        StableMTL.load(folder, stage=1)     # does not need them


def test_nothing_is_written_from_a_damaged_base(tiny_base, tmp_path, capsys):
    """The cache, a first checkpoint and then "loss nan ... lower --lr" came of it."""
    bad = changed(tiny_base, tmp_path / "b", BASE["unet"], missing)
    assert run(lambda: train.main(["--stage", "1", "--base", bad, "--out", str(tmp_path / "out")])) == 2
    assert not (tmp_path / "out").exists() and "unet: 1 missing" in capsys.readouterr().err


WITHOUT_ACCELERATE = """
import sys
sys.modules |= dict.fromkeys(("accelerate", "peft"))    # as if it, and what needs it, were not installed
import torch
from model import StableMTL, from_base
from diffusers.utils import is_accelerate_available
assert not is_accelerate_available()
torch.save(StableMTL.load(sys.argv[1]).state_dict(), sys.argv[3])
for load, name in ((StableMTL.load, sys.argv[2]), (lambda hub: from_base(hub, ("depth",)), "some/base")):
    try:
        load(name)
    except ValueError as error:
        print(error, file=sys.stderr)
"""


def test_without_accelerate(small, tiny_base, tmp_path):
    """Without accelerate every model load printed six lines of advice to install it, and loaded differently: the same
    weights, the same refusals, nothing else on stderr. A hub id (offline, in the hub's cache) finds a variant, too."""
    bad = changed(small, tmp_path / "bad", CHECKPOINT["main_unet"], missing)
    hub, commit = tmp_path / "hub/models--some--base", "0123456789" * 4
    vae = Path(changed(tiny_base, hub / "snapshots" / commit, BASE["vae"], unexpected)) / BASE["vae"]
    vae.rename(vae.with_name(UNET.replace(".safetensors", ".fp16.safetensors")))
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(commit)
    command = [sys.executable, "-c", WITHOUT_ACCELERATE, small, bad, tmp_path / "state"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert re.fullmatch("the checkpoint in [^\n]*main_unet: 1 missing[^\n]*\n"
                        "notice: vae of some/base is its fp16 variant\n"
                        "could not load --base some/base: vae: 1 unexpected[^\n]*\n", done.stderr), done.stderr
    assert same(StableMTL.load(small).state_dict(), torch.load(tmp_path / "state"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- bases as people have them ----

def parts_of(base):
    """{part: state dict} as read_base reads them."""
    vae, unet, _, text_encoder = read_base(str(base))
    return {"vae": vae.state_dict(), "unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}


@pytest.mark.parametrize("variant, kind, parts", [
    ("fp16", torch.float16, tuple(BASE)), ("fp16", torch.float16, ("unet",)),
    ("bf16", torch.bfloat16, ("text_encoder",)),
    ("non_ema", torch.float32, ("vae", "unet")), ("my-own", torch.float32, ("vae",))])
def test_variants_load(tiny_base, tmp_path, capsys, variant, kind, parts):
    """Files like diffusion_pytorch_model.fp16.safetensors, of one part or of all, were refused as "no file named
    diffusion_pytorch_model.bin". They load, as float32, and what was taken is said."""
    base, expected = shutil.copytree(tiny_base, tmp_path / "b"), parts_of(tiny_base)
    for part in parts:
        path, expected[part] = base / BASE[part], {k: v.to(kind).float() for k, v in expected[part].items()}
        save_file({k: v.to(kind) for k, v in load_file(path).items()}, path, {"format": "pt"})
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))
    assert all(same(state, expected[part]) for part, state in parts_of(base).items())
    assert capsys.readouterr().err == "".join(f"notice: {p} of {base} is its {variant} variant\n" for p in parts)


def test_which_weights_are_taken(tiny_base, tmp_path, capsys):
    """The plain ones before a variant, fp16 before bf16; torch pickles, never with code in them; weights in pieces."""
    base, expected = shutil.copytree(tiny_base, tmp_path / "b"), parts_of(tiny_base)
    for part, name in {"vae": "fp16", "unet": "non_ema"}.items():
        (base / part / UNET.replace(".s", f".{name}.s")).write_bytes(b"not looked at")
    assert all(same(state, expected[part]) for part, state in parts_of(base).items()) and not capsys.readouterr().err
    for part, name in {"vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}.items():
        torch.save(load_file(base / BASE[part]), base / part / name)
        (base / BASE[part]).unlink()
    (base / "unet" / UNET).unlink()
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    unet.save_pretrained(base / "unet", max_shard_size="99KB")
    assert len([*base.glob("unet/*-of-*")]) > 1
    assert all(same(state, expected[part]) for part, state in parts_of(base).items())
    torch.save({"x": print}, base / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="^could not load --base .*: vae: "):
        read_base(str(base))
    assert variant_of(tmp_path, "model.bf16.safetensors", "model.fp16.bin", "model.onnx") == "fp16"


def variant_of(folder, *names):
    for name in names:
        (folder / "names" / name).parent.mkdir(exist_ok=True)
        (folder / "names" / name).touch()
    return loading.variant(folder / "names")


def test_what_is_no_base_says_what_was_looked_for(tiny_base, tmp_path):
    """Weights under another name, a single file, a part without config.json."""
    base = shutil.copytree(tiny_base, tmp_path / "b")
    (base / "unet" / UNET).rename(base / "unet/weights.safetensors")
    with pytest.raises(ValueError, match="unet: no weights in .*expected diffusion_pytorch_model.safetensors.* or .bin"
                       ".*fp16.* found config.json, weights.safetensors"):
        read_base(str(base))
    (base / "vae/config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"vae: .*vae/config.json is damaged, or of another program \(it is \[\]"):
        read_base(str(base))
    (base / "vae/config.json").unlink()
    with pytest.raises(ValueError, match="vae: no config.json in .*b/vae"):
        read_base(str(base))
    with pytest.raises(ValueError, match="weights.safetensors is a single file: .*from_single_file"):
        read_base(str(base / "unet/weights.safetensors"))


# ---- parts that do not fit ----

def test_a_tokenizer_without_vocabulary_is_refused(tiny_base, tmp_path):
    """transformers 5 builds an empty one: every word became the same token, normal and albedo were one task."""
    base = shutil.copytree(tiny_base, tmp_path / "b")
    (base / "tokenizer/tokenizer.json").unlink()
    for tasks in (("normal", "albedo"), ("depth",)):
        with pytest.raises(ValueError, match="could not load --base .*: (its )?tokenizer.*"):
            from_base(str(base), tasks)


def test_equal_tokens_are_refused(tiny_base, small, tmp_path):
    """Of a base whose text encoder makes one of all words, and of a checkpoint."""
    def blind(state):
        return {k: torch.zeros_like(v) if "token_embedding" in k else v for k, v in state.items()}
    base = changed(tiny_base, tmp_path / "b", BASE["text_encoder"], blind)
    with pytest.raises(ValueError, match="could not load --base .*: equal tokens of normal and albedo"):
        from_base(base, ("normal", "albedo"))
    alike = changed(small, tmp_path / "c", "tokens.safetensors", lambda t: t | {"normal": t["depth"].clone()})
    with pytest.raises(ValueError, match="c is damaged.*equal tokens of .*(depth and normal|normal and depth)"):
        StableMTL.load(alike)


NARROW = dict(in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
              down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], cross_attention_dim=32,
              up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=1)
SDXL = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
PLAIN = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, mid_block_type="UNetMidBlock2D")


@pytest.mark.parametrize("part, make, says", [
    ("unet", lambda: UNet2DConditionModel(**NARROW | SDXL), r"more than latents and text \(addition_embed_type\)"),
    ("unet", lambda: UNet2DConditionModel(**NARROW, num_class_embeds=3), "more than latents and text"),
    ("unet", lambda: UNet2DConditionModel(**NARROW | {"in_channels": 9}), "from 9 to 4 .*expected 4 or 12 to 4"),
    ("unet", lambda: UNet2DConditionModel(**NARROW | {"out_channels": 8}), "from 4 to 8 .*expected 4 or 12 to 4"),
    ("unet", lambda: UNet2DConditionModel(**NARROW | {"cross_attention_dim": 24}), "text of width 24, .* have 32"),
    ("unet", lambda: UNet2DConditionModel(**NARROW | PLAIN), "text of width none"),
    ("vae", lambda: AutoencoderKL(latent_channels=16, norm_num_groups=4, block_out_channels=(8,)), "expected 16 or 48"),
    ("text_encoder", lambda: new_text(64)[1], "text of width 32, .* have 64")])
def test_a_base_of_another_shape_is_refused(tiny_base, tmp_path, part, make, says):
    """An SDXL-like UNet, a VAE of 16 channels, a text encoder of another width: tracebacks in the first step, after the
    cache and a checkpoint had been written."""
    shutil.copytree(tiny_base, tmp_path / "b", ignore=shutil.ignore_patterns(part))
    make().save_pretrained(tmp_path / "b" / part)
    with pytest.raises(ValueError, match=f"^could not load --base .*b: its unet .*{says}.*diffusers folder"):
        from_base(str(tmp_path / "b"), ("normal", "depth"))


def test_a_four_channel_base_is_widened(tiny_base, tmp_path):
    """The usual base: its UNet takes 4 channels; cross_attention_dim may be a list, one entry per level."""
    shutil.copytree(tiny_base, tmp_path / "b", ignore=shutil.ignore_patterns("unet"))
    UNet2DConditionModel(**NARROW | {"cross_attention_dim": (32, 32)}).save_pretrained(tmp_path / "b/unet")
    assert from_base(str(tmp_path / "b"), ("depth",)).unet.config.in_channels == 12


@pytest.mark.parametrize("change, says", [
    (lambda f: UNet2DConditionModel(**NARROW).save_pretrained(f / "unet"), "unet goes from 4 to 4 .*expected 12 to 4"),
    (lambda f: UNet2DConditionModel(**NARROW | {"in_channels": 12, "block_out_channels": (8, 16)}).save_pretrained(
        f / "main_unet"), "the main UNet is not of the single stream's shape: .*of the wrong shape"),
    (lambda f: save_file({t: torch.rand(3, 24) for t in load_file(f / "tokens.safetensors")}, f / "tokens.safetensors"),
     "text of width 32, .* have 24")])
def test_parts_of_different_checkpoints_are_refused(small, tmp_path, change, says):
    """A UNet of other widths, or tokens of another base, were loaded and failed in the middle of the work."""
    folder = shutil.copytree(small, tmp_path / "c")
    change(folder)
    with pytest.raises(ValueError, match=f"c is damaged, or its parts are of different models: .*{says}"):
        StableMTL.load(folder)


@pytest.mark.parametrize("spec, says", [
    ({"multi": 3}, "multi is 3, expected an object"),
    ({"multi": {"heads": 2}}, "multi.shared is missing"),
    ({"multi": {"heads": 3, "shared": False, "attention": "n-to-1"}}, "heads 3 does not divide"),
    ({"multi": {"heads": 2, "shared": False, "attention": "all"}}, "unknown attention all"),
    ({"tasks": "depth"}, 'tasks is "depth", expected a list'),
    ({"tasks": ["normal", "deph", "albedo"]}, "deph, depth only in one of|depth, deph only in one of"),
    ({"tasks": None}, "tasks is missing"),
    ({"palette": "pink"}, "unknown palette 'pink'"),
    ({"second_frame": "third"}, "unknown second_frame third")])
def test_a_foreign_model_json_is_refused(small, tmp_path, spec, says):
    """TypeError, KeyError, or read as something that it does not say."""
    folder = shutil.copytree(small, tmp_path / "c")
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | spec))
    with pytest.raises(ValueError, match=f"c(/model.json)? is damaged, or .*({says})"):
        StableMTL.load(folder)


def test_a_part_that_may_not_be_read_is_not_damaged(small, monkeypatch):
    """It was called damaged, and to be copied again."""
    may = os.access     # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "tokens.safetensors" and may(path, mode))
    with pytest.raises(PermissionError, match="cannot be read: you lack the permission to open tokens.safetensors"):
        StableMTL.load(small)


def test_a_checkpoint_does_not_tell_where_it_came_from(tiny_ckpt, tmp_path):
    """diffusers notes the folder that weights were loaded from, which may have a user's name in it."""
    StableMTL.load(tiny_ckpt).save(tmp_path / "again")
    told = [path for path in (tmp_path / "again").rglob("*.json") if str(tiny_ckpt) in path.read_text()]
    assert not told and (tmp_path / "again" / "main_unet" / "config.json").is_file()
