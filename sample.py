"""Predict every map of photos, pairs of frames, folders, animations and videos: pictures to look at, arrays to compute with.

    python sample.py --ckpt out/ photo.jpg                 one image; the tasks about motion need a second frame and are skipped
    python sample.py --ckpt out/ photo.jpg next.jpg        two images: a frame and the one after it
    python sample.py --ckpt out/ a.png b.png c.png ...     three or more images: the frames of one sequence, in this order
    python sample.py --ckpt out/ folder/                   numbered files (x_07.png, x_08.png) are frames of a sequence, others are alone
    python sample.py --ckpt out/ clip.mp4 --stride 2       a video or an animated GIF: its frames are a sequence
    python sample.py --toy real:3                          a sample of a toy world's test split, labels beside predictions

Each frame of a sequence is paired with the next one; the last has none, so its motion is skipped. --single: nothing is a sequence.
Each input gets a folder <output>/<file name without ending>/ (a video: one per frame, <output>/<name>/<frame number>/) with
<task>.png, <task>.npy and panel.png, which shows all of it. A finished input is not computed again unless --overwrite is given.
"""
import argparse
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from checkpoint import read_json, write_json
from cli import Parser, parse_device, run, whole
from draw import COMPARED, attention_table, cell, compare, draw_attention, draw_panel
from evaluate import aligned
from model import StableMTL
from readers.toyworld import WORLDS, ToyWorld
from tasks import CLASSES, TASKS, parse_tasks

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")


# ---- reading ----

@contextmanager
def _reading(path):
    """Whatever Pillow stumbles over becomes one sentence that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # decoders of damaged files raise anything from SyntaxError to IndexError
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG of at most {limit} pixels") from error


def _rgb(image):
    """A Pillow image of any mode, upright -> (H,W,3) uint8. Transparent parts are put on white; 16-bit grey is divided by 257."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels are neither 8-bit nor 16-bit")
        return np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, 2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def read_image(path):
    """An image file of any mode that Pillow reads -> (H,W,3) uint8 RGB, turned upright by its EXIF tag; of an animation the first frame.

    FileNotFoundError if there is no such file; ValueError, naming it, if it is empty, damaged, no image, or dangerously large.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}: check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): fetch or save it again")
    with _reading(path), Image.open(path) as image:
        return _rgb(image)


def read_animation(path, stride=1):
    """Every stride-th frame of an animated image: yields (number, (H,W,3) uint8)."""
    with _reading(path):
        image = Image.open(path)
    with image:
        for i in range(0, image.n_frames, stride):
            with _reading(path):
                image.seek(i)
                frame = _rgb(image)
            yield i, frame


def read_video(path, stride=1):
    """Every stride-th frame of a video, decoded as it is asked for: yields (number, (H,W,3) uint8). ValueError if it has none."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")   # the sentence below says what matters
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"reading the video {path} needs OpenCV: pip install opencv-python-headless") from error
    video, i = cv2.VideoCapture(str(path)), 0
    while (frame := video.read()[1]) is not None:
        if i % stride == 0:
            yield i, frame[..., ::-1].copy()    # OpenCV's channels are BGR
        i += 1
    if i == 0:
        raise ValueError(f"{path} cannot be decoded as a video: convert it to MP4 (H.264), or give its frames as a folder of images")


# ---- what there is to predict ----

@dataclass
class Input:
    """One frame, and the next one where there is one: functions without arguments that read them, so that a list of inputs is small."""
    name: str                          # folder below --output
    image: Callable                    # () -> (H,W,3) uint8
    next: Callable | None = None       # the same
    truth: dict | None = None          # "labels" and "valid" of a toy sample


def _sequence(frames, linked=True):
    """(name, read) of frames in order -> an Input each; where `linked`, with the frame after it."""
    frames = iter(frames)
    now = next(frames, None)
    while now is not None:
        after = next(frames, None)
        yield Input(*now, after[1] if linked and after else None)
        now = after


def _named(stem, frames):
    """(number, array) of a video -> (name, read) as _sequence takes them."""
    for i, frame in frames:
        yield f"{stem}/{i:06d}", lambda frame=frame: frame


