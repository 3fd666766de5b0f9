"""What a GPU can tell about cost, all in one go: time and memory of prediction and training, and whether what makes
them cheap changes the numbers.

    python -m tools.gpu_report --json out.json                      Stable Diffusion 2's size, random weights: 8 minutes
    python -m tools.gpu_report --base toy --device cpu --size 32x48 --micro 4    the same, to try it

The most important rows come first; what the time does not suffice for is cut from the end and named. After each row,
--json holds all rows so far. A row that fails says why, and the others go on. fp32 is fp32: TF32 is off.

Prediction is of the first n tasks of one pair, beside a plain program of the same weights that does as the authors'
does: each task encodes its frames anew, and so does each auxiliary stream of each task (the text, which they also
encode anew, is not). Every call is repeated for 2 seconds or 20 times.

Checks, of which each must hold, or the exit code is 1 (TOLERANCES): latents in bf16 against fp32, compiled against
eager code of the same precision, and the losses of 60 steps of the toy preset against those of the CPU.

Where the tolerances come from: bf16 is 0.03 from fp32 on the toy base's shapes and 0.02 to 0.04 on Stable Diffusion's,
and two roundings to bf16 are as far from each other (H100, random weights), so 0.1. Generated code adds up in another
order, on a CPU within 1e-5 for one block, so 1e-4. Toy losses in fp32 change by 6e-8 with the micro-batches of a CPU,
in bf16 by 4e-4: 1e-4 and 0.01, far below what another precision, or another sample, would do.
"""
import argparse
import contextlib
import gc
import io
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# before torch, for Ctrl-C meanwhile
from cli import Parser, interruptible, markdown, parse_device, parse_size, run, whole, writable

# isort: split
import torch

import train
from checkpoint import read_lines, write_json
from model import StableMTL
from tasks import TASKS
from tools import bench, bench_memory

TOY_RUN = ("--stage 1 --preset toy --steps 60 --scenes 40 --processes 1 --val-samples 0 --picture-every 0 "
           "--save-every 1000")
LIMIT = 2.0     # seconds after which no row repeats its call, in the burn-in and when timed
TOLERANCES = {"bf16": 0.1, "compiled": 1e-4, "toy, fp32": 1e-4, "toy, bf16": 0.01}
GENERATING = {"agreement": 60, "prediction": 20, "training": 120}       # seconds to expect of a row that compiles


# ---- the plain program ----

@torch.no_grad()
def plain(model: StableMTL, image, next_image):
    """StableMTL.predict without any sharing: {task: (B,C,H,W)}; frames of a size that fits whole latent cells."""
    def encoded(task):
        z = model.encode(image)
        return z, model.encode(next_image) if TASKS[task].frames == 2 else z

    out = {}
    for main in model.tasks:
        streams = None
        if model.main is not None:
            streams = {}
            for task in model.tasks:
                if task != main:
                    for block, found in model.streams(*encoded(task), [task]).items():
                        streams.setdefault(block, {}).update(found)
        latents = model(*encoded(main), [main], streams=streams)
        out[main] = model.codecs[main].decode(model.decode_labels(latents)[main])
    return out


# ---- what is measured: each row is a call of one of these ----

class Shelf:
    """What several rows in turn have in common: one thing at a time, made when it is asked for."""

    def __init__(self):
        self.label, self.thing = None, None

    def get(self, label, make):
        """make(), or what it returned if that was the label before."""
        if label != self.label:
            self.clear()
            self.label, self.thing = label, make()
        return self.thing

    def clear(self):
        self.label = self.thing = None
        gc.collect()        # models are cycles: their taps refer to them
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def networks_of(args, shelf, multi, compiled, dtype):
    """bench.networks, of the same random weights each time; a precision has its own, for what was rounded stays so."""
    def make():
        torch.manual_seed(0)
        nets = bench.networks(args.base, args.device, main=multi)
        for net in nets if compiled else ():
            train.compile_blocks(net)
        return nets
    return shelf.get(("networks", multi, compiled, dtype), make)


