"""Every metric, and Delta_m, and the command that prints them.

    python evaluate.py --ckpt out/                          the held-out toy worlds, trivial predictors beside the model
    python evaluate.py --ckpt out/ --data <root>            the real test sets found under root, the paper's row beside ours
    python evaluate.py --oracle                             labels through encode, VAE, decode: what the codec alone costs
    python evaluate.py --ckpt out/ --baseline paper|a.json,b.json       Delta_m against single-task results

A test set whose numbers are in results.json already, from the same settings, weights, samples and code, is not computed again: what was
interrupted goes on where it stopped.

The formulas are functions of one image: pred, label (C,H,W) floating point, valid (H,W) bool. What lies outside the mask (NaN too) has
no effect on any number. The accumulators below the formulas hold the protocol: alignment, averaging, counting.
"""
import argparse
import contextlib
import json
import math
import sys
import time
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import toy
from checkpoint import crc, read_json, write_json
from cli import Parser, parse_device, run, whole
from data import label_tensors, resize, tensor_image, test_readers, train_readers
from model import StableMTL, from_base
from readers import READERS
from tasks import CLASSES, IGNORE, PALETTES, TASKS, registry

# ---- alignment: what a prediction is not asked to know is fitted to the ground truth first ----

def align_scale_shift(pred, label, valid, lo=-math.inf, hi=math.inf):
    """Least-squares scale and shift over all valid pixels, then clip to [lo, hi] (label's unit) -> (C,H,W)."""
    p, l = pred[:, valid], label[:, valid]
    d = p - p.mean()
    var = d.square().sum()
    s = (d * (l - l.mean())).sum() / var if var > 0 else 0.0  # a constant prediction becomes the mean of the label
    return (s * (pred - p.mean()) + l.mean()).clamp(lo, hi)


def align_scale_nonneg(pred, label, valid):
    """Per channel the least-squares scale >= 0 over valid pixels, no shift -> (C,H,W). An all-zero channel stays zero."""
    p, l = pred[:, valid], label[:, valid]
    pl, pp = (p * l).sum(1), p.square().sum(1)
    s = torch.where(pp > 0, pl / pp, 0.0).clamp(min=0)  # a flow of the wrong sign must not be turned round: 0 is the best it gets
    return s[:, None, None] * pred


def align_scale(pred, label, valid, lo=0.0, hi=1.0):
    """One least-squares scale over all channels and valid pixels, then clip to [lo, hi] -> (C,H,W). An all-zero prediction stays zero."""
    p, l = pred[:, valid], label[:, valid]
    pl, pp = (p * l).sum(), p.square().sum()
    return ((pl / pp if pp > 0 else 0.0) * pred).clamp(lo, hi)


# Task.metric -> its alignment; what is not here is compared as it comes
ALIGN = {"depth": align_scale_shift, "epe": align_scale_nonneg, "shading": align_scale, "albedo": align_scale}


def aligned(task, pred, label, valid):
    """The prediction (C,H,W) of a tasks.Task fitted to its label as for the metric, to be drawn beside it; as it is without
    a valid pixel. Depth is not clipped to a dataset's range."""
    align = ALIGN.get(task.metric)
    return align(pred, label, valid) if align and valid.any() else pred


# ---- formulas ----

def confusion(pred, label, valid, classes):
    """Class ids 0..classes-1 at valid pixels, any dtype -> (classes, classes) long counts, rows label, columns prediction."""
    p, l = pred[:, valid].long(), label[:, valid].long()
    for name, ids in ("prediction", p), ("label", l):
        if ids.numel() and not 0 <= ids.min() <= ids.max() < classes:
            raise ValueError(f"expected class ids below {classes}, found {ids.min()} to {ids.max()} in the {name}: map others to {IGNORE}")
    return torch.bincount((l * classes + p).flatten(), minlength=classes**2).view(classes, classes)


def iou(matrix):
    """(K,K) confusion matrix -> (K,) intersection over union in [0,1]; NaN for a class absent from both prediction and label."""
    hit = matrix.diag()
    return hit.double() / (matrix.sum(0) + matrix.sum(1) - hit)


