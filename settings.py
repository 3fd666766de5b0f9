"""Settings of training: every flag, the presets, what stage 2 takes over from stage 1, and what contradicts what.

A setting is a field of Config; the field makes the flag. They are written to config.json beside the weights.
"""
import argparse
import dataclasses
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import baselines
import cli
import readers
import toy
from checkpoint import STATE, not_ours, read_config, read_json, stage1_settings, state_file
from model import SECOND_FRAMES
from network.attention import ATTENTIONS, MASKS, QUERY_INITS
from network.generalist import CONDITIONS, OBJECTIVES, SPACES, STABLEMTL
from network.loading import read_model_json
from network.memory import OPTIMIZERS, lora_config
from tasks import PALETTES, TASKS, parse_tasks
from training.discovery import MASKS as PSEUDO_MASKS
from training.losses import LOSSES

# ---- the list: every field is a flag; None: set by the preset, or in stage 2 by stage 1 ----

def setting(default, help, choices=None, kind=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


@dataclass
class Config:
    stage: int = setting(1, "0 makes the toy base, 1 trains the single stream, 2 the multi stream", (0, 1, 2))
    system: str = setting("stablemtl", "what is trained: StableMTL, or with --stage 1 another system of the papers "
                          "(docs/systems.md)", ("stablemtl", *baselines.SYSTEMS))
    teacher: str = setting("", "a finished checkpoint of the same system: a new one learns what it predicts where an "
                           "image has no label")
    discover: str = setting("", "what it learns there: the teacher's labels, features or both, or true labels, which "
                            "the toy worlds have; light = nothing, but images in the changed light that students see "
                            "(default, with --teacher: all that the system can)",
                            ("labels", "features", "both", "true", "light"))
    options: str = setting("", "of that other system, key=value,...: " + baselines.options_help())
    out: str = setting("out", "folder of the checkpoint")
    preset: str = setting("auto", "defaults: toy, toy-gpu (larger images, wider UNet, longer) or paper; "
                          "auto = paper with --base and --data, else toy", ("auto", "toy", "toy-gpu", "paper"))
    # data
    data: str = setting("", "root folder of the real datasets (docs/data.md); empty = the toy worlds; with --resume, "
                            "where the same data is now")
    base: str = setting("", "diffusers folder or hub id of Stable Diffusion 1.x/2.x shape; empty = the toy base")
    cache: str = setting("auto", "folder of the latent cache; auto = <out>/cache on the toy worlds, none with --data; "
                         "none = encode on the fly")
    stream_gb: float = setting(5.0, "gigabytes of auxiliary streams that the cache may hold in stage 2 "
                               "(the toy preset fills 4.2)", kind=cli.number(0, 1e6))
    scenes: int = setting(None, "toy training scenes per world", kind=cli.whole(1))
    size: str = setting(None, "HxW of toy images and of one's own, a multiple of the VAE's factor; other data has the "
                        "paper's sizes")
    workers: int = setting(None, "loader processes; the batches do not depend on it (default: 2 on a GPU, else 0)",
                           kind=cli.whole(0, 256))
    skip_bad: bool = setting(False, "skip and count unreadable files instead of stopping")
    tasks: str = setting("all", "comma-separated; one task alone is the single-task baseline; all = all with labels")
    drop: str = setting("", "labels left out, dataset:task,... (paper Table 3)")
    palette: str = setting("cityscapes", "colours that code the classes", tuple(PALETTES))
    pseudo: str = setting("", "folder of python -m tools.discover: a teacher's labels where a dataset has none")
    pseudo_mask: str = setting("half", "which of them count: the half that the teacher is surest of, all (none), or "
                               "each latent cell the less often the less sure (weighted)", PSEUDO_MASKS)
    pseudo_weight: float = setting(0.5, "how often such a dataset is drawn, a labelled one having weight 1 or less",
                                   kind=cli.number(0, ends=False))
    # model
    widths: str = setting(None, "comma-separated widths of a fresh toy UNet instead of the base's, or in --stage 0 of "
                          "the base's own; empty = the base's")
    second_frame: str = setting("concat", "how the second frame enters", SECOND_FRAMES)
    space: str = setting("latent", "what the UNet predicts: latents of label codes, or their pixels at that size; with "
                         "the next four, the Diffusion Generalist (docs/systems.md)", SPACES)
    objective: str = setting("regress", "regress: one step; diffuse: the noise in a noised target, then DDIM",
                             OBJECTIVES)
    condition: str = setting("latent", "what the UNet is told of a frame: its latent, features of a small trained stem "
                             "or raw pixels at the latents' size", CONDITIONS)
    input_scale: float = setting(0.3, "with --objective diffuse: scale of the target before noise is added",
                                 kind=cli.number(0, ends=False))
    ddim_steps: int = setting(50, "with --objective diffuse: steps of a prediction", kind=cli.whole(1, 1000))
    init: str = setting("", "stage 1: start from the single stream of this finished checkpoint instead of the base "
                        "(continued)")
    main_init: str = setting("stage1", "where the main UNet of stage 2 starts: stage1 or base (w/o single-stream init)",
                             ("stage1", "base"))
    heads: int = setting(4, "heads of the task attention", kind=cli.whole(1))
    shared_qkv: bool = setting(False, "one set of query, key and value projections for all tasks")
    attention: str = setting("n-to-1", "n-to-1: the main stream attends to frozen streams; n-to-n: all tasks trained "
                             "jointly, attending to each other", ATTENTIONS)
    query_init: str = setting("released", "weights that the queries start with: as released, or unit = keeping the "
                              "variance of their input", QUERY_INITS)
    rho: float = setting(0.4, "probability that a layer leaves out an auxiliary task in a training step",
                         kind=cli.number(0, 1))
    rho_after: int = setting(0, "stage 2: steps at the start in which --rho leaves nothing out", kind=cli.whole(0))
    mask: str = setting("score", "how the task to leave out is chosen", MASKS)
    # optimisation
    steps: int = setting(None, "optimizer steps; with --resume, so many in all", kind=cli.whole(1))
    batch: int = setting(None, "samples per optimizer step, over all processes", kind=cli.whole(1))
    micro: int = setting(None, "samples per forward pass; changes memory, not the result", kind=cli.whole(1))
    optimizer: str = setting("adam", "adam, or adam-bf16, which keeps its moments in bfloat16, rounded stochastically "
                             "(docs/cost.md says what fits which GPU)", OPTIMIZERS)
    lora: int = setting(0, "train the main UNet of stage 2 by LoRA of this rank on all its attentions and feed-forward "
                        "layers, merged in what is saved; needs peft (0 = train all of it)", kind=cli.whole(0, 1024))
    frozen: str = setting("fp32", "precision of the weights that stage 2 does not train", ("fp32", "bf16"))
    lr: float = setting(None, "peak learning rate of Adam", kind=cli.number(0, ends=False))
    attention_lr: float = setting(None, "learning rate of the task attention as a multiple of --lr (1 = as released)",
                                  kind=cli.number(0, ends=False))
    main_lr: float = setting(1.0, "learning rate of the main UNet of stage 2 as a multiple of --lr",
                             kind=cli.number(0, ends=False))
    freeze_main: int = setting(0, "stage 2: steps in which only the task attention learns", kind=cli.whole(0))
    beta2: float = setting(None, "Adam's decay of the squared gradient; 0.99 suits short runs",
                           kind=cli.number(0, 1, ends=False))
    warmup: int = setting(100, "steps of linear warm-up", kind=cli.whole(0))
    schedule: str = setting(None, "after the warm-up: exponential (to 1%% over 25,000 steps, as released) or cosine "
                            "(to 0 over --steps; a run that --resume lengthens goes on at the longer one's rate)",
                            ("exponential", "cosine"))
    clip: float = setting(None, "largest norm of the gradient", kind=cli.number(0, ends=False))
    clip_apart: bool = setting(False, "in stage 2 clip the main UNet and the task attention each by itself")
    isolation: bool = setting(True, "every optimizer step sees one task only; --no-isolation mixes tasks")
    loss: str = setting("latent", "sum of latent, pixel (MSE after the decoder) and task (the task's usual loss on the "
                        "decoded map), each with an optional weight: latent:1,task:0.5")
    # running
    seed: int = setting(0, "of everything drawn", kind=cli.whole(0))
    device: str = setting("auto", "auto = cuda where there is one, else mps, else cpu")
    precision: str = setting("auto", "autocast: auto = bf16 on GPUs that have it, else fp16; fp32 on the CPU",
                             ("auto", "fp32", "bf16", "fp16"))
    channels_last: bool = setting(False, "memory format of the convolutions (on an H100 it paid only beside "
                                  "cached streams: docs/cost.md)")
    compile: bool = setting(False, "torch.compile the blocks that repeat (on an H100 it paid only beside cached "
                            "streams: docs/cost.md)")
    checkpointing: bool = setting(False, "gradient checkpointing: less memory, about a third more time")
    processes: int = setting(None, "on the CPU, processes that share every batch, with the result of one (default, or "
                             "0: one per core, of two samples or more, on the toy base)", kind=cli.whole(0, 1024))
    threads: int = setting(None, "CPU threads of each process (default, or 0: one on the toy base, else torch's "
                           "choice)", kind=cli.whole(0, 1024))
    save_every: int = setting(500, "steps between checkpoints", kind=cli.whole(1))
    val_samples: int = setting(16, "held-out samples per task: the checkpoint with the lowest latent loss on them, "
                               "averaged over tasks, is kept in <out>/best; 0 = none is", kind=cli.whole(0))
    picture_every: int = setting(500, "steps between pictures, labels beside predictions; 0 = none", kind=cli.whole(0))
    track: str = setting(None, "also log to this module, which has init, log and finish: trackio, wandb, ...")
    resume: bool = setting(False, "continue the run in --out with its own settings")
    overwrite: bool = setting(False, "replace the checkpoint of this stage in --out")

    @property
    def decoded(self):
        """The terms of --loss that compare images, after the decoder; other systems have losses of their own."""
        return {kind for kind in parse_loss(self.loss) if LOSSES[kind] != "latents"} if self.loss else set()

    @property
    def cache_folder(self):
        """Where the latent cache is; "" for none."""
        auto = "" if self.data or self.decoded else str(Path(self.out) / "cache")
        return {"auto": auto, "none": ""}.get(self.cache, self.cache)


# of --help, each from this flag on
HEADINGS = {"stage": "the run", "data": "data", "widths": "model", "steps": "optimisation", "seed": "running"}
KINDS = {f.name: (None, f.type) for f in dataclasses.fields(Config)}    # as checkpoint.misfit reads it
TOY = dict(scenes=600, size="32x48", widths="", batch=8, micro=8, lr={1: 7e-4, 2: 3.5e-4}, attention_lr=10.0,
           beta2=0.99, schedule="cosine", clip=1.0, steps={1: 4800, 2: 1000})
PRESETS = {      # {1: ..., 2: ...}: of a stage 1, and of what goes on from it (stage 2, --init)
    "toy": TOY,
    "toy-gpu": dict(scenes=4000, size="64x96", widths="64,128,192,256", batch=32, micro=32, lr=1e-3, attention_lr=1.0,
                    beta2=0.999, schedule="cosine", clip=1.0, steps={1: 20000, 2: 10000}),
    "paper": dict(scenes=500, size="32x48", widths="", batch=32, micro=2, lr=1e-4, attention_lr=1.0, beta2=0.999,
                  schedule="exponential", clip=5.0, steps={1: 20000, 2: 10000}),
}
# what stage 2, and a stage 1 that continues another, take over from the stage 1 before
INHERITED = ("preset", "data", "base", "cache", "scenes", "size", "skip_bad", "tasks", "drop", "palette",
             "second_frame", "space", "objective", "condition", "input_scale", "ddim_steps")
AXES = ("space", "objective", "condition", "input_scale", "ddim_steps")      # of the Generalist
SETTLED = ("base", "tasks", "palette", "second_frame", *AXES)      # of these, what the model cannot change afterwards
# settings that mean nothing to the other systems
OURS = ("base", "palette", "widths", "second_frame", *AXES, "pseudo", "pseudo_mask", "pseudo_weight", "init",
        "isolation", "loss", "compile", "checkpointing")
# what --resume may set anew; but for --out it stays what it was unless given
ANYTIME = "resume", "out", "data", "micro", "processes", "threads", "workers", "steps", "track"


# ---- the command line ----

def parse_args(argv=None, description=None):
    """The command line as a Config, inherited and preset values filled in. ValueError names an unknown or impossible
    value and the remedy."""
    parser = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        if f.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[f.name])
        flag, help = flag_name(f.name), f.metadata["help"] + default_told(f)
        if f.type is bool:      # --no-<flag> where it changes something
            both = f.default or f.name in INHERITED
            group.add_argument(flag, action=argparse.BooleanOptionalAction if both else "store_true", help=help)
        else:
            kind = f.metadata["kind"] or f.type
            group.add_argument(flag, type=kind, choices=f.metadata["choices"], help=help)
    given = vars(parser.parse_args(argv))
    cfg = Config(**given)
    if cfg.resume:
        other = [flag_name(name) for name in given if name not in ANYTIME]
        if other:
            raise ValueError(f"--resume continues the run in {cfg.out} with its own settings: leave out "
                             f"{', '.join(other)}")
        return from_anywhere(cfg)
    inherit(cfg, given)
    return check(cfg, given)


