"""File formats: one reader each, which says dtype, unit and invalid value, and names the file that does not decode."""
import os
import re
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAX_PIXELS = 2 ** 28  # a header that declares more is a mistake or an attack


@contextmanager
def reading(path, kind):
    """Whatever goes wrong inside becomes one sentence that names the file: FileNotFoundError if missing, ValueError if unreadable."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: extract its archive again (README: Data)") from None
    except Exception as e:  # decoders of damaged files raise anything
        raise ValueError(f"{path} is not a readable {kind}, perhaps truncated: download or extract it again ({e})") from e


def opencv():
    """cv2, imported where real data is read, as the toy worlds do without. Single-threaded, because data loaders run many processes."""
    os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"  # without it cv2 refuses EXR files
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    import cv2
    cv2.setNumThreads(0)
    return cv2


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


def read_png(path, dtypes, *channels):
    """The stored numbers of a PNG: (H,W), or (H,W,3) in RGB order. dtypes: "uint8", "uint16" or "uint8 uint16"; others raise ValueError."""
    cv2 = opencv()
    image = decode(path, cv2.IMREAD_UNCHANGED)
    has = 1 if image.ndim == 2 else image.shape[2]
    if str(image.dtype) not in dtypes.split() or has not in channels:
        want = " or ".join(map(str, channels))
        raise ValueError(f"{path} has {has} channels of {image.dtype}: expected {want} of {dtypes.replace(' ', ' or ')}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if has == 3 else image


def read_pfm(path):
    """One-channel PFM -> (H,W) float32, top row first (the file begins with the bottom row); a negative scale means little endian."""
    with reading(path, "PFM file"), open(path, "rb") as f:
        kind, size, scale = f.readline().strip(), f.readline().split(), f.readline()
        if kind != b"Pf":
            raise ValueError(f"starts with {kind[:8]!r}, not Pf")
        w, h = map(int, size)
        return np.frombuffer(f.read(), "<f4" if float(scale) < 0 else ">f4").reshape(h, w)[::-1].astype(np.float32)


def read_flo(path):
    """Middlebury flow -> (H,W,2) float32: (u,v) in pixels from frame t to t+1, rows top to bottom."""
    with reading(path, "FLO file"):
        data = Path(path).read_bytes()
        magic, w, h = struct.unpack_from("<fii", data)
        if magic != 202021.25:
            raise ValueError(f"magic number {magic}, not 202021.25")
        return np.frombuffer(data, "<f4", offset=12).reshape(h, w, 2).astype(np.float32)


def read_hdf5(path):
    """The array called `dataset` of an HDF5 file, in its stored dtype (Hypersim: float16, int16, float64)."""
    import h5py
    with reading(path, "HDF5 file"), h5py.File(path, "r", locking=False) as f:  # network disks often refuse locks
        if f["dataset"].size > 4 * MAX_PIXELS:
            raise ValueError(f"declares {f['dataset'].size} numbers")
        return f["dataset"][()]


def read_npy(path, channels):
    """Array of numbers -> (H,W,channels) in its stored dtype, (H,W) alone counts as one channel. Pickled objects are refused."""
    with reading(path, "NPY file"):
        x = np.array(np.lib.format.open_memmap(path, "r"))  # mapped first: a header cannot make it reserve more than the file holds
    if x.shape[2:] != (channels,) and (x.ndim, channels) != (2, 1) or x.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {x.dtype} of shape {x.shape}: expected numbers of shape (H, W, {channels})")
    return x.reshape(*x.shape[:2], channels)


def read_exr(path):
    """OpenEXR picture -> (H,W,3) float32 linear RGB, unbounded."""
    cv2 = opencv()
    if re.search(r"OpenEXR:\s+NO", cv2.getBuildInformation()):
        raise ValueError(f"{path} needs OpenEXR, which OpenCV {cv2.__version__} is built without: pip install 'opencv-python-headless<5'")
    with reading(path, "EXR file"):
        open(path, "rb").close()  # cv2 does not tell a missing file from a broken one
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is None or image.ndim != 3:
            raise ValueError("no colour picture in it")
        return cv2.cvtColor(image[..., :3], cv2.COLOR_BGR2RGB).astype(np.float32)
