"""Make a small decoder for a checkpoint: an AutoencoderTiny, TAESD's architecture, that learns from the VAE's decoder.

    python -m tools.distil --ckpt out/ --out out/decoder                        from random weights
    python -m tools.distil --ckpt real/ --init madebyollin/taesd --out small/   from TAESD's

    python sample.py --ckpt out/ --decoder out/decoder photo.jpg        what it is for
    python evaluate.py --ckpt out/ --decoder out/decoder                what it costs, task by task

It sees what it will be used on: the latents that the checkpoint predicts for training images, every task of each, and
those of the labels that training saw with them, where there are any. Latents of the images themselves are left out: a
checkpoint encodes photographs and never decodes one. Its target is what the VAE's decoder makes of the latents, so that
no label limits it. The encoder stays the VAE's; the file's own is a stub, or TAESD's. First everything is computed that
it learns from, then it is trained, and --out is written at the end, whole: what is interrupted before leaves nothing.
"""
import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from cli import Parser, half, number, parse_device, run, steady, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from tqdm import tqdm

from checkpoint import read_config, settle, write_json
from data import TOY_TRAIN, fetch, parse_drop, prepare, tasks_with_labels, train_readers, unreadable
from evaluate import choose, data_name
from model import StableMTL
from network import stock
from network.generalist import seeded
from network.loading import checkpoint_folder, factor, not_finite, read_decoder, read_model_json, save_part
from readers import READERS
from training.losses import DENSE

# By the VAE's factor, its pixels per latent cell: width, residual blocks per level, from the latents' to the pixels'.
# TAESD has 64 and 3,3,3,1. A block of whole pixels costs most; without one, the toy's misses more (docs/cost.md).
SIZES = {2: (32, (2, 1)), 4: (48, (3, 3, 1)), 8: (56, (3, 3, 3, 1))}
LOT = 8     # images that pass the network at once


# ---- the decoder, and what it learns from ----

def new_decoder(vae, width=None, blocks=None):
    """An AutoencoderTiny with random weights for the latents of a VAE, and a stub in place of its encoder.

    width: its channels; blocks: residual blocks of each level. Default: SIZES. ValueError for a wrong number of levels.
    """
    levels = 1 + round(math.log2(factor(vae)))
    usual = SIZES.get(factor(vae), (56, (3,) * (levels - 1) + (1,)))
    width, blocks = width or usual[0], blocks or usual[1]
    if len(blocks) != levels:
        raise ValueError(f"--blocks {','.join(map(str, blocks))}: this VAE has {factor(vae)} pixels per latent cell, "
                         f"which takes {levels} numbers")
    return stock.AutoencoderTiny(
        latent_channels=vae.config.latent_channels, decoder_block_out_channels=(width,) * levels,
        num_decoder_blocks=blocks, encoder_block_out_channels=(1,) * levels, num_encoder_blocks=(0,) * levels)


class Lots(Dataset):
    """`images` training images, of each dataset as many, some mirrored: none comes twice before all of a dataset have.

    Element k: LOT of one dataset or fewer, as data.prepare gives them, with the labels of `tasks` that they have and
    `drop` {dataset: tasks} leaves. One that cannot be read is a ValueError, or with skip_bad a sentence in its place.
    """

    def __init__(self, readers, tasks, codecs, images, seed, drop, skip_bad=False):
        self.codecs, self.skip_bad, self.lots, rng = codecs, skip_bad, [], np.random.default_rng(seed)
        for n, reader in enumerate(readers):
            share = images // len(readers) + (n < images % len(readers))
            rounds = math.ceil(share / len(reader))
            numbers = [int(i) for _ in range(rounds) for i in rng.permutation(len(reader))][:share]
            flips = rng.random((share, 2)) < (0.5, 0.5 if reader.vflip else 0)
            left = [t for t in tasks if t not in drop.get(reader.name, ())]
            known = {t: set(reader.indices(t)) for t in tasks_with_labels(reader, left)}
            jobs = [(i, tuple(t for t in known if i in known[t]), tuple(flip))
                    for i, flip in zip(numbers, flips.tolist(), strict=True)]
            self.lots += [(reader, jobs[k:k + LOT]) for k in range(0, share, LOT)]

    def __len__(self):
        return len(self.lots)

    def __getitem__(self, k):
        (reader, jobs), items = self.lots[k], []
        for i, tasks, flips in jobs:
            try:
                items.append(prepare(reader, i, tasks, self.codecs, flips))
            except (OSError, ValueError) as error:
                if not self.skip_bad:
                    raise unreadable(reader, i, error, self.skip_bad) from error
                items.append(f"{reader.name} sample {i}: {error}")
        return items


