"""Label discovery: a trained model's predictions as labels where a training set has none. HiTTs' idea on StableMTL, our
adaptation.

    pair      a training set and a task of one frame, not of classes, that it has no label of
    label     the latent that a teacher predicts for the image as it is; it enters StableMTL's one loss as it stands
    doubt     how far the teacher disagrees with itself on the mirrored image, in [0,1], one number per latent cell

A student starts from the base as its teacher did, sees the images of these pairs with their colours changed, and takes
the labels that a mask leaves. What is labelled keeps its labels.
"""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import read_json
from data import mirror, prepare, tasks_with_labels, unreadable, whole_cells
from inference.confidence import agreement, turned
from network.generalist import seeded
from tasks import TASKS
from training.cache import LatentCache, codes

MASKS = ("half", "none", "weighted")
JITTER = (0.2, 0.2, 0.2, 0.0)       # of a student's images; no hue: the labels of albedo follow it
ABOUT = {"vae": str, "datasets": {str: dict}, "cells": {str: [str]}, "teacher": str}


def discoverable(tasks):
    """The tasks of one frame that are not about classes: without a second frame there is no motion to label, and a
    dataset without class labels (rooms, things) is full of what belongs to none of the classes."""
    return [t for t in tasks if TASKS[t].frames == 1 and not TASKS[t].categorical]


def unlabelled(readers, tasks, drop):
    """{dataset: the tasks that it has a pair of}: discoverable, without any label left by `drop`."""
    def known(reader):
        return set(tasks_with_labels(reader, tasks)) - drop.get(reader.name, set())
    pairs = {r.name: [t for t in discoverable(tasks) if t not in known(r)] for r in readers}
    return {name: found for name, found in pairs.items() if found}


class UnlabelledPair:
    """A training set and one task of it, for data.Mixture: a reader of the images, with a weight of its own.

    weight: of the draw of a dataset, where the labelled ones have theirs (reader.mix).
    """

    vflip, train_crop = False, {}
    jitter = {None: JITTER}         # of samples that are loaded without a label

    def __init__(self, reader, task, weight):
        self.reader, self.tasks, self.size, self.mix = reader, (task,), reader.size, {task: weight}
        self.name, self.load = f"{reader.name} (pseudo)", reader.load

    def __len__(self):
        return len(self.reader)

    def indices(self, task):
        return range(len(self))