def default_told(field):
    """The default of a flag, or those of the presets, as --help says it."""
    if field.name not in TOY:
        return "" if field.default in (None, "", False) else f" (default: {field.default})"
    values = {name: preset[field.name] for name, preset in PRESETS.items()}
    both = {name: " / ".join(map(str, x.values())) if isinstance(x, dict) else x for name, x in values.items()}
    stages = ", stage 1 / stage 2" if values != both else ""
    return f" (default{stages}: {', '.join(f'{name} {x}' for name, x in both.items() if x != '')})"


def flag_name(name):
    return "--" + name.replace("_", "-")


def settled(folder):
    """What a stage 2 or a continued stage 1 takes over from a checkpoint: the settings of its stage 1; where it does
    not say, what its model tells, and of imported weights their base and the paper's preset. None if there is none."""
    if known := stage1_settings(folder):
        return known
    if not (Path(folder) / "model.json").is_file():
        return None
    model, imported = read_model_json(folder), read_config(folder).get("imported")
    known = {"tasks": ",".join(model["tasks"]), "palette": model["palette"], "second_frame": model["second_frame"],
             **(model.get("generalist") or {})}
    return known | ({"preset": "paper", "base": imported["base"]} if imported else {})


def inherit(cfg, given):
    """Take over what the stage 1 in --out (or --init) settled, and say what; ValueError if a flag contradicts it."""
    source = cfg.init if cfg.stage == 1 else cfg.out if cfg.stage == 2 else ""
    before = settled(source) if source else None
    if not before:
        return
    for name in SETTLED:
        if name in given and name in before and not same_setting(name, given[name], before[name]):
            raise ValueError(f"{flag_name(name)} {given[name]} contradicts the stage 1 in {source}, which has "
                             f"{before[name] or 'the toy base'}: leave it out, or train another stage 1")
    taken = {name: before[name] for name in INHERITED if name not in given and before.get(name) is not None}
    for name, value in taken.items():
        setattr(cfg, name, value)
    if told := unusual(taken):
        print(f"as the stage 1 in {source}: {', '.join(told)}", file=sys.stderr)


