"""How far a map can be trusted: the prediction of an image and that of its mirror image should be the same.

The network sees the mirrored frames as well, its maps are turned back (motion and normals change sign along x, as
tasks.py states), fitted to the first prediction by what the task leaves open (scale of motion, scale and shift of
depth) and compared in the task's own terms. Where both differ, at least one is wrong; where they agree, both may be. It
costs a second prediction. `Sparsification` tells what that is worth: the error of the pixels that it trusts most.
"""
import math

import torch
import torch.nn.functional as F

from cli import markdown
from metrics import METRICS, Accumulator, aligned
from tasks import IGNORE, TASKS

WINDOW = 5                      # pixels of a side: a pixel is trusted as far as its neighbourhood
SHARES = 25, 50, 75, 100        # per cent of the pixels, the surest first


def turned(task, x):
    """A native map (B,C,H,W) of what a mirror shows: flipped, with the signs of tasks.Task.hflip. Twice is once not."""
    signs = torch.tensor(task.hflip[:task.channels], device=x.device).view(-1, 1, 1)
    return x.flip(-1) * signs.to(x.dtype)


def difference(task, a, b):
    """Two maps (C,H,W) of one scale -> (H,W) in [0,1]: 1 where the classes differ, the angle over 90 degrees for unit
    vectors (more is 1), else d / (d + m) with d = |a - b| and the mean m of |a| over the map."""
    if task.categorical:
        return (a != b)[0].float()
    if task.dense_loss == "cosine":
        return (F.cosine_similarity(a, b, dim=0).clamp(-1, 1).acos() / (torch.pi / 2)).clamp(max=1)
    d = (a - b).norm(dim=0)
    return d / (d + a.norm(dim=0).mean()).clamp(min=1e-9)


def agreement(task, predicted, mirror):
    """Prediction and turned-back prediction of the mirror (C,H,W) -> (H,W) in [0,1], the confidence: 1 = they agree."""
    everywhere = torch.ones_like(predicted[0], dtype=torch.bool)
    doubt = difference(task, predicted, aligned(task, mirror, predicted, everywhere))
    side = min(WINDOW, *(n - 1 + n % 2 for n in doubt.shape))      # odd, and no larger than the map
    return 1 - F.avg_pool2d(doubt[None], side, 1, side // 2, count_include_pad=False)[0].clamp(0, 1)


# ---- what it is worth ----

class Sparsification(Accumulator):
    """Errors of the SHARES of an image's pixels that are surest, and of as many that are best ("oracle"), after the
    alignment of all pixels and as the task's metric counts them, averaged over images.

    The oracle orders pixels by their true error: no confidence does better. One that knows nothing gives all shares the
    error of 100%. Pixels of equal confidence come in a random order, the same each time.
    """

    def __init__(self, task, clip):
        super().__init__(clip)
        self.measure, self.classes, self.certain = METRICS[task.metric].accumulator(clip=clip), task.categorical, None
        self.align = self.measure.align

    def add(self, pred, label, valid, certain):
        """certain: (H,W), higher is surer; the others as in Accumulator.add."""
        self.certain = certain.cpu()
        super().add(pred, label, valid & (label[0] != IGNORE) if self.classes else valid)

    def score(self, pred, label, valid):
        errors, scores = self.measure.errors(pred, label, valid), {}
        mixed = torch.randperm(len(errors), generator=torch.Generator().manual_seed(0))
        errors, certain = errors[mixed], self.certain[valid][mixed]
        for who, order in ("surest", -certain), ("oracle", errors):
            ranked = errors[order.argsort(stable=True)]
            for share in SHARES:
                part = ranked[:math.ceil(len(ranked) * share / 100)]
                scores[f"{who} {share}%"] = self.measure.average(part).item()
        return scores


def gained(result):
    """Of the error that the oracle's order saves in the better half of the pixels, the share that the confidence saves:
    1 = as good as the oracle, 0 = no better than chance; NaN if there is no error to save."""
    whole, best = result["surest 100%"], result["oracle 50%"]
    return (whole - result["surest 50%"]) / (whole - best) if whole > best else math.nan


def sparsification_table(results):
    """{test set: {task: metrics}} -> Markdown lines, a row where there is a result of Sparsification."""
    rows = []
    for name, tasks in results.items():
        for task, r in ((t, r) for t, r in tasks.items() if "surest 100%" in r):
            error = METRICS[TASKS[task.split(":")[0]].metric].accumulator.error
            row = {"test set": name, "task": task, "error": error}
            row |= {f"{share}%": f"{r[f'surest {share}%']:.4g}" for share in SHARES}
            row |= {f"oracle {share}%": f"{r[f'oracle {share}%']:.4g}" for share in SHARES[:-1]}
            rows.append(row | {"gained": f"{gained(r):.2f}"})
    return markdown(rows, ["test set", "task", "error", *(f"{share}%" for share in SHARES),
                           *(f"oracle {share}%" for share in SHARES[:-1]), "gained"]) if rows else []
