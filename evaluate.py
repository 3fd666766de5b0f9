"""Measure a checkpoint on its test sets: every metric, trivial predictors beside it, Delta_m.

    python evaluate.py --ckpt out/                    on the data it was trained on, trivial predictors beside it
    python evaluate.py --ckpt out/ --data <root>      the test sets found under root, the paper's row beside ours
    python evaluate.py --ckpt out/ --data toy         the held-out toy worlds
    python evaluate.py --ckpt out/ --baseline paper|a.json,b.json       Delta_m against single-task results
    python evaluate.py --ckpt out/ --streams off      stage 2 without its streams, or with some (--streams depth,normal)
    python evaluate.py --predictions <folder> --data <root>             files of any system (docs/predictions.md)
    python evaluate.py --codec                        what the label codec alone costs: labels through the VAE and back
    python evaluate.py --ckpt out/ --decoder <folder>       with a small decoder in the VAE's place
    python evaluate.py --codec --decoder <folder>           both decoders side by side, task by task and class by class

Results go to results.json in the checkpoint, those of stage 1 beside a stage 2, of fewer streams, of one frame, of the
split val, of other data and of a decoder to files of their own (results_stage1.json, results_streams-off.json,
results_one-frame.json, results_val.json, results_<name of the root or decoder>.json). Those of the toy model and of a
hub id go to the current folder (results_toy_model.json, results_<org>_<name>.json), those of predictions to theirs;
with --codec the same names begin with codec.

A test set that is there already, from the same settings, weights, samples and code, is not computed again: so an
interrupted run goes on. A report of the same weights by other settings, or in --json of another checkpoint, is renamed
first (results.before.json).

On a GPU that has bfloat16 the networks run in it, which moves numbers a little; the report says so ("precision").
"""
import argparse
import math
import sys
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import cli  # before torch, for Ctrl-C meanwhile
from cli import Parser, markdown, parse_device, run, steady, whole, writable

# isort: split
import torch
import torch.nn.functional as F

import toy
from baselines import load
from checkpoint import read_config, read_json
from data import resize, tasks_with_labels, test_batches, test_readers, train_readers
from inference import photometric
from inference.confidence import Sparsification, agreement, sparsification_table
from inference.infer import mirror_maps, network_maps, precision, seen
from inference.predictions import Predictions
from inference.report import (
    METRIC_VALUES,
    current,
    fingerprints,
    flags_of,
    read_report,
    result_dependencies,
    results_file,
    scoring,
    weights_of,
    write_report,
)
from metrics import GUESSES, METRICS, code_sums, delta_m, trivial
from model import from_base
from network.loading import checkpoint_folder
from readers import READERS
from tasks import MOTION, PALETTES, TASKS, parse_tasks, registry
from training.about import stages_of


def _row(miou, normal, kitti, diode, uv, xyz, shading, albedo):
    return {"semantic": {"cityscapes": miou}, "normal": {"diode": normal},
            "depth": {"kitti_eigen": kitti, "diode": diode}, "optical_flow": {"kitti_2015": uv},
            "scene_flow": {"kitti_2015": xyz}, "shading": {"mid": shading}, "albedo": {"mid": albedo}}


# Table 2 of the paper. It prints the single-task shading and albedo the other way round: only with 0.2551 for shading
# and 0.2145 for albedo (as in its supplement's Table 9) do the rows give the printed -106.87, -78.76, -1.57, +4.78.
PAPER = {"single-task": _row(48.17, 22.27, 14.21, 32.56, 10.36, 0.2735, 0.2551, 0.2145),
         "JTR*": _row(20.46, 50.91, 39.27, 73.14, 34.92, 0.5176, 0.3030, 0.3565),
         "DiffusionMTL*": _row(45.92, 44.56, 24.83, 58.17, 36.60, 0.3502, 0.3004, 0.3660),
         "StableMTL-S": _row(52.57, 23.94, 15.64, 33.36, 12.76, 0.2618, 0.2310, 0.2077),
         "StableMTL": _row(55.79, 23.27, 14.98, 33.03, 10.76, 0.2313, 0.2346, 0.2016)}