def unusual(settings):
    """["--data my", ...]: those of INHERITED that their preset has not, which another model may have, too."""
    data, preset = settings.get("data"), PRESETS[settings.get("preset", "toy")]
    defaults = {f.name: f.default for f in dataclasses.fields(Config)} | preset | {"preset": "toy"}
    idle = [*SETTLED[1:], *["scenes"] * bool(data), *["size"] * bool(data and readers.sized(data))]
    names = [name for name in INHERITED if name in settings and name not in idle]
    given = {flag_name(name): settings[name] for name in names if settings[name] != defaults[name]}
    return [flag if value is True else f"{flag} {shlex.quote(str(value))}" for flag, value in given.items()]


def same_setting(name, a, b):
    if name == "tasks":
        return a == "all" or parse_tasks(a) == parse_tasks(b)
    return a == b or (name == "base" and os.path.realpath(a) == os.path.realpath(b or toy.BASE))


def idle_flags(cfg):
    """[(flags, why they would do nothing here)]: every flag acts or is refused."""
    fresh = cfg.stage == 1 and not cfg.init
    return [
        (OURS, cfg.system != "stablemtl" and f"it belongs to StableMTL, and this is --system {cfg.system}"),
        (("options", "teacher", "discover"),
         cfg.system == "stablemtl" and "it belongs to the other systems: name one with --system"),
        ([f.name for f in dataclasses.fields(cfg) if f.name not in ("stage", "out", "seed", "threads", "widths")],
         cfg.stage == 0 and "--stage 0 has its settings in toy/make.py"),
        (("rho", "mask", "heads", "shared_qkv", "attention", "main_init", "stream_gb", "attention_lr", "query_init",
          "rho_after", "main_lr", "freeze_main", "clip_apart", "lora", "frozen"),
         cfg.stage == 1 and "it belongs to --stage 2"),
        ((*AXES, "pseudo", "pseudo_mask", "pseudo_weight"), cfg.stage == 2 and "it belongs to --stage 1"),
        (("pseudo_mask", "pseudo_weight"), not cfg.pseudo and "it is about --pseudo"),
        (("input_scale", "ddim_steps"), cfg.objective == "regress" and "it goes with --objective diffuse"),
        (("loss",), axes(cfg) and "with --space, --objective or --condition the loss is that of what the UNet gives"),
        (("init",), cfg.stage == 2 and "stage 2 starts from the stage 1 in --out"),
        (("widths",), not (cfg.stage == 0 or fresh or cfg.main_init == "base") and
         "it makes a fresh UNet, in a stage 1 without --init or with --main-init base"),
        (("lora",), cfg.main_init == "base" and "a low rank starts from stage 1: leave --main-init out"),
        (("mask", "rho_after"), cfg.rho == 0 and "with --rho 0 nothing is left out"),
        (("rho", "mask", "rho_after"), cfg.rho_after >= cfg.steps and "--rho-after lasts to the last step"),
        (("main_lr",), cfg.freeze_main >= cfg.steps and "--freeze-main lasts to the last step"),
        (("size",), cfg.data and readers.sized(cfg.data, "train") and
         f"the datasets in {cfg.data} have sizes of their own"),
        (("scenes",), cfg.data and "it counts scenes of the toy worlds, and --data names others"),
        (("stream_gb",), cfg.attention == "n-to-n" and "n-to-n has no frozen streams"),
        (("stream_gb",), not cfg.cache_folder and "streams are kept beside the latents, and this run has no --cache"),
        (("processes",), "RANK" in os.environ and "torchrun has started them"),
        (("palette",), not any(TASKS[t].categorical for t in parse_tasks(cfg.tasks))
         and "it colours classes, and --tasks leaves them out"),
    ]


