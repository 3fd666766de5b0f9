"""hitts: hierarchical task tokens (Zhang et al., Multi-Task Label Discovery via Hierarchical Task Tokens for Partially
Annotated Dense Predictions, 2025). Our adaptation, at toy scale, to seven tasks and two frames; single-scale.

    theta_i  (C)     global token of task i: makes the task's feature F_i out of the shared one, and mixes with the
                     other tasks' tokens and features (inter-task attention) and with its own feature (intra-task)
    phi_i    (P,C)   fine tokens, one per class or bin of the task: weigh its logits G_i, pixel by pixel

Every task is a classification: a regression's value is the mean of bin centres that the softmax weighs. Phase 1 trains
with labels alone; --teacher makes phase 3 of it: a new network that also learns what the trained one discovers
(teacher.py), labels (L_p) and features:

    L_f = 1/T sum_i [a_i mse(F_i, F~_i) + (1 - a_i) sigmoid(theta_i F_i) mse(F_i, F~_i)]     a_i: image has the label

Where paper and released code part, this follows the paper; docs/systems.md lists it. Shapes as in trunk.py.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from baselines.trunk import WIDTH, System, Trunk, conv, first_images, larger, outputs, task_errors, to_code
from data import tasks_with_labels
from readers.reader import some

REGRESSION = 0.1                # lambda: weight of the regression loss beside the classification's
DIRECTIONS, SAMPLES = 20, 32    # centres of unit vectors; labelled images per dataset that they are found on


# ---- bins: what the classes of a regression are ----

def bins(codec):
    """How many, of each of the code's channels: odd for motion, so that none is a centre."""
    if codec.frames == 2:
        return 21
    return 30 if codec.dense_loss == "scale-shift" else 20


def spread(count):
    """`count` unit vectors (count,3) spread evenly, on a spiral."""
    k = torch.arange(count) + 0.5
    z, turn = 1 - 2 * k / count, k * torch.pi * (1 + 5 ** 0.5)
    r = (1 - z * z).sqrt()
    return torch.stack([r * turn.cos(), r * turn.sin(), z], 1)


def cluster(vectors, count, rounds=30):
    """Centres (count,3) of unit vectors (N,3) by k-means on the sphere, from evenly spaced vectors of the list."""
    centres = vectors[torch.linspace(0, len(vectors) - 1, count).long()]
    for _ in range(rounds):
        nearest = (vectors @ centres.T).argmax(1)
        sums = torch.zeros(count, 3).index_add_(0, nearest, vectors)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return centres


class Bins(nn.Module):
    """The classes of one task. Its P logits are those of K centres of each of n channels, or of K vectors (n = 1)."""

    def __init__(self, codec):
        super().__init__()
        self.codec, self.vectors = codec, codec.dense_loss == "cosine"
        if codec.categorical:
            self.channels, count = 1, outputs(codec)
            centres = torch.zeros(count)    # classes have none
        elif self.vectors:
            self.channels, count = 1, DIRECTIONS
            centres = spread(count)
        else:
            self.channels, count = codec.channels, bins(codec)
            centres = 2 * torch.arange(count) / (count - 1) - 1
        self.register_buffer("centres", centres)
        self.size = self.channels * count       # P

    def split(self, x):
        """Logits (B,P,H,W) -> (B,n,K,H,W)."""
        return x.unflatten(1, (self.channels, -1))

    def nearest(self, code):
        """The class of each pixel of a label's code (B,3,H,W) -> (B,n,H,W)."""
        if self.codec.categorical:
            return self.codec.decode(code)
        if self.vectors:
            return torch.einsum("bchw,kc->bkhw", code, self.centres).argmax(1, keepdim=True)
        code = code[:, :self.channels, None]
        return (code - self.centres.view(1, 1, -1, 1, 1)).abs().argmin(2)

    def value(self, weights):
        """What weights of the classes (B,n,K,H,W) come to: (B,C,H,W); of directions the length says nothing."""
        if self.vectors:
            return torch.einsum("bnkhw,kc->bchw", weights, self.centres)
        return torch.einsum("bnkhw,k->bnhw", weights, self.centres)

    def code(self, x, hard=False):
        """The code (B,3,H,W) that logits stand for; hard: the centre of the likeliest class."""
        if self.codec.categorical:
            return to_code(self.codec, x)
        x = self.split(x)
        weights = F.one_hot(x.argmax(2), x.shape[2]).permute(0, 1, 4, 2, 3).to(x) if hard else x.softmax(2)
        return to_code(self.codec, self.value(weights))

    def quantised(self, code):
        """A label's code through the nearest centre and back: what even the best prediction loses."""
        if self.codec.categorical:
            return code
        weights = F.one_hot(self.nearest(code), len(self.centres)).permute(0, 1, 4, 2, 3).to(code)
        return to_code(self.codec, self.value(weights))

    def errors(self, x, code):
        """Cross-entropy, mean over channels, and a little of the task's usual loss -> (B,1,H,W)."""
        split = self.split(x)
        out = F.cross_entropy(split.transpose(1, 2), self.nearest(code), reduction="none").mean(1, keepdim=True)
        if self.codec.categorical:
            return out
        return out + REGRESSION * task_errors(self.codec, self.value(split.softmax(2)), code)


