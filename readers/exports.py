"""Maps as files: which format fits a task, what its numbers mean, written and read back. Predictions and labels alike.

    npy     every task; the numbers as they are, NaN = unknown
    png16   classes: 8-bit grey, ids, 255 = unknown
            two channels: as KITTI's flow, 16-bit RGB, R, G = numbers, B = 0 unknown
            values between two bounds, one channel or three: 16-bit grey or RGB over the whole range
            other maps of one channel: 16-bit grey, 0 = unknown
    flo     two channels: Middlebury's flow, beyond 1e9 = unknown
    exr     one channel or three: OpenEXR, 32-bit, NaN = unknown

What a task needs follows from its channels, span and kind (tasks.Task). Beside <file>, but for npy, lies <file>.json:
value = stored x scale + offset, and the unit. A PNG without it is read in the usual convention: KITTI's 1/64 pixel
around 32768, bounded values over the whole range of 8 or 16 bits, else thousandths of the unit (depth: millimetres).
"""
import io
import json
import math
from pathlib import Path

import numpy as np

from checkpoint import put, read_json
from readers.formats import (
    encoded,
    exr_codec,
    flo_bytes,
    known_values,
    read_classes,
    read_exr,
    read_flo,
    read_npy,
    read_png,
)
from readers.geometry import ids_from_colours, shows_classes
from tasks import CITYSCAPES, IGNORE

FORMATS = {"npy": ".npy", "png16": ".png", "flo": ".flo", "exr": ".exr"}    # name on a command line: ending
DISPLAY = {**{colour: i for i, colour in enumerate(CITYSCAPES)}, (0, 0, 0): IGNORE}
NOTE = {"scale": float, "offset": float}


def bounded(task):
    return all(map(math.isfinite, task.span))


def fits(task, form):
    """Whether one of FORMATS can hold the maps of a tasks.Task."""
    plain = task.channels in (1, 3) and not task.categorical
    return {"npy": True, "flo": task.channels == 2, "exr": plain,
            "png16": task.channels < 3 or plain and bounded(task)}[form]


def endings(task):
    """The endings of files that may hold a map of the task: (".npy", ...)."""
    return tuple(ending for form, ending in FORMATS.items() if fits(task, form))


def parse_formats(text, tasks):
    """"npy,exr" -> ("npy", "exr"). ValueError: an unknown one, one that fits none of these tasks (tasks.Task), or
    EXR where there is no codec for it."""
    forms = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [form for form in forms if form not in FORMATS]
    if unknown or not forms:
        raise ValueError(f"unknown format {', '.join(unknown) or repr(text)}: choose from {', '.join(FORMATS)}")
    if "exr" in forms:
        exr_codec("--format exr")
    for form in forms:
        if not any(fits(task, form) for task in tasks):
            able = {task.name: [f for f in FORMATS if fits(task, f)] for task in tasks}
            able = "; ".join(f"{name} as {', '.join(names)}" for name, names in able.items())
            raise ValueError(f"format {form} fits no task asked for, which can be written so: {able}")
    return forms


def note_of(path):
    """Where the note on a file's numbers lies."""
    return Path(f"{path}.json")


# ---- writing ----

def encode(x, task, form):
    """Map of a task, (H,W,C) or of one channel (H,W), unknown pixels NaN (classes: ids, 255) -> [bytes of the file,
    but for npy those of its note]. ValueError: unknown pixels in a PNG without a mark for them."""
    scale, offset = 1.0, 0.0
    x = x.reshape(*x.shape[:2], -1)
    if task.categorical:
        x = x.astype(np.uint8)
    elif form == "png16":
        x, scale, offset = quantised(x, task)
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, x[..., 0] if task.channels == 1 else x)
        return [buffer.getvalue()]
    data = flo_bytes(x) if form == "flo" else encoded(x, FORMATS[form])
    note = {"task": task.name, "unit": task.unit, "value": "stored x scale + offset", "scale": scale, "offset": offset}
    return [data, json.dumps(note, indent=1).encode()]


def save(path, x, task, form):
    """encode(x, task, form) as path and, before it, its note."""
    data, *note = encode(x, task, form)
    if note:
        put(note_of(path), *note)
    put(path, data)


