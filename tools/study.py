"""Which part of StableMTL helps? The comparison of the paper's Tables 2, 4 and 10 and its Figure 5 on the toy worlds.

    python study.py --out study/                                the toy preset's steps, three seeds; the same command continues it
    python study.py --out study/ --seeds 5 -- --threads 1       what follows -- goes to train.py for every model
    nohup python study.py --out study/ > study.log 2>&1 &       in the background

VARIANTS below says what is compared; a new row there is all that a further comparison needs. Models are trained by train.py, measured by
evaluate.py. Optimizer steps are equal: every single stream takes --steps; every multi stream starts from the single stream of its seed and
takes --steps2 more, and `continued` takes the same number of further steps, on the same batches, as a single stream. A single-task model
takes --steps divided by the number of tasks: as many steps of its task as the single stream takes of it, so that all of them together cost
one single stream (the paper trains each for its own full schedule: --single-steps).

Delta_m is against the single-task models of the same seed: on `real`, the world that training never sees (paper Table 2), and on held-out
scenes of the training worlds (Table 10). Differences between variants are paired by seed.

Writes --out: study.md with tables, verdicts and pictures, results.json with all numbers, seed<N>/<variant>/ with every checkpoint.
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch

import evaluate
import train
from checkpoint import read_json, write_json
from cli import Parser, parse_device, run, whole
from data import TOY_TEST, TOY_TRAIN, tensor_image, test_readers
from draw import COLOURS, Chart, attention_table, draw_attention, grid
from evaluate import METRICS, by_task, delta_m, markdown
from model import StableMTL
from tasks import TASKS, parse_tasks
from tools.bench import hardware, step_operations

# ---- what is compared ----

class Variant(NamedTuple):
    title: str
    flags: str           # of train.py; with {task}: one model per task
    parent: str = ""     # the variant whose single stream it starts from


VARIANTS = {
    "single-task": Variant("single-task models", "--stage 1 --tasks {task}"),
    "single": Variant("single stream", "--stage 1"),
    "no-isolation": Variant("single stream w/o task-gradient isolation", "--stage 1 --no-isolation"),
    "continued": Variant("single stream, continued", "--stage 1 --init {parent}", "single"),
    "multi": Variant("multi stream, rho 0.4", "--stage 2 --rho 0.4", "single"),
    # the paper's Table 4 takes parts away from the multi stream without masking: its differences are to that row
    "rho-0": Variant("multi stream, rho 0", "--stage 2 --rho 0", "single"),
    "shared-qkv": Variant("multi stream, rho 0, w/o separate projections", "--stage 2 --rho 0 --shared-qkv", "single"),
    "base-init": Variant("multi stream, rho 0, w/o single-stream init", "--stage 2 --rho 0 --main-init base", "single"),
}

# (claim, what should have the higher Delta_m, than what, the paper's difference on unseen data)
CLAIMS = [
    ("the multi stream beats the single-task models", "multi", "single-task", 4.78),
    ("the multi stream beats the single stream", "multi", "single", 4.78 + 1.57),
    ("the multi stream beats the single stream trained for as many steps", "multi", "continued", None),
    ("the single stream stays behind the single-task models", "single-task", "single", 1.57),
    ("task-gradient isolation helps", "single", "no-isolation", -1.57 + 4.11),
    ("attention-guided masking helps", "multi", "rho-0", 4.78 - 3.41),
    ("separate projections help", "rho-0", "shared-qkv", 3.41 - 0.85),
    ("single-stream initialisation helps", "rho-0", "base-init", 3.41 + 3.11),
]

WORLDS = {"unseen": tuple(w for w in TOY_TEST if w not in TOY_TRAIN), "in-domain": TOY_TRAIN}
LOWER = {t: METRICS[TASKS[t].metric][2] for t in TASKS}


# ---- the runs ----

class Run(NamedTuple):
    seed: int
    variant: str
    task: str            # of a single-task model, else empty
    steps: int
    out: Path
    parent: Path | None

    @property
    def finished(self):
        return (self.out / "results.json").is_file()

    @property
    def ready(self):
        return self.parent is None or (self.parent / "results.json").is_file()


def runs(args):
    """Every model to train, parents before children."""
    for seed in range(args.seeds):
        for name in args.only:
            v, place = VARIANTS[name], Path(args.out) / f"seed{seed}"
            for task in args.tasks if "{task}" in v.flags else [""]:
                steps = args.single_steps if task else args.steps2 if v.parent else args.steps
                yield Run(seed, name, task, steps, place / (f"{name}-{task}" if task else name), place / v.parent if v.parent else None)


def perform(job, args):
    """Train and evaluate one model, or what is left of that; KeyboardInterrupt after Ctrl-C, with a checkpoint to continue from."""
    flags, argv = VARIANTS[job.variant].flags, ["--resume", "--out", str(job.out)]
    if not (job.out / "state").is_dir():        # train.py has not written its first checkpoint
        shutil.rmtree(job.out, ignore_errors=True)
        job.out.mkdir(parents=True)
        if "--stage 2" in flags:
            StableMTL.load(job.parent, stage=1).save(job.out)
            shutil.copy(job.parent / "config.json", job.out)
        # train.py draws the batches from seed + 1000 x stage: a single stream that is continued gets those of stage 2
        seed = job.seed + 1000 * ("--init" in flags)
        argv = [*args.train, "--tasks", ",".join(args.tasks), "--out", str(job.out), "--steps", str(job.steps), "--seed", str(seed),
                *flags.format(task=job.task, parent=job.parent).split()]
        if job.task:        # the same share of its steps
            argv += ["--warmup", str(round(args.settings["warmup"] * job.steps / args.steps))]
    with (job.out / "output.txt").open("a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        results = job.out / "evaluation.json"
        device = str(parse_device(args.settings["device"]))
        if train.main(argv) or evaluate.main(["--ckpt", str(job.out), "--trivial", "0", "--limit", str(args.limit), "--device", device,
                                              "--json", str(results)]):
            raise KeyboardInterrupt     # both have caught it, and saved what they had
    os.replace(results, job.out / "results.json")       # under this name it is complete
    for state in ("state", "state.prev"):       # most of the disk, and what is finished does not resume
        shutil.rmtree(job.out / state, ignore_errors=True)
    gc.collect()        # a model is a cycle: its taps refer to it


def keep(args):
    """Write the study's settings to study.json, or refuse (ValueError) if they differ from those already there. New rows and seeds do not."""
    path = Path(args.out) / "study.json"
    now = {k: getattr(args, k) for k in ("steps", "steps2", "single_steps", "limit")} | {"tasks": ",".join(args.tasks)} | args.settings
    now |= {f"variant {name}": " ".join(VARIANTS[name]) for name in args.only}
    old = read_json(path, "") if path.is_file() else {}
    differs = [f"{k} {old[k]}, now {now[k]}" for k in now if k in old and old[k] != now[k]]
    if differs:
        raise ValueError(f"{args.out} holds a study with other settings ({'; '.join(differs)}): name another --out, or delete that folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, old | now)


# ---- what came out ----

def collect(args):
    """{variant: {seed: {"results": {task: {world: headline}}, "steps", "minutes" of training}}} of all that is finished."""
    out = {}
    for job in runs(args):
        if job.finished:
            row = out.setdefault(job.variant, {}).setdefault(job.seed, {"results": {}, "steps": 0, "minutes": 0.0})
            row["results"] |= by_task(read_json(job.out / "results.json", "")["results"])
            row["steps"] += job.steps
            row["minutes"] += job.steps * args.settings["batch"] / log(job.out)[-1]["img_per_s"] / 60
    complete = {name: {s: row for s, row in seeds.items() if row["results"].keys() == set(args.tasks)} for name, seeds in out.items()}
    return {name: seeds for name, seeds in complete.items() if seeds}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def gain(results, baseline, worlds):
    """Delta_m in percent of {task: {world: headline}}, on some of the worlds."""
    pick = lambda table: {t: {w: x for w, x in row.items() if w in worlds} for t, row in table.items()}
    return delta_m(pick(results), pick(baseline), LOWER)


def operations(folder, batch):
    """Counted operations of one optimizer step of this checkpoint's last stage, from cached latents."""
    model, (height, width) = StableMTL.load(folder).to("meta"), read_json(folder / "config.json", "")["size"]
    z = torch.empty(1, 4, height // model.factor, width // model.factor, device="meta")
    return batch * step_operations(model, z, model.tasks[-1])


# Student's t for 95% confidence, two-sided, of 2, 3, ... seeds; more than ten count as ten
T95 = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26


def verdict(differences):
    """Of paired differences, one per seed: "reproduced" if the 95% confidence interval of their mean lies above 0, "not reproduced" if it
    lies below, else "undecided", as with a single seed. (Two standard errors would be wrong for 3 seeds in 18% of cases without any effect.)"""
    n = len(differences)
    if n < 2:
        return "undecided"
    mean, error = fmean(differences), stdev(differences) / n ** 0.5
    return "undecided" if abs(mean) <= T95[min(n, 10) - 2] * error else "reproduced" if mean > 0 else "not reproduced"


def summary(args):
    """All numbers of the study so far, as written to results.json."""
    seen, rows, counted, cost, claims = collect(args), {}, {}, {}, []
    for name, seeds in seen.items():
        folder = next(job.out for job in runs(args) if job.variant == name and job.finished)
        kind = str(read_json(folder / "model.json", "")["multi"])       # all that a step's operations depend on
        step = counted[kind] = counted.get(kind) or operations(folder, args.settings["batch"])
        cost[name] = step * next(iter(seeds.values()))["steps"]
        for seed, row in seeds.items():
            baseline = seen.get("single-task", {}).get(seed)
            row["delta_m"] = {where: gain(row["results"], baseline["results"], worlds) for where, worlds in WORLDS.items()} if baseline else {}
        total = cost[name] + cost.get(VARIANTS[name].parent, 0)
        rows[name] = {**VARIANTS[name]._asdict(), "operations per step": step, "operations": total, "seeds": seeds}
    for claim, better, worse, paper in CLAIMS:
        for where in WORLDS if better in rows and worse in rows else ():
            a, b = ({seed: row["delta_m"][where] for seed, row in rows[name]["seeds"].items() if row["delta_m"]} for name in (better, worse))
            if differences := [a[seed] - b[seed] for seed in a if seed in b]:
                claims.append({"claim": claim, "where": where, "better": better, "worse": worse, "differences": differences,
                               "verdict": verdict(differences), "paper": paper if where == "unseen" else None})
    about = {k: getattr(args, k) for k in ("tasks", "steps", "steps2", "single_steps", "limit", "settings")}
    device = hardware(parse_device(args.settings["device"]))
    return about | {"hardware": device, "torch": torch.__version__, "commit": train.commit(), "variants": rows, "claims": claims}


# ---- how it is told ----

def spread(values, form=".4g"):
    """Mean and, of several, standard deviation, as text."""
    values = list(values)
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "") if values else ""


TITLES = {"unseen": "The unseen world (paper Tables 2 and 4)", "in-domain": "Held-out scenes of the training worlds (paper Table 10)"}


def tables(result):
    """study.md as lines."""
    variants, settings, columns = result["variants"].values(), result["settings"], {}
    base = result["variants"].get("single", {"operations": float("nan")})["operations"]
    lines = [f"{len(result['tasks'])} tasks, {settings['batch']} images of {settings['size']} per step. Steps: {result['steps']} of a single stream, "
             f"{result['steps2']} more of a multi stream or a continued single stream, {result['single_steps']} of each single-task model. "
             f"{result['limit']} test scenes per world. Mean ± standard deviation over seeds. {result['hardware']}, torch {result['torch']}."]
    for where, worlds in WORLDS.items():
        rows = []
        for v in variants:
            seeds = v["seeds"].values()
            gains = spread((s["delta_m"][where] for s in seeds if s["delta_m"]), "+.2f")
            rows.append({"variant": v["title"], "Delta_m % ↑": gains, "seeds": str(len(seeds))})
            for t, row in next(iter(seeds))["results"].items():
                for w in (w for w in worlds if w in row):
                    name = f"{w} {t} {METRICS[TASKS[t].metric][1]} {'↓' if LOWER[t] else '↑'}"
                    rows[-1][name] = spread(s["results"][t][w] for s in seeds)
        columns = ["variant", "Delta_m % ↑", *(c for c in rows[0] if c not in ("variant", "Delta_m % ↑", "seeds")), "seeds"]
        lines += ["", f"## {TITLES[where]}", "", *markdown(rows, columns)]
    lines += ["", "## Cost", "", "Operations are counted, from cached latents, 1 multiply-add = 2. In all: relative to the single stream, with the "
              "single stream that a variant starts from; the single-task models together.", ""]
    rows = [{"variant": v["title"], "flags of train.py": f"`{v['flags']}`", "G per step": f"{v['operations per step'] / 1e9:.3g}",
             "in all": f"{v['operations'] / base:.2f}x", "minutes of training": spread((s["minutes"] for s in v["seeds"].values()), ".3g")}
            for v in variants]
    lines += markdown(rows, ("variant", "flags of train.py", "G per step", "in all", "minutes of training"))
    lines += ["", "## The paper's claims", "", "Differences of Delta_m, paired by seed. Reproduced: the 95% confidence interval of their mean "
              "(Student's t) lies above 0; not reproduced: below 0; else undecided.", ""]
    rows = [{"claim": c["claim"], "on": c["where"], "difference": spread(c["differences"], "+.2f"), "verdict": c["verdict"],
             "in the paper": "" if c["paper"] is None else f"{c['paper']:+.2f}"} for c in result["claims"]]
    return lines + (markdown(rows, ("claim", "on", "difference", "in the paper", "verdict")) if rows else ["none can be judged yet"])


# ---- pictures ----

def smooth(values):
    """[(step, running mean over a twentieth of all steps)]"""
    n = max(1, len(values) // 20)
    return [(i, fmean(values[i - n:i])) for i in range(n, len(values) + 1)]


def draw_losses(args):
    """Training loss, a curve per seed: for each task single-task model against single stream, over the steps of that task; for all tasks
    together with and without isolation (a mixed step has no loss of one task)."""
    logs, charts = {}, []
    for job in (j for j in runs(args) if j.finished and j.variant in ("single-task", "single", "no-isolation")):
        logs.setdefault(f"{job.variant} {job.task}".strip(), []).append(log(job.out))
    of = lambda name, task=None: [smooth([e["loss"] for e in entries if task is None or e["task"] == [task]]) for entries in logs.get(name, [])]
    panels = {t: {"single-task model": of(f"single-task {t}"), "single stream": of("single", t)} for t in args.tasks}
    panels["all tasks"] = {"w/o isolation": of("no-isolation"), "single stream": of("single")}
    for title, curves in panels.items():
        xs, ys = zip((0, 0), *(point for each in curves.values() for curve in each for point in curve))
        charts.append(Chart(f"loss, {title}", (0, max(xs)), (0, max(ys)), "steps of this task" if title in args.tasks else "steps"))
        for each, colour in zip(curves.values(), COLOURS[1::-1]):
            for curve in each:
                charts[-1].curve(curve, colour, 2)
        charts[-1].legend(zip(curves, COLOURS[1::-1]), "right")
    return grid(charts, 4)


def draw_gains(result):
    """Delta_m of every variant on both kinds of test scenes: mean and standard deviation over seeds, and each seed as a small dot."""
    charts, rows = [], list(result["variants"].values())[::-1]
    for where, colour in zip(WORLDS, COLOURS):
        values = {i: [s["delta_m"][where] for s in v["seeds"].values() if s["delta_m"]] for i, v in enumerate(rows)}
        means = {i: (fmean(each), stdev(each) if len(each) > 1 else 0.0) for i, each in values.items() if each}
        ends = [0.0, *(mean + sign * error for mean, error in means.values() for sign in (-1, 1))]
        margin = 0.1 * (max(ends) - min(ends)) + 0.1
        chart = Chart(f"Delta_m %, {where}", (min(ends) - margin, max(ends) + margin), (-0.5, len(rows) - 0.5),
                      "against the single-task models of the same seed", yticks={i: v["title"] for i, v in enumerate(rows)},
                      size=(800, 110 + 34 * len(rows)), left=360)
        chart.curve([(0, -0.5), (0, len(rows) - 0.5)], (150, 150, 150), 1)
        for i, (mean, error) in means.items():
            chart.curve([(mean - error, i), (mean + error, i)], colour)
            chart.dots([(mean, i)], colour, 6)
            chart.dots([(x, i) for x in values[i]], "black", 2)
        charts.append(chart)
    return grid(charts, 1)


def draw_isolation(args, result):
    """The paper's Fig. 5b: a task's mean gradient norm in the single stream against what it gains from isolation on the unseen world."""
    seeds, norms, points = [result["variants"].get(name, {"seeds": {}})["seeds"] for name in ("single", "no-isolation")], {}, {}
    for e in (e for job in runs(args) if job.finished and job.variant == "single" for e in log(job.out)):
        norms.setdefault(e["task"][0], []).append(e["grad_norm"])
    for t in args.tasks:
        with_, without = ({s: {t: row["results"][t]} for s, row in rows.items()} for rows in seeds)
        gains = [gain(with_[s], without[s], WORLDS["unseen"]) for s in with_ if s in without]
        points |= {t: (fmean(norms[t]), fmean(gains))} if gains else {}
    if not points:
        return None
    xs, ys = zip((0, 0), *points.values())
    margin = 0.15 * (max(ys) - min(ys)) + 0.01
    chart = Chart("gain from isolation %, unseen world", (0, 1.3 * max(xs)), (min(ys) - margin, max(ys) + margin), "mean gradient norm of the task",
                  size=(560, 400))
    chart.curve([(0, 0), (1.3 * max(xs), 0)], (150, 150, 150), 1)
    chart.dots(points.values(), COLOURS[0], 5)
    for t, point in points.items():
        chart.text(point, t, "black", "lm", (9, 0))
    return chart.image


def draw_attended(args, scenes=16):
    """{variant: image} of the multi streams, the paper's Fig. 9: which stream each task attends to, per block, averaged over scenes of the
    unseen world and over seeds."""
    *_, world = test_readers(size=train.parse_size(args.settings["size"]))
    samples, weights = [world.load(i, (), with_next=True) for i in range(min(scenes, args.limit))], {}
    frames = [torch.stack([tensor_image(s[key]) for s in samples]) for key in ("image", "next")]
    for job in (j for j in runs(args) if j.finished and "--stage 2" in VARIANTS[j.variant].flags):
        model = StableMTL.load(job.out)
        model.attention_log = []
        model.predict(*frames)
        for block, main, row in model.attention_log:
            weights.setdefault(job.variant, {}).setdefault((block, main), []).append(row)
    mean = {name: [(*key, {t: fmean(row[t] for row in rows) for t in rows[0]}) for key, rows in each.items()] for name, each in weights.items()}
    return {name: draw_attention(attention_table(entries, args.tasks)) for name, entries in mean.items()}


def report(args):
    """Write results.json, study.md and the pictures of what is finished, and return study.md's lines."""
    out, result = Path(args.out), summary(args)
    pictures = {"losses.png": draw_losses(args), "delta_m.png": draw_gains(result), "isolation.png": draw_isolation(args, result)}
    pictures |= {f"attention_{name}.png": picture for name, picture in draw_attended(args).items()}
    pictures = {name: picture for name, picture in pictures.items() if picture}
    for name, picture in pictures.items():
        picture.save(out / name)
    lines = tables(result)
    write_json(out / "results.json", result)
    (out / "study.md").write_text("\n".join([*lines, "", *(f"![{name}]({name})\n" for name in pictures)]))
    return lines


# ---- the command ----

# flags of train.py that the study sets or cannot use, and settings that may differ from call to call
OURS = {"--stage", "--out", "--steps", "--seed", "--tasks", "--init", "--resume", "--overwrite", "--data"}
FREE = {"stage", "out", "steps", "seed", "tasks", "cache", "resume", "overwrite", "threads", "workers", "save_every", "picture_every",
        "val_samples"}


def parse(argv):
    """The command line, with `train` (flags for train.py) and `settings` (what these come to). ValueError names what is wrong."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="study", help="folder of the study (default: %(default)s)")
    parser.add_argument("--seeds", type=whole(1), default=3, help="how many; more can be added later (default: %(default)s)")
    parser.add_argument("--only", default=",".join(VARIANTS), help="comma-separated variants; others can be added later (default: %(default)s)")
    parser.add_argument("--tasks", default="all", help="comma-separated task names, at least two (default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), help="optimizer steps of a single stream (default: stage 1 of train.py's preset)")
    parser.add_argument("--steps2", type=whole(1), help="further steps of a multi or a continued single stream (default: stage 2 of the preset)")
    parser.add_argument("--single-steps", type=whole(1), help="steps of each single-task model (default: --steps / number of tasks)")
    parser.add_argument("--limit", type=whole(1), default=64, help="test scenes per world (default: %(default)s)")
    args, flags = parser.parse_args(argv[:at]), argv[at + 1:]
    if taken := OURS & {f.split("=")[0] for f in flags}:
        raise ValueError(f"{', '.join(sorted(taken))} after --: the study sets this itself, or cannot use it")
    args.tasks, wanted = parse_tasks(args.tasks), args.only.split(",")
    if unknown := set(wanted) - VARIANTS.keys():
        raise ValueError(f"--only {args.only}: no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    args.only = [name for name in VARIANTS if name in wanted]
    if orphans := [name for name in args.only if VARIANTS[name].parent and VARIANTS[name].parent not in wanted]:
        raise ValueError(f"--only {','.join(wanted)}: {orphans[0]} starts from {VARIANTS[orphans[0]].parent}, which is missing")
    first, second = (train.parse_args([*flags, "--stage", s]) for s in "12")
    args.steps, args.steps2 = args.steps or first.steps, args.steps2 or second.steps
    args.single_steps = args.single_steps or max(1, round(args.steps / len(args.tasks)))
    if len(args.tasks) < 2:
        raise ValueError(f"--tasks {args.tasks[0]}: expected at least two tasks, for a multi stream needs another one to attend to")
    args.settings = {k: v for k, v in dataclasses.asdict(first).items() if k not in FREE}
    args.train = ["--cache", str(Path(args.out) / "cache"), "--val-samples", "0", *flags]      # the last checkpoint is the one that is measured
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    keep(args)
    jobs, pace, failed = list(runs(args)), {}, []
    try:
        for k, job in enumerate(jobs):
            if job.finished or not job.ready:       # not ready: the model it starts from has failed
                continue
            start, name = time.time(), f"seed {job.seed}, {job.out.name}"
            print(f"[{k + 1}/{len(jobs)}] {name}: {job.steps} steps, output in {job.out}/output.txt", flush=True)
            try:
                perform(job, args)
            except FloatingPointError as error:     # diverged: the other models do not suffer
                failed.append(f"{name}: {error}")
                print(f"    failed: {error}", flush=True)
                continue
            pace[job.variant] = (time.time() - start) / job.steps     # seconds; of a variant not seen yet, that of the slowest
            left = sum(j.steps * pace.get(j.variant, max(pace.values())) for j in jobs[k + 1:] if not j.finished)
            print(f"    {(time.time() - start) / 60:.1f} min; about {left / 60:.0f} min to go", flush=True)
            if k + 1 < len(jobs) and jobs[k + 1].seed > job.seed:
                report(args)
    except KeyboardInterrupt:
        print(f"\nstopped with {sum(j.finished for j in jobs)} of {len(jobs)} models finished: the same command continues", file=sys.stderr)
        return 130
    if any(j.finished for j in jobs):
        print("\n".join(["", *report(args), "", f"written to {args.out}: study.md, results.json, pictures"]))
    if failed:
        raise FloatingPointError(f"{len(failed)} models are missing from the tables, the same command tries them again: {'; '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
