"""jtr: an auto-encoder over the maps of all tasks keeps them consistent with one another, where labels are and where
they are not (Nishi et al., Joint-Task Regularization for Partially Labeled Multi-Task Learning, CVPR 2024). Our
adaptation, at toy scale, to all tasks and two frames.

Y^ stacks the predictions of all tasks, Y the labels with a prediction standing in where there is none; g1 encodes a
stack, g2 decodes it:

    L = L_s + w_d L_dist + w_r L_rec        L_dist = 1 - cos(g1(Y^), g1(Y)) per position of the bottleneck
                                            L_rec: g2(g1(.)) is Y, and is Y^

View 0, the batch: L_s, and L_dist through a frozen g1, so that it moves predictions alone, and of these only the
unlabelled tasks'. View 1, the same images in other light: the trunk is left alone; g1 and g2 learn from L_rec, and g1
from L_dist lest it map everything to one point's neighbourhood. (The released code has a third view, for L_s alone.)
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from baselines.teacher import relit
from baselines.trunk import MTL, double, larger, outputs

WIDTHS = (32, 64, 128)      # of the auto-encoder's levels, at H/2, H/4, H/8


def stacked(codec, x):
    """A prediction (B,P,H,W) as its part of the stack, in [0,1]: class probabilities, unit vectors, or a code."""
    if codec.categorical:
        return x.softmax(1)
    if codec.dense_loss == "cosine":
        x = F.normalize(x, dim=1, eps=1e-6)
    return ((x + 1) / 2).clamp(0, 1)


def label_stacked(codec, code):
    """A label's code (B,3,H,W) likewise."""
    if codec.categorical:
        return F.one_hot(codec.decode(code)[:, 0], outputs(codec)).permute(0, 3, 1, 2).float()
    return (code[:, :outputs(codec)] + 1) / 2


class AutoEncoder(nn.Module):
    """g1 and g2: (B,channels,H,W), any H and W, -> (B,128,H/8,W/8), rounded up -> (B,channels,H,W) before a sigmoid."""

    def __init__(self, channels):
        super().__init__()
        a, b, c = WIDTHS
        self.g1 = nn.Sequential(double(channels, a, 2), double(a, b, 2), double(b, c, 2))
        self.up = nn.ModuleList([double(c, b), double(b, a), double(a, a)])
        self.out = nn.Conv2d(a, channels, 1)

    def decode(self, z, size):
        for k, level in enumerate(self.up):
            z = level(larger(z, size if k == len(self.up) - 1 else [2 * s for s in z.shape[-2:]]))
        return self.out(z)


def distance(a, b):
    """Sum over positions of 1 - cos of two codes (B,C,h,w)."""
    return (1 - F.cosine_similarity(a, b, dim=1)).sum()


@dataclass
class Options:
    distance: float = field(default=4.0, metadata={"help": "w_d"})
    reconstruction: float = field(default=2.0, metadata={"help": "w_r"})


class JTR(MTL):
    """An mtl whose maps an auto-encoder judges together. With both weights 0 it is an mtl, bit for bit."""
    kind, Options, discovers = "jtr", Options, ()

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__(tasks, palette, **options)
        self.joint = AutoEncoder(sum(outputs(codec) for codec in self.codecs.values()))
        w_d, w_r = self.options.distance, self.options.reconstruction
        terms = {"distance": w_d, "distance of g1": w_d * w_r, "reconstruction": w_r}     # w_r twice: as released
        self.regularised = {name: w for name, w in terms.items() if w}
        self.weights |= self.regularised

    def ready(self, b):
        again = {"again": relit(b["frames"], b["keys"])} if self.training and self.regularised else {}
        return super().ready(b) | again

    def counts(self, b):
        if "again" not in b:
            return super().counts(b)
        images, _, height, width = b["frames"][0].shape
        cells = images * -(-height // 8) * -(-width // 8)
        pixels = 2 * images * height * width * len(self.tasks)
        terms = {"distance": cells, "distance of g1": cells, "reconstruction": pixels}
        return super().counts(b) | {name: n for name, n in terms.items() if name in self.regularised}

    def forward(self, b):
        """({task: prediction} of view 0, and while training of view 1)."""
        if "again" not in b:
            return super().forward(b), None
        first = self.maps(*b["frames"], self.tasks)
        with torch.no_grad():
            return first, self.maps(*b["again"], self.tasks)

    def stacks(self, maps, b):
        """(Y^, Y), each (B,channels,H,W): labelled tasks' predictions without gradient; 0 where a label is unknown."""
        valid = torch.stack(list(b["valid"].values())).all(0)
        predicted, wanted = [], []
        for t in self.tasks:
            part = stacked(self.codecs[t], maps[t].float())
            labelled = t in b["labels"]
            predicted.append(part.detach() if labelled else part)
            wanted.append(label_stacked(self.codecs[t], b["labels"][t]) if labelled else part)
        return torch.cat(predicted, 1) * valid, torch.cat(wanted, 1) * valid

    def reconstruction(self, z, stack):
        """Sum over pixels and tasks of how far g2(z) is from the stack."""
        x, total, start = self.joint.decode(z, stack.shape[-2:]), 0.0, 0
        for codec in self.codecs.values():
            part = slice(start, start + outputs(codec))
            ours, wanted, start = x[:, part], stack[:, part], part.stop
            if codec.categorical:
                error = F.binary_cross_entropy_with_logits(ours, wanted, reduction="none").mean(1)
            elif codec.dense_loss == "cosine":
                error = 1 - F.cosine_similarity(2 * ours.sigmoid() - 1, 2 * wanted - 1, dim=1)
            else:
                error = (ours.sigmoid() - wanted).abs().mean(1)
            total = total + error.sum()
        return total

    def errors(self, b, found):
        first, again = found
        out = super().errors(b, first)
        if again is None:
            return out
        if "distance" in self.weights:
            frozen = {name: p.detach() for name, p in self.joint.g1.named_parameters()}
            out["distance"] = distance(*(functional_call(self.joint.g1, frozen, (y,)) for y in self.stacks(first, b)))
        if "reconstruction" in self.weights:
            pair = self.stacks(again, b)
            codes = [self.joint.g1(y) for y in pair]
            out["reconstruction"] = sum(self.reconstruction(z, y) for z, y in zip(codes, pair, strict=True))
            if "distance of g1" in self.weights:
                out["distance of g1"] = distance(*codes)
        return out
