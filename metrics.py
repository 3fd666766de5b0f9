"""Every metric of the seven tasks, the trivial predictors they are read against, and Delta_m.

The formulas are functions of one image: pred, label (C,H,W) floating point, valid (H,W) bool. What lies outside the
mask (NaN too) has no effect on any number. The accumulators hold the protocol: alignment, averaging, counting.
"""
import math
from collections import defaultdict
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tasks import CLASSES, IGNORE

# ---- alignment: what a prediction is not asked to know is fitted to the ground truth first ----

def align_scale_shift(pred, label, valid, lo=-math.inf, hi=math.inf):
    """Least-squares scale and shift over all valid pixels, then clip to [lo, hi] (label's unit) -> (C,H,W)."""
    p, y = pred[:, valid], label[:, valid]
    d = p - p.mean()
    var = d.square().sum()
    s = (d * (y - y.mean())).sum() / var if var > 0 else 0.0  # a constant prediction becomes the mean of the label
    return (s * (pred - p.mean()) + y.mean()).clamp(lo, hi)


def align_scale_nonneg(pred, label, valid):
    """Per channel the least-squares scale >= 0 over valid pixels, no shift -> (C,H,W). A channel of zeros stays so."""
    p, y = pred[:, valid], label[:, valid]
    py, pp = (p * y).sum(1), p.square().sum(1)
    s = torch.where(pp > 0, py / pp, 0.0).clamp(min=0)  # a flow of the wrong sign is not turned round: 0 is its best
    return s[:, None, None] * pred


def align_scale(pred, label, valid, lo=0.0, hi=1.0):
    """One least-squares scale over all channels and valid pixels, then clip to [lo, hi] -> (C,H,W). Black stays so."""
    p, y = pred[:, valid], label[:, valid]
    py, pp = (p * y).sum(), p.square().sum()
    return ((py / pp if pp > 0 else 0.0) * pred).clamp(lo, hi)


def aligned(task, pred, label, valid):
    """A prediction (C,H,W) of a tasks.Task fitted to its label as for its metric, to be drawn beside it; as it is if no
    pixel is valid. Depth is not clipped to a dataset's range."""
    return METRICS[task.metric].accumulator().align(pred, label, valid) if valid.any() else pred


# ---- formulas ----

def confusion(pred, label, valid, classes):
    """Class ids 0..classes-1 at valid pixels, any dtype -> (classes, classes) long counts, rows label, columns pred."""
    p, y = pred[:, valid].long(), label[:, valid].long()
    for name, ids in ("prediction", p), ("label", y):
        if ids.numel() and not 0 <= ids.min() <= ids.max() < classes:
            raise ValueError(f"expected class ids below {classes}, found {ids.min()} to {ids.max()} in the {name}: "
                             f"map others to {IGNORE}")
    return torch.bincount((y * classes + p).flatten(), minlength=classes**2).view(classes, classes)


def iou(matrix):
    """(K,K) confusion matrix -> (K,) intersection over union in [0,1]; NaN for a class that never occurs in either."""
    hit = matrix.diag()
    return hit.double() / (matrix.sum(0) + matrix.sum(1) - hit)


def angles(pred, label, valid):
    """Angle between the vectors of each valid pixel, degrees -> (N,). Lengths do not matter; a zero vector makes 90."""
    return F.cosine_similarity(pred[:, valid], label[:, valid], dim=0).clamp(-1, 1).acos().rad2deg()


def depth_errors(pred, label, valid):
    """Errors of aligned depth in metres (Eigen et al. 2014): AbsRel, deltas in %; SqRel, RMSE in m; RMSElog natural."""
    p, y = pred[:, valid], label[:, valid]
    if y.min() <= 0:
        raise ValueError(f"expected depth above 0 m at every valid pixel, found {y.min():g}: mask it out")
    ratio = torch.maximum(p / y, y / p)
    errors = {"AbsRel": 100 * ((p - y).abs() / y).mean(), "SqRel": ((p - y).square() / y).mean(),
              "RMSE": (p - y).square().mean().sqrt(), "RMSElog": (p.log() - y.log()).square().mean().sqrt(),
              "log10": (p.log10() - y.log10()).abs().mean(),
              **{f"delta{k}": 100 * (ratio < 1.25**k).double().mean() for k in (1, 2, 3)}}
    return {k: v.item() for k, v in errors.items()}


def rmse(pred, label, valid, per_element=False):
    """Root of the squared error summed over channels and averaged over valid pixels (the paper's), or over elements."""
    e = (pred - label)[:, valid].square()
    return (e.mean() if per_element else e.sum(0).mean()).sqrt().item()


