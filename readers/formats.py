"""File formats: one reader each, which says dtype, unit and invalid value, and names the file that does not decode."""
import glob
import os
import re
import struct
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 2 ** 28  # a header that declares more is a mistake or an attack
LEFTOVERS = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # what systems leave in folders and archives
UNKNOWN = 1e9  # Middlebury's mark of a pixel without flow is any value beyond it; some renderers' of sky is 1e10 m


# ---- what all have in common ----

@contextmanager
def reading(path, kind):
    """Whatever goes wrong inside becomes one sentence that names the file.

    FileNotFoundError if it is missing, ValueError if it is unreadable.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: extract its archive again (docs/data.md)") from None
    except Exception as e:  # decoders of damaged files raise anything
        raise ValueError(f"{path} is not a readable {kind}, perhaps truncated: "
                         f"download or extract it again ({e})") from e


def visible(folder, pattern):
    """Yield the paths, relative to a folder and with "/", that match a glob pattern, in no particular order.

    Hidden files (._0.png, .DS_Store), which glob leaves out by itself, and other leftovers are not data.
    """
    for name in glob.iglob(pattern, root_dir=folder):
        name = name.replace(os.sep, "/")
        if LEFTOVERS.isdisjoint(name.split("/")):
            yield name


def opencv():
    """cv2, imported where real data is read: the toy worlds do without. One thread: data loaders run many processes."""
    os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"  # without it cv2 refuses EXR files
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    import cv2
    cv2.setNumThreads(0)
    return cv2


# ---- PNG and JPEG ----

def decode(path, flags):
    """One PNG or JPEG file as cv2 decodes it: (H,W) or (H,W,C), channels still in BGR order."""
    cv2 = opencv()
    with reading(path, "image"):
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, flags) if data.size else None
        if image is None:
            raise ValueError(f"{data.size} bytes that do not decode")
        return image


def read_image(path):
    """Picture -> (H,W,3) uint8 RGB. Grey is repeated, alpha dropped, 16 bits reduced to 8, EXIF rotation applied."""
    cv2 = opencv()
    return cv2.cvtColor(decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def image_size(path):
    """(H,W) of what read_image returns, from the file's header alone."""
    with reading(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but harmless metadata
        with Image.open(path) as image:
            (w, h), turned = image.size, False
            with suppress(Exception):  # metadata that does not parse turns nothing
                turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            return (w, h) if turned else (h, w)


def read_png(path, dtypes, *channels):
    """The stored numbers of a PNG: (H,W), or (H,W,3) in RGB order.

    dtypes: "uint8", "uint16" or "uint8 uint16"; ValueError: another one, or another number of channels.
    """
    cv2 = opencv()
    image = decode(path, cv2.IMREAD_UNCHANGED)
    has = 1 if image.ndim == 2 else image.shape[2]
    if str(image.dtype) not in dtypes.split() or has not in channels:
        want = " or ".join(map(str, channels))
        raise ValueError(f"{path} has {has} channels of {image.dtype}: "
                         f"expected {want} of {dtypes.replace(' ', ' or ')}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if has == 3 else image


def read_classes(path):
    """A PNG of class labels as it is stored -> (numbers (H,W) or None, colours (H,W,3) uint8 or None, opaque (H,W)).

    Grey of 1 to 16 bits has numbers, RGB has colours; a palette image has both, its indices and what they look like.
    opaque: False where there is an alpha channel and it is 0.
    """
    with reading(path, "PNG file"), Image.open(path, formats=("PNG",)) as image:
        pixels = np.array(image)
        opaque = pixels[..., -1] > 0 if image.mode in ("LA", "RGBA") else np.ones(pixels.shape[:2], bool)
        if image.mode in ("RGB", "RGBA"):
            return None, pixels[..., :3], opaque
        if image.mode == "P":
            return pixels, np.array(image.convert("RGB")), opaque
        if image.mode == "L":
            pixels = pixels // (255 // (2 ** bit_depth(path) - 1))  # Pillow stretches 2 and 4 bits to 0..255
        return (pixels[..., 0] if image.mode == "LA" else pixels).astype(int), None, opaque


def bit_depth(path):
    """Bits per sample of a PNG file, from its header."""
    with open(path, "rb") as f:
        return f.read(25)[24]


def read_flow_png(path):
    """KITTI's flow, 16-bit RGB -> (H,W,2) float32 pixels, valid (H,W): R, G = 64 x pixels + 32768, B = 0: no flow."""
    raw = read_png(path, "uint16", 3)
    valid = raw[..., 2] > 0
    return (raw[..., :2].astype(np.float32) - 32768) / 64 * valid[..., None], valid


# ---- arrays ----

def read_pfm(path):
    """One-channel PFM -> (H,W) float32, top row first: the file begins with the bottom row.

    A negative scale means little endian.
    """
    with reading(path, "PFM file"), open(path, "rb") as f:
        kind, size, scale = f.readline().strip(), f.readline().split(), f.readline()
        if kind != b"Pf":
            raise ValueError(f"starts with {kind[:8]!r}, not Pf")
        w, h = map(int, size)
        return np.frombuffer(f.read(), "<f4" if float(scale) < 0 else ">f4").reshape(h, w)[::-1].astype(np.float32)


def read_flo(path):
    """Middlebury flow -> (H,W,2) float32: (u,v) in pixels from frame t to t+1, rows top to bottom, NaN = unknown."""
    with reading(path, "FLO file"):
        data = Path(path).read_bytes()
        magic, w, h = struct.unpack_from("<fii", data)
        if magic != 202021.25:
            raise ValueError(f"magic number {magic}, not 202021.25")
        return known_values(np.frombuffer(data, "<f4", offset=12).reshape(h, w, 2).astype(np.float32))


def flo_bytes(x):
    """(H,W,2) flow, NaN = unknown -> what read_flo reads."""
    data = np.where(np.isfinite(x), x, 10 * UNKNOWN).astype("<f4")
    return struct.pack("<fii", 202021.25, x.shape[1], x.shape[0]) + data.tobytes()


def known_values(x):
    """Floating-point metres or pixels with NaN instead of the marks of unknown pixels, beyond UNKNOWN."""
    unknown = np.abs(x) > UNKNOWN
    return np.where(unknown, np.float32(np.nan), x) if unknown.any() else x


def read_hdf5(path):
    """The array called `dataset` of an HDF5 file, in its stored dtype (Hypersim: float16, int16, float64)."""
    import h5py
    with reading(path, "HDF5 file"), h5py.File(path, "r", locking=False) as f:  # network disks often refuse locks
        if f["dataset"].size > 4 * MAX_PIXELS:
            raise ValueError(f"declares {f['dataset'].size} numbers")
        return f["dataset"][()]


def read_npy(path, channels):
    """Array of numbers -> (H,W,channels) in its stored dtype, (H,W) alone counts as one channel.

    Pickled objects are refused.
    """
    with reading(path, "NPY file"):
        # mapped first: a header cannot make it reserve more than the file holds
        x = np.array(np.lib.format.open_memmap(path, "r"))
    if x.shape[2:] != (channels,) and (x.ndim, channels) != (2, 1) or x.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {x.dtype} of shape {x.shape}: expected numbers of shape (H, W, {channels})")
    return x.reshape(*x.shape[:2], channels)


def read_exr(path, channels=3):
    """OpenEXR picture -> (H,W,channels) float32, linear, unbounded: RGB, or grey (also RGB of three equal channels)."""
    cv2 = exr_codec(path)
    with reading(path, "EXR file"):
        open(path, "rb").close()  # cv2 does not tell a missing file from a broken one
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is None or image.ndim != 3 and channels == 3:
            raise ValueError("no colour picture in it" if channels == 3 else "no picture in it")
        if image.ndim == 2:
            return image[..., None].astype(np.float32)
        image = cv2.cvtColor(image[..., :3], cv2.COLOR_BGR2RGB).astype(np.float32)
    if channels == 1 and not np.array_equal(image, image[..., :1].repeat(3, -1), equal_nan=True):
        raise ValueError(f"{path} holds a colour picture: expected one channel, or three that are equal")
    return image[..., :channels]


def exr_codec(what):
    """cv2, if it is built with OpenEXR; else a ValueError that says what needs it, and the remedy."""
    cv2 = opencv()
    if re.search(r"OpenEXR:\s+NO", cv2.getBuildInformation()):
        raise ValueError(f"{what} needs OpenEXR, which OpenCV {cv2.__version__} is built without: "
                         "pip install 'opencv-python-headless<5'")
    return cv2


def encoded(x, ending):
    """Numbers (H,W,1) or (H,W,3), RGB, as the bytes of a file: ".png" uint8 or uint16, ".exr" float32."""
    cv2 = exr_codec("writing EXR") if ending == ".exr" else opencv()
    x = np.ascontiguousarray(x[..., ::-1])  # cv2's order is BGR
    return cv2.imencode(ending, x.astype(np.float32) if ending == ".exr" else x)[1].tobytes()
