"""What could the streams give at best? A stage 2 whose auxiliary streams hold the truth, on the toy worlds.

    python -m tools.oracle --ckpt out/ --out oracle/                             from the stage 1 in out/
    python -m tools.oracle --ckpt out/ --steps 600 --seed 0 -- --attention-lr 8  what follows -- goes to train.py

1. A copy of stage 1 learns for --aux-steps to repeat the true label latent of its own task, which it is given in the
   third slot of its input, where stage 1 has zeros. This is the auxiliary UNet: its features carry the truth.
2. A stage 2 is trained as `train.py --stage 2` would, on the same samples in the same order, except that its streams
   see the truth of the other tasks; that of the main task never reaches the main stream.
3. It is measured as evaluate.py does, the truth of the other tasks given to its streams.

With --tell predictions the streams hold, in the same way, what stage 1 predicts of each task: nothing that stage 1 does
not know, but said in the same form as the truth. The auxiliary UNet becomes no better predictor by that: it repeats.

What the bound means: whether this main UNet, with this attention and as many steps, can make use of other tasks at all.
If it gains little over a single stream that was continued (tools.study), better streams would not help it: what limits
it is the attention or its training. If it gains much, the streams of stage 1 are what is missing.

What it does not mean: that predicted streams could come close, for the truth of one task tells of another what no image
tells (normals follow from depth); nor a limit of any other architecture, or of more steps; nor, strictly, a bound: an
auxiliary UNet that copies may have lost features of the image that help. Its streams know labels that partial
annotation withholds: labels never trained on, which are seen by streams only.

The truth is the code of a label as tasks.py gives it, invalid pixels as they come; where a scene has no valid label of
a task, indoors for the classes, its stream sees zeros.

Writes --out when all is done: results.json, as evaluate.py's, and log.jsonl (stage 1: the auxiliary UNet).
"""
import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from cli import Parser, parse_device, parse_size, run, whole, writable  # before torch, for Ctrl-C

# isort: split
import torch
from tqdm import tqdm

import settings
import train
from checkpoint import locked, stage1_settings, write_json
from data import Mixture, loader, parse_drop, tasks_with_labels, test_batches, test_readers, train_readers, whole_cells
from evaluate import table
from inference.infer import network_maps
from inference.report import scoring
from metrics import METRICS
from model import StableMTL
from network.attention import WATCHED, watched
from tasks import TASKS, parse_tasks, registry
from training.about import commit
from training.cache import LatentCache, StreamCache, fingerprint
from training.losses import LatentObjective

# ---- the truth ----

def known(z, cells):
    """(B,4,h,w) label latents, zeros where not one of the (B,1,h,w) cells is valid."""
    return z * cells.any((1, 2, 3), keepdim=True)


class Predicted:
    """In the place of a latent cache, the same frames with other labels: what a model predicts of them, valid
    everywhere. Each image is predicted once."""

    def __init__(self, cache, model):
        self.cache, self.model, self.known = cache, model, {}

    @torch.no_grad()
    def get(self, reader, index, tasks, flip, seed=None):
        """As LatentCache.get."""
        item, key = self.cache.get(reader, index, tasks, flip), (reader.name, int(index), bool(flip))
        if key not in self.known:
            device = next(self.model.parameters()).device
            with torch.autocast(device.type, enabled=False):    # as in the test
                predicted = self.model(*(f[None].to(device) for f in item["frames"]), self.model.tasks)
            self.known[key] = {t: z[0].half().cpu() for t, z in predicted.items()}
        labels = {t: self.known[key][t].float() for t in tasks}
        everywhere = torch.ones(1, *item["frames"][0].shape[1:], dtype=torch.bool)
        return item | {"labels": labels, "valid": dict.fromkeys(tasks, everywhere)}


class Truth:
    """Label latents of the images of a latent cache; in the place of a StreamCache it hands them to the model before a
    pass, whose streams are then computed."""

    def __init__(self, model, cache, readers):
        self.model, self.cache, self.readers = model, cache, {r.name: r for r in readers}

    def fetch(self, keys, tasks, z_i, z_j):
        """keys: [(dataset, index, flip)] of a micro-batch -> None: no stream is known."""
        items = [self.cache.get(self.readers[name], index, self.model.tasks, flip) for name, index, flip in keys]
        labels, cells = ({t: torch.stack([item[kind][t] for item in items]).to(z_i) for t in self.model.tasks}
                         for kind in ("labels", "valid"))
        self.model.truth = {t: known(z, cells[t]) for t, z in labels.items()}


class TrueStreams(StreamCache):
    """The streams of images whose truth the auxiliary UNet is told."""

    def __init__(self, truth, *args):
        self.truth = truth
        super().__init__(*args)

    def fetch(self, keys, tasks, z_i, z_j):
        given = super().fetch(keys, tasks, z_i, z_j)
        return self.truth.fetch(keys, tasks, z_i, z_j) if given is None else given     # none kept: the model computes

    def one(self, name, index, flip, z_i, z_j):
        self.truth.fetch([(name, index, flip)], (), z_i, z_j)
        return super().one(name, index, flip, z_i, z_j)