@torch.no_grad()
def model_of(nets, tasks, dtype, multi, decoder=""):
    """bench.assemble, with task attention that does something, and that does the same in any precision."""
    torch.manual_seed(0)
    model = bench.assemble(nets, tasks, bench.DTYPES[dtype], multi, decoder)
    for layer in model.attention.values() if multi else ():
        weight = layer.to_out_task.weight
        weight.copy_(torch.randn(weight.shape, device=weight.device) * len(weight) ** -0.5)
    return model


def pair_of(args, dtype):
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 1, 3, *args.size, generator=generator) * 2 - 1
    return [f.to(args.device, bench.DTYPES[dtype]) for f in frames]


def prediction(args, shelf, tasks, multi, dtype, predict=StableMTL.predict, decoder="", compiled=False):
    """bench.measured of one way to predict."""
    nets = networks_of(args, shelf, multi, compiled, dtype)
    model = model_of(nets, tasks, dtype, multi, decoder)
    return bench.measured(partial(predict, model, *pair_of(args, dtype)), 1, args.device, limit=LIMIT)


def training(args, shelf, tasks, stage, source, switches):
    """bench.measured of train.py's steps in bf16, at the size of training."""
    args = argparse.Namespace(**vars(args) | {"size": args.train_size, "dtype": "bf16"} | switches)
    trainer = shelf.get(("trainer", stage, *switches.values()), partial(bench.make_trainer, args, tasks, stage))
    return bench.training_of(args, trainer, source, limit=LIMIT)


@torch.no_grad()
def latents_of(args, shelf, tasks, multi, dtype, compiled=False):
    """All latents, in float32, of the same weights each time."""
    nets = networks_of(args, shelf, multi, compiled, dtype)
    model = model_of(nets, tasks, dtype, multi)
    z = [model.encode(f) for f in pair_of(args, dtype)]
    return torch.cat([*model(*z, tasks).values()]).float()


class Agreement:
    """How far all latents are from those of eager code, relative to their size: of bf16 in fp32, else of eager code in
    the same precision, which is computed when it is first needed."""

    def __init__(self, args, shelf, tasks):
        self.latents, self.eager = partial(latents_of, args, shelf, tasks), {}

    def __call__(self, multi, dtype, compiled):
        against = multi, dtype if compiled else "fp32"
        if against not in self.eager:
            self.eager[against] = self.latents(*against)
        wanted, found = self.eager[against], self.latents(multi, dtype, compiled)
        return judged(difference=((found - wanted).norm() / wanted.norm()).item(),
                      at_most=TOLERANCES["compiled" if compiled and dtype == "fp32" else "bf16"])


def judged(difference, at_most):
    """What is not a number does not hold either."""
    return {"difference": difference, "at most": at_most, "holds": difference <= at_most}


class Toy:
    """How far the losses of a short run with the toy preset are from those of the CPU in fp32, relative, on average.
    One process also on the CPU: after CUDA has begun none may fork."""

    def __init__(self):
        self.reference = None

    def __call__(self, device, precision):
        if self.reference is None:
            self.reference = losses_of("cpu", "fp32")
        each = (losses_of(device, precision) / self.reference - 1).abs()
        verdict = judged(each.mean().item(), TOLERANCES[f"toy, {precision}"])
        return {"steps": len(each), "first step": each[0].item()} | verdict


