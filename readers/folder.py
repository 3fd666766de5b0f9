"""A folder of one's own images and labels: <root>/folder/, or <root> itself if it holds images/.

The files of a sample share their stem X. Any subset of the label folders, any subset of the samples in each:

    images/X.png|jpg                frame t
    next/X.png|jpg                  frame t+1, needed where X has a flow
    semantic/X.png|npy              class ids 0..7, 255 = ignore, or the classes' display colours (exports.read_ids)
    normal/X.npy|exr|png            (H,W,3) unit vectors pointing away from the camera; (0,0,0) = invalid
    depth/X.npy|exr|png             (H,W) metres, <= 0 or beyond 1e9 invalid; PNG: 16-bit millimetres, 0 invalid
    optical_flow/X.npy|flo|png      (H,W,2) pixels, beyond 1e9 unknown; PNG: as in KITTI, 16-bit RGB, R, G = 64 x pixels
                                    + 32768, B = 0 unknown
    scene_flow/X.npy|exr            (H,W,3) metres, beyond 1e9 unknown
    shading/X.npy|exr|png           (H,W) in [0,1], linear; PNG: 8- or 16-bit grey, linear too
    albedo/X.npy|exr|png            (H,W,3) in [0,1], linear; PNG: 8- or 16-bit RGB, linear too

A PNG of normals is 8- or 16-bit RGB, -1 = 0 to 1 = the largest number, black = invalid. Beside a PNG may lie X.png.json
with another "scale" and "offset" (exports.py): so what sample.py --format writes is read as it was.
Axes are OpenCV's: x right, y down, z forward. NaN and infinity are invalid in every array.

Splits: train.txt, val.txt and test.txt list the stems of a split, one a line; a split without a list is everything.
Without any list, a hash of the stem decides: about 80% train, 10% val, 10% test, the same as long as the images are
(for frames of a video, which resemble each other, lists are better). Fewer than three images are not split: all are in
every split.

Size: all samples are resized to one (H,W), the caller's or that of the first image, reduced until its shorter side has
at most 384 pixels. Images of another aspect ratio are refused unless the caller names a size.
"""
import hashlib
from collections import Counter
from difflib import get_close_matches
from functools import partialmethod
from pathlib import Path

import numpy as np

from checkpoint import digest, stamps
from readers.exports import decode, endings, note_of
from readers.formats import image_size, reading, visible
from readers.geometry import length, unit_vectors
from readers.media import read_image
from readers.reader import Frame, Reader, notice
from tasks import IGNORE, TASKS

PICTURES = (".png", ".jpg", ".jpeg")
SHORTER_SIDE = 384     # pixels at most, unless a size is given
SAME_ASPECT = 1.05     # ratios of width and height that differ by no more than this factor count as the same


def split_by_name(stems):
    """-> {"train": [...], "val": [...], "test": [...]}, at least one in each; fewer than three stems are in all."""
    if len(stems) < 3:
        return dict.fromkeys(("train", "val", "test"), stems)
    place = {stem: int(hashlib.sha256(stem.encode()).hexdigest()[:12], 16) / 16 ** 12 for stem in stems}
    ordered = sorted(stems, key=place.get)
    test = min(max(sum(p < 0.9 for p in place.values()), 2), len(stems) - 1)   # where the test samples begin
    val = min(max(sum(p < 0.8 for p in place.values()), 1), test - 1)
    return {"train": sorted(ordered[:val]), "val": sorted(ordered[val:test]), "test": sorted(ordered[test:])}


def same_aspect(a, b, most=SAME_ASPECT):
    """Whether images of sizes a and b, (H,W) each, have about the same ratio of width and height."""
    ratio = a[1] * b[0] / (a[0] * b[1])
    return max(ratio, 1 / ratio) <= most


def reduced(h, w):
    """A size of the same aspect ratio whose shorter side has at most SHORTER_SIDE pixels, in multiples of 8."""
    scale = SHORTER_SIDE / min(h, w)
    return (h, w) if scale >= 1 else (8 * round(h * scale / 8), 8 * round(w * scale / 8))