@torch.no_grad()
def lessons(model, lots, workers=0):
    """What there is to learn from `Lots`, predictions of all tasks and labels, and the sentences about skipped images:
    {size: (latents (N,4,h,w), what the VAE makes of them (N,3,H,W), numbers of their tasks (N))}, on the CPU in half
    precision. ValueError if no image can be read."""
    seen, skipped, device = {}, [], next(model.parameters()).device
    order = fetch(lots, workers, batch_size=None, sampler=range(len(lots)))
    for lot in tqdm(order, "what there is to learn", len(lots), leave=False):
        skipped += [x for x in lot if isinstance(x, str)]
        items = [x for x in lot if not isinstance(x, str)]
        if not items:
            continue
        codes = {t: [x["labels"][t] for x in items if t in x["labels"]] for t in model.tasks}
        frames = [torch.stack([x["frames"][n] for x in items]).to(device) for n in (0, 1)]
        with half(device), seeded(model, frames[0]):
            latents = [*model(*model.encode_frames(*frames, model.tasks), model.tasks).items()]
            latents += [(t, model.encode(torch.stack(x).to(device))) for t, x in codes.items() if x]
            for t, z in latents:
                kinds = torch.full((len(z),), model.tasks.index(t))
                maps = z.half().cpu(), model.decode(z).half().cpu(), kinds
                columns = seen.setdefault(tuple(z.shape[2:]), ([], [], []))
                for column, x in zip(columns, maps, strict=True):
                    column.append(x)
    if not seen:
        raise ValueError(f"none of the training images can be read, first {skipped[0]}")
    return {size: tuple(map(joined, columns)) for size, columns in seen.items()}, skipped


def joined(parts):
    """torch.cat of a list of tensors, which is empty afterwards: each is freed as soon as it is copied, for all of them
    twice would be the most memory that a distillation takes."""
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rows in out.split([len(part) for part in parts]):
        rows.copy_(parts.pop(0))
    return out


def distance(tiny, z, images, kinds, codecs):
    """Mean squared error of the small decoder, and the loss: that, a little of the absolute one, for edges, and of maps
    of classes the cross-entropy of those that the VAE's decoder shows: a small error there can be another class.

    images (B,3,H,W): what the VAE makes of z (B,4,h,w); kinds (B): numbers of their codecs.
    """
    y = tiny.decode(z / tiny.config.scaling_factor).sample.float()
    square = (y - images).square().mean()
    loss = square + 0.1 * (y - images).abs().mean()
    for k, codec in enumerate(codecs):
        if codec.categorical and (mine := kinds == k).any():
            errors = DENSE[codec.dense_loss](y[mine], images[mine], None, codec)
            loss = loss + 0.2 * errors.sum() / images[:, 0].numel()
    return square, loss


@torch.no_grad()
def measure(tiny, seen, codecs, batch=16):
    """Mean squared difference from the VAE's decoder."""
    device, total, count = tiny.device, 0.0, 0
    for tensors in seen.values():
        for z, x, kinds in zip(*(t.to(device).split(batch) for t in tensors), strict=True):
            total += distance(tiny, z.float(), x.float(), kinds, codecs)[0].item() * len(z)
            count += len(z)
    return total / count


# ---- training ----

def train(tiny, seen, codecs, steps, batch=8, lr=2e-3, seed=0):
    """Adam with a short warm-up and cosine decay. seen: of `lessons`; codecs: of the model's tasks, in order.

    FloatingPointError if it diverges.
    """
    device, g = tiny.device, torch.Generator().manual_seed(seed)
    params = [p for p in tiny.decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr, betas=(0.9, 0.99))
    warmup, sizes = min(100, steps // 10 + 1), list(seen)
    weights = torch.tensor([len(seen[s][0]) for s in sizes], dtype=torch.float)
    bar = tqdm(range(steps), "training the decoder", leave=False, mininterval=2)
    for step in bar:
        tensors = seen[sizes[torch.multinomial(weights, 1, generator=g)]]
        rows = torch.randint(len(tensors[0]), (batch,), generator=g)
        z, images, kinds = (x[rows].to(device) for x in tensors)
        z, images = z.float(), images.float()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with half(device):
            square, loss = distance(tiny, z, images, kinds, codecs)
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}: lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(error=f"{square.item():.5f}", refresh=False)


def save(tiny, about, out):
    """Write the folder, which must not be there yet, in one piece or not at all; OSError says why not."""
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:     # no one else's
            made = Path(temporary) / out.name
            made.mkdir()
            save_part(tiny, made)
            write_json(made / "distilled.json", about)
            settle(made)
            os.replace(made, out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} cannot be written ({error}): make room, and distil again") from None


# ---- the command ----