PAPER_TASKS = tuple(PAPER["StableMTL"])     # also of the released weights; TASKS may have more


# ---- one test set ----

def evaluate(model, reader, world_size=1, **how):
    """Run one test set. Returns ({task: metrics}, {one of GUESSES: {task: metrics}}, names of skipped samples).

    world_size: processes that share the work; no number depends on it. how: further settings of `score`.
    """
    scores, psnr, skipped = {}, defaultdict(list), []
    share = partial(score, world_size=world_size, model=model, reader=reader, **how)
    for part, ratios, bad in cli.spread(share, world_size):
        for (who, name), counted in part.items():
            scores[who, name] = scores[who, name].merge(counted) if (who, name) in scores else counted
        for t, values in ratios.items():
            psnr[t] += values
        skipped += bad
    if not scores:
        raise ValueError(f"{reader.name}: not one sample can be read, {[*skipped, 'or there is no prediction'][0]}")
    results = {who: {} for who in ("model", *GUESSES)}
    for (who, name), counted in scores.items():
        if who in results:
            results[who][name] = counted.result()
    for (who, name), counted in scores.items():
        if who in ("confidence", "pixels"):     # beside what images the metrics themselves have
            results["model"][name] = counted.result() | results["model"][name]
    for t, values in psnr.items():
        results["model"][t]["PSNR"] = fmean(values)
    return results.pop("model"), {who: r for who, r in results.items() if r}, sorted(skipped)


def score(rank, world_size, model, reader, batch=16, workers=2, limit=None, rows=None, skip_bad=None, codec=False,
          guesses=None, confidence=False, pixels=False, one_frame=False):
    """The rank-th of `world_size` shares of `evaluate`.

    codec: instead of predicting, send each label through encode, VAE, decode: the ceiling that the codec sets.
    guesses: {task: predictions as in GUESSES, each (C,H,W)} to score beside the model. confidence, pixels: what
    confidence.Sparsification, photometric.Scaled measure, too. one_frame: tasks of one frame get that one alone.

    Returns ({("model", one of GUESSES, "confidence" or "pixels"; task): Accumulator}, {task: PSNRs}, names of skipped
    samples).
    """
    scores, psnr, skipped, wanted = {}, defaultdict(list), [], tasks_with_labels(reader, model.tasks)
    files = isinstance(model, Predictions)
    device = torch.device("cpu") if files else next(model.parameters()).device
    for group in test_batches(reader, wanted, batch, workers, limit, None, rank, world_size, skip_bad, skipped):
        pair = [torch.stack(f).to(device) for f in zip(*(frames for frames, *_ in group), strict=True)]
        if codec:
            predicted = round_trip(model, [maps for _, maps, *_ in group], psnr)
        elif files:
            predicted = model.maps(reader, group, skipped if skip_bad else None)
        else:
            known = [t for t in group[0][1] if t in TASKS]
            predicted = seen(network_maps, model, pair, known, rows, one_frame)
            mirror = seen(mirror_maps, model, pair, known, rows, one_frame) if confidence else {}
        for n, (_, maps, _, native) in enumerate(group):
            for name, (label, valid) in maps.items():
                task = name.split(":")[0]
                if predicted[task][n] is None:      # a missing file: what stands beside is scored on the same samples
                    continue
                guess = dict(zip(GUESSES, (guesses or {}).get(name, ()), strict=False))
                for who, pred in {"model": predicted[task][n], **guess}.items():
                    new = METRICS[TASKS[task].metric].accumulator(clip=reader.depth_range)
                    scores.setdefault((who, name), new).add(pred, label, valid)
                if confidence:
                    certain = agreement(TASKS[task], predicted[task][n], mirror[task][n])
                    new = Sparsification(TASKS[task], reader.depth_range)
                    scores.setdefault(("confidence", name), new).add(predicted[task][n], label, valid, certain)
                if pixels and TASKS[task].geometry == MOTION:
                    scores.setdefault(("pixels", name), photometric.Scaled()).add(
                        predicted[task][n], label, valid, [f[n] for f in pair], native)
    return scores, dict(psnr), skipped


