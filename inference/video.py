"""Clips: the maps of successive frames as MP4 films, in colours that hold over the whole clip, and their flicker.

The arrays are on disk, so each clip is read twice, frame by frame: once for the scale of the colours, once for the
films. Memory does not grow with its length.

Flicker of a task: the difference, as confidence.difference has it (0 = none, 1 = all is different), of each map and the
next one warped back by the motion between the frames, averaged over the pixels that stay in the image, then over pairs
of frames. The motion is the predicted optical flow in the scales that the two frames tell (photometric.py);
pairs that do not tell them are left out, and without optical flow nothing is warped.
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from checkpoint import digest
from draw import cell, draw_panel
from inference.confidence import difference
from inference.photometric import Flow, fit, warp
from readers.media import frame_rate
from tasks import MOTION, TASKS

FPS = 10.0      # where the input does not say
CLOCK = 65535   # MPEG-4's limit: 66.67 frames per second are 6667 in 100 seconds, 66.667 would be 66667
STEADY = 90     # per cent of the frames whose colours may not saturate
NO_FILM = "nothing to film: --video takes three frames or more, numbered images in a folder, or a video"


# ---- one frame on disk ----

def read_map(folder, name):
    """<folder>/<name>.npy -> (C,H,W) tensor, or None if there is none: the last frame of a clip has no motion."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        return None
    array = torch.from_numpy(np.load(path))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def _known(x):
    return torch.ones(x.shape[1:], dtype=torch.bool)


def clip_scale(task, maps):
    """One scale for the colours of many maps (C,H,W): each end is such that most frames (STEADY) reach no further."""
    scales = [task.scale(x, _known(x)) for x in maps if x is not None]
    parts = zip(*scales, strict=True)
    ends = [np.percentile(np.array(part), (100 - STEADY, STEADY), axis=0) for part in parts]
    return tuple((float(e[0, 0]), float(e[1, 1])) for e in ends)


# ---- films ----

class Film:
    """An MP4 file (MPEG-4 part 2, by OpenCV) that grows by pictures of one size, (H,W,3) uint8; complete after close().

    OSError if OpenCV cannot write it, or the disk is full. The file has another name until then.
    """

    def __init__(self, path, fps):
        self.path, self.fps, self.frames, self.writer = path, fps, 0, None
        self.temporary = path.with_name(f"{path.stem}.tmp.mp4")

    def add(self, picture):
        import cv2
        height, width = picture.shape[:2]
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")    # its format wants even sides
        if self.writer is None:
            size, rate = picture.shape[1::-1], told_rate(self.fps)
            self.writer = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        self.writer.write(picture[..., ::-1])       # OpenCV's channels are BGR
        self.frames += 1

    def close(self):
        """OpenCV is silent about what it cannot write: count what can be read."""
        import cv2
        self.writer.release()
        self.writer, seen = None, cv2.VideoCapture(str(self.temporary))
        if int(seen.get(cv2.CAP_PROP_FRAME_COUNT)) != self.frames:
            raise OSError(f"{self.path} cannot be written: make room, name another --fps, or check that OpenCV can "
                          "write MP4")
        os.replace(self.temporary, self.path)

    def abandon(self):
        if self.writer is not None:
            self.writer.release()
        self.temporary.unlink(missing_ok=True)


def told_rate(fps):
    """Frames per second with as many decimals as MPEG-4 can tell."""
    return round(fps, max(0, int(math.log10(CLOCK / fps))))


@contextmanager
def films(folder, names, fps):
    """{name: Film of folder/<name>.mp4}; those that got pictures are complete afterwards, none is left half-written."""
    reels = {name: Film(folder / f"{name}.mp4", fps) for name in names}
    try:
        yield reels
        for film in reels.values():
            if film.frames:
                film.close()
    finally:
        for film in reels.values():
            film.abandon()


def enlarged(picture):
    """A small picture enlarged as in panels, a large one as it is."""
    return picture if max(picture.shape[:2]) > 288 else np.asarray(cell(picture))


# ---- flicker ----

class Flicker:
    """add() the frames of a clip in turn, then figures() -> ({task: flicker}, pairs of frames that counted, of how
    many)."""

    def __init__(self):
        self.sums, self.pairs, self.before = {}, 0, None

    def add(self, frame, maps):
        """frame (H,W,3) uint8 and its maps {task: (C,H,W)}."""
        frame = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1) / 255
        if self.before is not None:
            self.pairs += 1
            motion = _motion(*self.before, frame)
            if motion is not None:
                for t in maps.keys() & self.before[1].keys():
                    self.sums.setdefault(t, []).append(changed(TASKS[t], self.before[1][t], maps[t], motion))
        self.before = frame, maps

    def figures(self):
        counted = max(map(len, self.sums.values()), default=0)
        return {t: fmean(self.sums[t]) for t in TASKS if t in self.sums}, counted, self.pairs


