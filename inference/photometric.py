"""Motion in real units: the scales that a predicted flow lacks, found in the two frames themselves.

A predicted flow is right up to one positive scale per channel (tasks.py). Under the right scales frame 2, warped back
by the flow, looks like frame 1: these are searched for. Per pixel the difference of colours e counts as e / (e + s),
which lets no occluded pixel outweigh the others (s: the mean difference without any motion); pixels that leave the
image do not count. Coarse to fine: a grid over all magnitudes in octaves at a small size, then a pattern search in ever
smaller steps at sizes up to 256 pixels.

What the frames do not tell is not invented: without texture, without motion in the prediction, or where no scale of it
explains the second frame better than standing still, there is no answer, and the reason is said.
"""
import math
from dataclasses import astuple, dataclass
from itertools import product

import torch
import torch.nn.functional as F

from cli import markdown
from metrics import Accumulator, align_scale_nonneg
from tasks import DISTANCE, MOTION, MOTION_3D, TASKS

LEAST = 0.1         # pixels that the longest vectors of a channel move at least: less is no motion
FINEST = 256        # pixels of the longer side at which the search ends
COARSEST = 24       # and begins, at least
AREA = 9            # neighbouring pixels that are one observation
SURE = 2.0          # standard errors by which the motion must be better than none
LIKELY = 1.0        # and a channel's scale than others


@dataclass(frozen=True)
class Fit:
    """scales: one per channel, which make the map one of `unit`; or None where the frames do not tell, and `why` says
    what is missing."""
    scales: tuple | None
    why: str = ""
    unit: str = ""

    def apply(self, x):
        """The map (C,H,W) in real units, or as it is."""
        return x if self.scales is None else x * torch.tensor(self.scales)[:, None, None]


@dataclass(frozen=True)
class Camera:
    """What scene flow in metres takes: focal length and centre in pixels of the image, and the distances in metres that
    0 and 1 of the depth map stand for. ValueError if no camera is like that."""
    focal: float
    cx: float
    cy: float
    near: float
    far: float

    def __post_init__(self):
        numbers = astuple(self)
        if not (all(map(math.isfinite, numbers)) and self.focal > 0 and 0 < self.near < self.far):
            told = ",".join(f"{x:g}" for x in numbers)
            raise ValueError(f"camera {told}: expected focal length, cx, cy in pixels, then the metres of the nearest "
                             "and the farthest depth, all finite, 0 < near < far")


def find_scales(maps, image, next_image, camera=None):
    """{task: (C,H,W)} of one pair of frames (3,H,W) -> {task: Fit} of those about motion; without next_image none.

    camera: a Camera, by which scene flow is told too, if there is a depth map beside it.
    """
    fits, near = {}, [x for t, x in maps.items() if TASKS[t].geometry == DISTANCE]
    for t, x in maps.items():
        if TASKS[t].geometry == MOTION:
            fits[t] = fit(image, next_image, Flow(x))
        elif TASKS[t].geometry == MOTION_3D and not (camera and near):
            fits[t] = Fit(None, "metres need a camera and a depth map" if not camera else "metres need a depth map")
        elif TASKS[t].geometry == MOTION_3D:
            depth = camera.near + (camera.far - camera.near) * near[0]
            fits[t] = fit(image, next_image, SceneFlow(x, depth, (camera.focal, camera.cx, camera.cy)))
    return fits


# ---- what a motion does to an image ----