def angles(pred, label, valid):
    """Angle between the vectors of each valid pixel, degrees -> (N,). Lengths do not matter; a zero vector counts as 90."""
    return F.cosine_similarity(pred[:, valid], label[:, valid], dim=0).clamp(-1, 1).acos().rad2deg()


def depth_errors(pred, label, valid):
    """Errors of aligned depth in metres (Eigen et al. 2014): AbsRel and deltas in %, SqRel and RMSE in m, RMSElog natural, log10."""
    p, l = pred[:, valid], label[:, valid]
    if l.min() <= 0:
        raise ValueError(f"expected depth above 0 m at every valid pixel, found {l.min():g}: leave such pixels out of the mask")
    ratio = torch.maximum(p / l, l / p)
    errors = {"AbsRel": 100 * ((p - l).abs() / l).mean(), "SqRel": ((p - l).square() / l).mean(), "RMSE": (p - l).square().mean().sqrt(),
              "RMSElog": (p.log() - l.log()).square().mean().sqrt(), "log10": (p.log10() - l.log10()).abs().mean(),
              **{f"delta{k}": 100 * (ratio < 1.25**k).double().mean() for k in (1, 2, 3)}}
    return {k: v.item() for k, v in errors.items()}


def rmse(pred, label, valid, per_element=False):
    """Root of the squared error summed over channels and averaged over valid pixels (the paper's albedo), or over pixels x channels."""
    e = (pred - label)[:, valid].square()
    return (e.mean() if per_element else e.sum(0).mean()).sqrt().item()


def ssim(pred, label, valid):
    """Structural similarity (Wang et al. 2004) of maps in [0,1]: 7x7 uniform window, sample covariance, mean over channels -> float.

    Invalid pixels are set to 0 in both maps; the mean runs over valid pixels whose window lies inside the image. NaN if there is none.
    """
    if min(valid.shape) < 7:
        return math.nan
    x, y = torch.where(valid, pred, 0), torch.where(valid, label, 0)
    mx, my, xx, yy, xy = (F.avg_pool2d(z, 7, 1) for z in (x, y, x * x, y * y, x * y))  # (C,H-6,W-6)
    n, c1, c2 = 49 / 48, 0.01**2, 0.03**2
    vx, vy, cov = n * (xx - mx * mx), n * (yy - my * my), n * (xy - mx * my)
    s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return s.mean(0)[valid[3:-3, 3:-3]].mean().item()


def lmse(pred, label, valid):
    """Local error of the MIT intrinsic images (Grosse et al. 2009): 16x16 windows, step 8, own least-squares scale each -> [0,1].

    Squared error summed over windows, channels and valid pixels, over the same sum of label squared. NaN if no window fits or that is 0.
    """
    if min(valid.shape) < 16:
        return math.nan
    p, l = torch.where(valid, pred, 0), torch.where(valid, label, 0)
    pl, pp, ll = (F.avg_pool2d(z.sum(0, keepdim=True), 16, 8) for z in (p * l, p * p, l * l))  # sums per window, up to one factor
    explained = torch.where(pp > 0, pl * (pl / pp), 0.0)
    return ((ll - explained).clamp(min=0).sum() / ll.sum()).item()  # min |l - s p|^2 = ll - pl^2 / pp


# ---- accumulators: one per task and test set ----