def check(cfg, given=()):
    """Fill in the preset's values and refuse impossible settings before anything is written."""
    parse_tasks(cfg.tasks)
    if cfg.system != "stablemtl" and cfg.stage != 1:
        raise ValueError(f"--system {cfg.system} is trained in one go: leave out --stage {cfg.stage}")
    if cfg.system != "stablemtl":
        cfg.lr = cfg.lr or baselines.LEARNING_RATE
    if cfg.preset == "auto":
        cfg.preset = "paper" if cfg.base and cfg.data else "toy"
    further = 2 if cfg.stage == 2 or cfg.init else 1    # a continued stage 1 is what a stage 2 is compared with
    for name, value in PRESETS[cfg.preset].items():
        value = "" if name == "widths" and cfg.base else value      # a base has its own
        if getattr(cfg, name) is None and not (name == "size" and cfg.data):
            setattr(cfg, name, value[further] if isinstance(value, dict) else value)
    for names, why in idle_flags(cfg):
        idle = [flag_name(n) for n in names if n in given]
        if why and idle:
            raise ValueError(f"{', '.join(idle)} would do nothing here: {why}")
    if cfg.system != "stablemtl":       # every label of an image at once, losses of their own
        baselines.parse_options(cfg.system, cfg.options)
        cfg.isolation, cfg.loss, cfg.discover = False, "", baselines.parse_discover(cfg)
        check_teacher(cfg)
    elif cfg.decoded and cfg.cache_folder:
        raise ValueError("--loss pixel and task compare images, which the latent cache does not hold: add --cache none")
    cli.parse_size(cfg.size)
    parse_widths(cfg.widths)
    cli.parse_device(cfg.device)
    if cfg.lora:
        lora_config()       # for its ValueError without peft
    if cfg.init:
        check_finished(cfg.init, 1, "--init starts from a finished stage 1")
    return from_anywhere(cfg)