# ---- tokens ----

class InterTask(nn.Module):
    """A = softmax(Q K') over the tasks' tokens mixes tokens and features alike. It depends on no image: a learnt T x T
    matrix."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def affinity(self, theta):
        """theta: (T,C) -> A (T,T), rows sum to 1."""
        return (self.q(theta) @ self.k(theta).T * WIDTH ** -0.5).softmax(1)

    @staticmethod
    def mix(a, theta, features):
        """theta: (T,C), features: (B,T,C,h,w) -> the same, mixed by a (T,T)."""
        return a @ theta, torch.einsum("ij,bjchw->bichw", a, features)


class IntraTask(nn.Module):
    """Self-attention over the sequence [feature's cells; token] of one task, whose features are halved for it."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1, groups=WIDTH)
        self.qkv, self.feature, self.token = (nn.Linear(WIDTH, n * WIDTH) for n in (3, 1, 1))
        self.after = conv(WIDTH, WIDTH)

    def forward(self, x, theta):
        """x: (B,C,h,w), theta: (B,C) -> the same."""
        small = self.reduce(x)
        sequence = torch.cat([small.flatten(2).transpose(1, 2), theta[:, None]], 1)     # (B, cells + 1, C)
        y = F.scaled_dot_product_attention(*self.qkv(sequence).chunk(3, 2))
        cells = self.feature(y[:, :-1]).transpose(1, 2).unflatten(2, small.shape[-2:])
        return self.after(x + larger(cells, x.shape[-2:])), theta + self.token(y[:, -1])


def relevance(x, theta):
    """sigmoid(theta F), where a task's token finds its task. x: (B,C,h,w), theta: (B,C) -> (B,h,w)."""
    return torch.einsum("bc,bchw->bhw", theta, x).sigmoid()


class FineTokens(nn.Module):
    """phi_i = MLP(theta_i + W_o o_p), o_p the p-th unit vector of P dimensions (the orthogonal embedding, OE), and
    G' = conv(G * softplus(phi F)). Without OE all P tokens are equal and cannot tell classes apart."""

    def __init__(self, size, oe):
        super().__init__()
        self.size, self.embedding = size, nn.Linear(size, WIDTH, bias=False) if oe else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU(),
                                 nn.Linear(2 * WIDTH, WIDTH))
        self.logits, self.out = nn.Conv2d(WIDTH, size, 1), nn.Conv2d(size, size, 3, padding=1)

    def tokens(self, theta):
        """theta: (B,C) -> phi (B,P,C)."""
        theta = theta[:, None].expand(-1, self.size, -1)
        return self.mlp(theta if self.embedding is None else theta + self.embedding.weight.T)

    def weights(self, x, theta):
        """x: (B,C,h,w), theta: (B,C) -> softplus(phi F) (B,P,h,w)."""
        return F.softplus(torch.einsum("bpc,bchw->bphw", self.tokens(theta), x))

    def forward(self, x, theta):
        """x: (B,C,h,w), theta: (B,C) -> logits (B,P,h,w)."""
        return self.out(self.logits(x) * self.weights(x, theta))


# ---- the system ----

@dataclass
class Options:
    inter: bool = field(default=True, metadata={"help": "attention between tasks"})
    intra: bool = field(default=True, metadata={"help": "attention within a task"})
    oe: bool = field(default=True, metadata={"help": "orthogonal embedding"})


