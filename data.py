"""From readers to batches: transforms, the mixture of partial labels, the latent cache.

A reader (toyworld.py, datasets.py) lists the samples of one dataset and loads them at native resolution; this file does the rest.

    reader.load(i, tasks) -> codes in [-1,1] (tasks.py) -> crop, resize nearest-exact, jitter, flips -> micro-batches of one step

Everything drawn for step s depends on (seed, s) alone: the stream of batches is the same for any number of workers and ranks,
and a resumed run continues it exactly.

    python data.py --data <root> --check              what is found, what is missing, the first unreadable file
    python data.py --data <root> --show hypersim:0    a picture of one sample with all its labels (toy worlds: --show streets:3)
"""
import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import read_json, write_json
from cli import Parser, run
from draw import cell, draw_panel
from readers import READERS, check, found
from readers.toyworld import ToyWorld
from tasks import TASKS

TOY_TRAIN, TOY_TEST = ("rooms", "streets", "things"), ("rooms", "streets", "things", "real")


# ---- which datasets ----

def parse_drop(text, known):
    """"streets:depth,things:scene_flow" -> {"streets": {"depth"}, ...}: labels that training does not see (paper Table 3)."""
    drop = {}
    for part in filter(None, text.split(",")):
        world, _, task = part.partition(":")
        if world not in known or task not in TASKS:
            raise ValueError(f"--drop {part}: expected dataset:task with a dataset of {', '.join(known)} and a task of {', '.join(TASKS)}")
        drop.setdefault(world, set()).add(task)
    return drop


def train_readers(root="", size=(32, 48), scenes=800, split="train"):
    """The training datasets, or ("val") what they hold out: the toy worlds, or those found under `root` (FileNotFoundError if none)."""
    if not root:
        return [ToyWorld(w, split, scenes, size) for w in TOY_TRAIN]
    return found(root, split)


def test_readers(root="", size=(32, 48), scenes=64, split="test", kitti_baseline="calibration"):
    """The held-out datasets: the same worlds' test split and the unseen world, or those found under `root`."""
    if not root:
        return [ToyWorld(w, split, scenes, size) for w in TOY_TEST]
    readers = found(root, split)
    for reader in readers:
        if reader.name == "kitti_2015":
            reader.baseline = kitti_baseline
    return readers


# ---- one sample ----

def tensor_image(array):
    """(H,W,3) uint8 -> (3,H,W) float in [-1,1]."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 127.5 - 1


def resize(x, size):
    """(C,H,W) -> (C,*size), nearest-exact; values (flow, depth) are never rescaled."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x[None].float(), size=tuple(size), mode="nearest-exact")[0].to(x.dtype)


def label_tensors(sample, task):
    """A sample's label of one task as tensors: (C,H,W) float, (1,H,W) bool."""
    label = torch.from_numpy(np.ascontiguousarray(sample["labels"][task])).permute(2, 0, 1).float()
    return label, torch.from_numpy(np.ascontiguousarray(sample["valid"][task]))[None]


def jitter(images, strength, rng):
    """Brightness, contrast, saturation (factors 1 +- s) and hue (+- s of the colour circle), the same for all frames of a sample."""
    brightness, contrast, saturation = (rng.uniform(1 - s, 1 + s) for s in strength[:3])
    hue = int(round(rng.uniform(-strength[3], strength[3]) * 255))
    out = []
    for array in images:
        image = Image.fromarray(array)
        for enhance, factor in ((ImageEnhance.Brightness, brightness), (ImageEnhance.Contrast, contrast), (ImageEnhance.Color, saturation)):
            image = enhance(image).enhance(factor)
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 256
        out.append(np.array(Image.fromarray(hsv, "HSV").convert("RGB")))
    return out


