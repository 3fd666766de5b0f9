"""From readers to batches: transforms, and the mixture of partial labels.

A reader (readers/) lists the samples of one dataset and loads them at native resolution; this file does the rest.

    reader.load(i, tasks) -> jitter and crop -> codes in [-1,1] (tasks.py) -> resize nearest-exact -> flips
                          -> micro-batches of one step

Everything drawn for step s depends on (seed, s) alone: the stream of batches is the same for any number of workers and
ranks, and a resumed run continues it exactly.

    python data.py --data <root> --check              what is found, what is missing, the first unreadable file;
                                                      ends with exit code 1 if something is wrong
    python data.py --data <root> --show hypersim:0    a picture of one sample with its labels (toy worlds: streets:3)
"""
import argparse
import sys
from collections import defaultdict
from functools import partial

from cli import Parser, parse_size, run, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from draw import LABELS, cell, draw_panel
from readers import READERS, check, found, make, sized
from readers.reader import some
from readers.toyworld import ToyWorld
from tasks import TASKS

TOY_TRAIN, TOY_TEST = ("rooms", "streets", "things"), ("rooms", "streets", "things", "real")


# ---- which datasets ----

def parse_drop(text, known):
    """"streets:depth,things:scene_flow" -> {"streets": {"depth"}, ...}: labels that training does not see (Table 3)."""
    drop = {}
    for part in filter(None, text.split(",")):
        world, _, task = part.partition(":")
        if world not in known or task not in TASKS:
            raise ValueError(f"--drop {part}: expected dataset:task with a dataset of {', '.join(known)} "
                             f"and a task of {', '.join(TASKS)}")
        drop.setdefault(world, set()).add(task)
    return drop


def train_readers(root="", size=(32, 48), scenes=800, split="train"):
    """The training datasets, or ("val") what they hold out: the toy worlds, or those found under `root`.

    size: (H, W) of the toy worlds and of a folder of one's own, which without it (None) takes that of its images.
    FileNotFoundError if there is none.
    """
    if not root:
        return [ToyWorld(w, split, scenes, size) for w in TOY_TRAIN]
    return found(root, split, size)


def test_readers(root="", size=(32, 48), scenes=64, split="test", kitti_baseline="calibration", limit=None):
    """The held-out datasets: the worlds' test split and the unseen world, or those found under `root`.

    limit: how many samples of each are wanted; a toy world has as many `scenes`, or more if more are wanted.
    """
    if not root:
        return [ToyWorld(w, split, max(scenes, limit or 0), size) for w in TOY_TEST]
    readers = found(root, split, size)
    for reader in readers:
        if reader.name == "kitti_2015":
            reader.baseline = kitti_baseline
    return readers


# ---- one sample ----

def tensor_image(array):
    """(H,W,3) uint8 -> (3,H,W) float in [-1,1]."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 127.5 - 1


def picture(frame):
    """Inverse of tensor_image: (3,H,W) in [-1,1] -> (H,W,3) uint8."""
    return ((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def resize(x, size):
    """(C,H,W) -> (C,*size), nearest-exact; values (flow, depth) are never rescaled."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[None].float(), size=tuple(size), mode="nearest-exact")[0].to(x.dtype)


def label_tensors(sample, task):
    """A sample's label of one task as tensors: (C,H,W) float, (1,H,W) bool."""
    label = torch.from_numpy(np.ascontiguousarray(sample["labels"][task])).permute(2, 0, 1).float()
    return label, torch.from_numpy(np.ascontiguousarray(sample["valid"][task]))[None]


def jitter(images, strength, rng):
    """Brightness, contrast, saturation (factors 1 +- s), hue (+- s of the colour circle), alike for all frames."""
    kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    factors = [rng.uniform(1 - s, 1 + s) for s in strength[:3]]
    hue = int(round(rng.uniform(-strength[3], strength[3]) * 255))
    out = []
    for array in images:
        image = Image.fromarray(array)
        for enhance, factor in zip(kinds, factors, strict=True):
            image = enhance(image).enhance(factor)
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 256
        out.append(np.array(Image.fromarray(hsv, "HSV").convert("RGB")))
    return out


