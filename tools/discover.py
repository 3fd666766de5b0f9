"""Label a training set's tasks by a model (training/discovery.py), the data of `python train.py --pseudo`.

    python -m tools.discover --ckpt out/ --to pseudo/          what the teacher in out/ says of its own training images
    python train.py --stage 1 --pseudo pseudo/ --out student/  a student that learns from these labels as well
    python -m tools.discover --ckpt out/ --to truth/ --truth   true labels in their place: the most one can hope for

Data, sizes, tasks and dropped labels are those of the teacher's stage 1. Where the truth is known, on the toy worlds
and of dropped labels, it prints how good the labels are, all of them and those the teacher is surest of, and for
comparison the better trivial predictor of all pixels, of the labels that other datasets have. Stopped, the same command
does the rest.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

from cli import Parser, markdown, parse_device, parse_size, run, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import numpy as np
import torch

from checkpoint import stage1_settings
from data import label_tensors, parse_drop, resize, tasks_with_labels, train_readers
from evaluate import TrainingLabels
from metrics import GUESSES, METRICS
from model import StableMTL
from readers.reader import some
from settings import check_finished, unusual
from tasks import TASKS
from training.cache import fingerprint
from training.discovery import PseudoLabels, unlabelled

BEHIND = 128        # training labels per dataset behind the trivial predictors


@torch.no_grad()
def errors(labels, model, truth, count, guesses):
    """How good the labels are, on up to `count` samples of every pair that `truth`, {dataset: reader}, has a label of
    -> rows of a table. guesses: {task: TrainingLabels}, of the labels there are."""
    rows = []
    for reader in labels.readers:
        true = truth[reader.name]
        for t in tasks_with_labels(true, labels.about["cells"][reader.name]):
            latents, doubts = (labels.array(reader, name) for name in (t, f"{t}_doubt"))
            middle, trivial = labels.median(t), guesses[t].guesses(true, (t,))[0].get(t, ())
            metric = METRICS[TASKS[t].metric]
            scores = {who: metric.accumulator(clip=reader.depth_range) for who in ("all", "surest half", *GUESSES)}
            for i in some(true, true.indices(t), count):
                if not np.isfinite(doubts[i, 0]).any():
                    continue
                z = torch.from_numpy(np.array(latents[i, :1])).float().to(next(model.parameters()).device)
                map = model.codecs[t].decode(model.decode_labels({t: z})[t])[0].cpu()
                size = map.shape[-2:]       # of whole latent cells
                label, valid = (resize(x, reader.size)[..., :size[0], :size[1]]
                                for x in label_tensors(true.load(i, (t,)), t))
                sure = torch.from_numpy(np.array(doubts[i, 0])).float() <= middle
                scores["all"].add(map, label, valid[0])
                scores["surest half"].add(map, label, valid[0] & resize(sure, size)[0])
                for who, guess in zip(GUESSES, trivial, strict=False):
                    scores[who].add(guess[..., :size[0], :size[1]], label, valid[0])
            found = {who: s.result()[metric.headline] for who, s in scores.items() if s.images}
            if chance := [found.pop(who) for who in GUESSES if who in found]:
                found["trivial"] = (min if metric.lower else max)(chance)
            rows.append({"dataset": reader.name, "task": t, "metric": metric.titled,
                         **{who: f"{x:.4g}" for who, x in found.items()}})
    return rows


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="the teacher: a finished folder of train.py, of stage 1 or 2")
    flag("--stage", type=int, choices=(1, 2), help="which stage of it (default: 2 where it exists)")
    flag("--to", required=True, type=partial(writable, folder=True), help="folder of the labels, outside of --ckpt")
    flag("--truth", action="store_true", help="true labels instead of the teacher's (toy worlds only)")
    flag("--samples", type=whole(0), default=32, help="samples per dataset and task to measure on "
         "(default: %(default)s)")
    flag("--batch", type=whole(1, 4096), default=8, help="images at once (default: %(default)s)")
    flag("--skip-bad", action="store_true", help="name, skip and count unreadable images, which get no labels, instead "
         "of stopping")
    flag("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    model = StableMTL.load(args.ckpt, args.stage, parse_device(args.device))
    check_finished(args.ckpt, 2 if model.multi else 1, "--ckpt is a finished teacher")
    if Path(args.to).resolve().is_relative_to(Path(args.ckpt).resolve()):
        raise ValueError(f"--to {args.to} is in the teacher's folder, which training writes to: name one outside of it")
    known = stage1_settings(args.ckpt)
    if model.cache_tag:
        raise ValueError(f"{args.ckpt} is not of StableMTL's latents: it cannot teach with them")
    if not known:
        raise ValueError(f"{args.ckpt} does not say what it was trained on: train a stage 1, or take another teacher")
    if args.truth and known["data"]:
        raise ValueError(f"--truth: only the toy worlds have labels of every task, and {args.ckpt} was trained on "
                         f"{known['data']}")
    readers = train_readers(known["data"], parse_size(known["size"]), known["scenes"])
    drop = parse_drop(known["drop"], [r.name for r in readers])
    pairs = unlabelled(readers, model.tasks, drop)
    if not pairs:
        raise ValueError(f"{known['data'] or 'the toy worlds'} lack no label of {', '.join(model.tasks)} that could be "
                         "discovered: tasks of one frame that are not about classes")
    everything = model.state_dict() | {t: model.get_buffer(f"token_{t}") for t in model.tasks}
    labels = PseudoLabels(args.to, readers, fingerprint(model.vae.state_dict()), pairs,
                          "truth" if args.truth else fingerprint(everything))
    truth = {r.name: r if known["data"] else r.complete() for r in readers}
    skipped = [] if args.skip_bad else None
    try:
        labels.discover(model, args.batch, truth if args.truth else None, skipped)
    except KeyboardInterrupt:
        print(f"\nstopped: what is done is in {args.to}; the same command does the rest", file=sys.stderr)
        return 130
    told = ", ".join(f"{name} {'+'.join(tasks)}" for name, tasks in pairs.items())
    for sentence in skipped or ():
        print(f"skipped: {sentence}", file=sys.stderr)
    print(f"labels of {told} in {args.to}; {len(skipped or ())} images skipped")
    if args.samples:
        trained = {t: [r for r in readers if t not in drop.get(r.name, ())] for t in model.tasks}
        guesses = {t: TrainingLabels(some, BEHIND, 0, args.skip_bad) for t, some in trained.items()}
        rows = errors(labels, model, truth, args.samples, guesses)
        if rows:
            table = markdown(rows, ["dataset", "task", "metric", "all", "surest half", "trivial"])
            print("\n".join(["", *table]))
    flags = " ".join(["--stage 1", *unusual(known), f"--pseudo {args.to}"])
    print(f"\nnext: python train.py {flags} --out <another folder>")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
