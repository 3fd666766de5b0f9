"""Photos, animations and videos, as cameras and the web make them. (Files of datasets: formats.py.)"""
import os
import warnings
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif")
ANIMATIONS = (".gif", ".webp", ".png", ".avif")     # of these, some
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")


@contextmanager
def _reading(path):
    """Whatever Pillow stumbles over becomes one sentence that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of odd but harmless metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # decoders of damaged files raise anything from SyntaxError to IndexError
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"{path} cannot be read as an image ({error}): "
                         f"give a PNG or JPEG of at most {limit} pixels") from error


# EXIF's orientation -> what turns the picture upright
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def _upright(image):
    """The image as a viewer shows it. Pillow's own exif_transpose writes all of EXIF anew, and fails at odd entries."""
    turn = None
    with suppress(Exception):   # metadata that does not parse turns nothing
        turn = TURNS.get(image.getexif().get(0x0112))
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """A Pillow image of any mode -> upright (H,W,3) uint8. What is transparent is put on white; 16 bits become 8.
    ValueError for pixels of other kinds."""
    image = _upright(image)
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
    """An image file of any mode that Pillow reads -> (H,W,3) uint8 RGB, upright; of an animation the first frame.

    FileNotFoundError if there is no such file; ValueError, naming it, if it is empty, damaged, no image, or so large
    that reading it would be dangerous.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}: check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): fetch or save it again")
    with _reading(path), Image.open(path) as image:
        return to_rgb(image)


def read_animation(path, stride=1):
    """Every stride-th frame of an animated image: yields (number, (H,W,3) uint8). ValueError where it is damaged."""
    with _reading(path):
        image = Image.open(path)
    with image:
        for i in count(0, stride):
            with _reading(path):
                try:
                    image.seek(i)
                except EOFError:    # there is no frame of this number
                    return
                frame = to_rgb(image)
            yield i, frame


def read_video(path, stride=1):
    """Every stride-th frame of a video, decoded as it is asked for: yields (number, (H,W,3) uint8).

    ValueError if it has none, or, after those that can be read, if it declares more than two frames more.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")   # the sentences below say what matters
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"reading the video {path} needs OpenCV: pip install opencv-python-headless") from error
    video, i = cv2.VideoCapture(str(path)), 0
    declared = int(video.get(cv2.CAP_PROP_FRAME_COUNT))     # some containers state a duration: then it is an estimate
    while (frame := video.read()[1]) is not None:
        if i % stride == 0:
            yield i, frame[..., ::-1].copy()    # OpenCV's channels are BGR
        i += 1
    if i == 0:
        raise ValueError(f"{path} cannot be decoded as a video: convert it to MP4 (H.264) or to images")
    if i < declared - 2:
        raise ValueError(f"{path} is damaged, {i} of {declared} frames could be read: fetch or convert it again")


def frame_rate(path):
    """Frames per second of a video or animation; None if it does not say."""
    if path.suffix.lower() in VIDEOS:
        import cv2
        return cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) or None
    with _reading(path), Image.open(path) as image:
        image.seek(1)       # the first frame's may be missing
        return 1000 / image.info["duration"] if image.info.get("duration") else None


def frame_reader(path):
    """What reads the frames of a video or animation; None for anything else."""
    if path.suffix.lower() in VIDEOS:
        return read_video
    if path.suffix.lower() in ANIMATIONS:
        with suppress(ValueError), _reading(path), Image.open(path) as image:
            image.seek(1)
            return read_animation
    return None