def quantised(x, task):
    """(H,W,C) -> (16-bit numbers as a PNG of the task stores them, scale, offset).

    Bounded values fill their task's range, others their own; a flow's zero is 32768, as in KITTI.
    """
    known = np.isfinite(x).all(-1, keepdims=True)
    numbers = x[known[..., 0]].astype(np.float64)
    low, high = task.span if bounded(task) else (numbers.min(initial=math.inf), numbers.max(initial=-math.inf))
    if task.channels == 2:
        scale = (np.abs(numbers).max(initial=0) or 1.0) / 32767
        offset = -32768 * scale
    elif bounded(task):
        scale, offset = (high - low) / 65535, low
        if not known.all():
            raise ValueError(f"{task.name} with unknown pixels does not fit png16, which has no mark for them: "
                             "use exr or npy")
    else:
        scale = (high - low) / 65534 if low < high else 1.0
        offset = low - scale if low <= high else 0.0    # the least value is stored as 1, unknown as 0
    stored = np.round((np.where(known, x, offset) - offset) / scale).clip(0, 65535).astype(np.uint16)
    if task.channels == 2:
        stored = np.concatenate([stored, known.astype(np.uint16)], -1)
    return stored, float(scale), float(offset)


# ---- reading ----

def decode(path, task):
    """A file that holds a map of the task -> (H,W,C) float32, unknown pixels NaN; classes uint8 ids, unknown 255.

    FileNotFoundError: it is missing; ValueError: it, or its note, is unreadable or holds something else.
    """
    ending = Path(path).suffix.lower()
    if task.categorical:
        return (whole_ids(path) if ending == ".npy" else read_ids(path))[..., None]
    if ending == ".png":
        return read_numbers(path, task)
    if ending == ".flo":
        return read_flo(path)
    x = read_exr(path, task.channels) if ending == ".exr" else read_npy(path, task.channels)
    x = x.astype(np.float32, copy=False)
    return x if bounded(task) else known_values(x)


def read_numbers(path, task):
    """A PNG of numbers -> (H,W,C) float32, as told at the top."""
    full = bounded(task) and task.channels != 2
    raw = read_png(path, "uint8 uint16" if full else "uint16", 1 if task.channels == 1 else 3)
    raw = raw.reshape(*raw.shape[:2], -1)
    low, high = task.span
    if note_of(path).is_file():
        note = read_json(note_of(path), "", NOTE, "write it again, or delete it if the numbers are as usual")
        scale, offset = note["scale"], note["offset"]
    elif task.channels == 2:
        scale, offset = 1 / 64, -512.0
    else:
        scale, offset = ((high - low) / np.iinfo(raw.dtype).max, low) if full else (1 / 1000, 0.0)
    x = (raw[..., :task.channels] * np.float64(scale) + offset).astype(np.float32)
    if full:
        return x
    return np.where(raw[..., -1:] > 0, x, np.float32(np.nan))


def read_ids(path):
    """A PNG of classes -> (H,W) uint8 ids, 255 = unknown. What the PNG holds decides. Grey of any depth: ids. RGB:
    display colours, black = unknown. A palette: its colours if they are display colours, otherwise its indices are ids.
    Transparent = unknown. ValueError names an id or a colour of no class."""
    ids, rgb, opaque = read_classes(path)
    if ids is None or (rgb is not None and shows_classes(rgb, DISPLAY)):
        ids = ids_from_colours(np.where(opaque[..., None], rgb, np.uint8(0)), DISPLAY, path)
    return checked_ids(np.where(opaque, ids, IGNORE), path)


def whole_ids(path):
    """An array of class ids, whole numbers of any dtype -> (H,W) uint8."""
    return checked_ids(read_npy(path, 1)[..., 0], path)


def checked_ids(ids, path):
    for wrong in np.setdiff1d(ids, [*range(len(CITYSCAPES)), IGNORE]):
        raise ValueError(f"{path} holds the id {wrong}: expected class ids 0..{len(CITYSCAPES) - 1}, {IGNORE} for "
                         "ignore, or the display colours of the classes")
    return ids.astype(np.uint8)
