"""One folder per input: its pictures and arrays, the panel that shows them all, and when that is finished.

made_from.json comes first, with the input alone, and last: with fingerprint and names of the files, too. Without these
nothing in the folder counts; without it the folder is somebody else's, and stays as it is.
"""
import io
import json
import os
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import digest, put, read_json
from draw import COMPARED, cell, compare, draw_attention, draw_panel
from inference.infer import as_array
from metrics import aligned
from readers.exports import FORMATS, fits, save
from tasks import TASKS

MADE_FROM = {"input": str, "key": (None, str), "files": (None, [str])}


def made_from(folder):
    """What `write` noted in a folder: (input, key, names of the files); None, None and none if nothing is legible."""
    note = {}
    with suppress(OSError, ValueError):
        note = read_json(folder / "made_from.json", "", MADE_FROM)
    return note.get("input"), note.get("key"), set(note.get("files") or ())


def own_folder(output, item, taken):
    """The folder of an Input: <output>/<name>, or <name>-2, ... where that is another's; taken: {folder: source}."""
    for n in count(1):
        top = output / (item.name if n == 1 else f"{item.name}-{n}")
        if top not in taken:
            taken[top] = (made_from(top)[0] or item.source) if _free(top) else None
        if taken[top] == item.source:
            return top / item.frame


def _free(top):
    """Whether nothing is there yet but what `write` makes."""
    if not top.is_dir():
        return not os.path.lexists(top)
    return (top / "made_from.json").is_file() or not any(top.iterdir())


def _claim(folder, item):
    """Note whose folder it is, before anything else is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    put_json(folder / "made_from.json", {"input": item.source})


@cache
def _tell_replaced(output):
    """Say, once for all inputs, that maps in this folder make room for others."""
    tqdm.write(f"notice: maps in {output} were made by other settings or another checkpoint, or of other frames; new "
               "ones replace them, and all that came with them (confidence, scales, attention, a video's films) goes: "
               "another --output keeps both", file=sys.stderr)


def fingerprint(frames, settings):
    """Eight hexadecimal digits for what maps follow from."""
    return digest([settings, [(f.shape, zlib.crc32(np.ascontiguousarray(f))) for f in frames]])


def finished(folder, key, files):
    """Are these files there, made with this fingerprint?"""
    _, before, there = made_from(folder)
    return before == key and all(f in there and (folder / f).is_file() for f in files)


def put_made(path, save, *args):
    """What save(file, *args) writes."""
    buffer = io.BytesIO()
    save(buffer, *args)
    put(path, buffer.getvalue())


def put_json(path, value):
    put(path, json.dumps(value, indent=1).encode())


def array_name(task, form):
    """The file of a map in one of exports.FORMATS: <task>.png is its picture already."""
    return f"{task}.values.png" if FORMATS[form] == ".png" else f"{task}{FORMATS[form]}"


def array_files(tasks, forms):
    """Names of the arrays of these tasks, where a form fits."""
    return [array_name(t, form) for t in tasks for form in forms if fits(TASKS[t], form)]


@dataclass
class Result:
    """Of one input, at the size of its frames: maps {task: (C,H,W)}, confidence {task: (H,W)} and the scales of motion
    {task: photometric.Fit} where they are asked for, and the attention table."""
    maps: dict
    confidence: dict
    fits: dict
    attention: dict | None


def write(folder, item, key, frames, result, forms=("npy",)):
    """The Result of a sample.Input with its frames, 1 or 2 of (H,W,3) uint8. forms: of the arrays, of exports.FORMATS.

    Maps of another input, checkpoint or other settings do not stay, and a notice on stderr says so.
    """
    (_, before, there), size = made_from(folder), frames[0].shape[:2]
    arrays = array_files(TASKS, FORMATS)
    ours = {"panel.png", "attention.png", "attention.json", "scales.json", *(f"{t}.png" for t in TASKS), *arrays,
            *(f"{name}.json" for name in arrays), *(f"confidence_{t}.{end}" for t in TASKS for end in ("png", "npy"))}
    files = ours & there if before == key else set()
    if item.frame:      # the frames' common folder belongs to this video, too
        _claim(folder.parent, item)
    _claim(folder, item)
    if before not in (None, key):
        _tell_replaced(folder.parent.parent if item.frame else folder.parent)
        for name in (*TASKS, "panel") if item.frame else ():
            (folder.parent / f"{name}.mp4").unlink(missing_ok=True)
    for name in ours - files:
        (folder / name).unlink(missing_ok=True)
    cells = [(name, cell(f)) for name, f in zip(("image", "second frame"), frames, strict=False)]
    columns, everywhere = 4 if bool(item.truth) != bool(result.confidence) else 3, torch.ones(size, dtype=torch.bool)
    if result.confidence:       # each map has it on its right
        cells += [None] * ((3 if item.truth else 2) - len(cells))
    for t, x in result.maps.items():
        scaled = t in result.fits and result.fits[t].scales
        task = replace(TASKS[t], unit=result.fits[t].unit) if scaled else TASKS[t]
        picture = task.colour(x, everywhere)
        put_made(folder / f"{t}.png", Image.fromarray(picture).save, "PNG")
        for form in (form for form in forms if fits(task, form)):
            save(folder / array_name(t, form), as_array(x, task), task, form)
        if item.truth:
            label, valid = torch.zeros_like(x), ~everywhere     # a task that the toy worlds lack
            if t in item.truth["labels"]:
                label = torch.from_numpy(item.truth["labels"][t]).permute(2, 0, 1)
                valid = torch.from_numpy(item.truth["valid"][t])
            cells += compare(task, label, valid, aligned(task, x, label, valid))
        else:
            cells.append((f"{t}, {task.tell(x, everywhere)}" if scaled else t, cell(picture)))
        if t in result.confidence:
            certain = result.confidence[t]
            picture = (255 * certain).round().byte().numpy()
            put_made(folder / f"confidence_{t}.png", Image.fromarray(picture).save, "PNG")
            put_made(folder / f"confidence_{t}.npy", np.save, certain.numpy())
            cells.append((f"{t}, confidence", cell(picture)))
    if result.fits:
        scales = read_json(folder / "scales.json", "") if "scales.json" in files else {}
        scales |= {t: {"scales": f.scales, "why": f.why} for t, f in result.fits.items()}
        put_json(folder / "scales.json", scales)
    if result.attention:
        put_json(folder / "attention.json", result.attention)
        put_made(folder / "attention.png", draw_attention(result.attention).savefig)
    note = " ".join([COMPARED] * bool(item.truth) + ["Confidence: white is sure."] * bool(result.confidence))
    panel = draw_panel(cells, columns, [TASKS[t] for t in result.maps], note)
    put_made(folder / "panel.png", panel.save, "PNG")
    files = sorted(files | {name for name in ours if (folder / name).is_file()})
    put_json(folder / "made_from.json", {"input": item.source, "key": key, "files": files})
