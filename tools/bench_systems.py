"""What the other systems cost: weights, and counted operations beside StableMTL's. Called by tools/bench.py."""
import contextlib

import torch

import baselines
from tasks import TASKS
from training.losses import accumulate


def pair(size):
    """Two frames (1,3,H,W)."""
    return list(torch.rand(2, 1, 3, *size))


def training(operations, model, size):
    """Operations of a training step of one image with every label that the model learns from."""
    valid = torch.ones(1, 1, *size, dtype=torch.bool)
    labels = {t: TASKS[t].encode(torch.ones(1, TASKS[t].channels, *size), valid) for t in model.tasks}
    batch = {"tasks": model.tasks, "keys": [("bench", 0, False)], "frames": pair(size), "labels": labels,
             "valid": dict.fromkeys(model.tasks, valid)}
    return operations(accumulate, model.train(), [batch], valid.device, contextlib.nullcontext)


def weights(model):
    return sum(p.numel() for p in model.parameters())


def count(operations, size, tasks):
    """{name: {"weights", "prediction", "training"}}: how many weights, operations of all maps of one pair of images of
    `size`, and of a training step of one image with every label. operations(f, *args) -> those of f(*args)."""
    out = {}
    for name, system in baselines.SYSTEMS.items():
        model = system(tasks)
        out[name] = {"weights": weights(model), "training": training(operations, model, size),
                     "prediction": operations(model.eval().predict, *pair(size))}
    return out


def lines(rows):
    """The rows as text."""
    return ["other systems (python train.py --system ...), billions of operations:",
            *(f"  {name:13}{row['weights'] / 1e6:6.2f} M weights,{row['prediction'] / 1e9:7.2f} for all maps of a pair,"
              f"{row['training'] / 1e9:7.2f} for one image in training" for name, row in rows.items())]