def training_crop(reader, only, size, rng):
    """(rows, columns) slices: the reader's crop, for the task `only`, of an image of size (H, W); rng None: central."""
    if only not in reader.train_crop:
        return slice(None), slice(None)
    out = []
    for crop, whole in zip(reader.train_crop[only], size, strict=True):
        crop = min(crop, whole)
        start = (whole - crop) // 2 if rng is None else rng.integers(whole - crop + 1)
        out.append(slice(start, start + crop))
    return tuple(out)


def prepare(reader, index, tasks, codecs, flips=(False, False), rng=None, with_next=True):
    """Load and transform one training sample.

    flips: (horizontal, vertical). rng: draws random crop and colour jitter; None = centre crop, no jitter (the cache).
    with_next: load the second frame for single-frame tasks, too (stage 2's flow streams look at it).
    Returns {"frames": [frame i, frame j] (3,H,W) each, "labels": {task: code (3,H,W)}, "valid": {task: (1,H,W) bool}};
    without a second frame j = i. A reader's train_crop and jitter belong to one task: they act when it is asked alone.
    """
    sample = reader.load(index, tasks, with_next=with_next)
    images = [sample["image"], sample.get("next", sample["image"])]
    only = tasks[0] if len(tasks) == 1 else None
    rows, columns = training_crop(reader, only, images[0].shape[:2], rng)
    if only in reader.jitter and rng is not None:
        images = jitter(images, reader.jitter[only], rng)
    item = {"frames": [resize(tensor_image(a)[:, rows, columns], reader.size) for a in images],
            "labels": {}, "valid": {}}
    for t in tasks:
        label, mask = (x[:, rows, columns] for x in label_tensors(sample, t))
        item["labels"][t] = resize(codecs[t].encode(label[None], mask[None])[0], reader.size)
        item["valid"][t] = resize(mask, reader.size)
    for axis, flip in ((-1, flips[0]), (-2, flips[1])):
        item = mirror(item, codecs, axis) if flip else item
    return item


def mirror(item, codecs, axis):
    """What `prepare` returns, flipped along an axis (-1 horizontally, -2 vertically): that component changes sign."""
    signs = {t: torch.tensor(codecs[t].hflip if axis == -1 else codecs[t].vflip).view(3, 1, 1) for t in item["labels"]}
    return {"frames": [f.flip(axis) for f in item["frames"]],
            "labels": {t: x.flip(axis) * signs[t].to(x.device) for t, x in item["labels"].items()},
            "valid": {t: m.flip(axis) for t, m in item["valid"].items()}}


def whole_cells(valid, factor):
    """(B,1,H,W) bool -> (B,1,H//f,W//f) bool: a latent cell counts only if all pixels of its block are valid."""
    return F.max_pool2d((~valid).float(), factor) == 0


def views(reader):
    """Tuples of a dataset's tasks that see the same crop of an image: those without a crop of their own together."""
    shared = tuple(t for t in reader.tasks if t not in reader.train_crop)
    return [shared] * bool(shared) + [(t,) for t in reader.tasks if t in reader.train_crop]


# ---- the mixture: what step s trains on ----