def through_vae(model, task, code):
    """Codes (B,3,H,W) of a task as the VAE gives them back; meanwhile they are padded to whole latent cells."""
    height, width = code.shape[-2:]
    pad = (0, -width % model.factor, 0, -height % model.factor)
    latents = model.encode_labels({task: F.pad(code, pad, mode="replicate")})
    return model.decode_labels(latents)[task][..., :height, :width]


@torch.no_grad()
def round_trip(model, labels, psnr):
    """What the codec (encode, VAE, decode) leaves of labels, [{task: (label, valid)}] -> {task: (B,C,H,W)}. The PSNR of
    each coded label, in dB of the range [-1,1] over valid pixels, goes to the list psnr[task]."""
    out, device = {}, next(model.parameters()).device
    for t in (t for t in labels[0] if t in TASKS):
        label, valid = (torch.stack([maps[t][i] for maps in labels]).to(device) for i in (0, 1))
        code = model.codecs[t].encode(label, valid[:, None])
        back = through_vae(model, t, code)
        out[t] = model.codecs[t].decode(back)
        for c, b, v in zip(code, back, valid, strict=True):
            if v.any():
                error = (c - b.clamp(-1, 1))[:, v].square().mean().item()
                psnr[t].append(10 * math.log10(4 / max(1e-10, error)))
    return out


def with_its_vae(model, reader, world_size, **how):
    """{task: metrics} of `evaluate` with the VAE's decoder in the place of the model's small one."""
    small, model.decoder = model.decoder, None
    results, *_ = evaluate(model, reader, world_size, **how)
    model.decoder = small
    return results


class TrainingLabels:
    """What the trivial predictors know: the codes of up to `limit` training labels of each dataset and task.

    train: readers of the training datasets. A dataset is read once for all tasks asked of it, by `world_size` processes
    in shares. An unreadable sample is skipped and named with skip_bad, else a ValueError; None as in data.or_skip.
    """

    def __init__(self, train, limit, workers=2, skip_bad=None, world_size=1):
        self.train, self.limit, self.workers, self.skip_bad = train, limit, workers, skip_bad
        self.world_size = world_size
        self.sums, self.skipped = {}, defaultdict(set)      # the latter by dataset

    def sources(self, reader, task):
        """Of a test set's task: the dataset of the same name where it labels the task, else all that do."""
        own = [r for r in self.train if r.name == reader.name and tasks_with_labels(r, [task])]
        return own or [r for r in self.train if tasks_with_labels(r, [task])]   # looked at only then

    def read(self, readers, tasks):
        """Sum up what the guesses for these test sets will need, and is not known yet."""
        need = defaultdict(dict)        # {(training reader, size): tasks}; a dict keeps their order
        for reader in readers:
            for t in tasks_with_labels(reader, tasks):
                for source in self.sources(reader, t):
                    if (source.name, t, reader.size) not in self.sums:
                        need[source, reader.size][t] = None
        for (source, size), wanted in need.items():
            share = partial(self.share, world_size=self.world_size, source=source, size=size, tasks=wanted)
            parts = cli.spread(share, self.world_size)
            batches = [batch for turn in zip_longest(*(sums for sums, _ in parts)) for batch in turn if batch]
            for t in wanted:
                self.sums[source.name, t, size] = [batch[t] for batch in batches if t in batch]
            self.skipped[source.name] |= {name for _, skipped in parts for name in skipped}

    def share(self, rank, world_size, source, size, tasks):
        """The rank-th of `world_size` shares: ([{task: code_sums} of a batch], names of skipped samples)."""
        sums, skipped = [], []
        for group in test_batches(source, tasks, 16, self.workers, None, self.limit, rank, world_size, self.skip_bad,
                                  skipped):
            known = [t for t in group[0][1] if t in TASKS]
            pairs = {t: [labels[t] for _, labels, *_ in group] for t in known}
            sums.append({t: code_sums(TASKS[t], [(resize(x, size), resize(m[None], size)[0]) for x, m in pairs[t]])
                         for t in known})
        return sums, skipped

    def guesses(self, reader, tasks):
        """({task: predictions as in GUESSES} for a test set, names of skipped samples); tasks that no training dataset
        labels are left out."""
        self.read([reader], tasks)
        out, skipped = {}, set()
        for t in tasks_with_labels(reader, tasks):
            sources = self.sources(reader, t)
            if sums := [s for source in sources for s in self.sums[source.name, t, reader.size]]:
                out[t] = trivial(TASKS[t], sums)
            skipped |= {f"{reader.name}: training label {s}" for source in sources for s in self.skipped[source.name]}
        return out, sorted(skipped)