def encoded(model, labels):
    """[{task: (label (C,H,W), valid (H,W))}] of a batch -> {task: (B,4,h,w)} label latents of all tasks."""
    out, device = {}, next(model.parameters()).device
    for t in (t for t in model.tasks if t in labels[0]):
        label, valid = (torch.stack([maps[t][i] for maps in labels]).to(device) for i in (0, 1))
        z = model.encode(model.codecs[t].encode(label, valid[:, None]))
        out[t] = known(z, whole_cells(valid[:, None], model.factor))
    nothing = torch.zeros_like(next(iter(out.values())))
    return {t: out.get(t, nothing) for t in model.tasks}


# ---- training and measuring ----

def fit(model, mixture, streams, cfg, log):
    """Train what is trained of the model for cfg.steps, as train.py does. FloatingPointError if it diverges."""
    device, start = next(model.parameters()).device, time.time()
    optimizer = train.make_optimizer(cfg, train.trainable(model))
    objective = LatentObjective(model, {"latent": 1.0}, encode=False, streams=streams)
    autocast, scaler = train.precision(cfg, device)
    patience, in_vain = train.PATIENCE if scaler else 1, 0
    train.set_mode(model, True)
    with tqdm(total=cfg.steps, desc=("auxiliary UNet", "stage 2")[cfg.stage - 1], mininterval=2) as bar:
        for step, fetched in enumerate(loader(mixture, 0, cfg.steps, 0)):
            batches = fetched["batches"]
            done = train.optimizer_step(cfg, step, model, objective, batches, optimizer, autocast, scaler)
            in_vain = 0 if done.finite else in_vain + 1
            if in_vain == patience:
                raise FloatingPointError(f"step {step} of stage {cfg.stage}: loss {done.losses}: lower --lr")
            loss = sum(done.losses.values())
            entry = {"stage": cfg.stage, "step": step, "task": train.in_order(t for b in batches for t in b["tasks"]),
                     "loss": loss, "lr": done.lr, "grad_norm": done.norm,
                     "img_per_s": round((step + 1) * cfg.batch / (time.time() - start), 1)}
            entry |= done.attention if cfg.stage == 2 else {}
            if math.isfinite(loss + done.norm):
                log.write(json.dumps(entry, allow_nan=False) + "\n")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    model.eval()


@torch.no_grad()
def measure(model, reader, limit, stage1=None, batch=16):
    """evaluate.py's metrics of a test set, with the truth of the other tasks in the streams, or what stage1 predicts of
    them -> {task: metrics}."""
    scores, wanted, device = {}, tasks_with_labels(reader, model.tasks), next(model.parameters()).device
    for group in test_batches(reader.complete(), model.tasks, batch, 0, limit):
        labels = [maps for _, maps, *_ in group]
        frames = [torch.stack(f).to(device) for f in zip(*(f for f, *_ in group), strict=True)]
        if stage1 is None:
            model.truth = encoded(model, labels)
        else:
            second = frames[1] if len(frames) > 1 else None
            model.truth = stage1(*stage1.encode_frames(frames[0], second, model.tasks), model.tasks)
        tasks = [t for t in labels[0] if t in wanted]
        predicted = network_maps(model, *frames, tasks=tasks)
        for n, maps in enumerate(labels):
            for t in tasks:
                new = METRICS[TASKS[t].metric].accumulator(clip=reader.depth_range)
                scores.setdefault(t, new).add(predicted[t][n], *maps[t])
    return {t: counted.result() for t, counted in scores.items()}


def short(x):
    """A number of network.attention.watched, None where it is not finite, as text."""
    return "none" if x is None else f"{x:.3f}"


# ---- the command ----

UNFINISHED = "oracle.tmp"       # in --out, until all is done
# flags of train.py that are set here; of the others those of the recipe act, not those of checkpoints and logs
OURS = {"--stage", "--out", "--seed", "--steps", "--data", "--cache", "--resume", "--overwrite"}


