"""What the other systems cost: weights, and counted operations beside StableMTL's. Called by tools/bench.py."""
import contextlib

import torch

import baselines
from tasks import TASKS
from training.losses import accumulate


def count(operations, size, tasks):
    """{name: {"weights", "prediction", "training"}}: how many weights, operations of all maps of one pair of images of
    `size`, and of a training step of one image with every label. operations(f, *args) -> those of f(*args)."""
    images, valid = torch.rand(2, 1, 3, *size), torch.ones(1, 1, *size, dtype=torch.bool)
    batch = {"tasks": tasks, "keys": [("bench", 0, False)], "frames": [*images],
             "labels": {t: TASKS[t].encode(torch.ones(1, TASKS[t].channels, *size), valid) for t in tasks},
             "valid": dict.fromkeys(tasks, valid)}
    out = {}
    for name, system in baselines.SYSTEMS.items():
        model = system(tasks)
        step = operations(accumulate, model, [batch], images.device, contextlib.nullcontext)
        out[name] = {"weights": sum(p.numel() for p in model.parameters()), "training": step,
                     "prediction": operations(model.eval().predict, *images)}
    return out


def lines(rows):
    """The rows as text."""
    return ["other systems (python train.py --system ...), billions of operations:",
            *(f"  {name:13}{row['weights'] / 1e6:6.2f} M weights,{row['prediction'] / 1e9:7.2f} for all maps of a pair,"
              f"{row['training'] / 1e9:7.2f} for one image in training" for name, row in rows.items())]