# ---- tables ----

def headline(task, result):
    """The value of the task's first metric, None where it is undefined."""
    metric = METRICS[TASKS[task].metric].headline
    if metric not in result and "images" not in result:
        raise ValueError(f"expected {metric} among the results of {task}, found {', '.join(result)}: is it ours?")
    return result.get(metric)


def known(values):
    """A {key: value} without those that are None."""
    return {key: value for key, value in values.items() if value is not None}


def by_task(results):
    """{dataset: {task: metrics}} -> {task: {dataset: headline}}, extra masks and what is undefined left out."""
    rows = {t: known({d: headline(t, tasks[t]) for d, tasks in results.items() if t in tasks}) for t in TASKS}
    return {t: row for t, row in rows.items() if row}


def table(results, trivials, before=None):
    """Markdown lines: a row per test set and task. before: results with the VAE's own decoder, where known."""
    rows = []
    for name, tasks in results.items():
        for task, result in tasks.items():
            key = task.split(":")[0]
            metric = METRICS[TASKS[key].metric]
            guesses = known({who: headline(key, r[task]) for who, r in trivials.get(name, {}).items() if task in r})
            mine = headline(key, result)
            better = (min if metric.lower else max)(guesses.values(), default=math.nan)
            what = "codec alone" if "PSNR" in result else "model"
            row = {"test set": name, "task": task, "metric": metric.titled,
                   what: "undefined" if mine is None else f"{mine:.4g}",
                   **{who: f"{g:.4g}" for who, g in guesses.items()},
                   "model / better trivial": f"{mine / better:.2f}x" if better > 0 and mine is not None else "",
                   **compared(key, result, (before or {}).get(name, {}).get(task)),
                   "paper": str(PAPER["StableMTL"].get(task, {}).get(name, "")), "images": str(result["images"])}
            if "PSNR" in result:
                kept = [f"{k} {x:.4g}" for k, x in result.items() if k == "accuracy" or k.startswith("IoU")]
                row |= {"PSNR of the code, dB": f"{result['PSNR']:.1f}", "classes": ", ".join(kept)}
            rows.append(row)
    return markdown(rows, ["test set", "task", "metric", "model", *GUESSES, "model / better trivial", "paper", "images",
                           "codec alone", "VAE's decoder", "change", "PSNR of the code, dB", "classes"])


def compared(task, result, before):
    """The cells that set a small decoder beside the VAE's own."""
    now, was = headline(task, result), before and headline(task, before)
    if now is None or was is None:
        return {}
    return {"VAE's decoder": f"{was:.4g}", "change": change(now, was)}


def change(now, was):
    return f"{100 * (now / was - 1):+z.2f}%" if was else ""


def decoders(results, before):
    """Markdown lines: what the codec alone costs with either decoder, a row per test set, task and class.

    A class that no label has counts, with an IoU of 0, for the decoder alone that shows it.
    """
    rows = []
    for name, tasks in results.items():
        for task, now in tasks.items():
            was, metric = before[name][task], METRICS[TASKS[task.split(":")[0]].metric]
            names = {metric.headline: metric.titled, "PSNR": "PSNR of the code, dB ↑"}
            names |= {k: f"{k} ↑" for k in was | now if k == "accuracy" or k.startswith("IoU")}
            for k in (k for k in names if k in was | now):
                cells = {who: f"{r[k]:.4g}" for who, r in (("VAE's decoder", was), ("small decoder", now)) if k in r}
                if len(cells) == 2:
                    cells["change"] = f"{now[k] - was[k]:+z.2f} dB" if k == "PSNR" else change(now[k], was[k])
                rows.append({"test set": name, "task": task, "metric": names[k], **cells, "images": str(now["images"])})
    return markdown(rows, ["test set", "task", "metric", "VAE's decoder", "small decoder", "change", "images"])


