"""What all datasets share: Reader lists the samples of one and loads them, Frame decodes one sample."""
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np

from checkpoint import digest
from readers.formats import read_image, visible
from readers.geometry import every
from tasks import TASKS


def stars(template):
    """A path template as a glob pattern: every {} or {0} becomes *."""
    return re.sub(r"{\d?}", "*", template)


@cache
def notice(sentence):
    """Print it on stderr, once: readers are made several times in a run."""
    print(sentence, file=sys.stderr)


def some(reader, numbers, count):
    """So many of a reader's sample numbers, or all if count is None: evenly spaced, for neighbours may be frames of one
    video. Of samples that are independent the first, which tell as much, and none of the others needs to be made."""
    numbers = list(numbers)
    if reader.independent or count is None or count >= len(numbers):
        return numbers[:count]
    return [numbers[k * len(numbers) // count] for k in range(count)]


class Frame:
    """One sample being loaded: image(0), image(1) where there is a second frame, and a method per labelled task
    -> (label, valid (H,W)). Files that several of these need are cached properties, so that each is read once."""

    def __init__(self, reader, key):
        self.reader, self.key = reader, key

    def path(self, kind, ahead=0):
        """Built forwards from the key, never by rewriting another path. ahead: frames to go on.

        The last part of a key is its frame.
        """
        *scene, t = self.key
        t = f"{int(t) + ahead:0{len(t)}}" if ahead else t
        return self.reader.top(kind) / self.reader.tree[kind].format(*scene, t)

    def image(self, t):
        return read_image(self.path("image", t))

    def extra(self, tasks):
        """Further masks {name: (H,W) bool} for evaluation to report on."""
        return {}


class Reader:
    """Base of all datasets: Reader(root, split). A subclass states facts, lists its samples and decodes them.

    samples: a key (tuple of strings) for each, of which its Frame decodes one; paired: the numbers of those that have
    a second frame. A subclass without a size of its own takes one: Reader(root, split, size).
    """

    name = page = ""                    # folder under root; where to obtain it
    tree = {}                           # kind of file: path template, filled in with the key; the first lists samples
    splits, use = (), {}                # all splits; role (train, val, test): the split that plays it
    tasks = ()                          # labelled ones
    size = None                         # (H,W) that data.py resizes to, nearest-exact, values never rescaled
    crop, bottom = None, False          # (H,W) of the fixed crop, central but for its rows if `bottom`
    mix = {}                            # task: weight among the datasets that label it
    train_crop = {}                     # task: (H,W) of the random crop in training, before resizing
    vflip = False                       # vertical flips in training
    jitter = {}                         # task: (brightness, contrast, saturation, hue), the same for both frames
    depth_range = (1e-5, float("inf"))  # aligned depth predictions are clipped to it in evaluation
    independent = False                 # whether no sample has to do with another: `some`
    version = 1                         # raised when labels come out different: latent caches made before are refused

    def __init__(self, root, split):
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}: expected one of {', '.join(self.splits)}")
        self.split, self.folder = split, self.place(root)
        self.tree = {kind: template.replace("<split>", split) for kind, template in self.tree.items()}
        self.tops = {}
        self.samples = self.find()
        if not self.samples:
            there = sorted(visible(self.folder, "*"))
            there = f"holds {len(there)} entries ({', '.join(there[:3])})" if there else "is empty or does not exist"
            raise FileNotFoundError(f"no {self.name} {split} samples: expected {stars(next(iter(self.tree.values())))} "
                                    f"in {self.folder}, which {there}; get it from {self.page} (docs/data.md)")
        self.paired = self.pairs()

    @classmethod
    def place(cls, root):
        """The dataset's folder under the data root."""
        return Path(root) / cls.name

    @classmethod
    def there(cls, root):
        return cls.place(root).is_dir()

    def top(self, kind):
        """Where the archive with this kind of file was extracted: the dataset's folder, or a subfolder of the archive's
        own."""
        if kind not in self.tops:
            pattern = stars(self.tree[kind])
            below = sorted(p for p in (self.folder / name for name in visible(self.folder, "*")) if p.is_dir())
            self.tops[kind] = next((top for top in (self.folder, *below) if any(visible(top, pattern))), self.folder)
        return self.tops[kind]

    def find(self):
        """Sorted keys, read off the paths of the first kind of file."""
        kind, template = next(iter(self.tree.items()))
        parts = re.compile(re.sub(r"\\{\d?\\}", "([^/]+)", re.escape(template)))
        return sorted(parts.fullmatch(path).groups() for path in visible(self.top(kind), stars(template)))

    def pairs(self):
        return frozenset(range(len(self)) if any(TASKS[task].frames == 2 for task in self.tasks) else ())

    def window(self, h, w):
        """(rows, columns) slices of the fixed crop of an h x w image."""
        height, width = self.crop or (h, w)
        if h < height or w < width:
            raise ValueError(f"{self.name} in {self.folder}: an image is {h}x{w}, "
                             f"smaller than the crop of {height}x{width}")
        top, left = (h - height) // (1 if self.bottom else 2), (w - width) // 2
        return slice(top, top + height), slice(left, left + width)

    def __len__(self):
        return len(self.samples)

    def labelled(self, task):
        """Numbers of the samples that come with a label of the task; none if the dataset does not label it."""
        if task not in self.tasks:
            return []
        return sorted(self.paired) if TASKS[task].frames == 2 else range(len(self))

    def identity(self):
        """A digest of which samples these are, found without opening a file: what was made of others is refused, or
        made anew. The files of a public dataset do not change, so its keys and which of them have labels are enough."""
        known = {t: [*self.labelled(t)] for t in self.tasks}
        partial = {t: numbers for t, numbers in known.items() if numbers != [*Reader.labelled(self, t)]}
        return digest([self.split, self.samples, *[partial] * bool(partial)])

    def indices(self, task):
        """Numbers of the samples to use for the task: `labelled`, less what a dataset leaves out."""
        return self.labelled(task)

    def source(self, i, task):
        """Where to look when the label of a sample is wrong: its file, where it has one, else the sample's name."""
        return f"the {task} label of {self.title(i)}"

    def stem(self, i):
        """The name of a sample in its dataset, for files about it: the same in every split and for every subset."""
        return "/".join(self.samples[i])

    def title(self, i):
        """The name of a sample."""
        return f"{self.name}/{self.split}/{self.stem(i)}"

    def load(self, i, tasks, with_next=False):
        """Sample i -> {"name": str, "image": (H,W,3) uint8 RGB, "labels": {task: (H,W,C) float32, semantic uint8},
        "valid": {task: (H,W) bool}}; "next" like "image" where a second frame exists and with_next or a task of two
        frames asks for it; "extra" {name: (H,W) bool} where the dataset has any.

        Labels are finite: a pixel with NaN or infinity is 0 and invalid.
        ValueError: a task without labels here; an unreadable file; a label that cannot be right; label and image of
        different sizes. FileNotFoundError: a missing file.
        """
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"{self.name} has no labels for {', '.join(unknown)}: it has {', '.join(self.tasks)}")
        name, frame = self.title(i), self.Frame(self, self.samples[i])
        image = frame.image(0)
        h, w = image.shape[:2]
        rows, cols = self.window(h, w)

        def cut(x, what):
            if x.shape[:2] != (h, w):
                size = "x".join(map(str, x.shape[:2]))
                raise ValueError(f"{name} in {self.folder}: the {what} is {size}, but the image {h}x{w}")
            return np.ascontiguousarray(x[rows, cols])

        sample = {"name": name, "image": cut(image, "image"), "labels": {}, "valid": {}}
        if i in self.paired and (with_next or any(TASKS[task].frames == 2 for task in tasks)):
            sample["next"] = cut(frame.image(1), "second frame")
        for task in tasks:
            with np.errstate(invalid="ignore", over="ignore"):  # arithmetic with pixels that are NaN or infinite
                label, valid = getattr(frame, task)()
                label = label.reshape(*label.shape[:2], -1)
                label = label if TASKS[task].categorical else label.astype(np.float32, copy=False)
            if np.ndim(valid) != 2:
                raise ValueError(f"{self.name}: the mask of {task} has the shape {np.shape(valid)}, expected (H,W)")
            label, valid = cut(label, f"{task} label"), cut(valid, f"{task} mask")
            number = every(np.isfinite(label))
            if not number.all():
                label, valid = np.where(number[..., None], label, 0), valid & number
            sample["labels"][task], sample["valid"][task] = label, valid
        extra = {what: cut(mask, what) for what, mask in frame.extra(tasks).items()}
        return {**sample, "extra": extra} if extra else sample