class Accumulator:
    """add() one image after the other, then result() -> {headline: float, ..., "images": used, "skipped": without a valid pixel}.

    Subclasses give score(pred, label, valid) -> {name: float} of one image, to be averaged, or override update and summary to pool pixels.
    What is undefined (IoU of a class that never occurs, SSIM without a full window) is left out. Computes in float64 on the CPU.
    """
    def __init__(self):
        self.images, self.skipped, self.scores = 0, 0, defaultdict(list)

    def add(self, pred, label, valid):
        """pred, label (C,H,W) in native units, valid (H,W) bool; any dtype, any device."""
        pred, label, valid = pred.detach().cpu().double(), label.detach().cpu().double(), valid.detach().cpu().bool()
        if not pred.shape == label.shape == (len(pred), *valid.shape):
            raise ValueError("expected prediction (C,H,W), label (C,H,W) and mask (H,W), found "
                             f"{[tuple(x.shape) for x in (pred, label, valid)]}: resize the prediction to its label")
        if not valid.any():
            self.skipped += 1
            return
        for name, x in ("prediction", pred), ("label", label):
            if bad := int((~x[:, valid].isfinite()).sum()):
                raise ValueError(f"expected finite numbers, found {bad} at valid pixels of the {name} that are not: check mask and weights")
        self.update(pred, label, valid)
        self.images += 1

    def update(self, pred, label, valid):
        for name, x in self.score(pred, label, valid).items():
            if not math.isnan(x):
                self.scores[name].append(x)

    def summary(self):
        return {name: fmean(xs) for name, xs in self.scores.items()}

    def result(self):
        if not self.images:
            raise ValueError(f"expected at least one image with a valid pixel, found none among {self.skipped}: check the dataset's masks")
        return {**self.summary(), "images": self.images, "skipped": self.skipped}


class Semantic(Accumulator):
    """mIoU and IoU per class in %, from one confusion matrix pooled over all pixels. Ids (1,H,W); label 255 is ignored."""
    def add(self, pred, label, valid):
        super().add(pred, label, valid & (label[0] != IGNORE))

    def update(self, pred, label, valid):
        self.scores["confusion"] = [sum(self.scores["confusion"]) + confusion(pred, label, valid, len(CLASSES))]

    def summary(self):
        scores = {f"IoU {c}": 100 * x for c, x in zip(CLASSES, iou(sum(self.scores["confusion"])).tolist()) if not math.isnan(x)}
        matrix = sum(self.scores["confusion"])
        return {"mIoU": fmean(scores.values()), **scores, "accuracy": 100 * (matrix.diag().sum() / matrix.sum()).item()}


class Normal(Accumulator):
    """Mean angular error in degrees, and % of pixels below 11.25, 22.5 and 30 degrees."""
    def score(self, pred, label, valid):
        a = angles(pred, label, valid)
        return {"mAE": a.mean().item(), **{f"<{t}": 100 * (a < t).double().mean().item() for t in (11.25, 22.5, 30)}}


class Depth(Accumulator):
    """Errors of depth_errors after scale and shift per image and clipping to clip = (lo, hi), the dataset's range in metres."""
    def __init__(self, clip):
        super().__init__()
        self.clip = lo, hi = clip
        if not 0 < lo < hi:
            raise ValueError(f"expected a depth range 0 < lo < hi in metres, found {clip}: logarithms need positive depth")

    def score(self, pred, label, valid):
        return depth_errors(align_scale_shift(pred, label, valid, *self.clip), label, valid)


class Epe(Accumulator):
    """Mean end-point error in the label's unit (px for two channels, m for three), pooled over the valid pixels of all images."""
    def update(self, pred, label, valid):
        e = (align_scale_nonneg(pred, label, valid) - label)[:, valid].norm(dim=0)
        self.scores["sum"].append(e.sum().item())
        self.scores["pixels"].append(e.numel())

    def summary(self):
        pixels = sum(self.scores["pixels"])
        return {"EPE": sum(self.scores["sum"]) / pixels, "pixels": pixels}


class Intensity(Accumulator):
    """RMSE per pixel, SSIM and LMSE after one scale per image and clipping to [0,1]; for albedo also the RMSE per element (/ sqrt 3)."""
    def __init__(self, albedo):
        super().__init__()
        self.albedo = albedo

    def score(self, pred, label, valid):
        pred = align_scale(pred, label, valid)
        scores = {"RMSE": rmse(pred, label, valid), "SSIM": ssim(pred, label, valid), "LMSE": lmse(pred, label, valid)}
        return scores | {"RMSE per element": rmse(pred, label, valid, per_element=True)} if self.albedo else scores


