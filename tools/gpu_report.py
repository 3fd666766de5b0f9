"""What a GPU can tell about cost, all in one go: time and memory of prediction and training, and whether what makes
them cheap changes the numbers.

    python -m tools.gpu_report --json out.json                      Stable Diffusion 2's size, random weights: 8 minutes
    python -m tools.gpu_report --base toy --device cpu --size 32x48 --micro 4 --minutes 2       the same, to try it

After each row, --json holds all rows so far; when the time is over, what is left is named. Prediction is of the first n
tasks of one pair, beside a plain program of the same weights that does as the authors' does: each task encodes its
frames anew, and so does each auxiliary stream of each task (the text, which they also encode anew, is not).
"""
import argparse
import contextlib
import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from cli import Parser, markdown, parse_device, parse_size, run, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import torch

import train
from checkpoint import read_lines, write_json
from model import StableMTL
from tasks import TASKS
from tools import bench

TOY_RUN = "--stage 1 --preset toy --steps 60 --scenes 40 --val-samples 0 --picture-every 0 --save-every 1000"
SPEEDS = [("as it is", {}), ("channels-last", {"channels_last": True}),
          ("channels-last, compiled", {"channels_last": True, "compile": True})]


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
        out[main] = model.codecs[main].decode(model.codes(latents)[main])
    return out


# ---- what is measured: each section yields its rows ----

def attempt(f, *args, **options):
    """f(...), or what the GPU has too little memory for."""
    try:
        return f(*args, **options)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"failed": "out of memory"}


def prediction_of(args, predict, nets, tasks, dtype, multi, decoder):
    """bench.measured of one way to predict."""
    model = model_of(nets, tasks, dtype, multi, decoder)
    return bench.measured(partial(predict, model, *pair_of(args, dtype)), 1, args.device)


def model_of(nets, tasks, dtype, multi, decoder=""):
    """bench.assemble, with task attention that does something."""
    model = bench.assemble(nets, tasks, bench.DTYPES[dtype], multi, decoder)
    for layer in model.attention.values() if multi else ():
        torch.nn.init.normal_(layer.to_out_task.weight, std=layer.to_out_task.in_features ** -0.5)
    return model


def pair_of(args, dtype):
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 1, 3, *args.size, generator=generator) * 2 - 1
    return [f.to(args.device, bench.DTYPES[dtype]) for f in frames]


def prediction(args, tasks):
    """Rows of time and memory: which stream, how, how many tasks."""
    for stage, kind, numbers in bench.trials(tasks):
        nets, multi = attempt(bench.networks, args.base, args.device, main=stage == 2), stage == 2
        if "failed" in nets:
            yield {"stream": kind, "how": "any", "tasks": len(tasks)} | nets
            continue
        ways = [("bf16", "bf16", StableMTL.predict, "", numbers), ("bf16, plain", "bf16", plain, "", numbers),
                ("bf16, small decoder", "bf16", StableMTL.predict, "new", numbers),
                ("fp32", "fp32", StableMTL.predict, "", numbers), ("fp32, plain", "fp32", plain, "", numbers[-1:]),
                ("bf16, compiled", "bf16", StableMTL.predict, "", numbers[-1:])]
        for how, dtype, predict, decoder, counts in ways:
            for net in nets if how.endswith("compiled") else ():
                train.compile_blocks(net)
            for n in counts:
                row = attempt(prediction_of, args, predict, nets, tasks[:n], dtype, multi, decoder)
                yield {"stream": kind, "how": how, "tasks": n} | row


@torch.no_grad()
def latents_of(args, tasks, multi, how, dtype):
    """{"latents": those of all tasks, in float32}, of the same weights each time."""
    torch.manual_seed(0)
    model = model_of(bench.networks(args.base, args.device, main=multi), tasks, dtype, multi)
    if "compiled" in how:
        train.compile_blocks(model)
    z = [model.encode(f) for f in pair_of(args, dtype)]
    return {"latents": torch.cat([*model(*z, tasks).values()]).float()}


def agreement(args, tasks):
    """Rows of how far all latents are from the eager ones in float32, relative to their size."""
    for stage, kind, _ in bench.trials(tasks):
        reference = None
        for how, dtype in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32, compiled", "fp32"), ("bf16, compiled", "bf16")):
            found = attempt(latents_of, args, tasks, stage == 2, how, dtype)
            reference = reference or found
            if failed := [x for x in (found, reference) if "failed" in x]:      # nothing, or nothing to compare with
                yield {"stream": kind, "how": how} | failed[0]
                continue
            apart = (found["latents"] - reference["latents"]).norm() / reference["latents"].norm()
            yield {"stream": kind, "how": how, "difference": apart.item()}


