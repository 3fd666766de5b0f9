"""The losses, and the gradient of one optimizer step.

Losses are sums over what is valid; how much that is in the whole step divides them, so that a step's mean does not
depend on its micro-batches.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import whole_cells
from tasks import CLASSES

# ---- losses ----

LOSSES = {"latent": "latents", "pixel": "images", "task": "maps"}       # of --loss: what each compares


def loss_terms(model, kinds, task, z_hat, z, cells, code, valid):
    """{kind: sum of errors} of one task.

    z_hat, z: (B,4,h,w) predicted and label latents; cells: (B,1,h,w) bool; code (B,3,H,W), valid (B,1,H,W): label image
    and mask, needed only for `pixel` and `task`. What is invalid is left out before anything is computed from it: NaN
    there reaches neither the loss nor, as zero times NaN would, the gradient.
    """
    def select(x, mask):
        return x[mask.expand_as(x)]
    out = {}
    if "latent" in kinds:
        difference = select(z_hat, cells).float() - select(z, cells).float()
        out["latent"] = difference.square().sum()
    if "pixel" in kinds or "task" in kinds:
        image = model.decode(z_hat).float()
        code, valid = (x[..., :image.shape[-2], :image.shape[-1]] for x in (code, valid))
        code = torch.where(valid, code, torch.zeros_like(code))
    if "pixel" in kinds:
        out["pixel"] = select((image - code).square(), valid).sum()
    if "task" in kinds:
        errors = DENSE[model.codecs[task].dense_loss](image, code, valid, model.codecs[task])
        out["task"] = select(errors, valid).sum()
    return out


def _l1(image, code, valid, codec):
    return (image - code).abs().mean(1, keepdim=True)


def _cosine(image, code, valid, codec):
    return 1 - F.cosine_similarity(image, code, dim=1)[:, None]


def _cross_entropy(image, code, valid, codec):
    """Softmax over the (negative, squared) distances to the classes' colours."""
    ids = torch.arange(len(CLASSES), device=image.device).view(1, 1, 1, -1)
    colours = codec.encode(ids, torch.ones_like(ids, dtype=torch.bool))     # (1,3,1,classes)
    logits = -8 * sum((image[:, c, None] - colours[0, c].view(1, -1, 1, 1)) ** 2 for c in range(3))
    return F.cross_entropy(logits, codec.decode(code)[:, 0], reduction="none")[:, None]


def _scale_shift(image, code, valid, codec):
    """L1 after the least-squares scale and shift of each image (MiDaS)."""
    n = valid.sum((1, 2, 3), keepdim=True).clamp(min=1)

    def mean(x):
        return torch.where(valid, x, torch.zeros_like(x)).sum((1, 2, 3), keepdim=True) / n
    p, y = image.mean(1, keepdim=True), code.mean(1, keepdim=True)
    p, y = p - mean(p), y - mean(y)
    return (mean(p * y) / mean(p * p).clamp(min=1e-6) * p - y).abs()


DENSE = {"l1": _l1, "cosine": _cosine, "cross-entropy": _cross_entropy, "scale-shift": _scale_shift}


# ---- one optimizer step ----

class LatentObjective:
    """What StableMTL minimises, as `accumulate` takes it: loss_terms of the latents it predicts.

    kinds: {kind: weight}; encode: whether batches hold images, else latents; streams: the cache of auxiliary streams,
    or None.
    """

    def __init__(self, model, kinds, encode, streams=None):
        self.model, self.weights, self.encode, self.streams = model, kinds, encode, streams

    @property
    def unseen(self):
        """The objective on held-out samples, which come as images: the latent loss."""
        return LatentObjective(self.model, {"latent": 1.0}, True)

    def ready(self, b):
        """The micro-batch with "cells", the valid latent cells of each task."""
        cells = {t: whole_cells(m, self.model.factor) if self.encode else m for t, m in b["valid"].items()}
        return b | {"cells": cells}

    def counts(self, b):
        facts = self.model.factor, self.model.out_channels
        return {kind: sum(valid_numbers(kind, b["cells"][t], b["valid"][t], *facts) for t in b["labels"])
                for kind in self.weights}

    def forward(self, b):
        """({task: what is predicted}, {task: what it should be})"""
        frames, latents = b["frames"], b["labels"]
        if self.encode:
            with torch.no_grad():
                frames = self.model.encode_frames(*frames, b["tasks"])
                latents = self.model.encode_labels(latents)
        given = self.streams.fetch(b["keys"], b["tasks"], *frames) if self.streams else None
        return self.model.learn(*frames, latents, b["cells"], b["keys"], given)

    def errors(self, b, found):
        predicted, wanted = found
        out = {}
        for t, z_hat in predicted.items():
            if not b["valid"][t].any():
                continue
            terms = loss_terms(self.model, self.weights, t, z_hat, wanted[t], b["cells"][t], b["labels"][t],
                               b["valid"][t])
            for kind, error in terms.items():
                out[kind] = out.get(kind, 0) + error
        return out


