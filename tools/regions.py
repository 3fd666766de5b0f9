"""How clean predicted classes are: what a codec or a diffusion model could spoil, apart from being right or wrong.

    python -m tools.regions --ckpt latent/ pixel/       test scenes of the toy worlds, a row per checkpoint and world

    classes per region   predicted classes inside a connected region of one true class, away from its edges, on average;
                         1 is clean
    off-colour           share of pixels whose decoded colour is further than half the least distance between two class
                         colours from all of them: no class is clearly meant

The same of the codec alone, without a prediction, stands beside each. The reason that the Diffusion Generalist's
authors give for working on pixels is that decoded latents miss the class colours: here one sees whether they do.
"""
import argparse
import sys
from dataclasses import replace
from statistics import fmean

from cli import Parser, markdown, parse_device, run, whole  # before torch, for Ctrl-C meanwhile

# isort: split
import cv2
import numpy as np
import torch

from checkpoint import read_config
from data import tasks_with_labels, test_batches, test_readers
from evaluate import through_vae
from model import StableMTL
from tasks import PALETTES, TASKS


def classes_per_region(predicted, label, valid, margin):
    """[number of predicted classes in each connected region of one class]; maps (H,W) of ids, mask (H,W) bool.

    Pixels up to `margin` from another region do not count: with cells of several pixels it may well be seen there.
    """
    out, window = [], np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    for k in label[valid].unique():
        mask = (valid & (label == k)).cpu().numpy()
        count, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        for n in range(1, count):
            inner = cv2.erode((regions == n).astype(np.uint8), window)
            if inner.any():
                out.append(len(predicted[torch.from_numpy(inner > 0)].unique()))
    return out


def off_colour(code, palette):
    """(3,H,W) decoded code -> (H,W) bool: further from all class colours than half the least distance of two."""
    colours = torch.tensor(PALETTES[palette], dtype=torch.float32) / 127.5 - 1
    half = torch.pdist(colours).min() / 2
    return torch.cdist(code.float().cpu().flatten(1).T, colours).min(1).values.view(code.shape[1:]) > half


@torch.no_grad()
def read_out(model, reader, task, limit, batch=8):
    """{"model" or "codec": (classes per region, share off-colour)} of one test set."""
    codec, device = model.codecs[task], next(model.parameters()).device
    model.codecs[task] = replace(codec, decode=torch.Tensor.float)      # predict gives the codes themselves
    counts, shares = {"model": [], "codec": []}, {"model": [], "codec": []}
    for group in test_batches(reader, [task], batch, 0, limit):
        label, valid = (torch.stack([maps[task][n] for _, maps, *_ in group]).to(device) for n in (0, 1))
        code = codec.encode(label, valid[:, None])
        frames = torch.stack([frames[0] for frames, *_ in group]).to(device)
        codes = {"model": model.predict(frames, tasks=[task])[task], "codec": through_vae(model, task, code)}
        for who, x in codes.items():
            for ids, one, true, mask in zip(codec.decode(x).cpu(), x, label.cpu(), valid.cpu(), strict=True):
                counts[who] += classes_per_region(ids[0], true[0], mask, model.factor - 1)
                shares[who].append(off_colour(one, model.palette)[mask].float().mean().item())
    model.codecs[task] = codec
    return {who: (fmean(counts[who]), fmean(shares[who])) for who in counts}


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", nargs="+", required=True, help="folders written by train.py")
    flag("--limit", type=whole(1), default=32, help="samples per world (default: %(default)s)")
    flag("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(argv)


def main(argv=None):
    args, rows = parse(argv), []
    for folder in args.ckpt:
        model = StableMTL.load(folder, device=parse_device(args.device))
        classes = [t for t in model.tasks if TASKS[t].categorical]
        if not classes:
            raise ValueError(f"{folder} predicts no classes: it has {', '.join(model.tasks)}")
        for reader in test_readers("", tuple(read_config(folder)["size"] or (32, 48)), limit=args.limit):
            for task in classes if tasks_with_labels(reader, classes) else ():
                found = read_out(model, reader, task, args.limit)
                rows.append({"checkpoint": folder, "palette": model.palette, "test set": reader.name})
                for who, (count, share) in found.items():
                    rows[-1] |= {f"classes per region, {who}": f"{count:.3f}", f"off-colour, {who}": f"{share:.2%}"}
    print("\n".join(markdown(rows, list(rows[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
