"""What the models of a study cost, whichever system's: counted operations, weights, labels that a run has seen."""
from functools import cache

import torch

import baselines
import train
from checkpoint import read_config, read_json
from data import Mixture, parse_drop, train_readers
from network.loading import read_model_json
from network.memory import add_lora
from settings import Config
from tasks import parse_tasks, registry
from tools import bench_systems
from tools.bench import operations, step_operations
from training.discovery import discoverable


def config(folder):
    """(settings of the run that made a checkpoint, (H, W) of its images)"""
    told = read_json(folder / "config.json", f"no config.json in {folder}", {"train": dict, "size": [int, int]})
    return Config(**told["train"]), told["size"]


def joint(spec):
    """Whether a step of the system that a model.json is about takes every label an image has."""
    return train.RECIPES[spec["kind"]].joint


def alike(folder):
    """What the operations of a training step depend on, as text."""
    spec, about = read_model_json(folder), read_config(folder)
    facts = [spec["kind"], spec["multi"], spec["options"], spec.get("generalist"), about["size"], len(spec["tasks"])]
    facts.append((about["train"] or {}).get("lora", 0))
    facts += [path.read_text() for path in sorted(folder.glob("*unet/config.json"))]
    if joint(spec):
        cfg, _ = config(folder)
        facts += [spec["tasks"], bool(cfg.teacher), cfg.discover]
    return str(facts)


def step(folder, batch):
    """Counted operations of one optimizer step of this checkpoint's last stage: from cached latents, of an image's one
    task; or of a system whose step takes every label an image has, for images with all labels."""
    model, (cfg, size) = baselines.load(folder), config(folder)
    if joint(read_model_json(folder)):
        return batch * (bench_systems.training(operations, model, size) + teaching(cfg, size))
    if cfg.lora:        # files hold it merged
        add_lora(model.main, cfg.lora)
    label = torch.empty(1, model.out_channels, *(s // model.factor for s in size), device="meta")
    seen = torch.empty(1, *model.encoded_shape(size), device="meta")
    return batch * step_operations(model.to("meta"), seen, model.tasks[-1], label=label)


@torch.no_grad()
def teaching(cfg, size):
    """Counted operations of what a student is told of one image by its teacher."""
    if not cfg.teacher:
        return 0
    teacher, images, out = baselines.load(cfg.teacher), bench_systems.pair(size), 0
    if cfg.discover in ("labels", "both"):
        out += operations(teacher.guess, *images, discoverable(teacher.tasks))
    if cfg.discover != "labels":
        out += operations(teacher.features, *images)
    return out


@cache
def prediction(folder):
    """{"weights", "prediction"} of a checkpoint: how many, those of a VAE included, and counted operations of all maps
    of a pair of images."""
    model, (_, size) = baselines.load(folder), config(folder)
    return {"weights": bench_systems.weights(model),
            "prediction": operations(model.predict, *bench_systems.pair(size))}


@cache
def labels_per_image(folder, steps=200):
    """How many labels of its data an image of a run has in the mean, counted over its first steps; what is discovered
    is not counted, but where it is an image's only label."""
    cfg, size = config(folder)
    if cfg.isolation:
        return 1.0
    tasks = parse_tasks(cfg.tasks)
    readers = [r for r in train_readers(cfg.data, tuple(size), cfg.scenes) if set(r.tasks) & set(tasks)]
    mixture = Mixture(readers, tasks, registry(cfg.palette), cfg.batch, cfg.batch, cfg.seed + 1000 * cfg.stage,
                      parse_drop(cfg.drop, [r.name for r in readers]), isolation=False,
                      joint=train.RECIPES[cfg.system].joint)
    drawn = [len(labels) for s in range(min(steps, cfg.steps)) for labels, *_ in mixture.plan(s)]
    return sum(drawn) / len(drawn)
