"""results.json, the report of an evaluation: where it lies, what its numbers depend on and so which still hold, and how
it makes room for another without being lost."""
import os
import re
import sys
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch

import toy
from checkpoint import crc, digest, read_json, write_json
from inference.infer import precision
from network.loading import read_model_json

METRIC_VALUES = {str: {str: {str: float}}}      # {dataset: {task: {metric: value}}}
REPORT = {"results": METRIC_VALUES, "trivial": {str: METRIC_VALUES}, "skipped": [str], "made_from": {str: str},
          "vae": (None, METRIC_VALUES), "flags": (None, dict), "weights": (None, str), "unfinished": (None, [str]),
          "scoring": (None, str)}


def read_report(path, remedy="delete it, or restore it from a copy"):
    """The report in a file; {} if there is none, ValueError if the file is none of ours."""
    return read_json(path, "", REPORT, remedy) if Path(path).is_file() else {}


def current(report, keys):
    """The test sets of a report (or {}) that are of these fingerprints, {test set: text}."""
    return {name for name, key in keys.items()
            if name in report.get("results", ()) and report["made_from"].get(name) == key}


def results_file(args, folder, stage, home):
    """The file of an evaluation's results, as evaluate.py tells at its top. args: its flags; folder: the checkpoint's;
    home: where it was trained."""
    if folder.resolve() == toy.MODEL.resolve():
        whose, where = "toy_model", Path()
    elif args.ckpt and not Path(args.ckpt).is_dir():
        whose, where = re.sub(r"\W+", "_", args.ckpt), Path()      # a hub id: its folder is the hub's cache
    else:
        whose, where = "", folder
    beside_stage_2 = stage == 1 and folder != toy.BASE and read_model_json(folder)["multi"]
    beside = [(whose, whose), ("stage1", beside_stage_2),
              (f"streams-{args.streams}".replace(",", "-"), args.streams), ("one-frame", args.one_frame),
              (args.split, args.split != "test"), (Path(args.data).name, args.data != home),
              (Path(args.decoder or "").name, args.decoder)]
    name, parts = "codec" if args.codec else "results", [part for part, so in beside if so]
    for n in count(1):
        path = where / ("_".join([name, *parts, *[str(n)] * (n > 1)]) + ".json")
        old = read_report(path)
        facts = ("data", args.data), ("decoder", args.decoder)
        if all(old.get(k, x) == x for k, x in facts):   # another root, or decoder, of the same name keeps its file
            return path


# ---- what numbers depend on ----

def flags_of(args):
    """{flag: value} of those of evaluate.py that numbers, or what numbers there are, may depend on."""
    idle = "ckpt", "predictions", "workers", "processes", "baseline", "overwrite", "json", "batch", "rows"
    return {k: v for k, v in vars(args).items() if k not in idle}


def weight_files(folder, stage):
    """The files of the weights of a stage in a checkpoint's folder, and no other in it, best/ or a decoder's."""
    parts = ["tokens.safetensors", "stem.safetensors", "model.safetensors", "vae/*", "unet/*"]
    parts += ["main_unet/*", "task_attention.safetensors"] if stage == 2 else []
    return [path for part in parts for path in sorted(Path(folder).glob(part)) if path.is_file()]


def weights_of(folder, stage):
    """Eight hexadecimal digits for them."""
    return digest([crc(path) for path in weight_files(folder, stage)])


def source_files():
    """The files of this project that numbers may depend on: what is imported, whole rooms of it, no scripts beside."""
    top, rooms = Path(__file__).parents[1], ("readers", "network", "inference", "training", "baselines", "toy")
    imported = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    ours = {p for p in imported if p.is_relative_to(top)}
    others = {p for p in ours if {"tests", "tools", "site-packages"} & {*p.relative_to(top).parts}}
    return [*ours - others | {path for room in rooms for path in top.joinpath(room).glob("*.py")}]


@cache
def scoring():
    """Eight hexadecimal digits for the code that turns maps and labels into metrics: numbers of other code do not
    compare."""
    top = Path(__file__).parents[1]
    files = [top / f"{name}.py" for name in ("tasks", "metrics", "data", "evaluate")] + [*top.glob("readers/*.py")]
    return digest([crc(path) for path in sorted(files)])


def result_dependencies(args, folder, size, weights):
    """Everything but its samples that the numbers of a test set depend on. weights: of the folder, as weights_of says
    it; to read them takes seconds."""
    files = [*folder.glob("model.json"), *source_files()]
    if args.decoder:
        files += Path(args.decoder).glob("*.*")     # none of a hub id
    versions = torch.__version__, version("diffusers"), precision(args.device)
    return [flags_of(args), size, versions, weights, [crc(path) for path in sorted(files)]]


def fingerprints(common, readers, train):
    """{test set: eight hexadecimal digits} of result_dependencies, its samples, and the training sets' of GUESSES."""
    about = [(r.name, r.split, len(r), r.size, r.version, r.identity()) for r in [*readers, *train]]
    behind = about[len(readers):]
    return {r.name: digest([common, own, behind]) for r, own in zip(readers, about, strict=False)}


# ---- what is not to be lost ----

def in_the_way(old, report, folder, named):
    """Whether a report is lost if another takes its file: one of other flags or test sets while its weights are still
    in `folder`, or, in a file that the user `named`, of another checkpoint. One that knows no weights counts as such.
    """
    planned = {*report["results"], *report["unfinished"]}
    other = old.get("flags") != report["flags"] or not planned.issuperset(old["results"])
    if named and old.get("checkpoint") != report["checkpoint"]:
        return other or old.get("weights") != report["weights"]
    return other and old.get("weights") in (None, weights_of(folder, old.get("stage")))


def write_report(path, report, folder, named=False):
    """Write it, after what is `in_the_way` has got another name: that of stage 1's results beside a stage 2's, or
    results.before.json."""
    path, old = Path(path), read_report(path)
    if old and in_the_way(old, report, folder, named):
        name = f"{path.stem}.before"
        if old.get("stage") == 1 and report["stage"] == 2 and not named:
            name = re.sub("^(results|codec)", r"\1_stage1", path.stem)
        print(f"notice: the results in {path} were of other settings or another checkpoint, and are in "
              f"{put_aside(path, name)} now", file=sys.stderr)
    write_json(path, report)


def put_aside(path, name):
    """Rename a file, all but its ending, to `name`, where that is taken to the same with a number. -> where it is."""
    for n in count(1):
        spare = path.with_name("_".join([name, *[str(n)] * (n > 1)]) + path.suffix)
        if not spare.exists():
            os.replace(path, spare)
            return spare