def _moving(path):
    """None for a folder or still image, else the function that reads the frames of this file."""
    if path.suffix.lower() in VIDEOS:
        return read_video
    if path.suffix.lower() in (".gif", ".webp", ".png") and path.stat().st_size:
        with _reading(path), Image.open(path) as image:
            return read_animation if getattr(image, "n_frames", 1) > 1 else None
    return None


def _runs(folder):
    """Images of a folder in natural order, as lists: numbered files that follow one another share a list, any other file is alone."""
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.is_file() and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: expected files that end in {', '.join(IMAGES)}")
    natural = lambda p: ([int(x) if x.isdecimal() else x for x in re.split("([0-9]+)", p.stem.lower())], p.name)
    runs, expected = [], None
    for path in sorted(paths, key=natural):
        stem, number = re.fullmatch("(.*?)([0-9]*)", path.stem, re.DOTALL).groups()
        if number and (stem, int(number)) == expected:
            runs[-1].append(path)
        else:
            runs.append([path])
        expected = (stem, int(number) + 1) if number else None
    return runs


def find(paths, single=False, stride=1):
    """An Input for everything the paths name (rules: top of this file): a list, or an iterator if a video or animation is among them.

    FileNotFoundError if a path does not exist or a folder holds no image.
    """
    paths = [Path(p) for p in paths]
    for p in paths:
        if not p.exists():
            raise FileNotFoundError(f"no file or folder {p}: check the path")
    read = lru_cache(2)(read_image)     # a pair's second frame is the next pair's first
    still, moving = lambda p: (p.stem, partial(read, p)), [None if p.is_dir() else _moving(p) for p in paths]
    if not single and not any(moving) and not any(p.is_dir() for p in paths):
        if len(paths) == 2:
            return [Input(*still(paths[0]), still(paths[1])[1])]
        return list(_sequence(map(still, paths[::stride])))
    parts = []
    for p, frames in zip(paths, moving):
        if frames:
            parts.append(_sequence(_named(p.stem, frames(p, stride)), not single))
        else:
            parts += [_sequence(map(still, run[::stride]), not single) for run in (_runs(p) if p.is_dir() else [[p]])]
    inputs = chain.from_iterable(parts)
    return inputs if any(moving) else list(inputs)


def toy(text):
    """"real:3" -> the Input of that sample of the toy world's test split, with all labels."""
    name, _, index = text.partition(":")
    world = ToyWorld(name, "test", all_labels=True)
    if not index.isdecimal() or int(index) >= len(world):
        raise ValueError(f"--toy {text}: expected world:number with a number from 0 to {len(world) - 1}, for example {name}:3")
    sample = world.load(int(index), world.tasks)
    return Input(f"{name}-{index}", lambda: sample["image"], lambda: sample["next"], sample)


# ---- from frames to maps ----

def network_size(height, width, size, trained, factor):
    """(H, W) at which the network sees an image of height x width.

    size: its longer side, 0 = as it is, None = the shorter side becomes that of `trained` (H, W), as long as the area stays below 8
    times the trained one. Each side gets at least 8 latent cells (one cell of the UNet's coarsest level), even if that distorts.
    """
    if size == 0 or (size is None and trained is None):
        scale = 1.0
    elif size:
        scale = size / max(height, width)
    else:
        scale = min(min(trained) / min(height, width), (8 * trained[0] * trained[1] / (height * width)) ** 0.5)
    return tuple(max(8 * factor, round(scale * side)) for side in (height, width))


def to_network(array, size, device):
    """(H,W,3) uint8 -> (1,3,*size) in [-1,1]."""
    image = Image.fromarray(array)
    image = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1


def restore(x, task, size):
    """A prediction (1,C,h,w) at the network's size -> (C,*size) on the CPU. Values are kept: flow in pixels is known up to scale anyway."""
    x = x.float().cpu()
    if task.categorical:
        return F.interpolate(x, size, mode="nearest-exact")[0].long()
    x = F.interpolate(x, size, mode="bilinear", antialias=True)[0]
    return F.normalize(x, dim=0, eps=1e-6) if task.dense_loss == "cosine" else x     # directions stay unit vectors


