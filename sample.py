"""Predict every map of photos, pairs of frames, folders, animations and videos: pictures to look at, arrays to compute with.

    python sample.py --ckpt out/ photo.jpg                 one image; the tasks about motion need a second frame and are skipped
    python sample.py --ckpt out/ photo.jpg next.jpg        two images: a frame and the one after it
    python sample.py --ckpt out/ a.png b.png c.png ...     three or more images: the frames of one sequence, in this order
    python sample.py --ckpt out/ folder/                   numbered files (x_07.png, x_08.png) are frames of a sequence, others single images
    python sample.py --ckpt out/ clip.mp4 --stride 2       a video or an animated GIF: its frames are a sequence
    python sample.py --toy real:3                          a sample of a toy world's test split, labels beside predictions

Each frame of a sequence is paired with the next one; the last has none, so its motion is skipped. --single: nothing is a sequence.
Each input gets a folder <output>/<file name without ending>/ (a video: one per frame, <output>/<name>/<frame number>/) with
<task>.png, <task>.npy and panel.png, which shows all of it. A finished input is not computed again unless --overwrite is given.
"""
import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from model import StableMTL
from tasks import TASKS, parse_tasks
from toyworld import ToyWorld

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
FONT = ImageFont.load_default(13)


# ---- reading ----

@contextmanager
def _reading(path):
    """Whatever Pillow stumbles over becomes one sentence that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is too large to be read safely: shrink it first ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow knows: convert it to PNG or JPEG") from error
    except Exception as error:  # decoders of damaged files raise anything from SyntaxError to IndexError
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


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
    try:
        while video.grab():
            if i % stride == 0:
                yield i, cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
            i += 1
    finally:
        video.release()
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


def _moving(path):
    """None for a folder or still image, else the function that reads the frames of this file."""
    if path.suffix.lower() in VIDEOS:
        return read_video
    if path.suffix.lower() in (".gif", ".webp", ".png") and path.stat().st_size:
        with _reading(path), Image.open(path) as image:
            return read_animation if getattr(image, "n_frames", 1) > 1 else None
    return None


def _runs(folder):
    """The images of a folder in natural order, split where a file's number does not follow its predecessor's: a list of lists of paths."""
    split = lambda p: re.split("([0-9]+)", p.stem.lower())
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.is_file() and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: expected files that end in {', '.join(IMAGES)}")
    runs = []
    for path in sorted(paths, key=lambda p: ([int(x) if x.isdigit() else x for x in split(p)], p.name)):
        *stem, number, tail = ["", *split(path)][-len(split(path)) - (len(split(path)) < 2):]
        ...
    return runs