def parse(argv):
    """The command line -> (its flags, the settings of stage 2 that come of those after --)."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="folder with a stage 1, which stays as it is")
    flag("--out", default="oracle", type=partial(writable, folder=True), help="folder to write (default: %(default)s)")
    flag("--seed", type=whole(0), default=0, help="of everything drawn (default: %(default)s)")
    flag("--steps", type=whole(1), help="optimizer steps of stage 2 (default: the preset's)")
    flag("--aux-steps", type=whole(1), default=200, help="steps in which the auxiliary UNet learns to repeat the truth "
         "(default: %(default)s)")
    flag("--tell", choices=("truth", "predictions"), default="truth", help="what the streams hold: true labels, or "
         "what stage 1 predicts (default: %(default)s)")
    flag("--limit", type=whole(1), default=64, help="test scenes per world (default: %(default)s)")
    args, flags = parser.parse_args(argv[:at]), argv[at + 1:]
    if taken := OURS & {f.split("=")[0] for f in flags}:
        raise ValueError(f"{', '.join(sorted(taken))} after --: tools.oracle sets this itself")
    steps = ["--steps", str(args.steps)] if args.steps else []
    cache = ["--cache", str(Path(args.out) / UNFINISHED / "cache")]     # whichever stage 1 had
    cfg = settings.parse_args(["--stage", "2", "--out", args.ckpt, "--seed", str(args.seed), *cache, *steps, *flags])
    if cfg.data:
        raise ValueError(f"{args.ckpt} was trained on {cfg.data}: every task's truth is known in the toy worlds only")
    if (cfg.attention, cfg.loss, cfg.frozen) != ("n-to-1", "latent", "fp32"):
        raise ValueError("the truth reaches frozen streams, as latents: leave out --attention, --loss and --frozen")
    if (Path(args.out) / "results.json").is_file():
        raise ValueError(f"{args.out} already holds a result: name another --out, or delete that folder")
    for name in ("model.json", "log.jsonl"):
        if (Path(args.out) / name).exists():
            raise ValueError(f"{args.out} holds {name}, of a training or a checkpoint: name another --out")
    return args, cfg


def main(argv=None):
    args, cfg = parse(sys.argv[1:] if argv is None else argv)
    device, out, work = parse_device(cfg.device), Path(args.out), Path(args.out) / UNFINISHED
    if device.type == "cpu" and (cfg.threads or not cfg.base):
        torch.set_num_threads(cfg.threads or 1)
    size, cfg.overwrite = parse_size(cfg.size), True        # whatever stage 2 is there: nothing is written to --ckpt
    model = train.build_model(cfg, parse_tasks(cfg.tasks), settings.stages_in(cfg)).to(device)
    train.check_size(cfg, model)
    auxiliary = StableMTL.load(args.ckpt, 1, device)
    stage1 = StableMTL.load(args.ckpt, 1, device) if args.tell == "predictions" else None
    readers = [r for r in train_readers("", size, cfg.scenes) if set(r.tasks) & set(auxiliary.tasks)]
    everything = [r.complete() for r in readers]
    cache = LatentCache(cfg.cache, everything, fingerprint(auxiliary.vae.state_dict()), cfg.palette)
    told = cache if stage1 is None else Predicted(cache, stage1)
    options = {"codecs": auxiliary.codecs, "batch": cfg.batch, "micro": cfg.micro}
    lessons = Mixture(everything, auxiliary.tasks, seed=cfg.seed + 1000, cache=told, **options)
    mixture = Mixture(readers, model.tasks, seed=cfg.seed + 2000, isolation=cfg.isolation, cache=cache,
                      drop=parse_drop(cfg.drop, [r.name for r in readers]), **options)
    work.mkdir(parents=True, exist_ok=True)
    with locked(out), (work / "log.jsonl").open("w", buffering=1) as log:
        # ---- the truth of all training scenes; kept until all is done, for a run that was stopped ----
        cache.create(everything, auxiliary)
        cache.build(everything, auxiliary, registry(cfg.palette))

        # ---- the auxiliary UNet learns to repeat it ----
        first = dataclasses.replace(cfg, stage=1, steps=args.aux_steps, warmup=min(cfg.warmup, args.aux_steps // 4))
        fit(auxiliary, lessons, Truth(auxiliary, told, everything), first, log)

        # ---- stage 2 beside it ----
        model.unet.load_state_dict(auxiliary.unet.state_dict())
        streams = Truth(model, told, everything)
        if cfg.stream_gb:
            streams = TrueStreams(streams, cfg.cache, everything, model, cfg.stream_gb * 1e9,
                                  train.precision(cfg, device)[0])
        fit(model, mixture, streams, cfg, log)

        # ---- what came out ----
        results, attention = {}, {}
        for reader in (r for r in test_readers(size=size, limit=args.limit) if tasks_with_labels(r, model.tasks)):
            model.watch = torch.zeros(len(WATCHED), device=device)
            results[reader.name] = measure(model, reader, args.limit, stage1)
            attention[reader.name] = watched(dict(zip(WATCHED, model.watch.tolist(), strict=True)))
        write_json(out / "results.json", {
            "checkpoint": args.ckpt, "stage": 2, "oracle": True, "tell": args.tell, "split": "test", "data": "toy",
            "commit": commit(), "settings": dataclasses.asdict(cfg), "aux_steps": args.aux_steps,
            "stage1": stage1_settings(args.ckpt), "results": results, "trivial": {}, "skipped": [],
            "made_from": {}, "unfinished": [], "attention": attention, "scoring": scoring()})
        os.replace(work / "log.jsonl", out / "log.jsonl")
        shutil.rmtree(work)
    named = {"entropy": "attention_entropy", "largest weight": "attention_largest", "term": "attention_term"}
    lines = [f"{name}: " + ", ".join(f"{what} {short(x[key])}" for what, key in named.items())
             for name, x in attention.items()]
    held = {"truth": "the truth", "predictions": "its predictions"}[args.tell]
    print("\n".join(["", *table(results, {}), "", "what the attention over tasks does:", *lines, "",
                     f"{held} in the streams of {args.ckpt}; written to {out / 'results.json'}"]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