class PseudoLabels(LatentCache):
    """The labels of unlabelled pairs in a folder, as a LatentCache keeps latents:

        <folder>/<dataset>/<task>.npy   (samples, 2 flips, 4, h, w) float16, done.npy
        <folder>/<dataset>/<task>_doubt.npy   (samples, 2, 1, h, w) float16; infinite where there is no label, and in
                                              all of an image that could not be read

    pairs: {dataset: tasks}; teacher: what made them. ValueError if the folder is of something else.
    """

    kind, anew, room = "folder of pseudo labels", "and run the same python -m tools.discover again", "make room"
    otherwise = "name another folder, or work with the code, base, data, size and number of scenes that its teacher had"

    def __init__(self, folder, readers, vae_hash, pairs, teacher):
        self.readers, self.cells = [r for r in readers if r.name in pairs], pairs
        super().__init__(folder, self.readers, vae_hash, "any")
        old = read_json(self.folder / "cache.json", "", ABOUT) if (self.folder / "cache.json").is_file() else {}
        for what, key, now in (("pairs", "cells", pairs), ("teacher", "teacher", teacher)):
            if old.get(key, now) != now:
                raise ValueError(f"{folder} holds pseudo labels of other {what} ({old[key]}, now {now}): name another "
                                 "folder or delete this one")
        self.about |= {"cells": pairs, "teacher": teacher}

    def codes(self, readers, palette):
        return codes({t for tasks in self.cells.values() for t in tasks}, "cityscapes")     # none is of classes

    def layout(self, reader, model):
        h, w = (s // model.factor for s in reader.size)
        out = {"done": ((len(reader),), bool)}
        for t in self.about["cells"][reader.name]:
            out[t] = (len(reader), 2, model.out_channels, h, w), np.float16
            out[f"{t}_doubt"] = (len(reader), 2, 1, h, w), np.float16
        return out

    # -- the teacher --

    def discover(self, model, batch, truth=None, skipped=None):
        """Fill in what is not there yet: the model's predictions, or the labels of `truth`, {dataset: reader}. What
        cannot be read is named in the list `skipped`; without one it is a ValueError."""
        self.create(self.readers, model)
        for reader in self.readers:
            arrays = {name: self.array(reader, name, "r+") for name in self.layout(reader, model)}
            todo, tasks = np.flatnonzero(~arrays["done"]), tuple(self.about["cells"][reader.name])
            for i in tqdm(range(0, len(todo), batch), f"labels of {reader.name}", disable=not len(todo), leave=False):
                part = todo[i:i + batch]
                if truth:
                    read = _readable(truth[reader.name], part, tasks, model.codecs, skipped)
                else:
                    read = _readable(reader, part, (), {}, skipped)
                for t in tasks:
                    arrays[f"{t}_doubt"][part] = np.inf
                found = (_true if truth else _told)(model, [*read.values()], tasks) if read else {}
                for t, (latents, doubt) in found.items():
                    for name, x in ((t, latents), (f"{t}_doubt", doubt)):
                        arrays[name][[*read]] = x.cpu().half().numpy()
                for array in arrays.values():
                    array.flush()
                arrays["done"][part] = True
        self.arrays.clear()

    # -- the student --

    def begin(self, pairs, mask):
        """Those of `pairs`, each an UnlabelledPair, of which `mask` leaves a part."""
        self.pairs, self.mask, self.middle = pairs, mask, {t: self.median(t) for p in pairs for t in p.tasks}
        return self

    def median(self, task):
        """The median doubt of a task's latent cells, over all datasets. ValueError: there is not one label of it."""
        doubts = [self.array(r, f"{task}_doubt")[:, 0].ravel() for r in self.readers
                  if task in self.about["cells"][r.name]]
        finite = np.concatenate([d[np.isfinite(d)] for d in doubts]).astype(np.float32)
        if not len(finite):
            raise ValueError(f"{self.folder} has no label of {task}, for not one image of its datasets could be read: "
                             "mend their files, and make it anew")
        return float(np.median(finite))

    def doubt(self, pair):
        return self.array(pair.reader, f"{pair.tasks[0]}_doubt")

    def beside(self, cache, model):
        """With the latent cache of the labelled datasets: what the mixture reads from."""
        self.cache, self.model = cache, model
        return self

    def get(self, reader, index, tasks, flip, seed):
        """A sample of an UnlabelledPair, colours and weighted mask drawn from the seed; of others the cache's."""
        if not isinstance(reader, UnlabelledPair):
            return self.cache.get(reader, index, tasks, flip, seed)
        (task,), rng = tasks, np.random.default_rng(seed)
        frame = prepare(reader, index, (), {}, (flip, False), rng, with_next=False)["frames"][0]
        with torch.no_grad():
            seen = self.model.encode_frame(frame[None].to(next(self.model.parameters()).device))[0].float().cpu()
        doubt = torch.from_numpy(np.array(self.doubt(reader)[index, int(flip)])).float()
        label = torch.from_numpy(np.array(self.array(reader.reader, task)[index, int(flip)])).float()
        kept = doubt.isfinite() & keep(self.mask, doubt, self.middle[task], rng)
        return {"frames": [seen, seen], "labels": {task: label}, "valid": {task: kept}}


def read_pseudo(cfg, readers, vae_hash, tasks, drop):
    """The PseudoLabels of these tasks that --pseudo names: .pairs are further datasets, and `get` gives their samples.

    cfg: settings.Config; readers: of all training sets. FileNotFoundError: there are none; ValueError: they are
    unfinished, or of something else, or one would replace a label.
    """
    about = read_json(f"{cfg.pseudo}/cache.json", f"no pseudo labels in {cfg.pseudo}: make them from a trained model "
                      f"by python -m tools.discover --ckpt <folder> --to {cfg.pseudo}", ABOUT)
    labels, pairs = PseudoLabels(cfg.pseudo, readers, vae_hash, about["cells"], about["teacher"]), []
    if absent := about["cells"].keys() - {r.name for r in readers}:
        raise ValueError(f"--pseudo {cfg.pseudo} is about {', '.join(sorted(absent))}, which is not trained on here")
    for reader in labels.readers:
        if not labels.array(reader, "done").all():
            raise ValueError(f"--pseudo {cfg.pseudo} is unfinished: run the same python -m tools.discover again")
        for t in (t for t in about["cells"][reader.name] if t in tasks):
            labels.array(reader, t)     # a missing file is told now, as median does for the doubts
            if t in tasks_with_labels(reader, [t]) and t not in drop.get(reader.name, ()):
                raise ValueError(f"--pseudo {cfg.pseudo} was made without the {t} labels of {reader.name}, which are "
                                 f"here: --drop {reader.name}:{t}, or make pseudo labels anew")
            pairs.append(UnlabelledPair(reader, t, cfg.pseudo_weight))
    if not pairs:
        raise ValueError(f"--pseudo {cfg.pseudo} has no label of {', '.join(tasks)}")
    return labels.begin(pairs, cfg.pseudo_mask)


def keep(mask, doubt, middle, rng):
    """Which cells count, of doubts with this median. half: those up to it; none: all; weighted: each with probability
    exp(-doubt / median), which in the mean over the steps is a loss with these weights."""
    if mask == "half":
        return doubt <= middle
    if mask == "none":
        return torch.ones_like(doubt, dtype=torch.bool)
    return torch.from_numpy(rng.random(doubt.shape)) < torch.exp(-doubt / max(middle, 1e-6))


def _readable(reader, indices, tasks, codecs, skipped):
    """{index: what data.prepare makes of it}; skipped: as in PseudoLabels.discover."""
    out = {}
    for i in map(int, indices):
        try:
            out[i] = prepare(reader, i, tasks, codecs)
        except (OSError, ValueError) as error:
            if skipped is None:
                raise unreadable(reader, i, error, False) from error
            skipped.append(f"{reader.name}:{i}: {error}")
    return out


@torch.no_grad()
def _told(model, items, tasks):
    """{task: (latents (B,2,4,h,w), doubts (B,2,1,h,w))} as the model tells it of images as they are, with the noise of
    StableMTL.predict where it draws any. items: of data.prepare."""
    frames = [torch.stack(x) for x in zip(*(item["frames"] for item in items), strict=True)]
    device, told, out = next(model.parameters()).device, [], {}
    for pair in (frames, [f.flip(-1) for f in frames]):
        with seeded(model, pair[0]):
            told.append(model(*model.encode_frames(*(f.to(device) for f in pair), tasks), tasks))
    upright, mirrored = told
    one, other = model.decode_labels(upright), model.decode_labels(mirrored)
    for t in tasks:
        codec, width = model.codecs[t], one[t].shape[-1]
        beyond = frames[0].shape[-1] - width    # columns of no whole cell: on the right, in the mirror on the left
        maps, mirror_maps = codec.decode(one[t]), turned(codec, codec.decode(other[t]))
        pairs = zip(maps[..., beyond:], mirror_maps[..., :width - beyond], strict=True)     # where both see
        doubt = 1 - torch.stack([agreement(codec, a, b) for a, b in pairs])[:, None].float()
        doubt = F.pad(doubt, (beyond, beyond, 0, 0), mode="replicate")
        seen, mirror_seen = (F.avg_pool2d(x, model.factor) for x in (doubt[..., :width], doubt[..., beyond:]))
        out[t] = torch.stack([upright[t], mirrored[t]], 1), torch.stack([seen, mirror_seen.flip(-1)], 1)
    return out


@torch.no_grad()
def _true(model, items, tasks):
    """The same of true labels: no doubt where a whole latent cell is valid, infinite doubt elsewhere."""
    device, out = next(model.parameters()).device, {t: ([], []) for t in tasks}
    for upright in items:
        both = upright, mirror(upright, model.codecs, -1)
        for t in tasks:
            codes = torch.stack([item["labels"][t] for item in both]).to(device)
            cells = whole_cells(torch.stack([item["valid"][t] for item in both]), model.factor)
            out[t][0].append(model.encode_labels({t: codes})[t])
            out[t][1].append(torch.where(cells, 0.0, torch.inf))
    return {t: tuple(torch.stack(x) for x in pair) for t, pair in out.items()}