def training(args, tasks):
    """Rows of train.py's steps in bf16: which stage, from images or cached latents, how."""
    for stage, _, _ in bench.trials(tasks):
        for how, switches in SPEEDS:
            chosen = argparse.Namespace(**vars(args) | {"channels_last": False, "compile": False} | switches)
            rows = attempt(bench.training_of, chosen, tasks, stage, repeats=5)
            if "failed" in rows:
                rows = {f"stage {stage}": rows}
            for what, row in rows.items():
                yield {"training": what, "how": how} | row


def toy(args, tasks):
    """Rows of how far the losses of a short run with the toy preset are from those of the CPU in fp32, relative."""
    reference = None
    for device, precision in (("cpu", "fp32"), (str(args.device), "fp32"), (str(args.device), "bf16")):
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            train.main([*TOY_RUN.split(), "--out", out, "--device", device, "--precision", precision])
            losses = torch.tensor([e["loss"] for e in read_lines(Path(out) / "log.jsonl")])
        reference = losses if reference is None else reference
        each = (losses / reference - 1).abs()
        yield {"run": f"{device}, {precision}", "steps": len(losses), "first step": each[0].item(),
               "mean of all": each.mean().item(), "mean loss": losses.mean().item()}


SECTIONS = {"agreement": agreement, "prediction": prediction, "training": training, "toy": toy}


def gather(args, tasks):
    """{section: rows}, and what the time did not suffice for, under "left out"."""
    end = time.monotonic() + 60 * args.minutes
    result = {"device": bench.hardware(args.device), "torch": torch.__version__, "base": args.base,
              "size": list(args.size), "micro": args.micro, "left out": []}
    for name, section in SECTIONS.items():
        result[name] = []
        for row in section(args, tasks) if time.monotonic() < end else ():
            result[name].append(row)
            print(name, *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), sep="; ",
                  file=sys.stderr)
            if args.json:
                write_json(args.json, result)
            if time.monotonic() >= end:
                break
        if time.monotonic() >= end:
            result["left out"].append(name)
    if args.json:
        write_json(args.json, result)       # with what was left out
    return result


# ---- the table ----

def number(row, key, factor=1, digits=3):
    """A value of a row as text."""
    return row["failed"] if "failed" in row else f"{factor * row[key]:.{digits}g}" if row.get(key) is not None else ""


def table(result):
    """The result as markdown for docs/cost.md."""
    height, width = result["size"]
    lines = [f"{result['device']}, torch {result['torch']}, {result['base']}, images of {height}x{width}"]
    if result["left out"]:
        lines.append(f"The time did not suffice for all of: {', '.join(result['left out'])}.")
    numbers = sorted({row["tasks"] for row in result["prediction"]})
    rows = {}
    for row in result["prediction"]:
        for unit, key, factor in (("ms", "seconds", 1e3), ("GB", "gigabytes", 1)):
            entry = rows.setdefault((row["stream"], row["how"], unit),
                                    {"stream": row["stream"], "how": row["how"], "tasks:": unit})
            entry[str(row["tasks"])] = number(row, key, factor)
    shown = [entry for entry in rows.values() if any(entry.get(str(n)) for n in numbers)]
    lines += ["", *markdown(shown, ["stream", "how", "tasks:", *map(str, numbers)])]
    lines += ["", *markdown([{"training": r["training"], "how": r["how"], "images per s": number(r, "images_per_s"),
                              "GB": number(r, "gigabytes"), "hours": number(r, "hours")} for r in result["training"]],
                            ["training", "how", "images per s", "GB", "hours"])]
    lines += ["", *markdown([{"stream": r["stream"], "how": r["how"], "from eager fp32": number(r, "difference")}
                             for r in result["agreement"]], ["stream", "how", "from eager fp32"])]
    lines += ["", *markdown([{k: v if isinstance(v, str) else f"{v:.3g}" for k, v in r.items()} for r in result["toy"]],
                            ["run", "steps", "first step", "mean of all", "mean loss"])]
    return "\n".join(lines)


def parse(argv):
    """The command line. ValueError or OSError names what is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", default="sd2", help="sd2, toy, or a diffusers folder: whose shapes (default: sd2)")
    parser.add_argument("--size", default="256x256", help="images of HEIGHTxWIDTH (default: %(default)s)")
    parser.add_argument("--tasks", type=whole(1, len(TASKS)), default=len(TASKS), metavar="N",
                        help="1..N tasks are tried (default: %(default)s)")
    parser.add_argument("--micro", type=whole(1), default=16, help="images per training pass (default: %(default)s)")
    parser.add_argument("--minutes", type=whole(0), default=8,
                        help="start nothing after so many (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: a GPU where there is one)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    args.device, args.size, args.dtype = parse_device(args.device), parse_size(args.size), "bf16"
    return args


def main(argv=None):
    args = parse(argv)
    print(table(gather(args, tuple(TASKS)[:args.tasks])))


if __name__ == "__main__":
    sys.exit(run(main))