def losses_of(device, precision):
    """Of TOY_RUN. FloatingPointError if one is not finite."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            if train.main([*TOY_RUN.split(), "--out", out, "--device", device, "--precision", precision]):
                raise KeyboardInterrupt     # it has ended its step first
        finally:
            torch.set_num_threads(threads)      # training on the CPU takes one
        losses = [entry["loss"] for entry in read_lines(Path(out) / "log.jsonl")]
    if None in losses:
        raise FloatingPointError(f"the loss of step {losses.index(None)} is not finite")
    return torch.tensor(losses)


# ---- all of them, in the time there is ----

class Row(NamedTuple):
    """A row to measure; facts: what the table calls it; generates: whether it waits for torch.compile."""
    section: str
    facts: dict
    measure: Callable
    generates: bool = False

    def __str__(self):
        return f"{self.section}: {', '.join(map(str, self.facts.values()))}"


def plan(args, tasks):
    """All rows, the most important first, for what the time does not suffice for is cut from the end."""
    shelf, toy = Shelf(), Toy()
    agreement, trials = Agreement(args, shelf, tasks), bench.trials(tasks)

    def compare(how, dtype, compiled):
        return [Row("agreement", {"stream": kind, "how": how}, partial(agreement, stage == 2, dtype, compiled),
                    compiled) for stage, kind, _ in reversed(trials)]       # both UNets first

    def predict(how, dtype, wanted=tuple(range(8)), **way):
        return [Row("prediction", {"stream": kind, "how": how, "tasks": n},
                    partial(prediction, args, shelf, tasks[:n], stage == 2, dtype, **way), "compiled" in way)
                for stage, kind, numbers in trials for n in numbers if n in wanted]

    def learn(how, **on):
        switches = {"channels_last": False, "compile": False} | on
        return [Row("training", {"training": f"stage {stage}, {source}", "how": how},
                    partial(training, args, shelf, tasks, stage, source, switches), "compile" in on)
                for stage, _, _ in trials for source in bench.SOURCES[stage]]

    most = len(tasks)
    few = {1, 2, most}
    return [*compare("bf16", "bf16", False),
            *(Row("toy", {"run": f"{args.device}, {precision}"}, partial(toy, str(args.device), precision))
              for precision in bench.DTYPES),
            *predict("bf16", "bf16"), *predict("bf16, plain", "bf16", predict=plain),
            *learn("as it is"), *learn("channels-last", channels_last=True),
            *predict("bf16, small decoder", "bf16", decoder="new"), *predict("fp32", "fp32", few),
            *predict("fp32, plain", "fp32", [most], predict=plain),
            # code is generated for every shape, which takes a minute for each number of tasks
            *compare("bf16, compiled", "bf16", True), *predict("bf16, compiled", "bf16", [most], compiled=True),
            *compare("fp32, compiled", "fp32", True), *predict("bf16, compiled", "bf16", few - {most}, compiled=True),
            *predict("fp32", "fp32", set(range(8)) - few), *learn("compiled", compile=True),
            *learn("channels-last, compiled", channels_last=True, compile=True)], shelf


def attempt(row, shelf):
    """What a row's call returns, or {"failed": why} in words; what rows have in common is then made anew."""
    if row.generates:
        torch.compiler.reset()      # else all rows share one limit of shapes, beyond which nothing is compiled
    try:
        with interruptible():
            return row.measure()
    except torch.OutOfMemoryError:
        failed = "out of memory"
    except Exception as error:      # whatever it is: the rows before are told, and those after may well work
        traceback.print_exc()
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    shelf.clear()       # not above: there the error still holds what filled the memory
    return {"failed": failed}


def gather(args, tasks):
    """{section: rows}, and under "left out" the names of those that the time does not suffice for.

    A row begins only if the longest of its kind so far would be over in time.
    """
    torch.backends.cudnn.allow_tf32 = False     # else convolutions in fp32 are not: 10 bits instead of 23
    torch.set_float32_matmul_precision("highest")
    start, longest = time.monotonic(), {}
    rows, shelf = plan(args, tasks)
    result = {"device": bench.hardware(args.device), "torch": torch.__version__, "base": args.base,
              "size": list(args.size), "train size": list(args.train_size), "micro": args.micro, "left out": [],
              "agreement": [], "toy": [], "prediction": [], "training": []}
    for row in rows:
        begun, kind = time.monotonic(), (row.section, row.generates)
        expected = longest.setdefault(kind, GENERATING[row.section] if row.generates else 0)
        if begun + expected >= start + 60 * args.minutes:
            result["left out"].append(str(row))
            continue
        found = attempt(row, shelf)
        longest[kind] = max(expected, time.monotonic() - begun)
        result[row.section].append(row.facts | found)
        print(f"{time.monotonic() - start:.0f} s; {row}", *(f"{k} {shown(v)}" for k, v in found.items()), sep="; ",
              file=sys.stderr)
        if args.json:
            write_json(args.json, result)
    if args.json:
        write_json(args.json, result)       # with what was left out
    return result


# ---- the table ----

def shown(v, digits=3):
    """A value of a row as text."""
    if v is None or isinstance(v, bool):
        return {None: "", True: "yes", False: "**no**"}[v]
    return f"{v:.{digits}g}" if isinstance(v, float) else str(v)


def number(row, key, factor=1.0):
    """The same of one value of a row, or that it failed."""
    if "failed" in row:
        return "out of memory" if row["failed"] == "out of memory" else "failed"
    return shown(row[key] and factor * row[key])


