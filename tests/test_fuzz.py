"""Random labels, predictions, damaged files: never NaN where something is valid, no error but the documented ones."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import metrics
from readers import formats, media
from tasks import CLASSES, IGNORE, TASKS
from tools import convert

cv2, h5py = formats.opencv(), pytest.importorskip("h5py")
some = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SIDES, POISON = st.integers(1, 24), st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38])
MASKS, SCALES = st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.sampled_from([0.0, 1e-42, 1e-6, 1.0, 1e6, 1e37])
SEEDS = st.integers(0, 2 ** 31 - 1)
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)   # (place, byte)


def native(task, height, width, scale, rng):
    """A label (C,H,W) in the task's range; `scale` stretches what has no range."""
    x = rng.standard_normal((task.channels, height, width))
    if task.categorical:
        return torch.from_numpy(rng.choice([*range(len(CLASSES)), IGNORE], x.shape)).float()
    if task.dense_loss == "cosine":
        return torch.from_numpy(x / np.linalg.norm(x, axis=0)).float()
    if task.metric in ("shading", "albedo"):
        return torch.from_numpy(rng.random(x.shape)).float()
    return torch.from_numpy(abs(x) * scale + 1e-3 if task.metric == "depth" else x * scale).float()


@pytest.mark.parametrize("name", TASKS)
@some
@given(SIDES, SIDES, MASKS, SCALES, POISON, SEEDS)
def test_codecs(name, height, width, share, scale, poison, seed):
    """Whatever stands outside the mask, a code is finite and in [-1, 1]; decoding it, or anything a network may say, is
    finite; so are pictures."""
    task, rng = TASKS[name], np.random.default_rng(seed)
    label, valid = native(task, height, width, scale, rng), torch.from_numpy(rng.random((height, width)) < share)
    label = torch.where(valid, label, torch.tensor(poison))
    code = task.encode(label[None], valid[None, None])
    assert code.shape == (1, 3, height, width) and code.isfinite().all() and code.abs().max() <= 1
    wild = code + torch.from_numpy(rng.standard_normal(code.shape) * scale).float()
    for decoded in map(task.decode, (code, wild)):
        assert decoded.shape == (1, task.channels, height, width) and decoded.float().isfinite().all()
    picture = task.colour(label, valid)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8 and not picture[~valid.numpy()].any()


