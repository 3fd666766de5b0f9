"""What HiTTs' task tokens see, and how good the labels are that it would discover (baselines/hitts.py).

    python -m tools.tokens --ckpt hitts/        trained on the toy worlds, which know the labels that training lacks

    table           each task's error on training images that have its label and on those that have none; then of the
                    likeliest bins, which `train.py --teacher` takes for labels, on all pixels and on the sure ones; the
                    share of these, and tau. A map is fitted to its label on the pixels that count
    maps.png        of one scene sigmoid(theta F) of each task, softplus(phi F) of each class
    cosines.png     of the same scene the cosines between phi, the classes' fine tokens: without the orthogonal
                    embedding (--options oe=no) all are 1
    tokens.json     all numbers
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

from cli import Parser, markdown, parse_device, parse_size, run, steady, whole, writable  # before torch, for Ctrl-C

# isort: split
import torch
import torch.nn.functional as F

import baselines
from baselines.hitts import HiTTs, relevance
from baselines.teacher import Discovery
from checkpoint import stage1_settings, write_json
from data import Mixture, parse_drop, picture, tasks_with_labels, tensor_image, test_batches, train_readers
from draw import draw_maps, draw_matrix
from metrics import METRICS
from network.loading import read_model_json
from sample import toy
from tasks import CLASSES, TASKS

WHO = "prediction", "likeliest bin", "sure"     # whose errors


def teacher(folder, device):
    """(the HiTTs in a folder, Discovery as it would teach it). ValueError: another system, or not of the toy worlds."""
    kind, known = read_model_json(folder)["kind"], stage1_settings(folder)
    if kind != HiTTs.kind:
        raise ValueError(f"{folder} holds a {kind}, which has no task tokens: name a folder of "
                         f"python train.py --stage 1 --system {HiTTs.kind}")
    if not known or known["data"]:
        where = f"was trained on {known['data']}" if known else "does not say what it was trained on"
        raise ValueError(f"{folder} {where}: name one of the toy worlds, which know the labels that training lacks")
    model = steady(baselines.load(folder, device=device))
    readers = train_readers(size=parse_size(known["size"]), scenes=known["scenes"])
    drop = parse_drop(known["drop"], [r.name for r in readers])
    readers = [r for r in readers if set(r.tasks) & set(model.tasks)]       # as train.py leaves the others out
    mixture = Mixture(readers, model.tasks, model.codecs, drop=drop, isolation=False, joint=True)
    return model, Discovery(mixture, model.tasks, model)


@torch.no_grad()
def measure(model, discovery, limit, batch=8):
    """Up to `limit` training images of each world, against the labels of all tasks; of motion only where training has
    two frames -> {(task, whether the images lack its label): {each of WHO: Accumulator, "worlds": their names,
    "shares": how much of each image is sure}}"""
    found, device = {}, next(model.parameters()).device
    for reader in discovery.mixture.readers:
        every = reader.complete()
        tasks = [t for t in tasks_with_labels(every, model.tasks) if TASKS[t].frames == 1 or every.paired]
        for group in test_batches(every, tasks, batch, 0, limit):
            pair = [torch.stack([frames[n] for frames, *_ in group]).to(device) for n in (0, -1)]
            predicted, guesses = model.predict(*pair, tasks=tasks), model.guess(*pair, tasks)
            for t, (code, sure) in guesses.items():
                likeliest = model.codecs[t].decode(code)
                passed = (sure > discovery.least.get(t, math.inf))[:, 0].cpu()
                for n, (_, labels, index, _) in enumerate(group):
                    new = {who: METRICS[TASKS[t].metric].accumulator(clip=reader.depth_range) for who in WHO}
                    lacks, (label, valid) = discovery.lacks((reader.name, index), t), labels[t]
                    part = found.setdefault((t, lacks), {"worlds": {}, "shares": []} | new)
                    part["prediction"].add(predicted[t][n], label, valid)
                    part["likeliest bin"].add(likeliest[n], label, valid)
                    part["sure"].add(likeliest[n], label, valid & passed[n])
                    part["worlds"][reader.name] = None
                    part["shares"].append(passed[n].float().mean().item())
    return found


def table(tasks, found, least):
    """What `measure` found, and tau, {task: confidence} -> rows of numbers, for people and with all metrics."""
    told, full = [], []
    for t, lacks in ((t, lacks) for t in tasks for lacks in (False, True) if (t, lacks) in found):
        part, metric = found[t, lacks], METRICS[TASKS[t].metric]
        results = {who: part[who].result() for who in WHO if part[who].images}
        row = {"task": t, "label": "none" if lacks else "yes", "worlds": ", ".join(part["worlds"])}
        sure = {"share sure": fmean(part["shares"]), "tau": least[t]} if t in least else {}
        full.append(row | {"results": results} | sure)
        told.append(row | {"metric": metric.titled} | {k: f"{x:.3f}" for k, x in sure.items()})
        told[-1] |= {who: f"{result[metric.headline]:.4g}" for who, result in results.items()}
    return told, full


def cosines(phi):
    """Tokens (P,C) -> their cosines (P,P), and the mean over pairs of different tokens."""
    matrix = F.cosine_similarity(phi[:, None], phi[None], dim=2)
    return matrix, ((matrix.sum() - matrix.trace()) / (len(phi) * (len(phi) - 1))).item()


@torch.no_grad()
def scene(model, image, next_image):
    """Of frames (1,3,H,W): rows for draw_maps, and {task: fine tokens (P,C)}."""
    found = model.global_tokens(image, next_image, model.tasks)
    theta = [(t, relevance(*found[t])[0].cpu()) for t in model.tasks]
    rows = [("sigmoid(theta F)", (0, 1), [("scene", picture(image[0].cpu())), *theta])]
    for t in (t for t in model.tasks if TASKS[t].categorical):
        ids, weights = model.predict(image, next_image, [t])[t][0], model.fine[t].weights(*found[t])[0].cpu()
        ends = weights.min().item(), weights.max().item()
        cell = "predicted", TASKS[t].colour(ids, torch.ones_like(ids[0], dtype=torch.bool))
        rows.append(("softplus(phi F)", ends, [cell, *zip(CLASSES, weights, strict=True)]))
    return rows, {t: model.fine[t].tokens(token)[0].cpu() for t, (_, token) in found.items()}


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="folder of python train.py --system hitts; a student is one, too")
    flag("--limit", type=whole(1), default=32, help="training images per world (default: %(default)s)")
    flag("--toy", metavar="WORLD:N", default="real:5", help="scene of the pictures, as in sample.py (default: "
         "%(default)s)")
    flag("--out", type=partial(writable, folder=True), default="tokens", help="folder of pictures and tokens.json "
         "(default: %(default)s)")
    flag("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = parse_device(args.device)
    model, discovery = teacher(args.ckpt, device)
    item, out = toy(args), Path(args.out)
    told, full = table(model.tasks, measure(model, discovery, args.limit), discovery.least)
    print("\n".join(markdown(told, ["task", "label", "worlds", "metric", *WHO, "share sure", "tau"])))
    maps, tokens = scene(model, *(tensor_image(read())[None].to(device) for read in (item.image, item.next)))
    matrices, means = ({t: cosines(phi)[n] for t, phi in tokens.items()} for n in (0, 1))
    print("\nmean cosine of two fine tokens: " + ", ".join(f"{t} {mean:.3f}" for t, mean in means.items()))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"maps.png": draw_maps(maps)}
    for t in (t for t in model.tasks if TASKS[t].categorical):
        title = f"cosines of fine tokens, {t}\nmean of two different ones: {means[t]:.3f}"
        pictures["cosines.png"] = draw_matrix(title, CLASSES, matrices[t].numpy())
    for name, figure in pictures.items():
        figure.savefig(out / name)
    write_json(out / "tokens.json", {"checkpoint": str(args.ckpt), "limit": args.limit, "scene": args.toy, "rows": full,
                                     "mean cosine": means, "cosines": {t: m.tolist() for t, m in matrices.items()}})
    print(f"in {out}: {', '.join(pictures)}, tokens.json")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
