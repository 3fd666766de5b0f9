"""Training memory on a GPU, counted without one. Called by tools/bench.py.

A step runs on the meta device, where tensors have shapes and no storage: what is alive is added up as it would be under
bf16 autocast on CUDA, with fused attention. Not counted: workspaces of the kernels, what the allocator loses to gaps,
the CUDA context (about half a gigabyte). A step begins with cached latents, as with --cache; without, its images are
encoded first.
"""
import contextlib
import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from network.memory import add_lora, freeze_in_bf16
from train import trainable

SIZE = 288, 384     # the paper's training images
SMALL = "--frozen bf16 --optimizer adam-bf16"
CHOICES = {1: ["", "--checkpointing", "--optimizer adam-bf16"],
           2: ["", "--checkpointing", "--frozen bf16", "--optimizer adam-bf16", "--lora 16", SMALL,
               f"{SMALL} --checkpointing", "--frozen bf16 --lora 16", "--frozen bf16 --lora 16 --checkpointing"]}
MICROS = 2, 16      # the paper's micro-batch, and half a step
CARDS = 24, 48, 80      # GB as sold, really 2^30 bytes each
SPARE = 1.5e9           # of a card: CUDA context, workspaces, gaps


class FusedAttention(torch.autograd.Function):
    """What flash attention allocates and keeps: inputs, output, a float32 per row."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class Autocast(TorchFunctionMode):
    """torch.autocast("cuda", torch.bfloat16) for the functions of our networks, where there is no CUDA."""

    KINDS = {torch.bfloat16: {F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
                              torch.baddbmm, F.scaled_dot_product_attention},
             torch.float32: {F.layer_norm, F.group_norm, torch.Tensor.softmax}}

    def __init__(self, keep=True):
        super().__init__()
        self.keep, self.casts = keep, {}    # of trained weights, kept until the forward pass is over

    def cast(self, x, kind):
        if not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == kind:
            return x
        if not (self.keep and x.is_leaf and x.requires_grad):
            return x.to(kind)
        if x not in self.casts:
            self.casts[x] = x.to(kind)
        return self.casts[x]

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = next((kind for kind, functions in self.KINDS.items() if f in functions), None)
        if kind:
            args, kwargs = [self.cast(x, kind) for x in args], {k: self.cast(x, kind) for k, x in kwargs.items()}
        if f is F.scaled_dot_product_attention:
            return FusedAttention.apply(*(args[:3] or (kwargs[k] for k in ("query", "key", "value"))))
        return f(*args, **kwargs)


class Alive(TorchDispatchMode):
    """Adds up the bytes of storages from their making to their end: `now`, and its largest value `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage() not in self.known:
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        self.known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, count):
        self.now -= count


def micro_batches(model, size, task, numbers):
    """[bytes]: the most alive during a step's later micro-batch of so many images, without the weights: gradients,
    which isolation keeps to what this task uses, activations, copies of weights in bfloat16, temporaries."""
    out = []
    with Alive() as alive:
        for images in (1, *numbers):        # the first one makes the gradients
            z = torch.empty(images, 4, *(s // model.factor for s in size), device="meta")
            alive.peak = alive.now
            with Autocast():
                loss = model(z, z, [task])[task].float().square().mean()
            loss.backward()
            out.append(alive.peak)
    return out[1:]


def count(assembled, stage, task, choice, size=SIZE):
    """{"flags", "states", "peaks"} of training with the flags `choice`: bytes of weights and moments, and {images per
    micro-batch: bytes at the peak}.

    assembled(stage) -> a StableMTL on the meta device in float32.
    """
    model, flags = assembled(stage), choice.split()
    if "--lora" in flags:
        add_lora(model.main, int(flags[flags.index("--lora") + 1]))
    if "--frozen" in flags:
        freeze_in_bf16(model)
    if "--checkpointing" in flags:      # what it runs again, in the backward pass, is under autocast again
        (model.main or model.unet).enable_gradient_checkpointing(partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), Autocast(keep=False))))
    trained = sum(p.numel() for own in trainable(model).values() for p in own.values())
    states = sum(p.nbytes for p in model.parameters()) + (4 if "adam-bf16" in flags else 8) * trained
    peaks = micro_batches(model, size, task, MICROS)
    return {"flags": choice, "states": states, "peaks": {m: states + p for m, p in zip(MICROS, peaks, strict=True)}}


def counts(assembled, tasks):
    """{stage: [count of each of CHOICES]}; the stages that so many tasks allow."""
    return {stage: [count(assembled, stage, tasks[-1], choice) for choice in choices]
            for stage, choices in CHOICES.items() if stage <= len(tasks)}


def fitting(peaks, card):
    """The largest power of two as micro-batch that fits a card of so many GB, at most the larger one counted; 0 if not
    even the smaller one does. Between the two the peak is at most on the line, for it is the largest of several."""
    room, (few, many) = card * 2**30 - SPARE, peaks
    slope = (peaks[many] - peaks[few]) / (many - few)
    most = few + (room - peaks[few]) / slope
    return 0 if most < few else 2 ** (int(min(most, many)).bit_length() - 1)


def table(rows):
    """The rows {stage: [count]} as lines of text."""
    cards = ", ".join(map(str, CARDS))
    lines = [f"training memory at {SIZE[0]}x{SIZE[1]} under bf16 autocast, counted, GB: weights and moments; at the "
             f"peak with --micro {' and '.join(map(str, MICROS))}; the --micro that fits a card of {cards} GB"]
    for stage, counted in rows.items():
        for r in counted:
            peaks = "".join(f"{p / 1e9:7.2f}" for p in r["peaks"].values())
            fits = ", ".join(str(fitting(r["peaks"], card) or "none") for card in CARDS)
            lines.append(f"  stage {stage} {r['flags'] or '(defaults)':60}{r['states'] / 1e9:6.2f}{peaks}   {fits}")
    return lines