# Task.metric -> (accumulator, headline, is lower better); to make one, depth wants clip=(lo, hi) of the test set, the others nothing
METRICS = {"semantic": (Semantic, "mIoU", False), "normal": (Normal, "mAE", True),
           "depth": (Depth, "AbsRel", True), "epe": (Epe, "EPE", True),
           "shading": (partial(Intensity, albedo=False), "RMSE", True), "albedo": (partial(Intensity, albedo=True), "RMSE", True)}


# ---- trivial predictors: what one scores without looking at the image ----

def trivial(task, labels):
    """Training labels, pairs of native label (C,H,W) and mask (H,W) of one size -> best constant and per-pixel mean, predictions (C,H,W).

    Each is a mean of codes, decoded (so depth is affine-invariant and a flow divided by its maximum), or the most frequent class: best in
    squared error of the code, merely sensible for AbsRel, EPE and angles. A pixel valid in no label gets the constant.
    """
    decode = (lambda x: x.argmax(0, keepdim=True)) if task.categorical else (lambda x: task.decode(x[None].float())[0])
    total = count = torch.zeros((), dtype=torch.float64)
    for label, valid in labels:
        votes = label[0] == torch.arange(len(CLASSES), device=label.device)[:, None, None]
        code = votes if task.categorical else task.encode(label[None], valid[None, None])[0]
        total, count = total + torch.where(valid, code, 0).cpu(), count + valid.cpu()
    if not count.any():
        raise ValueError(f"expected a {task.name} label with a valid pixel, found none: check the dataset's masks")
    constant = decode((total.sum((1, 2)) / count.sum())[:, None, None].expand_as(total))
    return constant, torch.where(count > 0, decode(total / count.clamp(min=1)), constant)


# ---- Delta_m ----

def delta_m(results, baseline, lower):
    """Mean over tasks of the signed relative change against the baseline, percent, positive is better (Vandenhende et al. 2022).

    results, baseline: {task: {dataset: headline}}; lower: {task: is lower better}. A task on several datasets counts once, with the mean of
    its changes. ValueError unless both hold the same tasks and datasets and every baseline is above zero.
    """
    new, old = ({(task, data): x for task, row in table.items() for data, x in row.items()} for table in (results, baseline))
    if not new or new.keys() != old.keys():
        raise ValueError(f"expected results and baseline on the same test sets, found {sorted(new.keys() ^ old.keys())} in one only")
    if min(old.values()) <= 0:
        raise ValueError(f"expected a baseline above zero, found {min(old, key=old.get)} is not: a relative change needs one")
    gain = {task: 100 * fmean(x / baseline[task][data] - 1 for data, x in row.items()) for task, row in results.items()}
    return fmean(-g if lower[task] else g for task, g in gain.items())


def _row(miou, normal, kitti, diode, uv, xyz, shading, albedo):
    return {"semantic": {"cityscapes": miou}, "normal": {"diode": normal}, "depth": {"kitti_eigen": kitti, "diode": diode},
            "optical_flow": {"kitti_2015": uv}, "scene_flow": {"kitti_2015": xyz}, "shading": {"mid": shading}, "albedo": {"mid": albedo}}


# Table 2 of the paper. It prints the single-task shading and albedo the other way round: only with 0.2551 for shading and 0.2145 for albedo
# (as in Table 9 of its supplement) do the rows give the printed Delta_m: -106.87, -78.76, -1.57, +4.78.
PAPER = {"single-task": _row(48.17, 22.27, 14.21, 32.56, 10.36, 0.2735, 0.2551, 0.2145),
         "JTR*": _row(20.46, 50.91, 39.27, 73.14, 34.92, 0.5176, 0.3030, 0.3565),
         "DiffusionMTL*": _row(45.92, 44.56, 24.83, 58.17, 36.60, 0.3502, 0.3004, 0.3660),
         "StableMTL-S": _row(52.57, 23.94, 15.64, 33.36, 12.76, 0.2618, 0.2310, 0.2077),
         "StableMTL": _row(55.79, 23.27, 14.98, 33.03, 10.76, 0.2313, 0.2346, 0.2016)}


# ---- one test set ----