class Mixture(Dataset):
    """Element s is optimizer step s: "batches", its micro-batches (dicts), each of one task (jointly: of several) and
    one image size; the names of "skipped" samples; all that were "drawn".

    Isolation (the default): all samples of a step belong to one task; a fresh random order of all tasks per cycle.
    Within a task, a sample's dataset is drawn with the readers' `mix` weights, renormalised over those that label the
    task, so that leaving out tasks never shifts them. The draws depend neither on `micro` nor on the number of ranks
    (rank r takes every world_size-th).

    beside: {dataset: tasks} whose labels come along in a joint step, and no image is drawn for. skip_bad: whether what
    cannot be read is skipped and named, else it is a ValueError; None as in or_skip.

    Micro-batch: "tasks"; "keys" [(dataset, index, horizontal flip)]; "frames" [i, j]; "labels" and "valid"
    {task: tensor}; as images in [-1,1] with pixel masks, or with a `cache` as latents with masks of latent cells.
    """

    def __init__(self, readers, tasks, codecs, batch=16, micro=16, seed=0, drop=None, isolation=True, joint=False,
                 cache=None, skip_bad=None, with_next=True, rank=0, world_size=1, beside=None):
        drop, beside = drop or {}, beside or {}
        self.readers, self.codecs, self.cache, self.skip_bad = readers, codecs, cache, skip_bad
        self.batch, self.micro, self.seed, self.isolation, self.joint = batch, micro, seed, isolation, joint
        self.with_next, self.rank, self.world_size = with_next, rank, world_size
        self.sources = {t: [] for t in tasks}
        for t in tasks:
            for reader in readers:
                left_out = {*drop.get(reader.name, ()), *beside.get(reader.name, ())}
                usable = list(reader.indices(t)) if t in reader.tasks and t not in left_out else []
                if usable:
                    self.sources[t].append((reader, usable))
        self.usable = {(r.name, t): set(i) for t, sources in self.sources.items() for r, i in sources}
        self.there = self.usable | {(r.name, t): set(r.indices(t)) for r in readers for t in tasks
                                      if t in beside.get(r.name, ())}
        self.tasks = [t for t in tasks if self.sources[t]]
        missing = [t for t in tasks if not self.sources[t]]
        if missing:
            raise ValueError(f"no training labels for {', '.join(missing)}: choose other --tasks, drop fewer labels, "
                             "or add a dataset that has them")

    def task_of(self, step):
        cycle, place = divmod(step, len(self.tasks))
        return self.tasks[np.random.default_rng([self.seed, 1, cycle]).permutation(len(self.tasks))[place]]

    def draw(self, step):
        """The samples of a step, of all processes: [(tasks, reader, index, flips, sample seed)]."""
        rng, out = np.random.default_rng([self.seed, 2, step]), []
        for _ in range(self.batch):
            task = self.task_of(step) if self.isolation else self.tasks[rng.integers(len(self.tasks))]
            weights = np.array([r.mix.get(task, 1.0) for r, _ in self.sources[task]])
            reader, indices = self.sources[task][rng.choice(len(weights), p=weights / weights.sum())]
            index = indices[rng.integers(len(indices))]
            flips, seed = rng.random(2) < 0.5, int(rng.integers(2 ** 31))
            tasks = self.together(task, reader, index) if self.joint else (task,)
            out.append((tasks, reader, index, (bool(flips[0]), bool(flips[1]) and reader.vflip), seed))
        return out

    def plan(self, step):
        """Those of this process, grouped by task and dataset."""
        return self.mine(self.draw(step))

    def mine(self, drawn):
        """Those of all processes' samples that are this process's, grouped."""
        return sorted(drawn[self.rank::self.world_size], key=lambda o: (self.tasks.index(o[0][0]), o[1].name, o[0]))

    def together(self, task, reader, index):
        """N-to-N: every available label of the image at once; a task with a crop of its own sees another image."""
        view = next(v for v in views(reader) if task in v)
        return tuple(t for t in self.tasks if t in view and index in self.there.get((reader.name, t), ()))

    def one(self, tasks, reader, index, flips, seed):
        if self.cache is not None:
            return self.cache.get(reader, index, tasks, flips[0], seed)
        return prepare(reader, index, tasks, self.codecs, flips, np.random.default_rng(seed), self.with_next)

    def __getitem__(self, step):
        drawn, groups, skipped = self.draw(step), {}, []
        for tasks, reader, index, flips, seed in self.mine(drawn):
            try:
                item = self.one(tasks, reader, index, flips, seed)
            except (OSError, ValueError) as error:
                if not self.skip_bad:
                    raise unreadable(reader, index, error, self.skip_bad, f"step {step}, ") from error
                skipped.append(f"{reader.name}:{index}")
                continue
            alike = tasks, item["frames"][0].shape
            groups.setdefault(alike, []).append(((reader.name, int(index), flips[0]), item))
        batches = [self.stacked(tasks, items[i:i + self.micro])
                   for (tasks, _), items in groups.items() for i in range(0, len(items), self.micro)]
        names = [(tasks, reader.name, int(index)) for tasks, reader, index, *_ in drawn]    # by all processes
        return {"batches": batches, "skipped": skipped, "drawn": names}

    def stacked(self, tasks, entries):
        """[(key, item)] of one task and size -> a micro-batch."""
        keys, items = zip(*entries, strict=True)
        return {"tasks": tasks, "keys": keys,
                "frames": [torch.stack([item["frames"][n] for item in items]) for n in (0, 1)],
                "labels": {t: torch.stack([item["labels"][t] for item in items]) for t in tasks},
                "valid": {t: torch.stack([item["valid"][t] for item in items]) for t in tasks}}


