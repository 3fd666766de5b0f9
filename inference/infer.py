"""From photos to maps, the one path that sample.py, StableMTL.infer and the tests share.

    read_frame      a path, Pillow image or array -> (H,W,3) uint8
    to_network      frames of one size -> (B,3,h,w) in [-1,1], at the size that `network_size` picks
    network_maps    these -> {task: (B,C,h,w)}; what is to happen at the network's size happens here
    mirror_maps     the same of the mirrored frames, turned back: what inference/confidence.py compares
    restore         -> (B,C,H,W), at the frames' own size
    in_pixels       flow in the units that the frames themselves tell (inference/photometric.py)
    as_array        (C,H,W) -> the numpy array that people get, and sample.py writes

`predict` is the middle, from frames of one size to maps at the network's size; `infer` is all of it, for anything.
"""
import os
from collections import defaultdict
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cli import half, has_bf16, less_memory
from inference.confidence import agreement, turned
from inference.photometric import Camera, find_scales
from readers.media import read_image, to_rgb
from tasks import TASKS, parse_tasks

LARGEST = 16384     # pixels of the longer side that the network may be asked to see


def read_frame(source):
    """A path, a Pillow image of any mode or an (H,W,3) uint8 array -> (H,W,3) uint8 RGB, upright as a viewer shows it.

    FileNotFoundError if there is no such file; ValueError if it cannot be read, or the array is not as above.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_image(source)
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except Exception as error:      # it is decoded only now, and damaged files raise anything
            raise ValueError(f"the Pillow image cannot be read ({error}): give another, or a path, which is then "
                             "named") from error
    if not isinstance(source, np.ndarray):
        raise ValueError(f"an image is a path, a Pillow image or an (H,W,3) uint8 array, not {type(source).__name__}")
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise ValueError(f"expected an (H,W,3) uint8 array of 0..255, found {source.shape} of {source.dtype}: "
                         "Image.fromarray(x) takes other shapes, (255 * x).astype(np.uint8) makes bytes of [0,1]")
    return source


def network_size(height, width, size, trained, factor):
    """(H, W) at which the network sees an image of height x width.

    size: its longer side, 0 = as it is, None = the shorter side becomes that of `trained` (H, W), as long as the area
    stays below 8 times the trained one. Each side gets at least 8 latent cells (one cell of the UNet's coarsest level),
    even if that distorts.
    """
    least, most = 8 * factor, max(height, width)
    scale = size / most if size else 1.0
    if size is None and trained:
        area = 8 * trained[0] * trained[1]
        scale = min(min(trained) / min(height, width), (area / (height * width)) ** 0.5)
        if scale * min(height, width) < least:      # the shorter side grows, so the longer one must give way
            return tuple(least if scale * side < least else min(round(scale * side), max(least, area // least))
                         for side in (height, width))
    return tuple(max(least, round(scale * side)) for side in (height, width))


def to_network(frames, size, device):
    """B frames of one size, (H,W,3) uint8 -> (B,3,*size) in [-1,1] on the device."""
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    fitted = [image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.LANCZOS)
              for image in images]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1


def precision(device):
    """In which network_maps predicts there."""
    return "bf16" if has_bf16(torch.device(device)) else "fp32"


def network_maps(model, image, next_image=None, tasks=None, rows=None):
    """model.predict in bfloat16 on GPUs that have it: (B,3,h,w) frames at the network's size -> {task: (B,C,h,w)}.

    ValueError if the memory does not suffice, and as model.predict.
    """
    try:
        with half(image.device):
            return model.predict(image, next_image, tasks, rows)
    except RuntimeError as error:
        if "allocate" not in str(error):        # so say CUDA and the CPU of a lack of memory
            raise
        count, _, height, width = image.shape
        what = f"{width}x{height} pixels" if count == 1 else f"{count} images of {width}x{height} pixels"
        remedy = less_memory("use rows=1, smaller images or a smaller batch")
        raise ValueError(f"out of memory at {what}: {remedy}") from error


def mirror_maps(model, image, next_image=None, tasks=None, rows=None):
    """As network_maps, but the network sees the frames in a mirror, and its maps are turned back."""
    frames = [None if frame is None else frame.flip(-1) for frame in (image, next_image)]
    return {t: turned(TASKS[t], x) for t, x in network_maps(model, *frames, tasks=tasks, rows=rows).items()}


def seen(maps, model, pair, tasks, rows, one_frame):
    """What network_maps or mirror_maps gives; one_frame: without the second frame to tasks that are not about it."""
    alone = [t for t in tasks if one_frame and TASKS[t].frames == 1]
    others = [t for t in tasks if t not in alone]
    out = maps(model, pair[0], tasks=alone, rows=rows) if alone else {}
    return out | (maps(model, *pair, tasks=others, rows=rows) if others else {})


def restore(x, task, size):
    """Predictions (B,C,h,w) at the network's size -> (B,C,*size) on the CPU. Flows keep their values (in any scale)."""
    x = x.float().cpu()
    if task.categorical:
        return F.interpolate(x, size, mode="nearest-exact").long()
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return F.normalize(x, dim=1, eps=1e-6) if task.dense_loss == "cosine" else x     # directions stay unit vectors


def restore_confidence(x, size):
    """(B,h,w) at the network's size -> (B,*size) on the CPU."""
    return F.interpolate(x[:, None].float().cpu(), size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def in_pixels(maps, frames, camera=None):
    """One pair's maps {task: (C,H,W)} and its frames, (H,W,3) uint8 -> (the maps, motion in pixels and, by a
    photometric.Camera, in metres where its scales are found, {task of motion: photometric.Fit})."""
    seen = [torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1) / 255 for frame in frames]
    fits = find_scales(maps, *seen, camera=camera)
    return {t: fits[t].apply(x) if t in fits else x for t, x in maps.items()}, fits


def as_array(x, task):
    """(C,H,W) -> (H,W) uint8 class ids, (H,W) float32 of one channel, or (H,W,C) float32."""
    array = np.ascontiguousarray(x.permute(1, 2, 0).numpy())
    array = array.astype(np.uint8) if task.categorical else array
    return array[..., 0] if task.channels == 1 else array


def predict(model, frames, next_frames=None, tasks=None, size=None, rows=None, confidence=False):
    """B frames, and the B after them, all of one size, (H,W,3) uint8 -> ({task: (B,C,h,w)} at the network's size,
    {task: (B,h,w)} confidence in [0,1], empty unless asked for).

    size: as in `network_size`; tasks, rows and errors: as in `network_maps`.
    """
    seen = network_size(*frames[0].shape[:2], size, model.size, model.factor)
    device = next(model.parameters()).device
    pair = [to_network(f, seen, device) for f in (frames, next_frames) if f is not None]
    maps = network_maps(model, *pair, tasks=tasks, rows=rows)
    mirror = mirror_maps(model, *pair, tasks=tasks, rows=rows) if confidence else {}
    return maps, {t: torch.stack([agreement(TASKS[t], *both) for both in zip(maps[t], x, strict=True)])
                  for t, x in mirror.items()}


def infer(model, image, next_image=None, tasks=None, size=None, rows=None, confidence=False, pixels=False, camera=None):
    """StableMTL.infer says what this takes and gives."""
    many = isinstance(image, (list, tuple))
    images, after = (list(image), next_image) if many else ([image], [next_image])
    after = [None] * len(images) if after is None else after
    if not isinstance(after, (list, tuple)) or len(after) != len(images):
        raise ValueError(f"{len(images)} images in a list need a list of as many next ones, with None where there is "
                         "none")
    if isinstance(tasks, str):
        tasks = None if tasks == "all" else parse_tasks(tasks)
    if size is not None and not (isinstance(size, Real) and 0 <= size <= LARGEST):
        raise ValueError(f"size {size!r}: expected the longer side in pixels, up to {LARGEST}, 0 for the image's own, "
                         "or None")
    if rows is not None and not (isinstance(rows, Integral) and rows >= 1):
        raise ValueError(f"rows {rows!r}: expected a whole number from 1, or None for all at once")
    if camera is not None and not pixels:
        raise ValueError("a camera is what metres of motion take: it goes with pixels=True")
    try:
        camera = None if camera is None else Camera(*camera)
    except TypeError:
        raise ValueError(f"camera {camera}: expected five numbers, focal length, cx, cy, near, far") from None
    groups, out = defaultdict(list), [{} for _ in images]
    for i, pair in enumerate(zip(images, after, strict=True)):
        frames = [read_frame(source) for source in pair if source is not None]
        check_pair(frames, f"image {i}" if many else "the image")
        groups[frames[0].shape, len(frames)].append((i, frames))
    for (shape, _), group in groups.items():
        numbers, frames = zip(*group, strict=True)
        maps, certain = predict(model, *zip(*frames, strict=True), tasks=tasks, size=size, rows=rows,
                                confidence=confidence)
        maps = {t: restore(x, TASKS[t], shape[:2]) for t, x in maps.items()}
        certain = {t: restore_confidence(x, shape[:2]).numpy() for t, x in certain.items()}
        for k, (i, seen) in enumerate(zip(numbers, frames, strict=True)):
            own, fits = {t: x[k] for t, x in maps.items()}, {}
            if pixels and len(seen) == 2:
                own, fits = in_pixels(own, seen, camera)
            out[i] = {t: as_array(x, TASKS[t]) for t, x in own.items()}
            out[i] |= {f"confidence_{t}": x[k] for t, x in certain.items()}
            out[i] |= {f"scale_{t}": found.scales for t, found in fits.items()}
    return out if many else out[0]


def check_pair(frames, name, remedy=""):
    """ValueError unless the one or two frames, (H,W,3), are of one size."""
    (h, w), (h2, w2) = frames[0].shape[:2], frames[-1].shape[:2]
    if (h, w) != (h2, w2):
        raise ValueError(f"{name} has {w}x{h} pixels and its next frame {w2}x{h2}: give frames of one size{remedy}")
