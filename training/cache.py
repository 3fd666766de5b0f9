"""What training computes once and reads back: latents of images and labels, and the auxiliary streams of stage 2."""
import contextlib
import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from checkpoint import Records, hold, in_turn, read_json, remove_unheld, write_json
from data import fetch, mirror, prepare, unreadable, views, whole_cells
from tasks import CLASSES, TASKS, registry

# ---- latents of images and labels ----

class LatentCache:
    """Latents of images and labels of all training sets, both horizontal flips, as memory-mapped float16 .npy files:

        <folder>/<dataset>/<array>.npy   (samples, 2 flips, 4, h, w); masks (samples, 2, 1, h, w) bool; done.npy

    arrays: frame0, frame1, then <task> and <task>_valid; a task with its own crop has frames of its own
    (<task>_frame0, ...). Training from it opens no image file and runs no VAE. It draws no vertical flip, colour jitter
    or random crop. An interrupted `build` continues where it stopped and adds datasets; a folder made with another VAE,
    palette, size or state of a dataset (Reader.identity) is refused (ValueError).
    """

    kind, anew, room = "latent cache", "it is built again", "make room, or in training --cache none"
    otherwise = "delete it, then it is built again, or name another folder"

    def __init__(self, folder, readers, vae_hash, palette):
        self.folder, self.arrays, self.places = Path(folder), {}, {r.name: r.folder for r in readers}
        self.about = {"vae": vae_hash, "palette": palette, "datasets": {r.name: self.facts(r) for r in readers},
                      "codes": self.codes(readers, palette)}
        self.join()

    def codes(self, readers, palette):
        """`codes` of the tasks whose labels are kept."""
        return codes({t for r in readers for t in r.tasks}, palette)

    def join(self):
        """Add the datasets that are in the folder to `about`; ValueError if it was made for something else."""
        path, folder = self.folder / "cache.json", self.folder
        others = self.others()      # looked for first: another run writes cache.json, then its arrays
        if not path.is_file():
            self.refuse(others)
            return
        shape = {"vae": str, "palette": str, "datasets": {str: dict}, "codes": (None, {str: [float]})}
        old, new = read_json(path, "", shape, f"delete {folder}, {self.anew}"), self.about["datasets"]
        self.refuse([(name, place) for name, place in others if name not in old["datasets"]])
        differs = [f"{k} {old[k]}, now {self.about[k]}" for k in ("vae", "palette") if old[k] != self.about[k]]
        for name, facts in new.items():     # runs of few tasks need few datasets, and share the folder
            was = old["datasets"].get(name, facts)
            differs += [f"{k} of {name} {was.get(k)}, now {facts[k]}" for k in facts if facts[k] != was.get(k)]
        known, now = old.get("codes") or {}, self.about["codes"]
        differs += [f"another code of {t}" for t in now if t in known and not alike(known[t], now[t])]
        if differs:
            raise ValueError(f"the {self.kind} {folder} was made for something else ({'; '.join(differs)}): "
                             + self.otherwise)
        self.about |= {"datasets": {**old["datasets"], **new}, "codes": {**known, **now}}

    def others(self):
        """[(dataset, folder with files where its arrays would be)]: they are of a cache, or of the dataset itself."""
        out = []
        for name, data in self.places.items():
            within = data and self.folder.resolve().is_relative_to(data.resolve())
            out += [(name, place) for place in (self.folder,) * bool(within) + (self.folder / name,) if filled(place)]
        return out

    def refuse(self, others):
        """ValueError if there are any of `others` that are of no cache: arrays would hide them, and whoever deletes a
        cache would delete them, too."""
        for _, place in others:
            raise ValueError(f"{place} holds other files than a {self.kind}: name another folder for it")

    @staticmethod
    def facts(reader):
        """What the latents of a dataset depend on."""
        return {"samples": len(reader), "size": list(reader.size), "tasks": list(reader.tasks),
                "version": reader.version, "files": reader.identity()}

    def layout(self, reader, model):
        """{array name: (shape, dtype)} of a dataset."""
        h, w = (s // model.factor for s in reader.size)
        frames = [f"{prefix(reader, tasks)}frame{n}" for tasks in views(reader) for n in (0, 1)]
        each = dict.fromkeys(frames, (model.encoded_shape(reader.size), np.float16))
        each |= dict.fromkeys(reader.tasks, ((model.out_channels, h, w), np.float16))
        each |= {f"{t}_valid": ((1, h, w), bool) for t in reader.tasks}
        return {"done": ((len(reader),), bool),
                **{name: ((len(reader), 2, *shape), kind) for name, (shape, kind) in each.items()}}

    def path(self, reader, name):
        return self.folder / reader.name / f"{name}.npy"

    def array(self, reader, name, mode="r"):
        """The memory-mapped array. ValueError names one that is missing or damaged."""
        key = (reader.name, name)
        if key not in self.arrays:
            try:
                # first to read: "r+" would lengthen a file that was cut short
                self.arrays[key] = np.lib.format.open_memmap(self.path(reader, name), "r")
                if mode != "r":
                    self.arrays[key] = np.lib.format.open_memmap(self.path(reader, name), mode)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.path(reader, name)} of the {self.kind} is missing or damaged ({error}): "
                                 f"delete {self.folder / reader.name}, {self.anew}") from error
        return self.arrays[key]

    def get(self, reader, index, tasks, flip, seed=None):
        """The cached counterpart of `prepare`, as float32 latents. seed: not needed, nothing is drawn."""
        def take(name):
            return torch.from_numpy(np.array(self.array(reader, name)[index, int(flip)]))
        before = prefix(reader, tasks)
        return {"frames": [take(f"{before}frame{n}").float() for n in (0, 1)],
                "labels": {t: take(t).float() for t in tasks}, "valid": {t: take(f"{t}_valid") for t in tasks}}

    def create(self, readers, model):
        """Make the arrays that are not there yet, empty. OSError if the disk has too little room for them: writing to
        a memory map on a full disk would end the process without a word."""
        with in_turn(self.folder):      # another run may share the folder, and begin at the same time
            self.join()
            self._create(readers, model)

    def _create(self, readers, model):
        missing = {self.path(r, name): spec for r in readers for name, spec in self.layout(r, model).items()
                   if not self.path(r, name).is_file()}
        need = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in missing.values())
        need += sum(self.unwritten(r, model) for r in readers)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(f"the {self.kind} {self.folder} needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
                          f"free: {self.room}")
        write_json(self.folder / "cache.json", self.about)
        for reader in (r for r in readers if self.path(r, "done") in missing):
            for streams in self.folder.glob("streams-*"):       # of images that may have been others
                (streams / record_name(reader)).unlink(missing_ok=True)
        for path, (shape, kind) in missing.items():
            path.parent.mkdir(exist_ok=True)
            np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", kind, shape)
            os.replace(path.with_suffix(".tmp"), path)
        self.arrays.clear()     # `unwritten` opens read-only

    def unwritten(self, reader, model):
        """Bytes that the arrays of an interrupted `build` will still take: the system gives them room when they are
        written."""
        if not self.path(reader, "done").is_file() or self.array(reader, "done").all():
            return 0
        paths = [self.path(reader, name) for name in self.layout(reader, model)]
        sizes = [path.stat() for path in paths if path.is_file()]
        return sum(max(0, s.st_size - 512 * s.st_blocks) for s in sizes)

    def build(self, readers, model, codecs, workers=0, batch=8, skip_bad=None, rank=0, world_size=1):
        """Encode what is not cached yet, of `world_size` ranks the rank-th share, into the arrays that `create` made.
        Ranks share whole batches, so that their number changes no bit.

        skip_bad: as in data.Mixture. Returns the names of skipped samples, which are tried again next time.
        """
        skipped = []
        for reader in readers if rank == 0 else ():     # once is enough
            self.compare(reader, model, codecs)
        self.arrays.clear()     # opened read-only
        for reader in readers:
            arrays = {name: self.array(reader, name, "r+") for name in self.layout(reader, model)}
            todo = [i for i in range(len(reader)) if i // batch % world_size == rank and not arrays["done"][i]]
            wanted = {t: set(reader.indices(t)) for t in reader.tasks}
            jobs = _Jobs(reader, todo, wanted, codecs, skip_bad)
            groups = fetch(jobs, workers if len(todo) > batch else 0, batch_size=batch, collate_fn=list)
            for group in tqdm(groups, f"caching latents of {reader.name}", disable=not todo or rank > 0, leave=False):
                parts = [(name, index, flip, x) for index, items, _ in group for (name, flip), x in items]
                images = [part for part in parts if not part[0].endswith("_valid")]
                latents = encode(model, [(name, x) for name, _, _, x in images])
                for (name, index, flip, _), z in zip(images, latents, strict=True):
                    arrays[name][index, flip] = z
                for name, index, flip, mask in (part for part in parts if part[0].endswith("_valid")):
                    arrays[name][index, flip] = whole_cells(mask[None], model.factor)[0].numpy()
                for array in arrays.values():
                    array.flush()
                for index, _, bad in group:
                    skipped += bad
                    arrays["done"][index] = not bad
        self.arrays.clear()   # reopened read-only, also by the workers
        return skipped


    @torch.no_grad()
    def compare(self, reader, model, codecs):
        """ValueError if the first label of a task, or an image of it, comes out otherwise now than it is stored: the
        task's code or the reader has been changed since. What cannot be read any more is not compared."""
        device = next(model.parameters()).device
        for t in reader.tasks:
            index = next(iter(reader.indices(t)), None)
            if index is None or not self.array(reader, "done")[index]:
                continue
            try:
                now = prepare(reader, index, (t,), codecs)
            except (OSError, ValueError):
                continue
            was = self.get(reader, index, (t,), False)
            cells = whole_cells(now["valid"][t][None], model.factor)[0]
            label = model.encode_labels({t: now["labels"][t][None].to(device)})[t]
            images = [model.encode_frame(x[None].to(device)) for x in now["frames"][:TASKS[t].frames]]
            if not torch.equal(cells, was["valid"][t]) or differ(label[0], was["labels"][t]):
                what = f"label of {t}"
            elif any(differ(z[0], stored) for z, stored in zip(images, was["frames"], strict=False)):
                what = "image"
            else:
                continue
            raise ValueError(f"the {self.kind} {self.folder} has another {what} for {reader.name} sample {index} than "
                             f"the code makes now: delete {self.folder / reader.name}, {self.anew}")


def codes(tasks, palette):
    """{task: eight numbers that tell its code from another: what it makes of a made-up label, weighted in eight ways}.
    """
    def scattered(count):       # in [0,1), the same whatever the version of torch
        return torch.arange(1, count + 1).double().sin().mul(43758.5453).frac().abs()

    told = {}
    for t, codec in ((t, codec) for t, codec in registry(palette).items() if t in tasks):
        label = scattered(codec.channels * 16 * 24)
        label = (len(CLASSES) * label).floor() if codec.categorical else label
        code = codec.encode(label.float().view(1, -1, 16, 24), torch.ones(1, 1, 16, 24, dtype=torch.bool)).flatten()
        weights = scattered(8 * len(code)).view(8, -1) - 0.5
        told[t] = [round(x, 4) for x in (weights @ code.double() / len(code) ** 0.5).tolist()]
    return told


def alike(one, other):
    """Whether two of `codes` are the same but for another machine's rounding."""
    return np.allclose(one, other, atol=1e-3, equal_nan=True)


def differ(now, stored):
    """Whether two latents differ by more than float16 and another device's rounding."""
    return (now.float().cpu() - stored).abs().mean() > 0.02 * stored.abs().mean()


def filled(folder):
    """Whether a folder holds anything but what a cache begins with."""
    return folder.is_dir() and not all(path.name.startswith("cache.") for path in folder.iterdir())


def prefix(reader, tasks):
    """Of the names of the frame arrays of tasks that share their frames."""
    return f"{tasks[0]}_" if tasks[0] in reader.train_crop else ""


AT_ONCE = 50_000    # pixels that pass the VAE at once: of small images many, of a real dataset's size four images


def encode(model, images):
    """[(array name, (3,H,W))] of any sizes -> what the model makes of them in float16, latents (4,h,w), in order."""
    device, out, groups = next(model.parameters()).device, [None] * len(images), {}
    for k, (name, x) in enumerate(images):
        groups.setdefault((name if name in TASKS else None, x.shape), []).append(k)
    for (task, shape), alike in groups.items():
        batch = max(4, AT_ONCE // math.prod(shape[1:]))
        for part in (alike[i:i + batch] for i in range(0, len(alike), batch)):
            x = torch.stack([images[k][1] for k in part]).to(device)
            with torch.no_grad():
                z = (model.encode_labels({task: x})[task] if task else model.encode_frame(x)).cpu().half().numpy()
            for k, latent in zip(part, z, strict=True):
                out[k] = latent
    return out


class _Jobs(Dataset):
    """Element k: (sample index, [((array name, flip), image or mask)], names of skipped samples)."""

    def __init__(self, reader, todo, wanted, codecs, skip_bad):
        self.reader, self.todo, self.wanted, self.codecs = reader, todo, wanted, codecs
        self.skip_bad = skip_bad

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, k):
        index, items = self.todo[k], []
        try:
            for tasks in views(self.reader):
                before, tasks = prefix(self.reader, tasks), tuple(t for t in tasks if index in self.wanted[t])
                if not tasks:
                    continue
                upright = prepare(self.reader, index, tasks, self.codecs)
                for flip, s in enumerate((upright, mirror(upright, self.codecs, -1))):
                    items += [((f"{before}frame{n}", flip), x) for n, x in enumerate(s["frames"])]
                    items += [((t, flip), x) for t, x in s["labels"].items()]
                    items += [((f"{t}_valid", flip), m) for t, m in s["valid"].items()]
        except (OSError, ValueError) as error:
            if not self.skip_bad:
                raise unreadable(self.reader, index, error, self.skip_bad) from error
            return index, [], [f"{self.reader.name}:{index}"]
        return index, items, []


def fingerprint(tensors):
    """Short hash of {name: tensor}: which weights made a cache."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(name.encode() + x.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the auxiliary streams of stage 2 ----

def record_name(reader):
    """Once, records of a dataset with crops could be of a crop: those have the other name."""
    return f"{reader.name}-whole.f16" if reader.train_crop else f"{reader.name}.f16"


class StreamCache:
    """Features of stage 2's frozen stream for the images of a latent cache, computed when first needed, then read back:

        <folder>/streams-<hash of stage 1>/<dataset>.f16      a record per sample and horizontal flip, float16
        (<dataset>-whole.f16 of one that some task sees a crop of)

    A record holds all tasks' features in all blocks. Training sees the float16 values whether they were just computed
    or read, so that a resumed run equals an uninterrupted one. Each dataset has an equal part of `limit` bytes for the
    records of its first samples. Micro-batches of others, and of a task with a crop of its own, are left to the model,
    which computes what it needs, at once.
    That these are the same samples as when they were stored, the latent cache in the same folder has checked.

    autocast: what opens its context in training; the name of a folder that was filled under one ends in its precision.
    own: no other run is meant to use `folder`, so the streams of earlier stage 1s are deleted (if none reads them).
    """

    def __init__(self, folder, readers, model, limit, autocast=contextlib.nullcontext, own=False):
        self.model, self.shapes, self.records, self.kept = model, {}, {}, {}
        self.compared, self.written = set(), set()      # datasets; records of this process
        self.cropped = {reader.name: reader.train_crop for reader in readers}
        tokens = {t: getattr(model, f"token_{t}") for t in model.tasks}
        weight, known = next(model.unet.parameters()), {}
        name, device = f"streams-{fingerprint(model.unet.state_dict() | tokens)}", weight.device.type
        with autocast():
            if torch.is_autocast_enabled(device):
                name += f"-{torch.get_autocast_dtype(device)}".replace("torch.", "")
        place, folder = Path(folder), Path(folder) / name
        with in_turn(place):
            self.held = hold(folder)
            for earlier in set(place.glob("streams-*")) - {folder} if own else ():
                remove_unheld(earlier)
        for size in {tuple(reader.size) for reader in readers}:
            z = weight.new_zeros(1, model.unet.config.out_channels, *(s // model.factor for s in size))
            known[size] = {block: f[model.tasks[0]].shape[1:] for block, f in model.streams(z, z, model.tasks).items()}
        for reader in readers:
            self.shapes[reader.name] = known[tuple(reader.size)]
            numbers = len(model.tasks) * sum(shape.numel() for shape in self.shapes[reader.name].values())
            kept = min(len(reader), int(limit / len(readers) / (4 * numbers)))      # two flips of two bytes
            self.records[reader.name] = Records(folder / record_name(reader), 2 * kept, numbers)
            self.kept[reader.name] = kept

    def fetch(self, keys, tasks, z_i, z_j):
        """keys [(dataset, index, flip)] of a micro-batch of one size, tasks: it is about, z_i, z_j: (B,4,h,w) its
        latents -> {block: {task: (B,N,C)}} as StableMTL.streams, in float32; None if no record of them is kept."""
        if any(tasks[0] in self.cropped[name] for name, *_ in keys):
            return None
        if all(index >= self.kept[name] for name, index, _ in keys):
            return None
        rows = [self.one(*key, z_i[k:k + 1], z_j[k:k + 1]) for k, key in enumerate(keys)]
        shapes, tasks = self.shapes[keys[0][0]], self.model.tasks
        parts = torch.stack(rows).split([len(tasks) * shape.numel() for shape in shapes.values()], 1)
        blocks = zip(shapes.items(), parts, strict=True)
        return {block: dict(zip(tasks, part.unflatten(1, (len(tasks), *shape)).unbind(1), strict=True))
                for (block, shape), part in blocks}

    def one(self, name, index, flip, z_i, z_j):
        """The record of one image, a vector of float16's values, in float32: autocast on a CPU stacks no others.
        ValueError if the first one that is read of a dataset is not what the code makes now."""
        records, number = self.records[name], 2 * index + flip
        record = records.read(number)
        if record is None or not (name in self.compared or (name, number) in self.written):
            feats = self.model.streams(z_i, z_j, self.model.tasks)
            now = torch.cat([torch.stack(list(f.values())).flatten() for f in feats.values()]).half().cpu()
            if record is not None and differ(now, torch.from_numpy(record).float()):
                raise ValueError(f"{records.path} has other streams of sample {index} than the code makes now: delete "
                                 f"{records.path.parent}, they are computed again")
            if record is not None:
                self.compared.add(name)
            elif z_i.any():     # else --skip-bad left it out of the latents, to be tried again next time
                records.write(number, now.numpy())
                self.written.add((name, number))
            record = now.numpy() if record is None else record
        return torch.from_numpy(record).to(z_i.device).float()