def ssim(pred, label, valid):
    """Structural similarity (Wang et al. 2004) of maps in [0,1]: 7x7 uniform window, sample covariance.

    Invalid pixels are set to 0 in both maps; the mean runs over channels and valid pixels whose window lies inside the
    image. NaN if there is none.
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
    """Local error of the MIT intrinsic images (Grosse et al. 2009): 16x16 windows, step 8, each with its own scale.

    Squared error summed over windows, channels and valid pixels, over the same sum of label squared, from 0 to 1. NaN
    if no window fits or that is 0.
    """
    if min(valid.shape) < 16:
        return math.nan
    p, y = torch.where(valid, pred, 0), torch.where(valid, label, 0)
    py, pp, yy = (F.avg_pool2d(z.sum(0, keepdim=True), 16, 8) for z in (p * y, p * p, y * y))  # sums, up to one factor
    explained = torch.where(pp > 0, py * (py / pp), 0.0)
    return ((yy - explained).clamp(min=0).sum() / yy.sum()).item()  # min |y - s p|^2 = yy - py^2 / pp


# ---- accumulators: one per task and test set ----

class Accumulator:
    """add() one image after the other, then result() -> {headline: float, ..., "images": used, "skipped": not valid}.

    Subclasses give score(pred, label, valid) -> {name: float} of one image, to be averaged, or override update and
    summary to pool pixels; align fits pred to label before. What is undefined (IoU of a class that never occurs, SSIM
    without a full window) is left out. errors are those of the pixels; their `average`, also over a part of them, is
    called `error`. clip: the test set's range of depth, metres. Computes in float64 on the CPU.
    """
    error = "error"

    def __init__(self, clip=(1e-5, math.inf)):
        self.images, self.skipped, self.scores = 0, 0, defaultdict(list)
        self.clip = lo, hi = clip
        if not 0 < lo < hi:
            raise ValueError(f"expected a depth range 0 < lo < hi in metres, found {clip}: logarithms need it so")

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
                raise ValueError(f"expected finite numbers, found {bad} at valid pixels of the {name} that are not: "
                                 "check mask and weights")
        self.update(self.align(pred, label, valid), label, valid)
        self.images += 1

    def align(self, pred, label, valid):
        return pred

    @staticmethod
    def errors(pred, label, valid):
        """Of an aligned prediction -> (N,), >= 0."""
        return (pred - label)[:, valid].norm(dim=0)

    @staticmethod
    def average(errors):
        return errors.mean(-1)

    def update(self, pred, label, valid):
        for name, x in self.score(pred, label, valid).items():
            if not math.isnan(x):
                self.scores[name].append(x)

    def merge(self, other):
        """Add what another one of this kind has counted, of other images; the order changes no result."""
        self.images, self.skipped = self.images + other.images, self.skipped + other.skipped
        for name, xs in other.scores.items():
            self.scores[name] += xs
        return self

    def summary(self):
        return {name: fmean(xs) for name, xs in self.scores.items()}

    def result(self):
        if not self.images:
            raise ValueError(f"expected at least one image with a valid pixel, found none among {self.skipped}: "
                             "check the dataset's masks")
        return {**self.summary(), "images": self.images, "skipped": self.skipped}


class Semantic(Accumulator):
    """mIoU and IoU per class in %, from one confusion matrix pooled over all pixels. Ids (1,H,W); 255 is ignored."""
    error = "% wrong"

    def add(self, pred, label, valid):
        super().add(pred, label, valid & (label[0] != IGNORE))

    @staticmethod
    def errors(pred, label, valid):
        return 100.0 * (pred != label)[0, valid].double()

    def update(self, pred, label, valid):
        self.scores["confusion"] = [sum(self.scores["confusion"]) + confusion(pred, label, valid, len(CLASSES))]

    def summary(self):
        matrix = sum(self.scores["confusion"])
        every = zip(CLASSES, iou(matrix).tolist(), strict=True)
        scores = {f"IoU {name}": 100 * x for name, x in every if not math.isnan(x)}
        return {"mIoU": fmean(scores.values()), **scores, "accuracy": 100 * (matrix.diag().sum() / matrix.sum()).item()}


class Normal(Accumulator):
    """Mean angular error in degrees, and % of pixels below 11.25, 22.5 and 30 degrees."""
    error, errors = "mAE", staticmethod(angles)

    def score(self, pred, label, valid):
        a = angles(pred, label, valid)
        return {"mAE": a.mean().item(), **{f"<{t}": 100 * (a < t).double().mean().item() for t in (11.25, 22.5, 30)}}


class Depth(Accumulator):
    """Errors of depth_errors after scale and shift per image and clipping to the test set's range."""
    error, score = "AbsRel", staticmethod(depth_errors)

    @staticmethod
    def errors(pred, label, valid):
        return 100 * ((pred - label).abs() / label)[0, valid]

    def align(self, pred, label, valid):
        return align_scale_shift(pred, label, valid, *self.clip)