# ---- the command ----

OF_A_MODEL = ("ckpt", "stage", "streams", "one_frame", "batch", "rows", "processes", "codec", "palette", "confidence",
              "decoder", "device")


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", help="folder written by train.py, or a hub id (default: out, else the trained toy model; with "
         "--codec the toy base)")
    flag("--predictions", metavar="FOLDER", help="score <dataset>/<task>/<sample>.npy (.png, .flo, .exr) in it instead "
         "of a checkpoint's predictions")
    flag("--stage", type=int, choices=(1, 2), help="which stage of the checkpoint (default: 2 where it exists)")
    flag("--streams", help="comma-separated tasks: stage 2 attends to these streams only; off = to none, which leaves "
         "the attention over tasks out (default: all)")
    flag("--one-frame", action="store_true", help="tasks of one frame see no second one, which the streams of "
         "motion know: stage 2 as on single images")
    flag("--data", help="root folder of the test sets, or `toy` (default: what the checkpoint was trained on, or "
         "sample.py --testset has predicted)")
    flag("--split", default="test", choices=("val", "test"), help="which held-out part (default: %(default)s)")
    flag("--limit", type=whole(1), help="samples per test set at most (default: 64 of a toy world, all of real data)")
    flag("--batch", type=whole(1, 4096), help="images at once (default: 16 on the toy worlds, 1 on real data)")
    flag("--rows", type=whole(1), help="tasks x images that pass the UNet at once: lowers memory, changes nothing else")
    flag("--workers", type=whole(0, 256), default=2, help="loader processes (default: %(default)s); several "
         "--processes load by themselves")
    flag("--processes", type=whole(0, 1024), default=0, help="that share the test sets, on the CPU; changes no number "
         "(default: one per core for a small network, else 1)")
    flag("--trivial", type=whole(), default=128, help="training labels per dataset behind the trivial "
         "rows (default: %(default)s); 0 = none")
    flag("--baseline", help="results.json of single-task runs (several: comma-separated), or `paper`: prints Delta_m")
    flag("--confidence", action="store_true", help="also the error of the pixels that a comparison with the mirror "
         "image trusts most, beside the best possible order; takes twice as long")
    flag("--pixels", action="store_true", help="also the error of flow in pixels, whose scales the two frames tell")
    flag("--codec", action="store_true", help="what the label codec alone costs: labels through the VAE and back")
    flag("--decoder", help="folder or hub id of an AutoencoderTiny that decodes in the VAE's place, compared with the "
         "VAE's where the results without it are in --ckpt, and always with --codec, which evaluates both")
    flag("--palette", choices=tuple(PALETTES), help="with --codec: other class colours than the checkpoint's")
    flag("--kitti-baseline", default="calibration", choices=("calibration", "paper"), help="camera distance behind "
         "KITTI 2015's scene flow: each scene's calibration, or the paper's constant 0.54 m")
    flag("--skip-bad", action="store_true", help="skip and count unreadable samples instead of stopping")
    flag("--overwrite", action="store_true", help="compute finished test sets again")
    flag("--device", default="auto", help="cpu, cuda or mps (default: a GPU where there is one)")
    flag("--json", type=writable, help="where to write the results (default: see above)")
    args = parser.parse_args(argv)
    parser.refuse_idle(args, (
        (args.predictions, OF_A_MODEL, "--predictions are scored as they are"),
        (not args.codec, ["palette"], "it changes the codec, and goes with --codec only"),
        (args.codec, ["confidence", "pixels"], "--codec makes no predictions to judge"),
        (args.codec, ["streams", "one_frame"], "it changes the model, and --codec is about the codec"),
        (args.codec and not args.ckpt, ["stage"], "the toy base has no stages: name a --ckpt")))
    return args