def prepare(reader, index, tasks, codecs, flips=(False, False), rng=None, with_next=True):
    """Load and transform one training sample.

    flips: (horizontal, vertical). rng: draws the random crop and the colour jitter; None = centre crop, no jitter (the latent cache).
    with_next: load the second frame for single-frame tasks, too (stage 2's flow streams look at it).
    Returns {"frames": [frame i, frame j] (3,H,W) each, "labels": {task: code (3,H,W)}, "valid": {task: (1,H,W) bool}}; without a
    second frame j = i. A reader's train_crop and jitter belong to one task: they act when that task is the only one asked for.
    """
    sample = reader.load(index, tasks, with_next=with_next)
    images = [sample["image"], sample.get("next", sample["image"])]
    only = tasks[0] if len(tasks) == 1 else None
    height, width = images[0].shape[:2]
    top, left, ch, cw = 0, 0, height, width
    if only in reader.train_crop:
        ch, cw = (min(a, b) for a, b in zip(reader.train_crop[only], (height, width)))
        top, left = ((height - ch) // 2, (width - cw) // 2) if rng is None else (rng.integers(height - ch + 1), rng.integers(width - cw + 1))
    crop = lambda x: x[..., top:top + ch, left:left + cw]
    if only in reader.jitter and rng is not None:
        images = jitter(images, reader.jitter[only], rng)
    frames = [resize(crop(tensor_image(a)), reader.size) for a in images]
    labels, valid = {}, {}
    for t in tasks:
        label, mask = (crop(x) for x in label_tensors(sample, t))
        labels[t] = resize(codecs[t].encode(label[None], mask[None])[0], reader.size)
        valid[t] = resize(mask, reader.size)
    item = {"frames": frames, "labels": labels, "valid": valid}
    for axis, flip in ((-1, flips[0]), (-2, flips[1])):
        item = mirror(item, codecs, axis) if flip else item
    return item


def mirror(item, codecs, axis):
    """What `prepare` returns, flipped along an axis (-1 horizontally, -2 vertically): vectors change the sign of that component."""
    signs = {t: torch.tensor(codecs[t].hflip if axis == -1 else codecs[t].vflip).view(3, 1, 1) for t in item["labels"]}
    return {"frames": [f.flip(axis) for f in item["frames"]], "labels": {t: x.flip(axis) * signs[t] for t, x in item["labels"].items()},
            "valid": {t: m.flip(axis) for t, m in item["valid"].items()}}


def whole_cells(valid, factor):
    """(B,1,H,W) bool -> (B,1,H//f,W//f) bool: a latent cell counts only if all pixels of its block are valid."""
    return F.max_pool2d((~valid).float(), factor) == 0


# ---- the mixture: what step s trains on ----

class Mixture(Dataset):
    """Element s is optimizer step s: a list of micro-batches (dicts), each of one task and one image size.

    Isolation (the default): all samples of a step belong to one task; the tasks come in a fresh random order per cycle.
    Within a task, a sample's dataset is drawn with the readers' `mix` weights, renormalised over those that label the task, so that
    leaving out tasks never shifts them. The draws do not depend on `micro`, nor on the number of ranks (rank r takes every world-th).

    Micro-batch: task(s) in "tasks", "names" ("dataset:index"), "frames" [i, j], "labels" and "valid" {task: tensor}; as images in [-1,1] with
    pixel masks, or with a `cache` as latents with masks of latent cells.
    """

    def __init__(self, readers, tasks, codecs, batch=16, micro=16, seed=0, drop=None, isolation=True, joint=False, cache=None,
                 skip_bad=False, with_next=True, rank=0, world=1):
        drop = drop or {}
        self.readers, self.codecs, self.cache, self.skip_bad = readers, codecs, cache, skip_bad
        self.batch, self.micro, self.seed, self.isolation, self.joint = batch, micro, seed, isolation, joint
        self.with_next, self.rank, self.world = with_next, rank, world
        self.sources = {t: [(r, list(r.indices(t))) for r in readers if t in r.tasks and t not in drop.get(r.name, ())] for t in tasks}
        self.sources = {t: [(r, i) for r, i in s if i] for t, s in self.sources.items()}
        self.labelled = {(r.name, t): set(i) for t, s in self.sources.items() for r, i in s}
        self.tasks = [t for t in tasks if self.sources[t]]
        missing = [t for t in tasks if not self.sources[t]]
        if missing:
            raise ValueError(f"no training labels for {', '.join(missing)}: choose other --tasks, drop fewer labels, or add a dataset that has them")

    def task_of(self, step):
        cycle, place = divmod(step, len(self.tasks))
        return self.tasks[np.random.default_rng([self.seed, 1, cycle]).permutation(len(self.tasks))[place]]

    def plan(self, step):
        """The samples of a step: [(tasks, reader, index, flips, sample seed)], grouped by task and dataset."""
        rng, out = np.random.default_rng([self.seed, 2, step]), []
        for _ in range(self.batch):
            task = self.tasks[rng.integers(len(self.tasks))] if not self.isolation else self.task_of(step)
            weights = np.array([r.mix.get(task, 1.0) for r, _ in self.sources[task]])
            reader, indices = self.sources[task][rng.choice(len(weights), p=weights / weights.sum())]
            index, flips, seed = indices[rng.integers(len(indices))], rng.random(2) < 0.5, int(rng.integers(2 ** 31))
            tasks = (task,)
            if self.joint:      # N-to-N: every available label of the image at once; one with a crop of its own is another image
                view = next(v for _, v in LatentCache.views(reader) if task in v)
                tasks = tuple(t for t in self.tasks if t in view and index in self.labelled.get((reader.name, t), ()))
            out.append((tasks, reader, index, (bool(flips[0]), bool(flips[1]) and reader.vflip), seed))
        out = out[self.rank::self.world]
        return sorted(out, key=lambda o: (self.tasks.index(o[0][0]), o[1].name, o[0]))

    def _one(self, tasks, reader, index, flips, seed):
        if self.cache is not None:
            return self.cache.get(reader, index, tasks, flips[0])
        return prepare(reader, index, tasks, self.codecs, flips, np.random.default_rng(seed), self.with_next)

    def __getitem__(self, step):
        groups, skipped = {}, []
        for tasks, reader, index, flips, seed in self.plan(step):
            try:
                item = self._one(tasks, reader, index, flips, seed)
            except (OSError, ValueError) as error:
                if not self.skip_bad:
                    raise ValueError(f"step {step}, {reader.name} sample {index}: {error} (--skip-bad skips and counts such files)") from error
                skipped.append(f"{reader.name}:{index}")
                continue
            groups.setdefault((tasks, item["frames"][0].shape), []).append((f"{reader.name}:{index}", item))
        batches = []
        for (tasks, _), items in groups.items():
            for i in range(0, len(items), self.micro):
                names, part = zip(*items[i:i + self.micro])
                stack = lambda pick: torch.stack([pick(p) for p in part])
                batches.append({"tasks": tasks, "names": names,
                                "frames": [stack(lambda p: p["frames"][0]), stack(lambda p: p["frames"][1])],
                                "labels": {t: stack(lambda p: p["labels"][t]) for t in tasks},
                                "valid": {t: stack(lambda p: p["valid"][t]) for t in tasks}})
        return {"batches": batches, "skipped": skipped}


def loader(mixture, start, stop, workers):
    """Steps start..stop-1 in order, loaded ahead by `workers` processes (0 = in this one)."""
    return _fetch(mixture, workers, batch_size=None, sampler=range(start, stop), prefetch_factor=2 if workers else None)


class _Carried(Dataset):
    """The same elements; a user's mistake comes as a value, because a worker's exceptions arrive with a traceback in their message."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k):
        try:
            return self.dataset[k]
        except (OSError, ValueError) as error:
            return error


def _fetch(dataset, workers, **options):
    """Yield what a DataLoader yields, raise what an element raised. A generator of its own keeps the loader from drawing a seed from
    the global one, which would make a resumed run differ from an uninterrupted one."""
    for item in DataLoader(_Carried(dataset), num_workers=workers, generator=torch.Generator(), **options):
        for x in item if isinstance(item, list) else [item]:
            if isinstance(x, Exception):
                raise x
        yield item


# ---- the latent cache ----

class LatentCache:
    """Latents of images and labels of all training sets, both horizontal flips, as memory-mapped float16 .npy files:

        <folder>/<dataset>/<array>.npy   (samples, 2 flips, 4, h, w); masks (samples, 2, 1, h, w) bool; done.npy (samples,) bool

    arrays: frame0, frame1, then <task> and <task>_valid; a task with its own crop has frames of its own (<task>_frame0, ...).
    Training from it opens no image file and runs no VAE. It draws no vertical flip, colour jitter or random crop. An interrupted
    `build` continues where it stopped and adds datasets; a folder made with another VAE, palette, size or state of a dataset is refused (ValueError).
    """

    def __init__(self, folder, readers, vae_hash, palette):
        self.folder, self.arrays = Path(folder), {}
        self.about = {"vae": vae_hash, "palette": palette, "datasets": {
            r.name: {"samples": len(r), "size": list(r.size), "tasks": list(r.tasks), "version": r.version} for r in readers}}
        if (self.folder / "cache.json").is_file():
            old, new = read_json(self.folder / "cache.json", ""), self.about["datasets"]
            self.about["datasets"] = {**old["datasets"], **new}     # runs of few tasks need few datasets, and share the folder
            differs = [k for k in ("vae", "palette") if old[k] != self.about[k]]
            differs += ["datasets"] * any(old["datasets"].get(name, new[name]) != new[name] for name in new)
            if differs:
                raise ValueError(f"--cache {folder} was made with another {' and '.join(differs)}: name another folder or delete this one")

    @staticmethod
    def views(reader):
        """[(prefix of the frame arrays, tasks)]: tasks without a crop of their own share the frames."""
        shared = tuple(t for t in reader.tasks if t not in reader.train_crop)
        return ([("", shared)] if shared else []) + [(f"{t}_", (t,)) for t in reader.tasks if t in reader.train_crop]

    def size(self, reader, factor):
        """Bytes on disk of a whole dataset."""
        cells = (reader.size[0] // factor) * (reader.size[1] // factor)
        return len(reader) * 2 * cells * (len(reader.tasks) * (4 * 2 + 1) + len(self.views(reader)) * 2 * 4 * 2)

    def array(self, reader, name, item=None):
        """The memory-mapped array, created with the shape of `item` if it does not exist yet."""
        key = (reader.name, name)
        if key not in self.arrays:
            path = self.folder / reader.name / f"{name}.npy"
            if item is not None and not path.is_file():
                path.parent.mkdir(exist_ok=True)
                np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", item.dtype, (len(reader), *item.shape))
                os.replace(path.with_suffix(".tmp"), path)
            self.arrays[key] = np.lib.format.open_memmap(path, "r+" if item is not None else "r")
        return self.arrays[key]

    def get(self, reader, index, tasks, flip):
        """The cached counterpart of `prepare`, as float32 latents."""
        prefix = f"{tasks[0]}_" if tasks[0] in reader.train_crop else ""
        take = lambda name: torch.from_numpy(np.array(self.array(reader, name)[index, int(flip)]))
        return {"frames": [take(f"{prefix}frame0").float(), take(f"{prefix}frame1").float()],
                "labels": {t: take(t).float() for t in tasks}, "valid": {t: take(f"{t}_valid") for t in tasks}}

    def build(self, readers, model, codecs, workers=2, batch=8, skip_bad=False):
        """Encode whatever is not cached yet. Returns the names of skipped samples, which are tried again next time.

        OSError if the disk has too little room: writing to a memory map on a full disk would end the process without a word.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        need = sum(self.size(r, model.factor) for r in readers if not (self.folder / r.name).is_dir())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(f"the latent cache in {self.folder} needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: make room, or --cache none")
        write_json(self.folder / "cache.json", self.about)
        skipped = []
        for reader in readers:
            done = self.array(reader, "done", np.zeros((), bool))
            todo = [int(i) for i in np.flatnonzero(~done)]
            wanted = {t: set(reader.indices(t)) for t in reader.tasks}
            jobs = _fetch(_CacheJobs(reader, todo, wanted, codecs, self.views(reader), skip_bad), workers if len(todo) > batch else 0,
                          batch_size=batch, collate_fn=list)
            for group in tqdm(jobs, desc=f"caching latents of {reader.name}", disable=not todo, leave=False):
                images = {}
                for index, items, bad in group:
                    skipped += bad
                    for key, x in items:
                        images.setdefault(tuple(x.shape), []).append((index, key, x))
                for entries in images.values():
                    z = encode_many(model, [x for _, key, x in entries if not key[0].endswith("_valid")])
                    for index, (name, flip), x in entries:
                        value = whole_cells(x[None], model.factor)[0].numpy() if name.endswith("_valid") else next(z)
                        self.array(reader, name, np.zeros((2, *value.shape), value.dtype))[index, flip] = value
                for index, _, bad in group:
                    done[index] = not bad
            for (name, _), a in self.arrays.items():
                if name == reader.name:
                    a.flush()
        self.arrays.clear()   # reopened read-only, also by the workers
        return skipped


def encode_many(model, images, batch=32):
    """Yield the float16 latent of each image, a batch at a time."""
    device = next(model.vae.parameters()).device
    for i in range(0, len(images), batch):
        with torch.no_grad():
            yield from model.encode(torch.stack(images[i:i + batch]).to(device)).cpu().half().numpy()


class _CacheJobs(Dataset):
    """Element k: (sample index, [((array name, flip), image or mask)], names of skipped samples)."""

    def __init__(self, reader, todo, wanted, codecs, views, skip_bad):
        self.reader, self.todo, self.wanted, self.codecs, self.views, self.skip_bad = reader, todo, wanted, codecs, views, skip_bad

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, k):
        index, items = self.todo[k], []
        try:
            for prefix, tasks in self.views:
                tasks = tuple(t for t in tasks if index in self.wanted[t])
                if not tasks:
                    continue
                upright = prepare(self.reader, index, tasks, self.codecs)
                for flip, s in enumerate((upright, mirror(upright, self.codecs, -1))):
                    items += [((f"{prefix}frame{n}", flip), x) for n, x in enumerate(s["frames"])]
                    items += [((t, flip), x) for t, x in s["labels"].items()] + [((f"{t}_valid", flip), m) for t, m in s["valid"].items()]
        except (OSError, ValueError) as error:
            if not self.skip_bad:
                raise ValueError(f"{self.reader.name} sample {index}: {error} (--skip-bad skips and counts such files)") from error
            return index, [], [f"{self.reader.name}:{index}"]
        return index, items, []