class _Items(Dataset):
    """Element k: (name, frames (3,H,W) x 1 or 2, {task: (label, valid)}) of a test sample at the reader's evaluation size."""

    def __init__(self, reader, wanted):
        self.reader, self.jobs = reader, {}
        for t in wanted:
            for i in reader.indices(t):
                self.jobs.setdefault(int(i), []).append(t)
        self.jobs = sorted(self.jobs.items())

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, k):
        index, tasks = self.jobs[k]
        try:
            sample = self.reader.load(index, tuple(tasks), with_next=True)
        except (OSError, ValueError) as error:
            return f"{self.reader.name}:{index}: {error}"
        frames = [resize(tensor_image(sample[key]), self.reader.size) for key in ("image", "next") if key in sample]
        maps = {t: tuple(resize(x, self.reader.size) for x in label_tensors(sample, t)) for t in tasks}
        maps = {t: (label, valid[0]) for t, (label, valid) in maps.items()}
        for name, mask in sample.get("extra", {}).items():      # "<task>:<mask>": a second mask for a task, reported beside it
            maps[name] = maps[name.split(":")[0]][0], resize(torch.from_numpy(mask)[None], self.reader.size)[0]
        return sample["name"], frames, maps


def items(reader, wanted, batch, workers, limit=None, skip_bad=False):
    """Yield lists of up to `batch` items that share their tasks and number of frames; unreadable samples stop it or, skipped, are named."""
    jobs = _Items(reader, wanted)
    jobs.jobs = jobs.jobs[:limit]
    for group in DataLoader(jobs, batch_size=batch, num_workers=workers if len(jobs) > batch else 0, collate_fn=list):
        alike = defaultdict(list)
        for item in group:
            if isinstance(item, str):
                if not skip_bad:
                    raise ValueError(f"{item} (--skip-bad skips and counts such samples)")
                yield item
            else:
                alike[tuple(item[2]), len(item[1])].append(item)
        yield from alike.values()


def accumulator(task, reader):
    """A fresh accumulator for one task on one test set."""
    make = METRICS[TASKS[task].metric][0]
    return make(clip=reader.depth_range) if TASKS[task].metric == "depth" else make()


def evaluate(model, reader, batch=16, workers=2, limit=None, rows=None, skip_bad=False, oracle=False, guesses=None):
    """Run one test set. Returns ({task: metrics}, {"constant"|"per-pixel mean": {task: metrics}}, names of skipped samples).

    oracle: instead of predicting, send each label through encode, VAE, decode: the ceiling that the codec sets. It adds the PSNR of the
    coded label in dB (range [-1,1], over valid pixels) and, for classes, the share of pixels that keep their class.
    guesses: {task: (constant, per-pixel mean)} trivial predictions (C,H,W) to score beside the model.
    """
    wanted = [t for t in reader.tasks if t in model.tasks and len(reader.indices(t))]
    device, skipped = next(model.parameters()).device, []
    scores = defaultdict(dict)
    psnr = defaultdict(list)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    total = min(len(_Items(reader, wanted)), limit or 10**9)
    with tqdm(total=total, desc=reader.name, leave=False) as bar:
        for group in items(reader, wanted, batch, workers, limit, skip_bad):
            if isinstance(group, str):
                skipped.append(group)
                continue
            tasks = [t for t in group[0][2] if t in TASKS]
            frames = [torch.stack(f).to(device) for f in zip(*(g[1] for g in group))]
            if oracle:
                predicted = {}
                for t in tasks:
                    label, valid = (torch.stack([g[2][t][i] for g in group]).to(device) for i in (0, 1))
                    code = model.codecs[t].encode(label, valid[:, None])
                    back = reconstruct(model, code)
                    predicted[t] = model.codecs[t].decode(back)
                    for c, b, v in zip(code, back, valid):
                        if v.any():
                            psnr[t].append(10 * math.log10(4 / max(1e-10, (c - b.clamp(-1, 1))[:, v].square().mean().item())))
            else:
                with autocast:
                    predicted = model.predict(frames[0], frames[1] if len(frames) > 1 else None, tasks, rows)
            for n, (_, _, maps) in enumerate(group):
                for name, (label, valid) in maps.items():
                    task = name.split(":")[0]
                    guess = dict(zip(("constant", "per-pixel mean"), (guesses or {}).get(name, ())))
                    for who, p in {"model": predicted[task][n], **guess}.items():
                        scores[who].setdefault(name, accumulator(task, reader)).add(p, label, valid)
            bar.update(len(group))
    results = {who: {t: a.result() for t, a in by_task.items()} for who, by_task in scores.items()}
    for t, values in psnr.items():
        results["model"][t]["PSNR"] = fmean(values)
    return results.pop("model"), results, skipped