def by_number_of_tasks(rows):
    """Rows of prediction -> (rows of a table with a column per number of tasks, these numbers as text)."""
    out, numbers = {}, [str(n) for n in sorted({row["tasks"] for row in rows})]
    for row in rows:
        for unit, key, factor in (("ms", "seconds", 1e3), ("GB", "gigabytes", 1.0)):
            facts = {"stream": row["stream"], "how": row["how"], "tasks:": unit}
            out.setdefault(tuple(facts.values()), facts)[str(row["tasks"])] = number(row, key, factor)
    return [entry for entry in out.values() if any(entry.get(n) for n in numbers)], numbers


def table(result):
    """The result as markdown for docs/cost.md; a section without rows is left out."""
    height, width = result["size"]
    lines = [f"{result['device']}, torch {result['torch']}, {result['base']}: prediction of a pair of {height}x{width}"]
    if result["prediction"]:
        rows, numbers = by_number_of_tasks(result["prediction"])
        lines += ["", *markdown(rows, ["stream", "how", "tasks:", *numbers])]
    if result["training"]:
        rows = [{"training": r["training"], "how": r["how"], "images per s": number(r, "images_per_s"),
                 "GB": number(r, "gigabytes"), "hours": number(r, "hours"), "first step, s": number(r, "first")}
                for r in result["training"]]
        lines += ["", f"Training at {'x'.join(map(str, result['train size']))} in bf16, --micro {result['micro']}; "
                      f"hours: of the paper's steps; reading and decoding files is not in it. {bench.ONE_FRAME}.",
                  "", *markdown(rows, [*rows[0]])]
    for section, also in (("agreement", []), ("toy", ["steps", "first step"])):
        rows = [{k: shown(v) for k, v in r.items()} | {"difference": number(r, "difference")} for r in result[section]]
        if rows:
            lines += ["", *markdown(rows, ["stream", "how", "run", *also, "difference", "at most", "holds"])]
    failed = [f"- {', '.join(map(str, r.values()))}" for rows in sections(result) for r in rows if "failed" in r]
    lines += ["", "Failed:", "", *failed] if failed else []
    if result["left out"]:
        lines += ["", f"The time did not suffice for {'; '.join(result['left out'])}."]
    return "\n".join(lines)


def sections(result):
    return [result[name] for name in ("agreement", "toy", "prediction", "training")]


def complaint(result):
    """A sentence on the checks that do not hold, or that failed; "" if there are none."""
    wrong = []
    for r in result["agreement"] + result["toy"]:
        name = ", ".join(r[k] for k in ("stream", "how", "run") if k in r)
        if "failed" in r:
            wrong.append(f"{name}: {r['failed']}")
        elif not r["holds"]:
            wrong.append(f"{name}: {shown(r['difference'])} apart, at most {r['at most']:g} is expected")
    return f"not every check holds: {'; '.join(wrong)}" if wrong else ""


def parse(argv):
    """The command line. ValueError or OSError names what is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", default="sd2", help="sd2, toy, or a diffusers folder: whose shapes (default: sd2)")
    papers = "{}x{}".format(*bench_memory.SIZE)
    parser.add_argument("--size", help="images of HEIGHTxWIDTH (default: 256x256)")
    parser.add_argument("--train-size", metavar="SIZE", help="those of training (default: as --size, and without it "
                        f"{papers}, the paper's)")
    parser.add_argument("--tasks", type=whole(1, len(TASKS)), default=len(TASKS), metavar="N",
                        help="1..N tasks are tried (default: %(default)s)")
    parser.add_argument("--micro", type=whole(1), default=16, help="images per training pass (default: %(default)s)")
    parser.add_argument("--minutes", type=whole(0), default=8,
                        help="begin nothing that would not be over by then (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: a GPU where there is one)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    args.device, given = parse_device(args.device), args.size
    args.size = parse_size(given or "256x256")
    args.train_size = parse_size(args.train_size or given or papers, "--train-size")
    return args


def main(argv=None):
    args = parse(argv)
    result = gather(args, tuple(TASKS)[:args.tasks])
    print(table(result))
    if wrong := complaint(result):
        print(f"gpu_report: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
