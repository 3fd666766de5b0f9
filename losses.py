"""The losses, and the gradient of one optimizer step.

Losses are sums over what is valid, and how much that is: a step's mean does not depend on its micro-batches.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import whole_cells
from tasks import CLASSES

# ---- losses ----

def loss_terms(model, kinds, task, z_hat, z, cells, code, valid):
    """{kind: (sum of errors, count)} of one task.

    z_hat, z: (B,4,h,w) predicted and label latents; cells: (B,1,h,w) bool; code (B,3,H,W), valid (B,1,H,W): label image
    and mask, needed only for `pixel` and `task`. What is invalid is left out before anything is computed from it: NaN
    there reaches neither the loss nor, as zero times NaN would, the gradient.
    """
    def select(x, mask):
        return x[mask.expand_as(x)]
    out = {}
    if "latent" in kinds:
        difference = select(z_hat, cells).float() - select(z, cells).float()
        out["latent"] = difference.square().sum(), int(cells.sum()) * z.shape[1]
    if "pixel" in kinds or "task" in kinds:
        image = model.decode(z_hat).float()
        code, valid = (x[..., :image.shape[-2], :image.shape[-1]] for x in (code, valid))
        code = torch.where(valid, code, torch.zeros_like(code))
    if "pixel" in kinds:
        out["pixel"] = select((image - code).square(), valid).sum(), int(valid.sum()) * 3
    if "task" in kinds:
        errors = DENSE[model.codecs[task].dense_loss](image, code, valid, model.codecs[task])
        out["task"] = select(errors, valid).sum(), int(valid.sum())
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

def step_gradients(model, batches, kinds, encode, device, autocast, scaler=None, streams=None):
    """Accumulate the gradient of one step's micro-batches; the loss is the mean over all that is valid in the step, on
    all ranks. streams: the cache of auxiliary streams, or None.

    Returns {kind: loss} as floats; under no_grad that is all. A step without any valid cell returns nothing and leaves
    every gradient as it was.
    """
    ready, total = [], dict.fromkeys(kinds, 0)
    for b in batches:
        frames = [f.to(device, non_blocking=True) for f in b["frames"]]
        labels = {t: x.to(device, non_blocking=True) for t, x in b["labels"].items()}
        valid = {t: m.to(device, non_blocking=True) for t, m in b["valid"].items()}
        cells = {t: whole_cells(m, model.factor) if encode else m for t, m in valid.items()}
        for t, kind in ((t, kind) for t in labels for kind in kinds):   # known before any forward pass
            total[kind] += valid_numbers(kind, cells[t], valid[t], model.factor, model.unet.config.out_channels)
        ready.append((b, frames, labels, valid, cells))
    if dist.is_initialized():
        counts = torch.tensor([total[k] for k in kinds], dtype=torch.float64, device=device)
        dist.all_reduce(counts)
        total = dict(zip(kinds, counts.tolist(), strict=True))
    out = {k: 0.0 for k in kinds if total[k] > 0}
    for b, frames, labels, valid, cells in ready:
        with autocast():
            latents = labels
            if encode:
                with torch.no_grad():
                    frames = [model.see(f) for f in frames]
                    latents = model.latents(labels)
            given = streams.fetch(b["keys"], *frames) if streams else None
            predicted, wanted = model.learn(*frames, latents, cells, b["keys"], given)
        loss = 0.0
        for t, z_hat in predicted.items():
            if not valid[t].any():
                continue
            terms = loss_terms(model, kinds, t, z_hat, wanted[t], cells[t], labels[t], valid[t])
            for kind, (error, _) in terms.items():
                if total[kind] > 0:
                    out[kind] += error.item() / total[kind]
                    loss = loss + kinds[kind] * error / total[kind]
        if torch.is_tensor(loss) and torch.is_grad_enabled():
            (scaler.scale(loss) if scaler else loss).backward()
    return out


def valid_numbers(kind, cells, valid, factor, channels):
    """How many numbers a loss averages over: the channels of a latent cell (4), 3 per pixel, or 1."""
    if kind == "latent":
        return int(cells.sum()) * channels
    height, width = (s // factor * factor for s in valid.shape[-2:])
    return int(valid[..., :height, :width].sum()) * (3 if kind == "pixel" else 1)


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