class HiTTs(System):
    """Trunk, global tokens, fine tokens."""
    kind, Options, discovers = "hitts", Options, ("labels", "features", "both", "true", "light")

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__(tasks, palette, **options)
        self.trunk, self.theta = Trunk(), nn.Parameter(torch.randn(len(tasks), WIDTH))
        self.query = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.inter = InterTask() if self.options.inter else None
        self.mixed = nn.ModuleDict({t: conv(WIDTH, WIDTH) for t in tasks})
        self.intra = nn.ModuleDict({t: IntraTask() for t in tasks} if self.options.intra else {})
        self.bins = nn.ModuleDict({t: Bins(self.codecs[t]) for t in tasks})
        self.fine = nn.ModuleDict({t: FineTokens(self.bins[t].size, self.options.oe) for t in tasks})

    def fit(self, mixture):
        """Centres of directions: k-means of training labels, of a few images of each dataset."""
        for t in (t for t in self.tasks if self.bins[t].vectors):
            vectors = [torch.empty(0, 3)]
            for reader in (r for r in mixture.readers if tasks_with_labels(r, [t])):
                known = some(reader, sorted(mixture.usable.get((reader.name, t), ())), SAMPLES)
                for _, item in first_images(mixture, reader, known, (t,), self.codecs):
                    vectors.append(item["labels"][t][:, item["valid"][t][0]].T)
            vectors = F.normalize(torch.cat(vectors), dim=1)
            if len(vectors) >= DIRECTIONS:
                self.bins[t].centres.copy_(cluster(vectors[::max(1, len(vectors) // 20_000)], DIRECTIONS))

    def global_tokens(self, image, next_image, tasks):
        """{task: (F_i (B,C,h,w), theta_i (B,C))} after both attentions."""
        shared, theta = self.trunk(*self.pair(image, next_image)), self.theta
        scores = torch.einsum("tc,bchw->bthw", theta, self.query(shared)).sigmoid()
        features = scores[:, :, None] * shared[:, None]                                 # (B,T,C,h,w)
        if self.inter is not None:
            theta, features = self.inter.mix(self.inter.affinity(theta), theta, features)
        out = {}
        for t in tasks:
            i = self.tasks.index(t)
            x, token = self.mixed[t](features[:, i]), theta[i].expand(len(image), -1)
            out[t] = self.intra[t](x, token) if self.options.intra else (x, token)
        return out

    @torch.no_grad()
    def affinities(self):
        """{task: {task: weight}}, the matrix A that mixes tasks. ValueError without inter-task attention."""
        if self.inter is None:
            raise ValueError("this hitts was trained without attention between tasks")
        rows = self.inter.affinity(self.theta).tolist()
        return {t: dict(zip(self.tasks, row, strict=True)) for t, row in zip(self.tasks, rows, strict=True)}

    def logits(self, found, size):
        """Of what global_tokens gives: {task: (B,P,*size)}."""
        out = {t: self.fine[t](*pair) for t, pair in found.items()}
        return {t: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., :size[0], :size[1]]
                for t, x in out.items()}

    def maps(self, image, next_image, tasks):
        return self.logits(self.global_tokens(image, next_image, tasks), image.shape[-2:])

    def code(self, task, x):
        return self.bins[task].code(x)

    def error(self, task, x, code):
        return self.bins[task].errors(x, code)

    def decode_labels(self, latents):
        return {t: self.bins[t].quantised(x) for t, x in latents.items()}

    # -- discovery --

    def features(self, image, next_image):
        """{task: F_i (B,C,h,w)}, what L_f compares."""
        return {t: x for t, (x, _) in self.global_tokens(image, next_image, self.tasks).items()}

    def guess(self, image, next_image, tasks):
        """{task: (code (B,3,H,W) of the likeliest class, its probability (B,1,H,W), the lowest of the channels)}."""
        maps, out = self.maps(image, next_image, tasks), {}
        for t, x in maps.items():
            sure = self.bins[t].split(x).softmax(2).amax(2).amin(1, keepdim=True)
            out[t] = self.bins[t].code(x, hard=True), sure
        return out

    def counts(self, b):
        cells = {f"feature {t}": x.shape[0] * x.shape[2] * x.shape[3] for t, x in b.get("features", {}).items()}
        return super().counts(b) | cells

    def forward(self, b):
        """({task: logits}, {task: (F_i, theta_i)} of all tasks whose features are compared)."""
        wanted = self.wanted(b)
        every = self.global_tokens(*b["frames"], self.tasks if b.get("features") else wanted)
        return self.logits({t: every[t] for t in wanted}, b["frames"][0].shape[-2:]), every

    def errors(self, b, found):
        maps, every = found
        out = super().errors(b, maps)
        for t, aim in b.get("features", {}).items():
            x, theta = (y.float() for y in every[t])
            sure = relevance(x, theta).detach()
            weight = torch.where(b["lacks"][t].view(-1, 1, 1), sure, torch.ones_like(sure))
            out[f"feature {t}"] = (weight * (x - aim).square().mean(1)).sum()
        return out