def or_skip(skip_bad):
    """What follows a sentence on a sample that does not load: its remedy, where the command has that flag. skip_bad:
    the flag's value, None for a command that has none."""
    return "" if skip_bad is None else " (--skip-bad skips and counts such files)"


def unreadable(reader, index, error, skip_bad, where=""):
    """The sentence for a sample that does not load; skip_bad: as in or_skip."""
    return ValueError(f"{where}{reader.name} sample {index}: {error}{or_skip(skip_bad)}")


def loader(mixture, start, stop, workers):
    """Steps start..stop-1 in order, loaded ahead by `workers` processes (0 = in this one)."""
    return fetch(mixture, workers, batch_size=None, sampler=range(start, stop), prefetch_factor=2 if workers else None)


class _Carried(Dataset):
    """The same elements; a user's mistake comes as a value: a worker's exceptions have a traceback in their message."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k):
        try:
            return self.dataset[k]
        except (OSError, ValueError) as error:
            return error


def fetch(dataset, workers, **options):
    """Yield what a DataLoader yields, raise what an element raised. A generator of its own keeps the loader from
    drawing a seed from the global one, which would make a resumed run differ from an uninterrupted one."""
    for item in DataLoader(_Carried(dataset), num_workers=workers, generator=torch.Generator(), **options):
        for x in item if isinstance(item, list) else [item]:
            if isinstance(x, Exception):
                raise x
        yield item


# ---- test sets: every labelled sample once, as it is ----

def tasks_with_labels(reader, tasks):
    """Those of the tasks that the reader has samples for."""
    return [t for t in reader.tasks if t in tasks and len(reader.indices(t))]


def _measured(reader, jobs):
    """[(index, tasks), ...] -> a list of samples as test_batches yields them, or sentences: why there is none."""
    out, size = [], reader.size
    for index, tasks in jobs:
        try:
            sample = reader.load(index, tuple(tasks), with_next=True)
        except (OSError, ValueError) as error:
            out.append(f"{reader.name}:{index}: {error}")
            continue
        frames = [resize(tensor_image(sample[key]), size) for key in ("image", "next") if key in sample]
        maps = {t: [resize(x, size) for x in label_tensors(sample, t)] for t in tasks}
        for name, mask in sample.get("extra", {}).items():
            maps[name] = maps[name.split(":")[0]][0], resize(torch.from_numpy(mask)[None], size)
        maps = {name: (label, valid[0]) for name, (label, valid) in maps.items()}
        out.append((frames, maps, index, sample["image"].shape[:2]))
    return out


def test_batches(reader, tasks, batch, workers, limit=None, each=None, rank=0, world_size=1, skip_bad=None,
                 skipped=None):
    """Yield the samples that have labels of these tasks, up to `batch` at once that are alike in tasks and frames:
    [(frames (3,H,W) x 1 or 2 in [-1,1], {task: (native label (C,H,W), valid (H,W))}, number, native (H,W)), ...], all
    of the reader's size. Labels keep their values: a flow's are native pixels.

    "<task>:<mask>" in the place of a task: a second mask for it. limit: `some` samples; each: `some` labels of each
    task. Of `world_size` processes the rank-th takes every world_size-th batch, so that batches do not depend on it.
    With skip_bad, what cannot be read is named in the list `skipped`, else it is a ValueError; None as in or_skip.
    """
    jobs = defaultdict(list)
    for t in tasks:
        for i in some(reader, reader.indices(t), each):
            jobs[int(i)].append(t)
    jobs = [(i, jobs[i]) for i in some(reader, sorted(jobs), limit)]
    parts = [jobs[k:k + batch] for k in range(0, len(jobs), batch)][rank::world_size]
    workers, load = workers if len(parts) > 1 else 0, partial(_measured, reader)
    with tqdm(total=sum(map(len, parts)), desc=reader.name, leave=False, disable=rank > 0) as bar:
        for samples in DataLoader(parts, batch_size=None, num_workers=workers, collate_fn=load):
            alike = defaultdict(list)
            for item in samples:
                if not isinstance(item, str):
                    alike[tuple(item[1]), len(item[0])].append(item)
                elif skip_bad:
                    skipped.append(item)
                else:
                    raise ValueError(f"{item}{or_skip(skip_bad)}")
            yield from alike.values()
            bar.update(len(samples))


# ---- the command ----

SIZED = "public datasets have sizes of their own"


def show(reader, index):
    """A Pillow image of a sample at the size training sees: the frames and every label, its invalid pixels black."""
    tasks = tuple(t for t in reader.tasks if index in reader.indices(t))
    sample, cells = reader.load(index, tasks, with_next=True), []
    for key, name in (("image", "image"), ("next", "second frame")):
        if key in sample:
            cells.append((name, cell(picture(resize(tensor_image(sample[key]), reader.size)))))
    for t in tasks:
        label, valid = (resize(x, reader.size) for x in label_tensors(sample, t))
        told = [t, f"{100 * valid.float().mean():.0f}% valid", TASKS[t].tell(label, valid[0]) if valid.any() else ""]
        cells.append((", ".join(filter(None, told)), cell(TASKS[t].colour(label, valid[0]))))
    return draw_panel(cells, 3, [TASKS[t] for t in tasks], LABELS)


def shown(args):
    """(reader, sample number) that --show names; ValueError if there is no such sample."""
    name, _, index = args.show.partition(":")
    if not args.data:
        reader = ToyWorld(name, args.split, all_labels=True)
        reader.size = parse_size(args.size) or reader.size
    elif name in READERS and args.split in READERS[name].use:
        if args.size and READERS[name].size:
            raise ValueError(f"--size would do nothing here: {SIZED}")
        reader = make(READERS[name], args.data, READERS[name].use[args.split], parse_size(args.size))
    else:
        use = ", ".join(f"{r.name} ({', '.join(r.use)})" for r in READERS.values())
        raise ValueError(f"--show {args.show} --split {args.split}: expected NAME:INDEX with one of {use}")
    if not index.isdecimal() or int(index) >= len(reader):
        raise ValueError(f"--show {args.show}: {name} {args.split} has samples 0 to {len(reader) - 1}")
    return reader, int(index)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", default="", help="root folder of real datasets, or one's own; empty = the toy worlds")
    parser.add_argument("--check", action="store_true",
                        help="report every dataset under --data: found, samples per task, first unreadable file")
    parser.add_argument("--full", action="store_true",
                        help="with --check: load every sample, not only the first, middle and last of each task")
    parser.add_argument("--show", metavar="NAME:INDEX", help="write a picture of one sample with all its labels")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="where --show takes it from")
    parser.add_argument("--size", help="HxW of one's own images (default: theirs), or of the toy worlds (32x48)")
    parser.add_argument("--output", "--out", type=writable, help="file that --show writes (default: NAME_INDEX.png)")
    args = parser.parse_args(argv)
    if not (args.check or args.show):
        parser.error("nothing to do: add --check or --show NAME:INDEX")
    if args.check and not args.data:
        raise ValueError("--check looks at real datasets: add --data <root> (the toy worlds are always there)")
    parser.refuse_idle(args, (
        (not args.check, ["full"], "it goes with --check"),
        (not args.show, ["split", "output"], "it goes with --show"),
        (args.data and sized(args.data), ["size"], SIZED)))
    if args.check:
        lines, well = check(args.data, args.full, parse_size(args.size))
        print("\n".join(lines))
    if args.show:
        reader, index = shown(args)
        path = args.output or f"{reader.name}_{index}.png"
        drawn = show(reader, index)
        try:
            drawn.save(path)
        except (ValueError, OSError) as error:      # the former for an ending that Pillow does not know
            raise OSError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}): name a .png or "
                          ".jpg, where there is room and permission, with --output") from None
        print(f"{reader.load(index, ())['name']} -> {path}")
    return 1 if args.check and not well else 0


if __name__ == "__main__":
    sys.exit(run(main))
