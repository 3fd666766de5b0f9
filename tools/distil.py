"""Make a small decoder for a checkpoint: an AutoencoderTiny, TAESD's architecture, that learns from the VAE's decoder.

    python -m tools.distil --ckpt out/ --out out/decoder                        from random weights
    python -m tools.distil --ckpt real/ --init madebyollin/taesd --out small/   from TAESD's

    python sample.py --ckpt out/ --decoder out/decoder photo.jpg        what it is for
    python evaluate.py --ckpt out/ --decoder out/decoder                what it costs, task by task

It sees what it will be used on: the latents that the checkpoint predicts for training images, every task of each, and
those of the labels these have. Its target is what the VAE's decoder makes of them, so that no label limits it. The
encoder stays the VAE's; the file's own is a stub, or TAESD's. First everything is computed that it learns from, then it
is trained, and --out is written at the end, whole: what is interrupted before leaves nothing.
"""
import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

from cli import Parser, half, number, parse_device, run, steady, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from checkpoint import read_config, write_json
from data import Mixture, loader, train_readers
from model import StableMTL
from network import stock
from network.loading import checkpoint_folder, factor, not_finite, read_decoder, save_part
from training.losses import DENSE

# By the VAE's factor, its pixels per latent cell: width, residual blocks per level, from the latents' to the pixels'.
# TAESD has 64 and 3,3,3,1. A block of whole pixels costs most; without one, the toy's misses more (docs/cost.md).
SIZES = {2: (32, (2, 1)), 4: (48, (3, 3, 1)), 8: (56, (3, 3, 3, 1))}


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


@torch.no_grad()
def lessons(model, readers, images, batch, seed, workers=0):
    """{size: (latents (N,4,h,w), what the VAE makes of them (N,3,H,W), numbers of their tasks (N))} of labels and
    predictions, on the CPU in half precision: of `images` training images, all tasks of the model and all labels."""
    seen, device = {}, next(model.parameters()).device
    mixture = Mixture(readers, model.tasks, model.codecs, batch, batch, seed, isolation=False, joint=True)
    steps = math.ceil(images / batch)
    for step in tqdm(loader(mixture, 0, steps, workers), "what there is to learn", steps, leave=False):
        for b in step["batches"]:
            with half(device):
                z_i, z_j = (model.see(f.to(device)) for f in b["frames"])
                latents = [*model(z_i, z_j, model.tasks).items()]
                latents += [(t, model.encode(x.to(device))) for t, x in b["labels"].items()]
                for t, z in latents:
                    kinds = torch.full((len(z),), model.tasks.index(t))
                    maps = z.half().cpu(), model.decode(z).half().cpu(), kinds
                    columns = seen.setdefault(tuple(z.shape[2:]), ([], [], []))
                    for column, x in zip(columns, maps, strict=True):
                        column.append(x)
    return {size: tuple(map(joined, columns)) for size, columns in seen.items()}


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
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_part(tiny, temporary)
        write_json(temporary / "distilled.json", about)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
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
    flag("--data", help="root folder of the training data (default: what the checkpoint was trained on)")
    flag("--images", type=whole(1), default=600, help="training images, whose maps are kept in memory (default: "
         "%(default)s)")
    flag("--steps", type=whole(1), default=6000, help="(default: %(default)s)")
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
    model = steady(StableMTL.load(folder, args.stage, device))
    if model.space != "latent":
        raise ValueError(f"{folder} predicts pixels, not latents: there is no decoder to make for it")
    torch.manual_seed(args.seed)
    if args.init:
        tiny = read_decoder(args.init, model.vae, "--init").to(device)
    else:
        tiny = new_decoder(model.vae, args.width, args.blocks).to(device)
    tiny.encoder.requires_grad_(False)
    config = read_config(folder)
    trained = config["train"] or {}
    root = args.data if args.data is not None else trained.get("data") or ""
    size = tuple(config["size"] or (32, 48))
    readers = train_readers("" if root == "toy" else root, size, trained.get("scenes", 400))
    codecs = [model.codecs[t] for t in model.tasks]
    seen = lessons(model, readers, args.images, 8, args.seed, args.workers)
    del model       # its memory is training's now
    before, maps = measure(tiny, seen, codecs), sum(len(z) for z, *_ in seen.values())
    train(tiny, seen, codecs, args.steps, args.batch, args.lr, args.seed)
    if bad := not_finite(tiny.state_dict()):
        raise FloatingPointError(f"{', '.join(bad[:4])} are not finite: lower --lr")
    after = measure(tiny, seen, codecs)
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "device")}
    save(tiny, {**flags, "maps": maps, "error before": before, "error": after}, args.out)
    weights = sum(p.numel() for p in tiny.decoder.parameters())
    print(f"{maps} maps, {args.steps} steps in {(time.time() - start) / 60:.1f} min on {device}; mean squared "
          f"difference from the VAE's decoder {before:.5f} -> {after:.5f}; {weights} weights in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
