"""The shared trunk with a head per task that the other systems of the papers build on, and the two plainest of them.

    stl     one trunk and one head for every task: single-task learning, in one checkpoint
    mtl     one trunk for all, a head for every task: multi-task learning
    mtl --teacher <folder>      again from scratch, with what a finished mtl predicts as labels where an image has none

Images go in and label codes (tasks.py) come out as they are: no latents, no pre-training. A step takes every label an
image has. The loss is the mean over tasks of each task's usual one (HiTTs, eq. 3), over pixels of the whole step:

    L_s = 1/T sum_t L_t      L_t: cross-entropy of classes, 1 - cosine of directions, L1 of all other codes

Shapes: B images, T tasks, H x W pixels, h x w = H/2 x W/2 the feature grid, C = 64 its width.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from checkpoint import write_json
from data import mirror, prepare, unreadable
from inference import infer
from model import asked, check_finite
from network import loading
from network.generalist import draw
from tasks import CLASSES, registry

WIDTHS = (32, 64, 96, 128)      # of the encoder's levels, at H x W, H/2 x W/2, ...
WIDTH = 64                      # C


# ---- the network: stands for the SegNets and ResNets of the papers ----

def conv(inputs, outputs, stride=1):
    """3x3 convolution, norm, ReLU. GroupNorm: an image's statistics are its own, whichever datasets share a batch."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU())


def double(inputs, outputs, stride=1):
    return nn.Sequential(conv(inputs, outputs, stride), conv(outputs, outputs))