def fingerprint(module):
    """Short hash of a module's weights: which VAE made a cache."""
    digest = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        digest.update(name.encode() + p.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the command ----

def show(reader, index):
    """A Pillow image of one sample at the size training sees: the frames and every label, its invalid pixels black."""
    tasks = tuple(t for t in reader.tasks if index in reader.indices(t))
    sample = reader.load(index, tasks, with_next=True)
    picture = lambda x: ((resize(tensor_image(x), reader.size) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    cells = [(name, cell(picture(sample[key]))) for key, name in (("image", "image"), ("next", "second frame")) if key in sample]
    for t in tasks:
        label, valid = (resize(x, reader.size) for x in label_tensors(sample, t))
        cells.append((f"{t}, {100 * valid.float().mean():.0f}% valid", cell(TASKS[t].colour(label, valid[0]))))
    return draw_panel(cells, 3)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", default="", help="root folder of the real datasets; empty = the toy worlds")
    parser.add_argument("--check", action="store_true", help="report every dataset under --data: found, samples per task, first unreadable file")
    parser.add_argument("--full", action="store_true", help="with --check: load every sample, not only the first, middle and last of each task")
    parser.add_argument("--show", metavar="NAME:INDEX", help="write a picture of one sample with all its labels")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="which part --show takes the sample from")
    parser.add_argument("--output", default="", help="file that --show writes (default: NAME_INDEX.png)")
    args = parser.parse_args(argv)
    if args.check:
        if not args.data:
            raise ValueError("--check looks at real datasets: add --data <root> (the toy worlds are always there)")
        print("\n".join(check(args.data, args.full)))
    if args.show:
        name, _, index = args.show.partition(":")
        if args.data:
            if name not in READERS or args.split not in READERS[name].use:
                use = ", ".join(f"{r.name} ({', '.join(r.use)})" for r in READERS.values())
                raise ValueError(f"--show {args.show} --split {args.split}: expected NAME:INDEX with one of {use}")
            reader = READERS[name](args.data, READERS[name].use[args.split])
        else:
            reader = ToyWorld(name, args.split, all_labels=True)
        if not index.isdigit() or int(index) >= len(reader):
            raise ValueError(f"--show {args.show}: {name} {args.split} has samples 0 to {len(reader) - 1}")
        path = args.output or f"{name}_{index}.png"
        show(reader, int(index)).save(path)
        print(f"{reader.load(int(index), ())['name']} -> {path}")
    if not (args.check or args.show):
        parser.error("nothing to do: add --check or --show NAME:INDEX")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