def _motion(frame, maps, after):
    """(2,H,W) pixels from one frame to the next, zero if no flow is predicted, None if its scales are not found."""
    flows = [x for t, x in maps.items() if TASKS[t].geometry == MOTION]
    if not flows:
        return torch.zeros(2, *frame.shape[1:])
    found = fit(frame, after, Flow(flows[0]))
    return found.apply(flows[0]) if found.scales else None


def changed(task, now, later, motion):
    """Mean difference, in [0,1], of a map (C,H,W) and the later one warped back by a motion (2,H,W) in pixels."""
    seen, inside = warp(later[None].float(), motion[None], "nearest" if task.categorical else "bilinear")
    return difference(task, now.float(), seen[0])[inside[0]].mean().item() if inside.any() else 0.0


# ---- clips ----

def write_clip(folder, frames, places, tasks, fps, unknown=()):
    """Films of one clip: <folder>/<task>.mp4 for each task and panel.mp4, all maps beside the frame.

    frames: its frames in turn, (H,W,3) uint8; places: the folders that hold their maps; unknown: (place, task) whose
    motion is in no unit, although that of the others is: drawn black. -> Flicker.figures()
    """
    tasks, flicker = [t for t in tasks if any((p / f"{t}.npy").is_file() for p in places)], Flicker()
    scales = {t: clip_scale(TASKS[t], (read_map(p, t) for p in places if (p, t) not in unknown)) for t in tasks}
    folder.mkdir(parents=True, exist_ok=True)
    with films(folder, [*tasks, "panel"], fps) as reels:
        for frame, place in zip(frames, places, strict=True):
            maps, cells = {t: read_map(place, t) for t in tasks}, [("image", cell(frame))]
            maps = {t: x for t, x in maps.items() if x is not None}
            for t in tasks:
                if t not in maps:
                    cells.append(None)
                    continue
                shown = _known(maps[t]) & ((place, t) not in unknown)
                picture = TASKS[t].colour(maps[t], shown, scales[t])
                reels[t].add(enlarged(picture))
                cells.append((t, cell(picture)))
            reels["panel"].add(np.asarray(draw_panel(cells, 4, [TASKS[t] for t in tasks])))
            flicker.add(frame, maps)
    return flicker.figures()


@dataclass(frozen=True)
class Place:
    """Where the maps of one input are: its folder, None if there are none; whether the next input follows it; the path
    of the video it is a frame of, or ""."""
    folder: Path | None
    linked: bool
    video: str


def runs(places):
    """[(first, last + 1), ...]: the inputs split into runs of those that have maps and follow one another."""
    cuts = [k for k, (a, b) in enumerate(pairwise(places), 1) if not (a.linked and a.folder and b.folder)]
    return list(pairwise([0, *cuts, len(places)]))


def check_film(inputs, tasks):
    """ValueError if none of the inputs (sample.Input) has a map of these tasks that follows one of the input before."""
    still = any(TASKS[t].frames == 1 for t in tasks)
    if not any(now.next and (after.next or still) for now, after in pairwise(inputs)):
        raise ValueError(NO_FILM)


def clip_name(first, last):
    """Of the folder of a clip of images; a checksum instead, where that is longer than file systems take."""
    name = f"{first}_to_{last}"
    return name if len(os.fsencode(name)) <= 255 else f"film_{digest([first, last])}"


def unscaled(folders):
    """{(folder, task)} whose motion has no unit although that of other frames has: of scales.json, if there are any."""
    notes = {f: json.loads((f / "scales.json").read_text()) for f in folders if (f / "scales.json").is_file()}
    known = {t for note in notes.values() for t, found in note.items() if found["scales"]}
    return {(f, t) for f, note in notes.items() for t, found in note.items() if t in known and not found["scales"]}


def write_clips(output, places, inputs, tasks, fps=None, stride=1):
    """Films of every run of frames, and a line about each: where it is, and how much its tasks flicker.

    output: folder of the clips of single images; places: a Place per input; inputs: the same in turn, with `image`,
    which reads the frame; fps: default that of the video, of which they are every stride-th frame, else FPS.
    ValueError if no frame follows another.
    """
    parts, inputs = runs(places), iter(inputs)
    if max(b - a for a, b in parts) < 2:
        raise ValueError(NO_FILM)
    for first, end in parts:
        if end - first == 1:
            next(inputs)
            continue
        folders, video = [place.folder for place in places[first:end]], places[first].video
        frames = (item.image() for item in islice(inputs, end - first))
        folder = folders[0].parent if video else output / clip_name(folders[0].name, folders[-1].name)
        own = frame_rate(Path(video)) if video else None
        rate = fps or (own / stride if own else FPS)
        flicker, counted, pairs = write_clip(folder, frames, folders, tasks, rate, unscaled(folders))
        told = ", ".join(f"{t} {x:.3f}" for t, x in flicker.items()) or "unknown, no motion between frames is"
        print(f"{end - first} frames, in {folder / 'panel.mp4'}; flicker over {counted} of {pairs} pairs: {told}")
