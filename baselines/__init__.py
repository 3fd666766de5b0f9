"""The other systems of the papers, for one table with StableMTL (docs/systems.md). Each reads top to bottom:

    trunk.py            what they share, and single-task and multi-task learning: stl, mtl
    teacher.py          labels and features from a teacher, where an image has none
    hitts.py            hierarchical task tokens
    jtr.py              joint-task regularisation
    diffusionmtl.py     multi-task denoising diffusion

All are trained, evaluated and sampled by the same three commands, from checkpoints that say in model.json, "kind", what
they hold. A further system is a subclass of trunk.System and a name in SYSTEMS.
"""
import dataclasses

import torch

from baselines.diffusionmtl import DiffusionMTL
from baselines.hitts import HiTTs
from baselines.jtr import JTR
from baselines.teacher import Discovery
from baselines.trunk import MTL, STL
from model import StableMTL
from network.loading import read_model_json

SYSTEMS = {system.kind: system for system in (STL, MTL, JTR, DiffusionMTL, HiTTs)}
LEARNING_RATE = 1e-3        # of networks from scratch, unless --lr says otherwise


# ---- training: what train.py's table says of every one of them ----

def build(cfg, tasks, stages):
    """The model of a run at its start. ValueError, FileNotFoundError: its teacher cannot teach it."""
    if cfg.teacher:     # `discovery` loads it again; here what is wrong with it is told before anything is written
        load_teacher(cfg.teacher, cfg.system, tasks)
    torch.manual_seed(cfg.seed + 1000 * bool(cfg.teacher))      # a student's own weights, not its teacher's again
    return SYSTEMS[cfg.system](tasks, cfg.palette, **parse_options(cfg.system, cfg.options))


def parts(model):
    """All of it is trained."""
    return {"model": dict(model.named_parameters())}


def objective(model, cfg, mixture, streams):
    """It knows itself what it minimises, once it is told what to discover."""
    model.fit(mixture)
    if cfg.discover:
        model.learn_from(discovery(model, cfg, mixture))
    return model


# ---- --teacher, --discover ----

def parse_discover(cfg):
    """What a run discovers, "" for nothing. ValueError if --teacher and --discover do not go together, or with the
    system or the data."""
    can, wanted = SYSTEMS[cfg.system].discovers, cfg.discover
    if not can and (cfg.teacher or wanted):
        raise ValueError(f"--teacher, --discover: {cfg.system} discovers nothing; it is for "
                         f"{', '.join(name for name, s in SYSTEMS.items() if s.discovers)}")
    if cfg.teacher and not wanted:
        wanted = "both" if "both" in can else "labels"
    if not wanted:
        return ""
    if wanted not in can:
        raise ValueError(f"--discover {wanted}: {cfg.system} can only take {', '.join(can)}")
    if wanted not in ("true", "light") and not cfg.teacher:
        raise ValueError(f"--discover {wanted} needs a --teacher: a finished checkpoint of {cfg.system}")
    if cfg.teacher and (wanted == "light" or wanted == "true" and "features" not in can):
        raise ValueError(f"--teacher would do nothing here: with --discover {wanted} {cfg.system} learns nothing from "
                         "it")
    if wanted == "true" and cfg.data:
        raise ValueError("--discover true is for the toy worlds, which know every label: leave out --data")
    if cfg.teacher and cfg.data and cfg.cache in ("auto", "none"):
        raise ValueError("--teacher looks at images without crops and jitter: give their cache a --cache <folder>")
    return wanted


def load_teacher(folder, kind, tasks, device="cpu"):
    """The model of a checkpoint. ValueError, FileNotFoundError: it is not whole, or not of this system and these
    tasks."""
    spec = read_model_json(folder)
    if (spec["kind"], tuple(spec["tasks"])) != (kind, tasks):
        raise ValueError(f"--teacher {folder} is a {spec['kind']} of {', '.join(spec['tasks'])}: expected a finished "
                         f"{kind} of {', '.join(tasks)}")
    return load(folder, device=device)


def discovery(model, cfg, mixture):
    """The Discovery of a run's settings."""
    device = next(model.parameters()).device
    teacher = load_teacher(cfg.teacher, model.kind, model.tasks, device) if cfg.teacher else None
    labels = {"features": None, "light": None, "true": "true"}.get(cfg.discover, "teacher")
    features = teacher is not None and cfg.discover != "labels" and "features" in model.discovers
    return Discovery(mixture, model.tasks, teacher, labels, features)


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
    for key in out:
        needed = fields[key].metadata.get("idle")       # with that at 0 it does nothing
        if needed and not out.get(needed, fields[needed].default):
            raise ValueError(f"--options {text}: {key} would do nothing here, with {needed}=0: leave it out")
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