def larger(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Trunk(nn.Module):
    """Two frames (B,3,H,W), any H and W, -> the shared feature F_s (B,C,h,w), H and W rounded up to whole cells."""

    def __init__(self):
        super().__init__()
        a, b, c, d = WIDTHS
        self.down = nn.ModuleList([double(6, a), double(a, b, 2), double(b, c, 2), double(c, d, 2)])
        self.up = nn.ModuleList([double(d + c, c), double(c + b, WIDTH)])

    def forward(self, image, next_image):
        x, levels = torch.cat([image, next_image], 1), []
        x = F.pad(x, (0, -x.shape[-1] % 8, 0, -x.shape[-2] % 8), mode="replicate")
        for level in self.down:
            x = level(x)
            levels.append(x)
        for level, skip in zip(self.up, levels[2:0:-1], strict=True):   # at H/4 and H/2
            x = level(torch.cat([larger(x, skip.shape[-2:]), skip], 1))
        return x


def outputs(codec):
    """Channels that a head predicts: a logit per class, or the code's channels that tell something."""
    return len(CLASSES) if codec.categorical else codec.channels


class Head(nn.Module):
    """F_s (B,C,h,w) -> the prediction of one task (B,P,2h,2w)."""

    def __init__(self, channels):
        super().__init__()
        self.body, self.out = double(WIDTH, WIDTH), nn.Conv2d(WIDTH, channels, 1)

    def forward(self, x):
        return F.interpolate(self.out(self.body(x)), scale_factor=2, mode="bilinear", align_corners=False)


# ---- predictions, codes, and how far one is from the other ----

def to_code(codec, x):
    """A prediction (B,P,H,W) -> the code (B,3,H,W) that it stands for."""
    if codec.categorical:
        ids = x.argmax(1, keepdim=True)
        return codec.encode(ids, torch.ones_like(ids, dtype=torch.bool))
    if codec.dense_loss == "cosine":
        x = F.normalize(x, dim=1, eps=1e-6)     # its loss leaves the length free, and a cut would turn a long one
    return x[:, [i % codec.channels for i in range(3)]].clamp(-1, 1)     # one channel three times, or u, v, u


def task_errors(codec, x, code):
    """The task's usual loss at every pixel. x: (B,P,H,W) prediction; code: (B,3,H,W) of the label -> (B,1,H,W)."""
    if codec.categorical:
        return F.cross_entropy(x, codec.decode(code)[:, 0], reduction="none")[:, None]
    y = code[:, :codec.channels]
    if codec.dense_loss == "cosine":
        return 1 - F.cosine_similarity(x, y, dim=1)[:, None]
    return (x - y).abs().mean(1, keepdim=True)


# ---- what is drawn, and what is looked at before the first step ----

def noise(facts, what, shape, device):
    """Normal numbers (B,*shape): of each sample those that follow from its fact and from what they are for; not from
    its batch, the number of processes, or what was drawn before."""
    return torch.stack([draw(f"{what} {fact}", shape, device)[0] for fact in facts])


def of_step(keys):
    """A fact for each sample of a training step: its key, and the seed of the step."""
    return [f"{torch.initial_seed()} {key}" for key in keys]


def first_images(mixture, reader, indices, tasks, codecs):
    """Yield (index, what data.prepare makes of that sample), upright and without jitter. ValueError if one cannot be
    read and is not to be skipped."""
    for index in indices:
        try:
            item = prepare(reader, index, tasks, codecs)
        except (OSError, ValueError) as error:
            if not mixture.skip_bad:
                raise unreadable(reader, index, error, mixture.skip_bad) from error
            continue
        yield index, item


# ---- what every system is ----

class Images(nn.Module):
    """In the place of a VAE: images and codes are seen as they are."""

    def enable_slicing(self):
        raise ValueError("this checkpoint has no VAE: leave out --vae-slicing and --vae-tiling")

    enable_tiling = enable_slicing


@dataclass
class NoOptions:
    """--options of a system that has none."""


class System(nn.Module):
    """What train.py, evaluate.py and sample.py expect of a system. A subclass says what its network is, `maps`, and, if
    it learns from more than its maps' errors, `forward`, `counts` and `errors` (losses.accumulate).

    kind: its name; Options: the dataclass of its --options; discovers: what --discover may be (teacher.py).
    ValueError for a palette or task there is not.
    """
    kind, Options, discovers = "", NoOptions, ("labels", "true", "light")
    main, multi, decoder, second_frame = None, None, None, "concat"     # as StableMTL has them
    factor, out_channels, cache_tag = 1, 3, "images"                # of its latents, which are images here

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__()
        self.tasks, self.palette, self.options = tuple(tasks), palette, self.Options(**options)
        self.codecs = {t: registry(palette)[t] for t in tasks}
        self.vae, self.weights = Images(), {t: 1 / len(tasks) for t in tasks}
        self.discovery = None       # what it learns from beside labels: teacher.Discovery
        self.size = None            # (H, W) of its training images, where known: what `infer` goes by

    def maps(self, image, next_image, tasks):
        """Frames (B,3,H,W) -> {task: prediction (B,P,H,W)}."""
        raise NotImplementedError

    def pair(self, image, next_image):
        """What a trunk sees: the frame twice where none of its tasks is of two, as StableMTL sees it of such a task."""
        return image, next_image if any(codec.frames == 2 for codec in self.codecs.values()) else image

    def use_decoder(self, decoder):
        raise ValueError("--decoder would do nothing here: this checkpoint has no VAE")

    # -- what the cache keeps, and what the codec costs: nothing is encoded --

    def encode_frame(self, frame):
        return frame

    def encoded_shape(self, size):
        return 3, *size

    def encode_labels(self, codes):
        return codes

    def decode_labels(self, latents):
        """What is left of label codes, {task: (B,3,H,W)}, if this system predicts as well as it can."""
        return latents

    # -- training: what losses.accumulate minimises --

    @property
    def unseen(self):
        """The objective on held-out samples: in eval mode it is the labels' loss."""
        return self

    def fit(self, mixture):
        """Settle what follows from the training labels, before the first step."""

    def learn_from(self, discovery):
        """Learn also what is discovered, with the weight of a label."""
        self.discovery, share = discovery, 1 / len(self.tasks)
        self.weights |= {f"pseudo {t}": share for t in discovery.tasks if discovery.labels}
        self.weights |= {f"feature {t}": share for t in self.tasks if discovery.features}

    def ready(self, b):
        """The micro-batch with "pseudo" {task: (code, mask)}, labels that are none of the dataset's."""
        return self.discovery.ready(b) if self.training and self.discovery else b | {"pseudo": {}}

    def counts(self, b):
        labels = {t: int(m.sum()) for t, m in b["valid"].items()}
        return labels | {f"pseudo {t}": int(m.sum()) for t, (_, m) in b["pseudo"].items()}

    def wanted(self, b):
        """The tasks that a micro-batch has any label of."""
        return [t for t in self.tasks if t in b["labels"] or t in b["pseudo"]]

    def forward(self, b):
        return self.maps(*b["frames"], self.wanted(b))

    def error(self, task, x, code):
        """The loss of a prediction (B,P,H,W) at every pixel, (B,1,H,W)."""
        return task_errors(self.codecs[task], x, code)

    def errors(self, b, found):
        """found: {task: (B,P,H,W)} -> {task: sum of its loss over valid pixels}."""
        out = {t: self.error(t, found[t].float(), b["labels"][t])[b["valid"][t]].sum() for t in b["labels"]}
        return out | {f"pseudo {t}": self.error(t, found[t].float(), code)[m].sum()
                      for t, (code, m) in b["pseudo"].items()}

    def guess(self, image, next_image, tasks):
        """{task: (code (B,3,H,W), how sure it is (B,1,H,W))}: a regression has no probabilities; here it is the surer,
        the less it differs from what it makes of the mirrored image."""
        codes, mirrored = ({t: self.code(t, x) for t, x in self.maps(*pair, tasks).items()}
                           for pair in ((image, next_image), (image.flip(-1), next_image.flip(-1))))
        back = mirror({"frames": [], "labels": mirrored, "valid": {}}, self.codecs, -1)["labels"]
        return {t: (code, -(code - back[t]).abs().mean(1, keepdim=True)) for t, code in codes.items()}

    # -- inference --

    def code(self, task, x):
        """The code (B,3,H,W) that a prediction stands for."""
        return to_code(self.codecs[task], x)

    @torch.no_grad()
    def predict(self, image, next_image=None, tasks=None, rows=None):
        """As StableMTL.predict: frames (B,3,H,W) in [-1,1] -> {task: (B,C,H,W) native predictions}.

        Without next_image the image stands in for it, as in training where a dataset has none, and tasks about motion
        are left out. rows: tasks x images at once; the result does not depend on it.
        """
        tasks = asked(image, next_image, tasks, self.tasks)
        pair, out = (image, image if next_image is None else next_image), {t: [] for t in tasks}
        size = len(image) if rows is None else max(1, rows // len(tasks))
        for part in zip(*(frame.split(size) for frame in pair), strict=True):
            for t, x in self.maps(*part, tasks).items():
                out[t].append(self.code(t, x.float()))
        codes = {t: torch.cat(parts) for t, parts in out.items()}
        check_finite({t: x.sum() for t, x in codes.items()})
        return {t: self.codecs[t].decode(x) for t, x in codes.items()}

    def infer(self, image, next=None, tasks=None, size=None, rows=None, confidence=False, pixels=False, camera=None):
        """As StableMTL.infer: maps of photos as numpy arrays of the photos' own size."""
        return infer.infer(self, image, next, tasks, size, rows, confidence, pixels, camera)

    # -- files --

    def save(self, folder):
        """Write model.safetensors and model.json."""
        folder = Path(folder)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()},
                  folder / "model.safetensors")
        write_json(folder / "model.json", {"kind": self.kind, "tasks": self.tasks, "palette": self.palette,
                                           "second_frame": self.second_frame, "multi": None,
                                           "options": asdict(self.options)})

    @classmethod
    def load(cls, folder, spec, device="cpu"):
        """Model of a folder written by `save`, whose model.json is `spec`. FileNotFoundError, ValueError: a file is
        missing, damaged, or of another model."""
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"the checkpoint in {folder} is incomplete: no {path.name} (copy the whole folder "
                                    "again, or --resume its training)")
        with loading.faults_of_checkpoint(folder):
            try:
                model = cls(spec["tasks"], spec["palette"], **spec["options"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"model.json does not describe a {cls.kind}: {error}") from error
            state = loading.read_tensors(path)
            loading.check_state(state, model.state_dict(), path.name)
            model.load_state_dict(state)
        return loading.ready(model, folder, device)


# ---- the two plainest systems ----

class MTL(System):
    """One trunk, a head per task."""
    kind = "mtl"

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__(tasks, palette, **options)
        self.trunk = Trunk()
        self.heads = nn.ModuleDict({t: Head(outputs(self.codecs[t])) for t in tasks})

    def maps(self, image, next_image, tasks):
        (height, width), shared = image.shape[-2:], self.trunk(*self.pair(image, next_image))
        return {t: self.heads[t](shared)[..., :height, :width] for t in tasks}


class STL(System):
    """A trunk and a head of its own for every task: as many models as tasks, trained side by side."""
    kind = "stl"

    def __init__(self, tasks, palette="cityscapes", **options):
        super().__init__(tasks, palette, **options)
        self.alone = nn.ModuleDict({t: MTL([t], palette) for t in tasks})

    def maps(self, image, next_image, tasks):
        return {t: self.alone[t].maps(image, next_image, [t])[t] for t in tasks}