@torch.no_grad()
def reconstruct(model, code):
    """(B,3,H,W) code -> through the VAE and back, the same size."""
    pad = (0, -code.shape[-1] % model.factor, 0, -code.shape[-2] % model.factor)
    return model.decode(model.encode(F.pad(code, pad, mode="replicate")))[..., :code.shape[-2], :code.shape[-1]]


def trivial_guesses(reader, train, wanted, count, workers, skip_bad=False):
    """{task: (constant, per-pixel mean)} from up to `count` training labels per dataset: of the dataset of the same name where it labels
    the task, else of all that do. Tasks that no training dataset labels are left out. Also returns the names of skipped samples."""
    out, skipped = {}, set()

    def readable(groups):
        for group in groups:
            if isinstance(group, str):
                skipped.add(f"{reader.name}: training label {group}")
            else:
                yield group
    for t in wanted:
        labelled = [r for r in train if t in r.tasks and len(r.indices(t))]
        sources = [r for r in labelled if r.name == reader.name] or labelled
        maps = (((resize(label, reader.size), resize(valid[None], reader.size)[0]))
                for r in sources for group in readable(items(r, [t], 16, workers, count, skip_bad)) for _, _, m in group for label, valid in [m[t]])
        if sources:
            out[t] = trivial(TASKS[t], maps)
    return out, sorted(skipped)


# ---- the command ----

def headline(task, result):
    return result[METRICS[TASKS[task].metric][1]]


def table(results, trivials):
    """Markdown lines: a row per test set and task; columns that are empty throughout are left out."""
    rows = []
    for name, by_task in results.items():
        for task, result in by_task.items():
            key = task.split(":")[0]
            _, metric, lower = METRICS[TASKS[key].metric]
            value = headline(key, result)
            row = {"test set": name, "task": task, "metric": f"{metric} {'↓' if lower else '↑'}", "model": f"{value:.4g}"}
            guesses = {who: headline(key, r[task]) for who, r in trivials.get(name, {}).items() if task in r}
            row |= {who: f"{g:.4g}" for who, g in guesses.items()}
            row["model / better trivial"] = f"{value / (min if lower else max)(guesses.values()):.2f}x" if guesses else ""
            row["paper"] = str(PAPER["StableMTL"].get(task, {}).get(name, ""))
            rows.append(row | {"images": str(result["images"])})
    return markdown(rows, ("test set", "task", "metric", "model", "constant", "per-pixel mean", "model / better trivial", "paper", "images"))


def markdown(rows, columns):
    """[{column: text}] -> the lines of a table of those columns that hold anything."""
    columns = [c for c in columns if any(r.get(c) for r in rows)]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(columns), "|---" * len(columns) + "|", *(line([r.get(c, "") for c in columns]) for r in rows)]


def by_task(results):
    """{dataset: {task: metrics}} -> {task: {dataset: headline}}, extra masks left out."""
    out = {}
    for name, tasks in results.items():
        for task, result in tasks.items():
            if task in TASKS:
                out.setdefault(task, {})[name] = headline(task, result)
    return out


