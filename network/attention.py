"""The attention over tasks of stage 2 (section 3.2), and the tap that puts it into diffusers' transformer blocks.

Shapes: B images, T tasks, N latent pixels of a block, C its width.
"""
import math
import zlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from network import stock

MASKS = ("score", "score-k", "argmax", "uniform")
ATTENTIONS = ("n-to-1", "n-to-n")
QUERY_INITS = ("released", "unit")

class KeyValue(nn.Module):
    """C -> C/2 -> C with one exact GELU: the projection of an auxiliary stream to keys or values."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // 2), nn.Linear(width // 2, width)     # applied by keys_values


class Query(nn.Module):
    """C -> hidden -> hidden -> hidden -> C: the projection of the main stream to queries."""

    def __init__(self, width, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        return self.net(x)

    def unit_gain(self):
        """Draw weights anew that keep the variance of their input: PyTorch's own shrink it at every layer, so that the
        attention starts even, with next to no gradient to the query."""
        for k, layer in enumerate(layer for layer in self.net if isinstance(layer, nn.Linear)):
            after_gelu = 1.0 if k == 0 else 1.5335      # 1 / sqrt(E gelu(x)^2), x standard normal
            nn.init.normal_(layer.weight, std=after_gelu * layer.in_features ** -0.5)
            nn.init.zeros_(layer.bias)


def stacked(layers):
    """Weight and bias of T like layers: of linear ones (T,out,in) and (T,1,out), of norms (T,1,C) both."""
    weight, bias = torch.stack([x.weight for x in layers]), torch.stack([x.bias for x in layers])
    return weight.view(len(weight), -1, weight.shape[-1]), bias[:, None]


class TaskAttention(nn.Module):
    """One block's N-to-1 attention: every pixel of the main stream attends to the same pixel of the other streams.

    The softmax runs over the other tasks, per pixel and head, never over space. `out` starts at zero, so that at step 0
    the main stream equals stage 1. Attribute names are those of the released weights. Raises ValueError if heads does
    not divide width.
    """

    def __init__(self, width, tasks, heads=4, hidden=640, shared=False):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"--heads {heads} does not divide the width {width} of a layer: choose a divisor")
        self.tasks, self.heads, self.shared = tuple(tasks), heads, shared
        own = ("shared",) if shared else self.tasks
        self.task_to_q = nn.ModuleDict({t: Query(width, hidden) for t in own})
        self.task_to_k = nn.ModuleDict({t: KeyValue(width) for t in own})
        self.task_to_v = nn.ModuleDict({t: KeyValue(width) for t in own})
        self.task_norm_q = nn.ModuleDict({t: nn.LayerNorm(width) for t in own})
        self.task_norm_k = nn.ModuleDict({t: nn.LayerNorm(width) for t in own})
        self.task_norm_v = nn.ModuleDict({t: nn.LayerNorm(width) for t in own})
        self.to_out_task = nn.Linear(width, width)
        nn.init.zeros_(self.to_out_task.weight)
        nn.init.zeros_(self.to_out_task.bias)

    def keys_values(self, feats):
        """{task: (B,N,C)} auxiliary streams -> (tasks, k, v), k and v (T,B,N,C): all tasks at once, each stream once.

        All norms share their statistics; gain and bias go into the first layer: W (x g + b) + c = (W g) x + (W b + c).
        """
        own = ["shared" if self.shared else t for t in feats]
        f = torch.stack(list(feats.values())).to(self.to_out_task.weight.dtype)     # frozen streams may be bfloat16
        x, out = F.layer_norm(f, f.shape[-1:]).flatten(1, 2), []                         # (T,B*N,C)
        for norms, projections in (self.task_norm_k, self.task_to_k), (self.task_norm_v, self.task_to_v):
            gain, bias = stacked([norms[t] for t in own])
            w1, b1 = stacked([projections[t].fc1 for t in own])
            w2, b2 = stacked([projections[t].fc2 for t in own])
            h = torch.baddbmm(b1 + bias @ w1.mT, x, (w1 * gain).mT)                      # (T,B*N,C/2)
            out.append(torch.baddbmm(b2, F.gelu(h), w2.mT).view_as(f))
        return tuple(feats), *out

    def forward(self, a, task, kv, mask=None):
        """a: (B,N,C) main stream of `task`; kv: keys_values; mask: None or (T,B) scores -> (T,B) bool, True: left out

        Returns (B,N,C), the term to add to a, and the detached (T,B,N,heads) attention over the other tasks, before
        any is left out.
        """
        tasks, k, v = kv
        s = "shared" if self.shared else task
        if task in tasks:       # by slices: a GPU would wait for a list of indices, which a CUDA graph cannot record
            own = tasks.index(task)
            k, v = (torch.cat([x[:own], x[own + 1:]]) for x in (k, v))                   # (T,B,N,C)
        head = torch.eye(self.heads, device=a.device, dtype=a.dtype).repeat_interleave(a.shape[-1] // self.heads, 0)
        q = self.task_to_q[s](self.task_norm_q[s](a))                                    # (B,N,C)
        logits = (q * k) @ head * (a.shape[-1] // self.heads) ** -0.5                    # (T,B,N,heads)
        weights = logits.softmax(0)
        chosen = weights.detach()
        if mask is not None:
            left_out = mask(chosen.float().mean((2, 3)))
            weights = logits.masked_fill(left_out[..., None, None], float("-inf")).softmax(0)
        y = ((weights.to(head.dtype) @ head.T) * v).sum(0)                               # (B,N,C)
        return self.to_out_task(y), chosen


def draw_mask(scores, numbers, rho, how):
    """Attention-guided masking (section 3.2): which of the T auxiliary tasks a layer leaves out, for each of B images.

    scores: (T,B) mean attention of an image, sums to 1 over T; numbers: (T+2 or more,B) uniform random. With
    probability rho: `score` samples one task in proportion to its score, `score-k` a random number 1..T-1 of them,
    `argmax` takes the highest, `uniform` samples one evenly. One task is always left. -> (T,B) bool
    """
    others = len(scores)
    act, several, own = numbers[0] < rho, numbers[1], numbers[2:others + 2]
    if how == "argmax":
        order = scores
    elif how == "uniform":
        order = own
    else:       # the first of a race in which each comes at a rate of its score
        order = scores.clamp(min=1e-12) / -own.log()
    count = 1 + (several * (others - 1)).long() if how == "score-k" else 1
    place = order.argsort(0, descending=True).argsort(0)
    return (place < count) & act & (others > 1)


def generator(what):
    """Random numbers that follow from a text alone."""
    return torch.Generator().manual_seed(zlib.crc32(what.encode()))


def masking(keys, tasks, layers, rho, how):
    """The masks of a training step, {(main task, layer): function for TaskAttention.forward}; {} if there are none.

    keys: of the B samples. What is drawn follows from the step's seed (torch.manual_seed), the sample's key, the main
    task and the layer alone, so that a sample's masks depend neither on its batch nor on how many processes share it.
    """
    layers, out = [*layers], {}
    for task in tasks if keys and rho > 0 else ():
        shape, device = (len(layers), 2 + len(layers[0].tasks)), layers[0].to_out_task.weight.device
        each = [torch.rand(shape, generator=generator(f"{torch.initial_seed()} {task} {[*key]}")) for key in keys]
        for layer, numbers in zip(layers, torch.stack(each, 2).to(device), strict=True):
            out[task, layer] = partial(draw_mask, numbers=numbers, rho=rho, how=how)
    return out


# ---- whether the attention has learned anything ----

WATCHED = "images", "entropy", "largest", "term", "main"     # sums over layers, images, processes: see `watch`


def watch(weights, a, y):
    """What one layer does, as (5,) sums that add up whatever the micro-batches: number of images; entropy of the
    attention, 1 = even over the other tasks, and its largest weight, each a mean over pixels and heads; squared norms
    of the term y that is added and of what it is added to.

    weights: (T,B,N,heads); a, y: (B,N,C)
    """
    most = math.log(len(weights)) if len(weights) > 1 else math.nan     # a single one is neither even nor not
    evenness = torch.special.entr(weights.float()).sum(0) / most        # (B,N,heads)
    largest = weights.float().amax(0)
    sums = [x.mean((1, 2)).sum() for x in (torch.ones_like(largest), evenness, largest)]
    return torch.stack(sums + [x.detach().float().square().sum() for x in (y, a)])


def watched(sums):
    """{name of WATCHED: sum} of a step -> what log.jsonl says; None where it is no number."""
    values = {"attention_entropy": (sums["entropy"], sums["images"]),
              "attention_largest": (sums["largest"], sums["images"]),
              "attention_term": (sums["term"] ** 0.5, sums["main"] ** 0.5)}
    return {k: part / whole if whole and math.isfinite(part / whole) else None for k, (part, whole) in values.items()}


# ---- how it enters diffusers' blocks ----

class StreamsDone(Exception):
    """Raised by the last tap: nothing after it is needed of an auxiliary stream."""


class Tap:
    """Attention processor of one `attn1`: diffusers' own self-attention, then hand the result a to `use(block, a)`."""

    def __init__(self, block, use):
        self.block, self.use, self.attend = block, use, stock.AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.use(self.block, self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb))


def transformer_blocks(unet):
    """{name: BasicTransformerBlock} in the order they run (modules() would list the mid block last)."""
    blocks = {n: m for n, m in unet.named_modules() if isinstance(m, stock.BasicTransformerBlock)}
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(blocks.items(), key=lambda item: order[item[0].split(".")[0]]))