def attended(streams, model):
    """--streams as a tuple of tasks. ValueError if this model has no such streams."""
    if model.main is None:
        raise ValueError("--streams would do nothing here: only stage 2 has streams to attend to")
    known = {"off": (), "all": model.tasks}
    tasks = known[streams] if streams in known else parse_tasks(streams)
    if unknown := [t for t in tasks if t not in model.tasks]:
        raise ValueError(f"--streams {streams}: this model has no {', '.join(unknown)}, only {', '.join(model.tasks)}")
    return tuple(t for t in model.tasks if t in tasks)


def data_name(data):
    """A --data, now or in training, in one word: "toy" for the toy worlds, or the absolute path of a root."""
    return "toy" if data in (None, "", "toy") else str(Path(str(data)).resolve())


def choose(data, home, config, whose):
    """--data in one word and (H, W), None for that of the images: by default the data it was trained on, `home`, and
    the size, which also other images of one's own take if training was told a --size. config: checkpoint.read_config;
    whose: how to call it. FileNotFoundError if the data is not here."""
    if not data and home != "toy" and not Path(home).is_dir():
        raise FileNotFoundError(f"{whose} was trained on {home}, which is not here: say where it is now (--data "
                                "<root>), or take the toy worlds (--data toy)")
    data, size = data_name(data or home), config["size"]
    told = (config["train"] or config).get("size")
    size = size if data in ("toy", home) or home != "toy" and told else None
    return data, tuple(size or (32, 48)) if size or data == "toy" else None


def test_sets(data, size, split, tasks, whose, kitti_baseline="calibration", limit=None):
    """The readers of the test sets in `data`, as `choose` gives it, that label any of these tasks; limit: how many
    samples of each are wanted."""
    root = data if data != "toy" else ""
    readers = test_readers(root, size, split=split, kitti_baseline=kitti_baseline, limit=limit)
    readers = [r for r in readers if tasks_with_labels(r, tasks)]
    if not readers:
        raise ValueError(f"no test set of {data} is labelled for what {whose} predicts, {', '.join(tasks)}")
    return readers


def shared(table, other):
    """The part of {task: {dataset: headline}} whose test sets `other` has, too."""
    rows = {t: {d: x for d, x in row.items() if d in other.get(t, ())} for t, row in table.items()}
    return {t: row for t, row in rows.items() if row}


def read_baseline(names, planned):
    """({task: {dataset: headline}}, {(dataset, task): images}) of the paper or of several results.json, the former on
    the test sets in `planned`. ValueError if a file is none of ours, or there is nothing to compare with."""
    table, counts = PAPER["single-task"] if names == "paper" else {}, {}
    for path in filter(None, names.split(",")) if names != "paper" else ():
        absent = f"no results in {path}: evaluate the single-task runs first, or use --baseline paper"
        report = read_json(path, absent, {"results": METRIC_VALUES}, "name the results.json of an evaluated checkpoint")
        if report.get("unfinished"):
            raise ValueError(f"{path} is unfinished: evaluate that run again, which does the rest")
        if report.get("scoring", scoring()) != scoring():
            print(f"notice: metrics, tasks or readers have changed since {path} was made: evaluate that run again",
                  file=sys.stderr)
        for task, row in by_task(report["results"]).items():
            table.setdefault(task, {}).update(row)
        counts |= {(d, t): x.get("images") for d, tasks in report["results"].items() for t, x in tasks.items()}
    if not shared(table, planned):
        has, here = (", ".join(sorted({d for row in x.values() for d in row})) for x in (table, planned))
        raise ValueError(f"--baseline {names} is about {has or 'nothing'}, and evaluated are {here}: other --data?")
    return shared(table, planned), counts