def oracle_table(results):
    """Markdown lines: what the codec alone (encode, VAE, decode) leaves of the labels."""
    rows = []
    for name, tasks in results.items():
        for task, r in tasks.items():
            kept = {k: v for k, v in r.items() if k == "accuracy" or k.startswith("IoU") or k == METRICS[TASKS[task].metric][1]}
            rows.append({"test set": name, "task": task, "PSNR, dB": f"{r['PSNR']:.1f}", "after the round trip": ", ".join(f"{k} {v:.4g}" for k, v in kept.items())})
    return markdown(rows, ("test set", "task", "PSNR, dB", "after the round trip"))


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", default="", help="folder written by train.py (with --oracle: may be left out, then the toy base)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="which stage of the checkpoint (default: 2 where it exists)")
    parser.add_argument("--data", default="", help="root folder of the real test sets (README: Data); empty = the toy worlds")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="which held-out part of the toy worlds")
    parser.add_argument("--limit", type=whole(1), help="at most this many samples per test set (default: 64 on the toy worlds, all of real data)")
    parser.add_argument("--batch", type=whole(1), help="images at once (default: 16 on the toy worlds, 1 on real data)")
    parser.add_argument("--rows", type=whole(1), help="tasks x images that pass the UNet at once: lowers memory, changes nothing else")
    parser.add_argument("--workers", type=whole(0), default=2, help="loader processes")
    parser.add_argument("--trivial", type=whole(0), default=128, help="training labels per dataset behind the trivial rows; 0 = no such rows")
    parser.add_argument("--baseline", default="", help="results.json of single-task runs (several: comma-separated), or `paper`: prints Delta_m")
    parser.add_argument("--oracle", action="store_true", help="labels through encode, VAE, decode: what the codec alone costs")
    parser.add_argument("--palette", choices=tuple(PALETTES), help="with --oracle: other class colours than the checkpoint's")
    parser.add_argument("--kitti-baseline", default="calibration", choices=("calibration", "paper"),
                        help="camera distance behind KITTI 2015's scene flow: each scene's calibration, or the paper's constant 0.54 m")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count unreadable samples instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="compute finished test sets again")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", default="", help="where to write the results (default: <ckpt>/results.json)")
    args = parser.parse_args(argv)
    if not args.ckpt and not args.oracle:
        raise ValueError("--ckpt is missing: name the folder that train.py wrote, for example --ckpt out/")
    if args.palette and not args.oracle:
        raise ValueError("--palette changes the codec, not the model: it goes with --oracle only")
    baseline = PAPER["single-task"] if args.baseline == "paper" else _merge(args.baseline) if args.baseline else None
    torch.manual_seed(0)
    start, args.device = time.time(), str(parse_device(args.device))
    if args.ckpt:
        model = StableMTL.load(args.ckpt, args.stage, args.device)
    else:
        model = from_base(str(toy.BASE), tuple(TASKS)).to(args.device).eval()
    if args.palette:
        model.codecs = {t: registry(args.palette)[t] for t in model.tasks}
    config = read_json(Path(args.ckpt) / "config.json", f"no config.json in {args.ckpt}") if args.ckpt else {}
    size = tuple(config.get("size", (32, 48)))
    where = args.json or (str(Path(args.ckpt) / ("oracle.json" if args.oracle else "results.json")) if args.ckpt else "")
    if where and not Path(where).parent.is_dir():
        raise FileNotFoundError(f"--json {where}: there is no folder {Path(where).parent} to write it to")
    readers = test_readers(args.data, size, split=args.split, kitti_baseline=args.kitti_baseline)
    readers = [r for r in readers if any(t in model.tasks and len(r.indices(t)) for t in r.tasks)]
    train = []
    if args.trivial and not args.oracle:
        with contextlib.suppress(FileNotFoundError):    # test sets alone: there are no training labels to be trivial with
            train = train_readers(args.data, size)
    results, trivials, skipped, made_from = {}, {}, [], {}
    report = {"checkpoint": args.ckpt or "toy base", "stage": 1 if model.main is None else 2, "oracle": args.oracle, "split": args.split,
              "commit": config.get("commit"), "settings": config.get("train"), "results": results, "trivial": trivials, "skipped": skipped,
              "made_from": made_from, "unfinished": [r.name for r in readers]}
    old = read_json(where, "") if where and Path(where).is_file() and not args.overwrite else {}
    common = settings(args, size)
    try:
        for reader in readers:
            name, key = reader.name, fingerprint(common, [reader, *train])
            if old.get("made_from", {}).get(name) == key:
                results[name], trivials[name] = old["results"][name], old["trivial"][name]
                bad = [s for s in old["skipped"] if s.startswith(f"{name}:")]
                print(f"{name}: kept from {where} (--overwrite computes it again)", file=sys.stderr)
            else:
                wanted = [t for t in reader.tasks if t in model.tasks and len(reader.indices(t))]
                guesses, unread = trivial_guesses(reader, train, wanted, args.trivial, args.workers, args.skip_bad)
                results[name], trivials[name], bad = evaluate(
                    model, reader, args.batch or (1 if args.data else 16), args.workers, args.limit, args.rows, args.skip_bad, args.oracle, guesses)
                bad = unread + bad
            skipped += bad
            made_from[name] = key
            report["unfinished"].remove(name)
            if where:
                write_json(where, report)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(results)} of {len(readers)} test sets are in {where or 'no file'}; the same command does the rest", file=sys.stderr)
        return 130
    lines = oracle_table(results) if args.oracle else table(results, trivials)
    if baseline:
        mine = by_task(results)
        common = {t: {d: v for d, v in row.items() if d in baseline.get(t, {})} for t, row in mine.items()}
        common = {t: row for t, row in common.items() if row}
        report["delta_m"] = delta_m(common, {t: {d: baseline[t][d] for d in row} for t, row in common.items()},
                                    {t: METRICS[TASKS[t].metric][2] for t in TASKS})
        lines.append(f"\nDelta_m against {args.baseline} over {len(common)} tasks: {report['delta_m']:+.2f} %")
    report["stage1"] = config.get("stage1")
    print("\n".join([*trained(config), *lines]))
    if args.data:
        absent = [r.name for r in READERS.values() if "test" in r.use and r.name not in results and r.name != "folder"]
        print(f"\nnot under {args.data}: {', '.join(absent) or 'nothing is missing'}")
    if where:
        write_json(where, report)
    print(f"\nstage {report['stage']} of {report['checkpoint']}, {args.split} split, {len(skipped)} samples skipped, {time.time() - start:.0f} s on {args.device}"
          + (f"; written to {where}" if where else ""))
    return 0


