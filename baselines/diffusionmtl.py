"""diffusionmtl: a first decoder's poor maps, or their features, are noised and cleaned again by a denoiser that sees
the maps of all tasks (Ye and Xu, DiffusionMTL: Learning Multi-Task Denoising Diffusion Model from Partially Annotated
Data, CVPR 2024). Our adaptation, at toy scale, to any tasks and two frames.

    F_t, P_t        features and first prediction of task t, supervised with weight 0.5
    c               a convolution of all P_t, without gradient: so the tasks an image has no label for take part
    x_S             sqrt(abar_S) F_t + sqrt(1 - abar_S) e, e ~ N(0, 1); with P_t in the place of F_t: "predictions"
    x_s -> x_{s-1}  the denoiser's x_0^ = D(x_s, c, s), then the usual posterior; no noise in the last step
    last            a 1x1 convolution of x_0 to the task's channels, supervised

Training unrolls the S = 2 steps, for the labelled tasks alone. The noise is little (deviation 0.105): this refines, it
does not generate. In training it follows from the step's seed and the sample; in prediction it is always the same.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from baselines.trunk import MTL, WIDTH, conv, larger, noise, of_step, outputs

HEADS, BLOCKS, QUARTER = 4, 2, 4


def schedule(steps):
    """(beta_1..beta_S, abar_0..abar_S): betas from 1e-3 to 1e-2, evenly spaced in their square root; abar_0 = 1."""
    betas = torch.linspace(1e-3 ** 0.5, 1e-2 ** 0.5, steps, dtype=torch.float64) ** 2
    return betas.tolist(), [1.0, *(1 - betas).cumprod(0).tolist()]


def posterior(x, x0, s, betas, abar, e):
    """x_{s-1} of x_s and the estimate of x_0 (Ho et al. 2020, eqs 6, 7); e: (B,C,h,w) noise."""
    beta, now, before = betas[s - 1], abar[s], abar[s - 1]
    mean = (before ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - now)
    return mean + (beta * (1 - before) / (1 - now)) ** 0.5 * e


def step_embedding(s, width):
    """Sines and cosines of a step number -> (width,)."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    return torch.cat([(s * rates).sin(), (s * rates).cos()])


class Cross(nn.Module):
    """A transformer block whose queries q are the condition's cells, keys and values x the noisy ones: (B,N,C)."""

    def __init__(self):
        super().__init__()
        self.norm_q, self.norm_x, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, q, x):
        x = self.norm_x(x)
        q = q + self.attention(self.norm_q(q), x, x, need_weights=False)[0]
        return q + self.mlp(self.norm(q))


class Denoiser(nn.Module):
    """D: x_s (B,channels,h,w), c (B,C,h,w), s -> x_0^ (B,channels,h,w). Convolutions of each task's own, blocks shared.

    channels: {task: of its x}.
    """

    def __init__(self, channels):
        super().__init__()
        self.first = nn.ModuleDict({t: nn.Conv2d(n, WIDTH, 3, padding=1) for t, n in channels.items()})
        self.blocks = nn.ModuleList([Cross() for _ in range(BLOCKS)])
        self.last = nn.ModuleDict({t: nn.Sequential(conv(WIDTH, WIDTH), nn.Conv2d(WIDTH, n, 3, padding=1))
                                   for t, n in channels.items()})

    def forward(self, x, c, s, task):
        x = self.first[task](x) + step_embedding(s, WIDTH).to(x).view(1, -1, 1, 1)
        size = [max(1, side // QUARTER) for side in x.shape[-2:]]
        q, cells = (F.adaptive_avg_pool2d(y, size).flatten(2).transpose(1, 2) for y in (c, x))
        for block in self.blocks:
            q = block(q, cells)
        q = q.transpose(1, 2).unflatten(2, size)
        return self.last[task](x + larger(q, x.shape[-2:]))


@dataclass
class Options:
    diffuse: str = field(default="features", metadata={"help": "features or predictions", "idle": "steps",
                                                       "choices": ("features", "predictions")})
    steps: int = field(default=2, metadata={"help": "S; 0 = the first decoder alone"})
    condition: str = field(default="all", metadata={"help": "on the maps of all tasks, the own one, or none",
                                                    "idle": "steps", "choices": ("all", "own", "none")})
    noise: bool = field(default=True, metadata={"help": "whether noise is added", "idle": "steps"})


class DiffusionMTL(MTL):
    """An mtl, the first decoder, and the denoiser after it."""
    kind, Options, discovers = "diffusionmtl", Options, ()

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__(tasks, palette, **options)
        native = {t: outputs(self.codecs[t]) for t in tasks}
        features = self.options.diffuse == "features"
        self.denoiser = Denoiser(dict.fromkeys(tasks, WIDTH) if features else native)
        self.condition = nn.Conv2d(sum(native.values()), WIDTH, 3, padding=1)
        self.final = nn.ModuleDict({t: nn.Conv2d(WIDTH, native[t], 1) for t in tasks} if features else {})
        self.betas, self.abar = schedule(self.options.steps)
        if self.options.steps:
            self.weights |= {f"first {t}": 0.5 / len(tasks) for t in tasks}

    def both(self, image, next_image, tasks, facts):
        """({task: final (B,P,H,W)}, {task: first, likewise}). facts: of each sample, what its noise follows from."""
        (height, width), shared = image.shape[-2:], self.trunk(*self.pair(image, next_image))
        features = {t: self.heads[t].body(shared) for t in self.tasks}
        first = {t: self.heads[t].out(f) for t, f in features.items()}
        last = {t: self.refine(t, features[t], first, facts) for t in tasks} if self.options.steps else first
        return [{t: F.interpolate(x[t], scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
                 for t in tasks} for x in (last, first)]

    def refine(self, task, feature, first, facts):
        """The prediction (B,P,h,w) after S steps."""
        seen = {"all": self.tasks, "own": (task,), "none": ()}[self.options.condition]
        c = self.condition(torch.cat([first[t].detach() if t in seen else torch.zeros_like(first[t])
                                      for t in self.tasks], 1))
        x0 = feature if self.options.diffuse == "features" else first[task]

        def e(s):
            return noise(facts, f"{task} {s}", x0.shape[1:], x0.device) if self.options.noise else torch.zeros_like(x0)
        steps, abar = self.options.steps, self.abar
        x = abar[steps] ** 0.5 * x0 + (1 - abar[steps]) ** 0.5 * e(steps)
        for s in range(steps, 0, -1):
            x0 = self.denoiser(x, c, s, task)
            x = posterior(x, x0, s, self.betas, abar, e(s - 1)) if s > 1 else x0
        return self.final[task](x) if self.options.diffuse == "features" else x

    def maps(self, image, next_image, tasks):
        """With the same noise for every image, so that predictions do not depend on their batch."""
        return self.both(image, next_image, tasks, ["prediction"] * len(image))[0]

    def forward(self, b):
        if not self.training:
            return self.maps(*b["frames"], b["tasks"]), {}
        return self.both(*b["frames"], b["tasks"], of_step(b["keys"]))

    def counts(self, b):
        out = super().counts(b)
        more = self.training and self.options.steps
        return out | {f"first {t}": out[t] for t in b["labels"] if more}

    def errors(self, b, found):
        last, first = found
        out = super().errors(b, last)
        if self.training and self.options.steps:
            out |= {f"first {t}": x for t, x in super().errors(b, first).items()}
        return out