def gathered(done, names, keys):
    """What a report says of the test sets in `done`, in the order of `names`: all that are to be evaluated."""
    there = [name for name in names if name in done]
    results, trivials, skipped = ({name: done[name][part] for name in there} for part in range(3))
    return {"results": results, "trivial": trivials, "skipped": sum(skipped.values(), []),
            "made_from": {name: keys[name] for name in there},
            "unfinished": [name for name in names if name not in done]}


def with_the_vae(args, folder, stage, home, size, weights, readers, train):
    """{test set: {task: metrics}}: the same without --decoder, as far as it was evaluated before."""
    plain = argparse.Namespace(**{**vars(args), "decoder": None})
    report = read_report(results_file(plain, folder, stage, home))
    keys = fingerprints(result_dependencies(plain, folder, size, weights), readers, train)
    return {name: report["results"][name] for name in current(report, keys)}


def subject(args):
    """(model that the flags name, its folder, how to call it)."""
    if args.codec and not args.ckpt:
        folder, whose = toy.BASE, "toy base"
        model = from_base(str(toy.BASE), tuple(TASKS)).to(args.device).eval()
    else:
        folder = checkpoint_folder(args.ckpt)
        whose = args.ckpt or ("toy model" if folder == toy.MODEL else str(folder))
        model = load(folder, args.stage, args.device)
    if args.decoder:
        model.use_decoder(args.decoder)
    if args.streams is not None:
        model.attends = attended(args.streams, model)
        args.streams = None if model.attends == model.tasks else ",".join(model.attends) or "off"
    if args.one_frame and not model.multi:
        raise ValueError("--one-frame would do nothing here: only stage 2 has streams of motion")
    if args.palette:
        model.codecs = {t: registry(args.palette)[t] for t in model.tasks}
    return steady(model), folder, whose