def accumulate(objective, batches, device, autocast, scaler=None):
    """Accumulate the gradient of one step's micro-batches; the loss is the mean over all that is valid in the step, on
    all ranks.

    objective: .weights {name: weight of a term}; .ready(batch) -> the batch with what else it needs; .counts(batch) ->
    {name: how much that term averages over}, known before any forward pass; .forward(batch), under autocast;
    .errors(batch, what forward returned) -> {name: sum of errors}.
    Returns {name: mean error} as floats; under no_grad that is all. A step without anything valid returns nothing and
    leaves every gradient as it was.
    """
    weights, total = objective.weights, dict.fromkeys(sorted(objective.weights), 0)
    batches = [objective.ready(on_device(b, device)) for b in batches]
    for b in batches:
        for name, count in objective.counts(b).items():
            total[name] += count
    if dist.is_initialized():
        counts = torch.tensor(list(total.values()), dtype=torch.float64, device=device)
        dist.all_reduce(counts)
        total = dict(zip(total, counts.tolist(), strict=True))
    out = {name: 0.0 for name in weights if total[name] > 0}
    for b in batches:
        loss = 0.0
        with autocast():
            found = objective.forward(b)
        for name, error in objective.errors(b, found).items():
            if total[name] > 0:
                out[name] += error.item() / total[name]
                loss = loss + weights[name] * error / total[name]
        if torch.is_tensor(loss) and torch.is_grad_enabled():
            (scaler.scale(loss) if scaler else loss).backward()
    return out


def on_device(b, device):
    """A micro-batch of data.Mixture whose tensors are on the device."""
    frames = [f.to(device, non_blocking=True) for f in b["frames"]]
    maps = {key: {t: x.to(device, non_blocking=True) for t, x in b[key].items()} for key in ("labels", "valid")}
    return b | {"frames": frames} | maps


def valid_numbers(kind, cells, valid, factor, channels):
    """How many numbers a loss averages over: the channels of a latent cell (4), 3 per pixel of an image, 1 of a map."""
    if LOSSES[kind] == "latents":
        return int(cells.sum()) * channels
    height, width = (s // factor * factor for s in valid.shape[-2:])
    return int(valid[..., :height, :width].sum()) * (3 if LOSSES[kind] == "images" else 1)


def sync_gradients(params, losses, device, stop=False):
    """Sum gradients and losses over the ranks -> (losses, whether any rank was told to stop). A parameter that no rank
    has used keeps None, so that Adam leaves it alone."""
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    grads = []
    for p, u in zip(params, used.tolist(), strict=True):
        if u:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(p.grad)
    bucket = np.cumsum([g.numel() for g in grads]) // 2**24
    for k in np.unique(bucket):         # a few large messages instead of hundreds of small ones
        part = [g for g, b in zip(grads, bucket, strict=True) if b == k]
        flat = torch.cat([g.flatten() for g in part])
        dist.all_reduce(flat)
        for g, total in zip(part, flat.split([g.numel() for g in part]), strict=True):
            g.copy_(total.view_as(g))
    values = torch.tensor([losses[k] for k in sorted(losses)] + [float(stop)], device=device)
    dist.all_reduce(values)
    *sums, stops = values.tolist()
    return dict(zip(sorted(losses), sums, strict=True)), stops > 0