def from_anywhere(cfg):
    """The Config with absolute paths: what goes on may do so from another folder."""
    for name in ("data", "base", "cache", "init", "pseudo", "teacher"):
        path = getattr(cfg, name)
        if path and (os.path.isdir(path) or name == "cache" and path == cfg.cache_folder):
            setattr(cfg, name, os.path.abspath(path))
    return cfg


def check_teacher(cfg):
    """ValueError if the teacher is unfinished, or what this run replaces, by whichever path it is named."""
    replaced = [os.path.realpath(folder) for folder in (cfg.out, Path(cfg.out, "best"))]
    if cfg.teacher and os.path.realpath(cfg.teacher) in replaced:
        raise ValueError(f"--teacher {cfg.teacher} is what a run in --out {cfg.out} replaces: name another --out")
    if cfg.teacher:
        check_finished(cfg.teacher, 1, "--teacher is a finished checkpoint")


def check_finished(folder, stage, who):
    """ValueError if this stage in a checkpoint is that of a run which has not come to its end; imported weights and
    copies have no run. who: what asks for a finished one, in words."""
    state = state_file(folder)
    about = read_json(state, "", STATE) if state else None
    if about and about["train"]["stage"] == stage and (step := about["step"]) < about["train"]["steps"]:
        raise ValueError(f"{who}, and the one in {folder} has done {step} of {about['train']['steps']} steps: finish "
                         f"it first with python train.py --resume --out {shlex.quote(str(folder))} "
                         f"(--steps {max(1, step)} ends it there)")