@pytest.mark.parametrize("name", TASKS)
@some
@given(SIDES, SIDES, MASKS, SCALES, SEEDS, st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_invalid_pixels_have_no_influence(name, height, width, share, scale, seed, values):
    """Changing invalid pixels, to anything, changes the code of no valid pixel. (The scale of a flow was that of all
    pixels: unknown motion of 3000 pixels in a corner left 0.7% of the range for the rest.)"""
    task, rng = TASKS[name], np.random.default_rng(seed)
    label, valid = native(task, height, width, scale, rng), torch.from_numpy(rng.random((height, width)) < share)
    codes = []
    for outside in (torch.zeros_like(label), torch.from_numpy(rng.choice(np.float32(values), label.shape))):
        code = task.encode(torch.where(valid, label, outside)[None], valid[None, None])
        assert code.isfinite().all() and code.abs().max() <= 1
        codes.append(code[0, :, valid])
    assert torch.equal(*codes)


RANGES = {"mIoU": 100, "accuracy": 100, "mAE": 180, "AbsRel": np.inf, "delta1": 100, "EPE": np.inf, "SSIM": 1,
          "LMSE": 1 + 1e-9, "RMSE": np.inf}


@pytest.mark.parametrize("metric", metrics.METRICS)
@some
@given(SIDES, SIDES, MASKS, SCALES, POISON, SEEDS)
def test_metrics(metric, height, width, share, scale, poison, seed):
    """Any finite prediction has finite scores within their range, and what stands outside the mask, in either map,
    changes none of them."""
    task, rng = next(t for t in TASKS.values() if t.metric == metric), np.random.default_rng(seed)
    label, valid = native(task, height, width, scale, rng), torch.from_numpy(rng.random((height, width)) < share)
    if task.categorical:
        pred = torch.from_numpy(rng.integers(0, len(CLASSES), label.shape)).double()
    else:
        pred = torch.from_numpy(rng.standard_normal(label.shape) * scale)
    results = []
    for outside in (0.0, poison):
        make = metrics.METRICS[metric].accumulator
        scores = make(clip=(1e-3, 80.0)) if metric == "depth" else make()
        for _ in range(2):
            scores.add(*(torch.where(valid, x, torch.tensor(outside, dtype=x.dtype)) for x in (pred, label)), valid)
        if not scores.images:
            with pytest.raises(ValueError, match="found none among 2"):
                scores.result()
            return
        results.append(scores.result())
    assert results[0] == results[1] and results[0]["images"] == 2
    for name, value in results[0].items():
        assert np.isfinite(value), name
        assert name not in RANGES or (-1 if name == "SSIM" else 0) <= value <= RANGES[name], (name, value)


def flo(path, x):
    size = np.int32([x.shape[1], x.shape[0]])
    path.write_bytes(np.float32(202021.25).tobytes() + size.tobytes() + x[..., :2].astype("<f4").tobytes())


def pfm(path, x):
    path.write_bytes(b"Pf\n%d %d\n-1.0\n" % x.shape[1::-1] + x[..., 0].astype("<f4").tobytes())


def hdf5(path, x):
    with h5py.File(path, "w") as f:
        f.create_dataset("dataset", data=x.astype(np.float16), compression="gzip")


def picture(path, x):
    Image.fromarray((255 * x).astype(np.uint8)).save(path)


def read_vectors(path):
    return formats.read_npy(path, 3)


def read_colours(path):
    return formats.read_png(path, "uint8", 3)


def tensors(path, x):
    save_file({"x": torch.from_numpy(x)}, path)


def checkpoint(path, x):
    torch.save({"x": torch.from_numpy(x)}, path)


FILES = {"a.flo": (flo, formats.read_flo), "a.pfm": (pfm, formats.read_pfm), "a.hdf5": (hdf5, formats.read_hdf5),
         "a.npy": (np.save, read_vectors), "a.png": (picture, formats.read_image), "b.png": (picture, read_colours),
         "d.png": (picture, formats.read_classes), "e.png": (picture, formats.image_size),
         "a.jpg": (picture, formats.read_image), "b.jpg": (picture, formats.image_size),
         "c.png": (picture, media.read_image), "c.gif": (picture, media.read_image),
         "a.safetensors": (tensors, convert.read_state), "a.pth": (checkpoint, convert.read_state)}


@pytest.mark.parametrize("name", FILES)
@some
@given(CHANGES, st.floats(0, 1), st.booleans())
def test_damaged_files(tmp_path_factory, name, changes, length, header):
    """Bytes changed (anywhere, or in the first 64) and the end cut off: the reader returns something or says in one
    error which file it is."""
    path, (write, read) = tmp_path_factory.mktemp("fuzz") / name, FILES[name]
    write(path, np.random.default_rng(0).random((6, 7, 3)))
    data = bytearray(path.read_bytes()[:None if length > 0.5 else int(2 * length * path.stat().st_size)])
    for place, byte in changes if data else ():
        data[int(place * (min(64, len(data)) if header else len(data)))] = byte
    path.write_bytes(data)
    try:
        read(path)
    except (ValueError, OSError) as error:
        assert name in str(error)


NPY_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000, 9000000, 3), }".ljust(117) + b"\n"
ABSURD = {"a.npy": b"\x93NUMPY\x01\0v\0" + NPY_HEADER + bytes(99),
          "a.flo": np.float32(202021.25).tobytes() + np.int32([2 ** 30, 2 ** 30]).tobytes() + bytes(99),
          "a.pfm": b"Pf\n99999999999999999999 99999999999999999999\n-1.0\n" + bytes(99),
          "a.safetensors": (2 ** 60).to_bytes(8, "little") + b"{}"}


@pytest.mark.parametrize("name, data", ABSURD.items())
def test_absurd_sizes(tmp_path, name, data):
    """A header that declares far more than the file holds is refused before room is made for it."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        FILES[name][1](tmp_path / name)


def test_pickles_and_huge_arrays_are_refused(tmp_path):
    """An array of Python objects is never unpickled; an HDF5 file whose (unwritten) array would fill the memory is not
    read."""
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        f.create_dataset("dataset", (2 ** 20, 2 ** 20), "f4", chunks=(64, 64))
    for name, says in (("a.npy", "Python objects"), ("a.hdf5", "declares 1099511627776 numbers")):
        with pytest.raises(ValueError, match=f"{name}.*{says}"):
            FILES[name][1](tmp_path / name)