def main(argv=None):
    # ---- what is evaluated, and on what ----
    args, start = parse(argv), time.time()
    args.device = "cpu" if args.predictions else str(parse_device(args.device))
    if args.predictions:
        model = Predictions(args.predictions)
        folder, whose, config, stage = model.folder, f"predictions in {args.predictions}", model.config, None
        home = data_name(model.home(args.data, args.split))
    else:
        model, folder, whose = subject(args)
        config, stage = read_config(folder), 2 if model.multi else 1
        home = data_name((config["train"] or {}).get("data"))
    args.stage = stage      # whether or not it was said
    args.data, size = choose(args.data, home, config, whose)
    root = args.data if args.data != "toy" else ""
    readers = test_sets(args.data, size, args.split, model.tasks, whose, args.kitti_baseline, args.limit)
    if args.predictions:
        readers = model.covered(readers)
    if args.kitti_baseline == "paper" and "kitti_2015" not in [r.name for r in readers]:
        raise ValueError("--kitti-baseline paper would do nothing here: KITTI 2015 is not among the test sets")
    train = []
    if args.trivial and not args.codec:
        with suppress(FileNotFoundError):   # test sets alone: there are no training labels to be trivial with
            train = train_readers(root, size)
    where = args.json or (folder != toy.BASE and writable(results_file(args, folder, stage, home),
                                                          remedy="; name another file with --json"))
    old = read_report(where, **({"remedy": "name another --json"} if args.json else {})) if where else {}
    planned = {t: [r.name for r in readers if tasks_with_labels(r, [t])] for t in model.tasks}
    baseline, counts = read_baseline(args.baseline, planned) if args.baseline else ({}, {})

    # ---- one test set after the other ----
    weights = weights_of(folder, stage)
    keys = fingerprints(result_dependencies(args, folder, size, weights), readers, train)
    if args.predictions:
        keys = {r.name: keys[r.name] + model.state(r) for r in readers}
    valid = {name for name in current(old, keys) if name in old["trivial"]}
    kept = set() if args.overwrite else valid
    # {test set: (metrics, those of the trivial predictors, names of skipped samples)}
    done = {name: (old["results"][name], old["trivial"][name],
                   [s for s in old["skipped"] if s.startswith(f"{name}:")]) for name in valid}
    report = {"checkpoint": whose, "stage": stage, "codec": args.codec, "split": args.split, "data": args.data,
              "decoder": args.decoder, "commit": config.get("commit"), "settings": config["train"],
              "flags": flags_of(args), "weights": weights, "stage1": config["stage1"],
              "precision": precision(args.device), "scoring": scoring()}
    if args.predictions:
        report |= model.told | {"missing": [name for r in readers for name in model.missing(r, args.limit)]}
    before, both = {}, args.codec and args.decoder
    if args.decoder:
        report["vae"] = before = {name: r for name, r in (old.get("vae") or {}).items() if name in kept}
        before |= with_the_vae(args, folder, stage, home, size, weights, readers, train)
    world_size = 1 if args.predictions else cli.shares(model, args.processes)
    workers = args.workers if world_size == 1 else 0
    how = {name: getattr(args, name) for name in ("limit", "rows", "skip_bad", "codec", "confidence", "pixels",
                                                "one_frame")}
    how |= {"batch": args.batch or (1 if root else 16), "workers": workers}
    labels = TrainingLabels(train, args.trivial, workers, args.skip_bad, world_size)
    try:
        labels.read([r for r in readers if r.name not in kept], model.tasks)
        for reader in readers:
            name = reader.name
            if both and name not in before:
                before[name] = with_its_vae(model, reader, world_size, **how)
            if name in kept:
                print(f"{name}: kept from {where} (--overwrite computes it again)", file=sys.stderr)
            else:
                guesses, unread = labels.guesses(reader, model.tasks)
                results, trivials, bad = evaluate(model, reader, world_size, guesses=guesses, **how)
                done[name] = results, trivials, unread + bad
            report |= gathered(done, [r.name for r in readers], keys)
            if where:
                write_report(where, report, folder, args.json)
    except KeyboardInterrupt:
        told = f"{len(done)} of {len(readers)} test sets are in {where or 'no file'}"
        print(f"\nstopped: {told}; the same command does the rest", file=sys.stderr)
        return 130
    results, trivials, skipped = report["results"], report["trivial"], report["skipped"]

    # ---- what came out ----
    lines = decoders(results, before) if both else table(results, trivials, before)
    print("\n".join([*stages_of(config), "", *lines]))
    if args.decoder and (absent := [name for name in results if name not in before]):
        print(f"\nnot compared on {', '.join(absent)}: the same command without --decoder comes first")
    for lines in filter(None, (sparsification_table(results), photometric.table(results))):
        print("\n".join(["", *lines]))
    differ = [(d, t) for d, t in counts if t in results.get(d, ()) and results[d][t]["images"] != counts[d, t]]
    if (mine := shared(by_task(results), baseline)) and not differ:
        report["delta_m"] = delta_m(mine, shared(baseline, mine), {t: METRICS[TASKS[t].metric].lower for t in TASKS})
        print(f"\nDelta_m against {args.baseline} over {len(mine)} tasks: {report['delta_m']:+z.2f} %")
        if where:
            write_report(where, report, folder, args.json)
    if root and "folder" not in results:
        absent = [r.name for r in READERS.values() if "test" in r.use and r.name not in {*results, "folder"}]
        print(f"\nnot under {root}: {', '.join(absent) or 'nothing is missing'}")
    if unlabelled := [t for t in model.tasks if not planned[t]]:
        print(f"\nnot scored, for lack of test labels: {', '.join(unlabelled)}")
    if missing := report.get("missing"):
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        print(f"\n{len(missing)} predictions are missing, and their samples not scored: {names}")
    whose = f"stage {stage} of {whose}" if stage else whose
    print(f"\n{whose}, {args.split} split of {root or 'the toy worlds'}, "
          f"{len(skipped)} samples skipped, {time.time() - start:.0f} s on {args.device}"
          + (f"; written to {where}" if where else ""))
    if differ:
        d, t = differ[0]
        raise ValueError(f"no Delta_m: {args.baseline} has {counts[d, t]} images of {d}, {t}, and this "
                         f"{results[d][t]['images']}: evaluate both with the same --limit and --split")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
