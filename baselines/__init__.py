"""The other systems of the papers, for one table with StableMTL (docs/systems.md). Each reads top to bottom:

    trunk.py        what they share, and single-task and multi-task learning: stl, mtl

All are trained, evaluated and sampled by the same three commands, from checkpoints that say in model.json, "kind", what
they hold. A further system is a subclass of trunk.System and a name in SYSTEMS.
"""
import dataclasses

import torch

from baselines.trunk import MTL, STL
from loading import read_model_json
from model import StableMTL

SYSTEMS = {system.kind: system for system in (STL, MTL)}
LEARNING_RATE = 1e-3        # of networks from scratch, unless --lr says otherwise


# ---- training: what train.py's table says of every one of them ----

def build(cfg, tasks, stages):
    """The model of a run at its start."""
    torch.manual_seed(cfg.seed)
    return SYSTEMS[cfg.system](tasks, cfg.palette, **parse_options(cfg.system, cfg.options))


def parts(model):
    """All of it is trained."""
    return {"model": dict(model.named_parameters())}


def objective(model, cfg, encode, streams=None):
    """It knows itself what it minimises."""
    return model


# ---- --options ----

def parse_options(name, text):
    """"steps=2,condition=own" -> {"steps": 2, "condition": "own"}, as the Options of a system take them. ValueError
    names what is unknown or impossible."""
    fields, out = {f.name: f for f in dataclasses.fields(SYSTEMS[name].Options)}, {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in fields:
            known = ", ".join(fields) or "it has none"
            raise ValueError(f"--options {part}: not an option of {name} ({known})")
        out[key] = _value(fields[key], part, value)
    return out


def _value(field, part, text):
    """The value of an option, of the type of its default; where choices are given, one of these."""
    choices, low = field.metadata.get("choices"), field.metadata.get("low", 0)
    if field.type is bool:
        choices = {"yes": True, "no": False}
    if choices:
        if text not in choices:
            raise ValueError(f"--options {part}: expected one of {', '.join(choices)}")
        return choices[text] if isinstance(choices, dict) else text
    try:
        value = field.type(text)
    except ValueError:
        value = None
    if value is None or not low <= value < float("inf"):
        raise ValueError(f"--options {part}: expected a {'whole ' if field.type is int else ''}number from {low}")
    return value


def options_help():
    """One line about all options of all systems, for --help."""
    told = []
    for name, system in SYSTEMS.items():
        every = [f"{f.name}={_shown(f)} ({f.metadata['help']})" for f in dataclasses.fields(system.Options)]
        told += [f"{name}: {', '.join(every)}"] * bool(every)
    return "; ".join(told)


def _shown(field):
    return {True: "yes", False: "no"}[field.default] if field.type is bool else field.default


# ---- checkpoints ----


def load(folder, stage=None, device="cpu"):
    """The model of a checkpoint, whichever system's. stage: of StableMTL (see there). Errors: StableMTL.load."""
    spec = read_model_json(folder)
    if spec["kind"] == "stablemtl":
        return StableMTL.load(folder, stage, device)
    if spec["kind"] not in SYSTEMS:
        raise ValueError(f"{folder} holds a model of the system {spec['kind']}, which is none of stablemtl, "
                         f"{', '.join(SYSTEMS)}")
    if stage == 2:
        raise FileNotFoundError(f"{folder} holds {spec['kind']}, which has no stage 2: leave out --stage")
    return SYSTEMS[spec["kind"]].load(folder, spec, device)