def read_frames(item):
    """[image] or [image, next] of an Input, each (H,W,3) uint8. ValueError if one cannot be read or they differ in size."""
    frames = [read() for read in (item.image, item.next) if read]
    if frames[0].shape != frames[-1].shape:
        (h, w), (h2, w2) = (f.shape[:2] for f in frames)
        raise ValueError(f"{item.name} has {w}x{h} pixels and its next frame {w2}x{h2}: give frames of one size (or --single)")
    return frames


def predict(model, frames, tasks, args, trained):
    """({task: (1,C,h,w) native prediction at the network's size}, attention table or None). ValueError if GPU memory does not suffice."""
    size = network_size(*frames[0].shape[:2], args.size, trained, model.factor)
    model.attention_log = [] if args.attention else None
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device.type == "cuda"):
            maps = model.predict(*[to_network(f, size, args.device) for f in frames], tasks=tasks, rows=args.rows)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory at {size[1]}x{size[0]} pixels: use --rows 1, or a smaller --size") from error
    return maps, attention_table(model.attention_log, model.tasks) if args.attention else None


# ---- what is written ----

def write(folder, frames, maps, truth=None, table=None):
    """frames: 1 or 2 of (H,W,3) uint8; maps: {task: (1,C,h,w)}; truth: sample with labels; table: attention. panel.png comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "panel.png").unlink(missing_ok=True)      # until all is new, this input is not finished
    size, cells = frames[0].shape[:2], [(name, cell(f)) for name, f in zip(("image", "second frame"), frames)]
    for t, x in maps.items():
        x = restore(x, TASKS[t], size)
        picture = TASKS[t].colour(x, torch.ones(size, dtype=torch.bool))
        array = np.ascontiguousarray(x.permute(1, 2, 0).numpy())
        Image.fromarray(picture).save(folder / f"{t}.png")
        np.save(folder / f"{t}.npy", array[..., 0].astype(np.uint8) if TASKS[t].categorical else array)
        if truth:
            label, valid = torch.from_numpy(truth["labels"][t]).permute(2, 0, 1), torch.from_numpy(truth["valid"][t])
            cells += compare(TASKS[t], label, valid, aligned(TASKS[t], x, label, valid))
        else:
            cells.append((t, cell(picture)))
    if table:
        write_json(folder / "attention.json", table)
        draw_attention(table).savefig(folder / "attention.png")
    tasks, note = [TASKS[t] for t in maps], COMPARED if truth else ""
    draw_panel(cells, 4 if truth else 3, tasks, note).save(folder / "panel.png.tmp", "PNG")
    os.replace(folder / "panel.png.tmp", folder / "panel.png")


# ---- command line ----

def parse(argv):
    kind = lambda t: "(H,W) uint8" if t.categorical else f"(H,W,{t.channels}) float32"
    units = "\n".join(f"  {t.name + '.npy':18}{kind(t):17}{t.unit}" for t in TASKS.values())
    classes = ", ".join(f"{i} {c}" for i, c in enumerate(CLASSES))
    parser = Parser(description=__doc__, epilog=f"arrays, at the size of the input:\n{units}\nclasses: {classes}",
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="path", help="images, folders, videos, animations")
    parser.add_argument("--toy", metavar="WORLD:N", help=f"sample N of the test split of a toy world: {', '.join(WORLDS)}")
    parser.add_argument("--ckpt", default="out", help="folder written by train.py (default: %(default)s)")
    parser.add_argument("--output", default="samples", help="where the results go (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="compute finished inputs again")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="which stage of the checkpoint (default: 2 where it exists)")
    parser.add_argument("--tasks", default="all", help="comma-separated (default: all that the checkpoint knows)")
    parser.add_argument("--single", action="store_true", help="the images or frames are unrelated: no second frames")
    parser.add_argument("--stride", type=whole(1), default=1, help="use every STRIDE-th frame of a sequence (default: 1)")
    parser.add_argument("--limit", type=whole(1), help="at most this many inputs")
    parser.add_argument("--size", type=whole(0), help="longer side in pixels that the network sees; 0 = the input's own "
                        "(default: the shorter side as in training); smaller is faster and needs less memory")
    parser.add_argument("--rows", type=whole(1), help="tasks that pass the UNet at once (default: all); 1 needs least memory, same results")
    parser.add_argument("--vae-slicing", action="store_true", help="decode one map at a time: less memory, same results")
    parser.add_argument("--vae-tiling", action="store_true", help="encode and decode large images in overlapping tiles: much less memory, faint seams")
    parser.add_argument("--device", default="auto", help="cpu, or cuda (in bfloat16; default: where there is one)")
    parser.add_argument("--attention", action="store_true", help="also write attention.png, .json: which tasks a task attends to (stage 2)")
    parser.add_argument("--skip-bad", action="store_true", help="name, skip and count unreadable inputs instead of stopping at the first")
    return parser.parse_args(argv)


def load(args):
    """The model, the tasks asked for, and the (H, W) it was trained at (None if the checkpoint does not say)."""
    args.device = parse_device(args.device)
    wanted, model = parse_tasks(args.tasks), StableMTL.load(args.ckpt, args.stage, args.device)
    tasks = [t for t in model.tasks if t in wanted]
    if args.tasks != "all" and len(tasks) < len(wanted):
        raise ValueError(f"--tasks {args.tasks}: the checkpoint in {args.ckpt} knows only {', '.join(model.tasks)}")
    if args.attention and model.main is None:
        raise ValueError(f"--attention needs stage 2, and stage 1 was loaded from {args.ckpt}: train it, or drop --stage 1")
    if args.vae_slicing:
        model.vae.enable_slicing()
    if args.vae_tiling:
        model.vae.enable_tiling()
    config = Path(args.ckpt) / "config.json"    # absent beside imported weights
    return model, tasks, read_json(config, "").get("size") if config.is_file() else None


def main(argv=None):
    """Predict what the command line names. Returns 130 if stopped by Ctrl-C, else 0; ValueError, FileNotFoundError: a user's mistake."""
    args = parse(argv)
    if bool(args.paths) == bool(args.toy):
        raise ValueError("nothing to predict, or too much: give images, folders or a video, or else --toy real:3")
    inputs = [toy(args.toy)] if args.toy else find(args.paths, args.single, args.stride)
    inputs = inputs[:args.limit] if isinstance(inputs, list) else islice(inputs, args.limit)
    model, asked, trained = load(args)
    output, names, tally = Path(args.output), set(), Counter()
    bar = tqdm(inputs, unit="input", disable=None)
    try:
        for item in bar:
            name = next(n for n in chain([item.name], (f"{item.name}-{k}" for k in count(2))) if n not in names)    # a/1.png and b/1.png
            names.add(name)
            tasks, folder = [t for t in asked if TASKS[t].frames == 1 or item.next], output / name
            files = ["panel.png", *(f"{t}.npy" for t in tasks), *(["attention.json"] if args.attention else [])]
            if not tasks or not args.overwrite and all((folder / f).is_file() for f in files):
                tally["kept" if tasks else "motionless"] += 1
                continue
            try:
                frames = read_frames(item)
            except ValueError as error:
                if not args.skip_bad:
                    raise
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                tally["bad"] += 1
                continue
            maps, table = predict(model, frames, tasks, args, trained)
            write(folder, frames, maps, item.truth, table)
            tally["done"] += 1
            tally["motionless"] += len(tasks) < len(asked)
    except KeyboardInterrupt:
        finished = tally["done"] + tally["kept"]
        print(f"\nstopped: {finished} finished in {output}; the same command without --overwrite does the rest", file=sys.stderr)
        return 130
    finally:
        bar.close()
    motion = ", ".join(t for t in asked if TASKS[t].frames == 2)
    if not tally["done"] + tally["kept"] + tally["bad"]:
        raise ValueError(f"nothing to predict: {motion} need a second frame and no input has one; give two images, a sequence or a video")
    print(f"{tally['done']} predicted, in {output}" + (f"/{name}/panel.png" if len(names) == 1 and not tally["bad"] else ""))
    for key, text in (("kept", "already finished, kept (--overwrite computes them again)"), ("bad", "unreadable, skipped"),
                      ("motionless", f"without a second frame: {motion} skipped")):
        if tally[key]:
            print(f"{tally[key]} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