def stages_in(cfg):
    """How many stages --out holds. ValueError: more than this run may replace, another system's, a base, or, under a
    stage 2, an unfinished stage 1."""
    if not (Path(cfg.out) / "model.json").is_file():
        not_ours(cfg.out)
        return 0
    there = read_model_json(cfg.out)
    if there["kind"] != cfg.system:
        raise ValueError(f"{cfg.out} holds a model of the system {there['kind']}, not {cfg.system}: name another --out")
    stages = 2 if there["multi"] else 1
    if stages >= cfg.stage and not (cfg.resume or cfg.overwrite):
        raise ValueError(f"{cfg.out} already holds stage {stages}: continue it with --resume, name another --out, "
                         "or replace it with --overwrite")
    if cfg.stage == 2:
        check_finished(cfg.out, 1, "--stage 2 starts from a finished stage 1")
    return stages


def axes(cfg):
    """The Generalist's axes, as its keywords; {} for StableMTL's own stage 1."""
    own = all(getattr(cfg, name) == value for name, value in STABLEMTL.items())
    return {} if own else {name: getattr(cfg, name) for name in AXES}


def parse_widths(text):
    """"32,32,48,64" -> (32, 32, 48, 64), one width per level of the UNet; "" -> ()."""
    widths = text.split(",") if text else []
    if widths and (len(widths) != 4 or not all(w.isdecimal() and int(w) > 0 and int(w) % 8 == 0 for w in widths)):
        raise ValueError(f"--widths {text}: expected four multiples of 8, for example 32,32,48,64")
    return tuple(int(w) for w in widths)


def parse_loss(text):
    """"latent,pixel:0.5" -> {"latent": 1.0, "pixel": 0.5}."""
    out = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        try:
            out[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--loss {part}: the weight must be a number") from None
        if name not in LOSSES or not 0 < out[name] < math.inf:
            raise ValueError(f"--loss {part}: expected {', '.join(LOSSES)}, each with a finite weight above 0 "
                             "(latent:1,task:0.5)")
    return out