def settings(args, size):
    """Everything but its samples that the numbers of a test set depend on."""
    folder, code = Path(args.ckpt or toy.BASE), Path(__file__).parent
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*model.safetensors"), *folder.glob("model.json"), *code.glob("*.py"), *code.glob("readers/*.py")]
    flags = {k: v for k, v in vars(args).items() if k not in ("ckpt", "workers", "baseline", "overwrite", "json")}
    return [flags, size, torch.__version__, [crc(path) for path in sorted(files)]]


def fingerprint(common, readers):
    """Eight hexadecimal digits for `settings` and the samples of the test set and of the training sets behind the trivial predictors."""
    samples = [(r.name, r.split, len(r), r.size, r.version) for r in readers]
    return f"{zlib.crc32(json.dumps([common, samples]).encode()):08x}"


def trained(config):
    """Lines that say how the checkpoint was trained: what the paper varies, of stage 1 (the one it started from, too) and of stage 2."""
    flags = {1: ("tasks", "drop", "palette", "second_frame", "isolation", "loss"),
             2: ("heads", "shared_qkv", "main_init", "attention", "rho", "mask", "drop", "isolation", "loss")}
    settings = [s for s in (config.get("stage1"), config.get("train")) if s]
    told = lambda s: ", ".join(f"{k} {s[k]}" for k in flags[s["stage"]] if s[k] != "")
    return [f"stage {s['stage']}, {s['steps']} steps of {s['batch']}, seed {s['seed']}: {told(s)}" for s in settings] + [""]


def _merge(paths):
    """Headlines {task: {dataset: value}} of several results.json, one per single-task run."""
    out = {}
    for path in paths.split(","):
        report = read_json(path, f"no results in {path}: evaluate the single-task runs first, or use --baseline paper")
        if report.get("unfinished"):
            raise ValueError(f"{path} is unfinished: evaluate that run again, which does the rest")
        for task, row in by_task(report["results"]).items():
            out.setdefault(task, {}).update(row)
    return out


if __name__ == "__main__":
    sys.exit(run(main))