class Epe(Accumulator):
    """Mean end-point error in the label's unit (px for two channels, m for three), pooled over all valid pixels."""
    error, align = "EPE", staticmethod(align_scale_nonneg)

    def update(self, pred, label, valid):
        e = self.errors(pred, label, valid)
        self.scores["sum"].append(e.sum().item())
        self.scores["pixels"].append(e.numel())

    def summary(self):
        pixels = sum(self.scores["pixels"])
        return {"EPE": math.fsum(self.scores["sum"]) / pixels, "pixels": pixels}


class Intensity(Accumulator):
    """RMSE per pixel, SSIM, LMSE after one scale per image and clipping to [0,1]; in colour also RMSE per element."""
    error, align = "RMSE", staticmethod(align_scale)

    @staticmethod
    def average(errors):
        return errors.square().mean(-1).sqrt()

    def score(self, *maps):
        scores = {"RMSE": rmse(*maps), "SSIM": ssim(*maps), "LMSE": lmse(*maps)}
        return scores if len(maps[0]) == 1 else scores | {"RMSE per element": rmse(*maps, per_element=True)}


class Metric(NamedTuple):
    """How a task is scored: by which accumulator, and which of its numbers is the headline."""
    accumulator: type[Accumulator]
    headline: str
    lower: bool         # is lower better?

    @property
    def titled(self):
        return f"{self.headline} {'↓' if self.lower else '↑'}"


METRICS = {     # by Task.metric
    "semantic": Metric(Semantic, "mIoU", False), "normal": Metric(Normal, "mAE", True),
    "depth": Metric(Depth, "AbsRel", True), "epe": Metric(Epe, "EPE", True),
    "shading": Metric(Intensity, "RMSE", True), "albedo": Metric(Intensity, "RMSE", True)}


# ---- trivial predictors: what one scores without looking at the image ----

GUESSES = "constant", "per-pixel mean"

def code_sums(task, labels):
    """Labels, pairs of native label (C,H,W) and mask (H,W) of one size -> (sum of their codes (K,H,W), (H,W) count).

    The code of classes is one-hot here: a sum counts votes.
    """
    total = count = torch.zeros((), dtype=torch.float64)
    for label, valid in labels:
        votes = label[0] == torch.arange(len(CLASSES), device=label.device)[:, None, None]
        code = votes if task.categorical else task.encode(label[None], valid[None, None])[0]
        total, count = total + torch.where(valid, code, 0).cpu(), count + valid.cpu()
    return total, count


def trivial(task, sums):
    """Of training labels their `code_sums`, one or more, of one size -> predictions (C,H,W) as in GUESSES.

    Each is a mean of codes, decoded (so depth is affine-invariant and a flow divided by its maximum), or the most
    frequent class: best in squared error of the code, merely sensible for AbsRel, EPE and angles. A pixel valid in no
    label gets the constant.
    """
    def decode(code):
        return code.argmax(0, keepdim=True) if task.categorical else task.decode(code[None].float())[0]

    total, count = (sum(parts) for parts in zip(*sums, strict=True))
    if not count.any():
        raise ValueError(f"expected a {task.name} label with a valid pixel, found none: check the dataset's masks")
    constant = decode((total.sum((1, 2)) / count.sum())[:, None, None].expand_as(total))
    return constant, torch.where(count > 0, decode(total / count.clamp(min=1)), constant)


# ---- Delta_m ----

def delta_m(results, baseline, lower):
    """Mean over tasks of the signed relative change against the baseline, in percent, positive is better (Vandenhende
    et al. 2022). A task on several datasets counts once, with the mean of its changes.

    results, baseline: {task: {dataset: headline}}; lower: {task: is lower better}. ValueError unless both hold the same
    tasks and datasets and every baseline is above zero.
    """
    new, old = ({(t, d): x for t, row in table.items() for d, x in row.items()} for table in (results, baseline))
    if not new or new.keys() != old.keys():
        differ = sorted(new.keys() ^ old.keys())
        raise ValueError(f"expected results and baseline on the same test sets, found {differ} in one only")
    if min(old.values()) <= 0:
        raise ValueError(f"expected a baseline above zero, found {min(old, key=old.get)} is not: leave it out")
    gain = {t: 100 * fmean(x / baseline[t][d] - 1 for d, x in row.items()) for t, row in results.items()}
    return fmean(-g if lower[task] else g for task, g in gain.items())