def parse_blocks(text):
    """argparse type: "3,3,3,0" -> (3, 3, 3, 0)."""
    if not all(n.isdecimal() and len(n) < 3 for n in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, for example 3,3,3,0")
    return tuple(map(int, text.split(",")))


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", help="folder written by train.py, or hub id (default: out/ where it is, else the toy model)")
    flag("--stage", type=int, choices=(1, 2), help="whose predictions it sees (default: 2 where it exists)")
    flag("--out", required=True, help="folder of the decoder, new")
    flag("--init", help="folder or hub id of an AutoencoderTiny to start from (default: random weights)")
    flag("--width", type=whole(1, 4096), help="channels (default: 56, 32 for the toy base)")
    flag("--blocks", type=parse_blocks, help="residual blocks per level, coarse to fine (default: 3,3,3,1, 2,1 for the "
         "toy base)")
    flag("--data", help="root folder of training images, labelled or not, or `toy` (default: what the checkpoint was "
         "trained on)")
    flag("--images", type=whole(1), default=600, help="training images, whose maps are kept in memory (default: "
         "%(default)s)")
    flag("--skip-bad", action="store_true", help="skip and count unreadable images instead of stopping (default: as in "
         "training)")
    flag("--steps", type=whole(1), default=12_000, help="(default: %(default)s)")
    flag("--batch", type=whole(1, 4096), default=8, help="maps per step (default: %(default)s)")
    flag("--lr", type=number(0, 1, ends=False), default=2e-3, help="peak learning rate (default: %(default)s)")
    flag("--seed", type=whole(), default=0, help="(default: %(default)s)")
    flag("--workers", type=whole(0, 256), default=0, help="loader processes (default: %(default)s)")
    flag("--device", default="auto", help="cpu, cuda or mps (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    if args.init and (args.width or args.blocks):
        raise ValueError("--width and --blocks would do nothing here: --init has a size of its own")
    return args


def main(argv=None):
    args, start = parse(argv), time.time()
    if Path(args.out).exists():
        raise ValueError(f"{args.out} is there already: name another --out, or delete it")
    writable(args.out, folder=True)
    device = parse_device(args.device)
    folder = checkpoint_folder(args.ckpt)
    whose = args.ckpt or str(folder)
    read_model_json(folder)     # or there is no checkpoint
    config = read_config(folder)
    if not (args.data or config["train"]):
        raise ValueError(f"{whose} does not say what it was trained on: name training images by --data <root>, or the "
                         "toy worlds by --data toy")
    trained = config["train"] or {}
    data, size = choose(args.data, data_name(trained.get("data")), config, whose)
    model = steady(StableMTL.load(folder, args.stage, device))
    if model.space != "latent":
        raise ValueError(f"{whose} predicts pixels, not latents: there is no decoder to make for it")
    torch.manual_seed(args.seed)
    if args.init:
        tiny = read_decoder(args.init, model.vae, "--init").to(device)
    else:
        tiny = new_decoder(model.vae, args.width, args.blocks).to(device)
    tiny.encoder.requires_grad_(False)
    codecs = [model.codecs[t] for t in model.tasks]
    readers = train_readers("" if data == "toy" else data, size, trained.get("scenes", 400))
    drop = parse_drop(trained.get("drop", ""), (*TOY_TRAIN, *READERS))
    lots = Lots(readers, model.tasks, model.codecs, args.images, args.seed, drop,
                args.skip_bad or trained.get("skip_bad", False))
    seen, skipped = lessons(model, lots, args.workers)
    del model       # its memory is training's now
    before, maps = measure(tiny, seen, codecs), sum(len(z) for z, *_ in seen.values())
    train(tiny, seen, codecs, args.steps, args.batch, args.lr, args.seed)
    if bad := not_finite(tiny.state_dict()):
        raise FloatingPointError(f"{', '.join(bad[:4])} are not finite: lower --lr")
    after = measure(tiny, seen, codecs)
    if not math.isfinite(after):
        raise FloatingPointError(f"the difference from the VAE's decoder is {after}: lower --lr")
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "device", "skip_bad")}
    source = {"ckpt": whose, "data": data, "datasets": [*dict.fromkeys(reader.name for reader, _ in lots.lots)],
              "skipped": skipped}
    save(tiny, {**flags, **source, "maps": maps, "error before": before, "error": after}, args.out)
    weights = sum(p.numel() for p in tiny.decoder.parameters())
    for sentence in skipped:
        print(f"skipped: {sentence}", file=sys.stderr)
    print(f"{maps} maps of {args.images - len(skipped)} training images of {', '.join(source['datasets'])} "
          f"({'the toy worlds' if data == 'toy' else data}), {len(skipped)} skipped")
    print(f"{args.steps} steps in {(time.time() - start) / 60:.1f} min on {device}; mean squared difference from the "
          f"VAE's decoder {before:.5f} -> {after:.5f}; {weights} weights in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