def warp(image, flow, mode="bilinear"):
    """image (K or 1,C,H,W), flow (K,2,H,W) in pixels (u right, v down) -> (what is seen at x + flow (K,C,H,W), whether
    that lies inside the image (K,H,W) bool). mode: or "nearest"; outside, the border is repeated."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x.to(flow) + flow[:, 0], y.to(flow) + flow[:, 1]                                         # (K,H,W)
    grid = torch.stack([x / max(width - 1, 1), y / max(height - 1, 1)], -1) * 2 - 1
    seen = F.grid_sample(image.expand(len(flow), -1, -1, -1), grid, mode, "border", align_corners=True)
    return seen, (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _reduced(x, size):
    """(C,H,W) -> (C,*size), never larger, averaged over what falls together."""
    return F.interpolate(x[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


class Flow:
    """Optical flow (2,H,W) up to scale as a motion: displaced(scales (K,2), size) -> (K,2,*size) pixels of H x W."""

    def __init__(self, flow):
        self.maps, self.channels, self.unit = flow, 2, "pixels (u, v)"

    def displaced(self, scales, size):
        return scales[:, :, None, None] * _reduced(self.maps, size)


class SceneFlow:
    """Scene flow (3,H,W) up to scale as a motion, seen by a camera.

    depth (1,H,W): metres along the optical axis; intrinsics: (focal length, cx, cy) in pixels of H x W.
    """

    def __init__(self, flow, depth, intrinsics):
        self.channels, self.unit = 3, "metres (x, y, z), OpenCV axes"
        self.maps, (self.focal, *self.centre) = torch.cat([flow, depth]), intrinsics

    def displaced(self, scales, size):
        *motion, depth = _reduced(self.maps, size)
        height, width = self.maps.shape[1:]
        y, x = ((torch.arange(n) + 0.5) * whole / n - 0.5 - c
                for n, whole, c in zip(size, (height, width), reversed(self.centre), strict=True))
        at = torch.stack(torch.meshgrid(x, y, indexing="xy")) / self.focal                          # (2,h,w)
        moved = scales[:, :, None, None] * torch.stack(motion)                                      # (K,3,h,w)
        later = (depth + moved[:, 2:]).clamp(min=1e-3)
        return self.focal * ((at * depth + moved[:, :2]) / later - at)


# ---- how well it explains the second frame ----

class _Level:
    """Both frames and a motion at one size."""

    def __init__(self, frames, motion, size, per_scale):
        self.frames, self.motion, self.size = [_reduced(f, size)[None] for f in frames], motion, size
        self.per_scale = per_scale
        self.ratio = torch.tensor([n / whole for n, whole in zip(size, frames[0].shape[1:], strict=True)]).flip(0)
        self.soft = (self.frames[0] - self.frames[1]).abs().mean().clamp(min=1e-4)

    def errors(self, pixels):
        """pixels (K,C) that the longest vectors move -> (each pixel's error in [0,1), whether it counts), (K,h,w)."""
        flow = self.motion.displaced(pixels / self.per_scale, self.size) * self.ratio[:, None, None]
        seen, inside = warp(self.frames[1], flow)
        error = (seen - self.frames[0]).abs().mean(1)
        return error / (error + self.soft), inside

    def costs(self, pixels):
        """pixels (K,C) -> (K,) mean error; infinite where more than half of the pixels leave the image."""
        costs = []
        for part in pixels.split(max(1, 2 ** 19 // math.prod(self.size))):
            errors, inside = self.errors(part)
            counted = inside.sum((1, 2))
            mean = (errors * inside).sum((1, 2)) / counted.clamp(min=1)
            costs.append(torch.where(2 * counted >= inside[0].numel(), mean, torch.inf))
        return torch.cat(costs)


# ---- the search ----

def fit(image, next_image, motion):
    """The scales of a motion (Flow or SceneFlow) that explain two frames (3,H,W) of one unit best -> Fit."""
    frames, whole = (image.float(), next_image.float()), image.shape[-2:]
    per_scale = _pixels_per_scale(motion, whole)
    if not (per_scale > 0).all():
        return Fit(None, "nothing moves in the prediction")
    finest = min(1.0, FINEST / max(whole))
    halvings = max(0, int(math.log2(finest * max(whole) / COARSEST)))
    octaves = None      # (C,): how many pixels the longest vectors of a channel move, as powers of two
    for k in range(halvings, -1, -1):
        level = _Level(frames, motion, [max(1, round(n * finest / 2 ** k)) for n in whole], per_scale)
        if octaves is None:
            span = torch.arange(math.log2(LEAST), math.log2(max(whole) / 2), 0.5 if motion.channels == 2 else 1.0)
            grid = torch.cartesian_prod(*[span] * motion.channels)
            octaves = grid[level.costs(2 ** grid).argmin()]
        octaves = _pattern_search(level, octaves, 0.5, 0.5 if k else 0.02)
    pixels = 2 ** octaves
    why = _unsure(level, pixels)
    return Fit(None, why) if why else Fit(tuple((pixels / per_scale).tolist()), unit=motion.unit)


def _pixels_per_scale(motion, size):
    """(C,): pixels that the longest vectors (95th percentile) of each channel move at scale 1."""
    small = 1e-3
    moves = motion.displaced(small * torch.eye(motion.channels), size).norm(dim=1).flatten(1)      # (C, H*W)
    return torch.stack([m.kthvalue(max(1, round(0.95 * len(m)))).values for m in moves]) / small


def _pattern_search(level, at, step, least):
    """Walk downhill on a lattice around `at` (C,), halving its step where all neighbours are higher."""
    around = torch.tensor(list(product((-1, 0, 1), repeat=len(at))), dtype=torch.float32)
    while step >= least:
        near = (at + step * around).clamp(min=math.log2(LEAST))
        costs = level.costs(2 ** near)
        if costs.min() < costs[len(around) // 2]:
            at = near[costs.argmin()]
        else:
            step /= 2
    return at


def _unsure(level, pixels):
    """Why the frames do not tell these scales; "" if they do: they are better than standing still and than the reverse
    (which noise is not, although any warp smooths it), and in each channel better than half as much and half again (one
    pixel less and more, where that is further)."""
    errors, inside = level.errors(pixels[None])

    def worse(other):
        """By how many standard errors; one pixel in AREA counts, as neighbours say the same."""
        others, also = level.errors(other[None])
        rise = (others - errors)[inside & also]
        return (rise.mean() / (rise.std() + 1e-6) * (len(rise) / AREA) ** 0.5).item() if len(rise) > AREA else 0.0

    for other, what in (0 * pixels, "standing still"), (-pixels, "the same motion backwards"):
        if not worse(other) > SURE:
            return f"no scale of the predicted motion explains the second frame better than {what}"
    for c, name in enumerate("xyz"[:len(pixels)]):
        by = torch.zeros_like(pixels)
        by[c] = max(pixels[c] / 2, 1 / level.ratio.max())
        if min(worse(pixels + by), worse(pixels - by) if pixels[c] > by[c] else math.inf) < LIKELY:
            return f"the frames look much the same whatever the motion along {name}"
    return ""


# ---- what it is worth ----

SCALES = "EPE, as predicted", "EPE, photometric scale", "EPE, label's scale"
FOUND = "pairs with photometric scale"


class Scaled(Accumulator):
    """End-point errors of flow in pixels, pooled over the valid pixels of those pairs whose scales are found: as the
    network gives it, in these scales, and in those that fit the label (the protocol of the paper)."""

    def __init__(self):
        super().__init__()
        self.fit, self.pixel, self.pairs = None, None, 0

    def add(self, pred, label, valid, frames, native=None):
        """frames: (image, next image), each (3,H,W); native: the (H,W) whose pixels the label counts, if it was
        resized; the others as in Accumulator.add."""
        size = frames[0].shape[1:]
        self.pixel = label.new_tensor([w / s for w, s in zip(native or size, size, strict=True)]).flip(0)[:, None, None]
        self.pairs += bool(valid.any())
        self.fit = fit(*(f.cpu() for f in frames), Flow(pred.cpu().float()))
        if self.fit.scales and valid.any():
            super().add(pred, label, valid)

    def update(self, pred, label, valid):
        scaled = pred, self.fit.apply(pred) * self.pixel, align_scale_nonneg(pred, label, valid)
        for how, x in zip(SCALES, scaled, strict=True):
            self.scores[how].append(self.errors(x, label, valid).sum().item())
        self.scores["pixels"].append(int(valid.sum()))

    def merge(self, other):
        self.pairs += other.pairs
        return super().merge(other)

    def result(self):
        """Without "images" and "skipped": pairs, and of how many the scales were found."""
        sums = {name: math.fsum(xs) for name, xs in self.scores.items()}
        pixels = sums.pop("pixels", 0)
        return {**{name: x / pixels for name, x in sums.items()}, "pairs": self.pairs, FOUND: self.images}


def table(results):
    """{test set: {task: metrics}} -> Markdown lines, a row where there is a result of Scaled."""
    rows = []
    for name, tasks in results.items():
        for task, r in ((t, r) for t, r in tasks.items() if FOUND in r):
            row = {"test set": name, "task": task, "pairs": f"{r[FOUND]} of {r['pairs']}"}
            row |= {how: f"{r[how]:.4g}" for how in SCALES if how in r}
            raw, found, best = (r.get(how, math.nan) for how in SCALES)
            rows.append(row | {"recovered": f"{100 * (raw - found) / (raw - best):.0f}%" if raw > best else ""})
    return markdown(rows, ["test set", "task", "pairs", *SCALES, "recovered"]) if rows else []