class Folder(Reader):
    name, splits, use = "folder", ("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}
    tree, page = {"image": "images/{}.*"}, "your own camera"
    suffixes = {task: endings(TASKS[task]) for task in
                ("semantic", "normal", "depth", "optical_flow", "scene_flow", "shading", "albedo")}
    tasks, mix = tuple(suffixes), dict.fromkeys(suffixes, 1.0)
    version = 4  # since 2 marks of unknown flow are known, since 3 those of unknown depth, since 4 alpha is on white

    def __init__(self, root, split, size=None):
        super().__init__(root, split)
        self.size, self.proven = self.common_size(size and tuple(size)), set()

    @classmethod
    def place(cls, root):
        return Path(root) / "folder" if (Path(root) / "folder" / "images").is_dir() else Path(root)

    @classmethod
    def there(cls, root):
        return (cls.place(root) / "images").is_dir()

    # ---- samples ----

    def files(self, sub, suffixes=PICTURES):
        """{stem: path} of one subfolder; ValueError if two files share a stem."""
        found, others, notes = {}, [], tuple(f"{suffix}.json" for suffix in suffixes)
        for path in sorted(self.folder / name for name in visible(self.folder, f"{sub}/*")):
            if path.name.lower().endswith(notes):
                continue
            if path.suffix.lower() not in suffixes:
                others.append(path.name)
            elif found.setdefault(path.stem, path) != path:
                raise ValueError(f"{path} and {found[path.stem].name} are the same sample twice: keep one of them")
        if others:
            notice(f"{self.folder / sub}: {len(others)} files are not read, first {others[0]}: "
                   f"expected {' or '.join(suffixes)}")
        return found

    def find(self):
        self.images, self.second = self.files("images"), self.files("next")
        self.labels = {task: self.files(task, suffixes) for task, suffixes in self.suffixes.items()}
        self.tasks = tuple(task for task, files in self.labels.items() if files)
        for name in {path.name for path in self.folder.iterdir() if path.is_dir()} - {"images", "next", *self.suffixes}:
            if meant := get_close_matches(name.lower(), self.suffixes, 1, 0.75):
                notice(f"{self.folder / name} is not read: labels of {meant[0]} are expected in {meant[0]}/")
        for task in self.tasks:
            for sub, pictures in (("images", self.images), ("next", self.second))[:TASKS[task].frames]:
                for stem in self.labels[task].keys() - pictures.keys():
                    raise ValueError(f"{self.labels[task][stem]} belongs to no picture: "
                                     f"expected {self.folder / sub / stem}.png or .jpg")
        if not self.images:
            return []
        lists = [f"{split}.txt" for split in self.splits if (self.folder / f"{split}.txt").exists()]
        if f"{self.split}.txt" in lists:
            return [(stem,) for stem in self.listed(self.folder / f"{self.split}.txt")]
        if lists:
            notice(f"{self.folder}: there is {' and '.join(lists)} but no {self.split}.txt, so {self.split} is all "
                   f"{len(self.images)} images")
            return [(stem,) for stem in self.images]
        parts = split_by_name(list(self.images))
        counts = ", ".join(f"{len(stems)} {split}" for split, stems in parts.items())
        told = "too few images to split, all are in every split" if len(self.images) < 3 else f"names decide: {counts}"
        notice(f"{self.folder}: no train.txt, val.txt or test.txt; {told}")
        return [(stem,) for stem in parts[self.split]]

    def listed(self, path):
        """The stems in a list; ValueError if one is no picture, or there is none."""
        with reading(path, "list of stems"):
            stems = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not stems:
            raise ValueError(f"{path} is empty: list one stem a line, or delete it")
        if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
            raise ValueError(f"{path} lists {twice[0]!r} more than once: keep one line of it")
        for stem in set(stems) - self.images.keys():
            raise ValueError(f"{path} names {stem!r}, no picture of {self.folder / 'images'}: "
                             "expected stems, without .png or .jpg")
        return stems

    def common_size(self, size):
        """(H,W) for the samples of all splits, from the headers of all images; ValueError if their shapes differ."""
        sizes = {}
        for path in self.images.values():
            try:
                sizes[path] = image_size(path)
            except ValueError as error:  # told, or skipped, where the image is loaded
                unread = error
        if not sizes:
            raise unread
        first, shape = next(iter(sizes.items()))
        others = [path for path, s in sizes.items() if not same_aspect(s, size or shape)]
        if others and not size:
            raise ValueError(f"{first} is {shape[0]}x{shape[1]}, {others[0]} {'x'.join(map(str, sizes[others[0]]))}: "
                             "crop images to one aspect ratio, or stretch all to one size by train.py --size "
                             "HEIGHTxWIDTH")
        h, w = size or reduced(*shape)
        changed = [(path.name, "x".join(map(str, s))) for path, s in sizes.items() if s != (h, w)]
        if changed:
            stretched = f", {len(others)} of them stretched" if others else ""
            remedy = "" if size else " (train.py --size sets another size)"
            notice(f"{self.folder}: {len(changed)} of {len(sizes)} images are resized to {h}x{w}{stretched}; the first "
                   f"is {' of '.join(changed[0])}{remedy}")
        return h, w

    def pairs(self):
        return frozenset(i for i, (stem,) in enumerate(self.samples) if stem in self.second)

    def labelled(self, task):
        return [i for i, (stem,) in enumerate(self.samples) if stem in self.labels.get(task, ())]

    def identity(self):
        """As of a reader, but one's own files may be corrected: their names, sizes and times of change count, too."""
        groups = self.images, self.second, *self.labels.values()
        paths = [files[stem] for (stem,) in self.samples for files in groups if stem in files]
        notes = [note for path in paths if (note := note_of(path)).is_file()]
        return digest([digest([self.split, self.samples]), stamps({*paths, *notes}, self.folder)])

    def indices(self, task):
        """Numbers of the samples with a label of the task. ValueError if none of these labels has a valid pixel: then
        it is the way they were written that is wrong, and nothing could be learnt."""
        known = self.labelled(task)
        if task not in self.proven and all(self.blank(i, task) for i in known) and known:
            raise ValueError(f"none of the {len(known)} {task} labels of {self.folder} ({self.split}) has a valid "
                             f"pixel, first {self.source(known[0], task)}: docs/data.md says what is invalid")
        self.proven.add(task)
        return known

    def blank(self, i, task):
        """Whether a label has no valid pixel. What does not load is not blank: it is told where it is used."""
        try:
            return not self.load(i, [task])["valid"][task].any()
        except (OSError, ValueError):
            return False

    def source(self, i, task):
        return str(self.labels[task][self.samples[i][0]])

    # ---- labels ----

    class Frame(Frame):
        def image(self, t):
            return read_image((self.reader.second if t else self.reader.images)[self.key[0]])

        def file(self, task):
            labels, (stem,) = self.reader.labels[task], self.key
            if stem not in labels:
                raise ValueError(f"{stem} in {self.reader.folder} has no {task} label: "
                                 f"indices({task!r}) are the samples that have")
            return labels[stem]

        def map(self, task):
            """(path, label (H,W,C), unknown pixels NaN or 255)."""
            path = self.file(task)
            return path, decode(path, TASKS[task])

        def semantic(self):
            _, ids = self.map("semantic")
            return ids, ids[..., 0] != IGNORE

        def normal(self):
            path, n = self.map("normal")
            n = np.where((n == -1).all(-1, keepdims=True), 0, n)    # a PNG's black
            norm = length(n)
            known = norm[(norm > 0.05) & np.isfinite(norm)]     # 8 bits have no exact 0
            if known.size and np.median(np.abs(known - 1)) > 0.1:
                raise ValueError(f"{path} holds vectors of length {np.median(known):.3g} (median): expected unit "
                                 "vectors, each number in [-1,1], (0,0,0) where there is none")
            n, valid = unit_vectors(n)
            back = (n[..., 2][valid] < 0).mean() if valid.any() else 0
            if back > 0.9:
                raise ValueError(f"{path} points at the camera (z < 0 at {back:.0%} of its pixels): normals must point "
                                 "away from it, change all signs")
            return n, valid

        def depth(self):
            _, z = self.map("depth")
            return z, z[..., 0] > 0

        def flow(self, task):
            _, x = self.map(task)
            return x, np.ones(x.shape[:2], bool)

        def intensity(self, task):
            path, x = self.map(task)
            known = x[np.isfinite(x)]
            if known.size and not 0 <= known.min() <= known.max() <= 1:
                raise ValueError(f"{path} ranges from {known.min():.3g} to {known.max():.3g}: "
                                 "expected linear values in [0,1]")
            return x, np.ones(x.shape[:2], bool)

        optical_flow, scene_flow = partialmethod(flow, "optical_flow"), partialmethod(flow, "scene_flow")
        shading, albedo = partialmethod(intensity, "shading"), partialmethod(intensity, "albedo")
