"""Which part of StableMTL helps? The comparison of the paper's Tables 2, 4 and 10 and its Figure 5 on the toy worlds.

    python -m tools.study --out study/                              the toy preset's steps, three seeds; the same
                                                                    command continues it
    python -m tools.study --out study/ --seeds 5 -- --batch 4       what follows -- goes to train.py for every model
    python -m tools.study --out study/ --jobs 8                     eight models at a time, one CPU core each
    nohup python -m tools.study --out study/ > study.log 2>&1 &     in the background
    python -m tools.study --suite systems --out systems/            the other systems of the papers beside StableMTL

tools/study_variants.py says what is compared, tools/study_systems.py what in the suite systems; --only all adds the
rows that are left out otherwise. Models are trained by train.py (two by tools/oracle.py, whose streams are told the
truth or predictions), measured by evaluate.py. Optimizer steps are equal: every single stream takes --steps; every
multi stream starts from the single stream of its seed and takes --steps2 more, and `continued` takes the same number
of further steps, on the same batches, as a single stream. A single-task model takes --steps divided by the number of
tasks: as many steps of its task as the single stream takes of it, so that all of them together cost one single stream
(the paper trains each for its own full schedule: --single-steps). Another system takes --steps, and so does a student
that learns from a model.

Delta_m is against the single-task models of the same seed; of what starts from a single stream, also against that
stream continued for as many steps; in the suite systems, also against the single-task trunks. It is taken on `real`,
the world that training never sees (paper Table 2), and on held-out scenes of the training worlds (Table 10).
Differences between variants are paired by seed.

Writes --out: study.md (systems.md of that suite) with tables, verdicts and pictures, results.json with all numbers,
seed<N>/<variant>/ with every checkpoint.
"""
import argparse
import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from cli import Parser, end, keep_memory, parse_device, run, whole, writable  # before torch, for Ctrl-C

# isort: split
import torch

import evaluate
import train
from checkpoint import read_json, state_file, write_json
from model import StableMTL
from readers.toyworld import ALL
from settings import PRESETS
from tasks import parse_tasks
from tools import discover, oracle, study_report, systems_report
from tools.study_systems import SUITE
from tools.study_variants import STABLEMTL, runs, tasks_of

SUITES = {"stablemtl": (STABLEMTL, study_report.report), "systems": (SUITE, systems_report.report)}

# ---- one model ----

def command(job, args):
    """train.py's command line for a model, or for what is left of it; its folder is ready for it."""
    if state_file(job.out):
        return ["--resume", "--out", str(job.out), *args.alone]
    for path in job.out.glob("*"):      # train.py has not written its first checkpoint
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "output.txt":     # which is being written
            path.unlink()
    job.out.mkdir(parents=True, exist_ok=True)
    flags = job.row.flags
    if "--stage 2" in flags:
        StableMTL.load(job.parent, stage=1).save(job.out)
        shutil.copy(job.parent / "config.json", job.out)
    # train.py draws the batches from seed + 1000 x stage: a single stream that is continued gets those of stage 2
    seed = job.seed + 1000 * ("--init" in flags)
    argv = ["--cache", str(Path(args.out) / job.row.cache), *args.train, "--tasks", ",".join(job.tasks), "--out",
            str(job.out), "--steps", str(job.steps), "--seed", str(seed), *job.flags]
    if job.task:        # the same share of its steps
        argv += ["--warmup", str(round(args.settings["warmup"] * job.steps / args.steps))]
    return argv


def trained(job, args, test):
    """train.py, then evaluate.py."""
    return train.main(command(job, args)) or evaluate.main(["--ckpt", str(job.out), *test])


def evaluated(job, args, test):
    """evaluate.py of the model that it starts from."""
    return evaluate.main(["--ckpt", str(job.parent), *job.flags, *test])


def with_true_streams(job, args, test):
    """tools.oracle, which evaluates as well; its auxiliary UNet learns for as long as the main one."""
    own = {"--ckpt": job.parent, "--out": job.out, "--steps": job.steps, "--aux-steps": job.steps, "--seed": job.seed,
           "--limit": args.limit}
    ours = [str(x) for pair in own.items() for x in pair]
    return oracle.main([*ours, *for_oracle(job.flags, [*args.alone, *args.flags])])


def for_oracle(flags, common):
    """A row's flags of tools.oracle, its own before a -- and those of stage 2 after it, with the flags for train.py
    that all rows have."""
    at = flags.index("--") if "--" in flags else -1
    return [*flags[:max(at, 0)], "--", *common, *flags[at + 1:]]


def discovered(job, args, test):
    """tools.discover: labels, and no model to evaluate."""
    code = discover.main(["--ckpt", str(job.parent), "--device", args.device, *job.flags])
    if not code:
        write_json(job.out / "evaluation.json", {"results": {}})
    return code


PROGRAMS = {"train.py": trained, "evaluate.py": evaluated, "tools.oracle": with_true_streams,
            "tools.discover": discovered}


def perform(job, args):
    """Train and evaluate one model, or what is left of that; KeyboardInterrupt after a stop, with a checkpoint to
    continue from."""
    measured = job.out / "evaluation.json"
    test = ["--trivial", "0", "--limit", str(args.limit), "--device", args.device, "--json", str(measured),
            *args.alone[:2]]
    job.out.mkdir(parents=True, exist_ok=True)
    output = (job.out / "output.txt").open("a")
    with output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if PROGRAMS[job.program](job, args, test):
            raise KeyboardInterrupt     # they have caught it, and saved what they had
    if measured.exists():
        os.replace(measured, job.out / "results.json")      # under this name it is complete
    for state in ("state", "state.prev"):       # most of the disk, and what is finished does not resume
        shutil.rmtree(job.out / state, ignore_errors=True)
    gc.collect()        # a model is a cycle: its taps refer to it


# ---- all models: both yield (job, seconds, the FloatingPointError of a model that diverged, or None) as they end ----

def one_by_one(jobs, args):
    """Perform the jobs in their order; what starts from a model that diverged is left out."""
    for job in jobs:
        if not job.finished and job.ready:
            start, error = announce(job, jobs), None
            try:
                perform(job, args)
            except FloatingPointError as diverged:      # the other models do not suffer
                error = diverged
            yield job, time.time() - start, error


def side_by_side(jobs, args):
    """Perform --jobs of the jobs at a time, each in a process of its own, parents before what starts from them.

    What ends this (a stop, a mistake in one of them) stops them all as Ctrl-C does, with checkpoints to continue from.
    """
    waiting, running = [job for job in jobs if not job.finished], {}
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            ready = [job for job in waiting if job.ready]
            filling = any(job.filling for job, *_ in running.values())      # one at a time
            if ready and not filling and len(running) < args.jobs:
                waiting.remove(ready[0])
                here, there = context.Pipe(False)
                process = context.Process(target=work, args=(ready[0], args, there))
                process.start()
                there.close()
                running[here] = ready[0], process, announce(ready[0], jobs)
            elif not running:       # what still waits starts from a model that diverged
                return
            for pipe in multiprocessing.connection.wait(list(running), 0.5):
                job, process, start = running.pop(pipe)
                yield job, time.time() - start, outcome(job, process, pipe)
    finally:
        for _, process, _ in running.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for _, process, _ in running.values():
            process.join()


def work(job, args, pipe):
    """The life of a process of `side_by_side`: one thread, deaf to the terminal's Ctrl-C, which the study passes on."""
    keep_memory()
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    error = None
    try:
        perform(job, args)
    except FloatingPointError as diverged:
        error = diverged
    except (ValueError, OSError) as mistake:
        error = ValueError(f"{job.name}: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
    pipe.send(error)


def outcome(job, process, pipe):
    """What a process of `side_by_side` sent: a FloatingPointError or None; a mistake is raised, so is its death."""
    try:
        error = pipe.recv()
    except EOFError:
        error = ChildProcessError(f"{job.name} {end(process)}: the same command continues, with fewer --jobs if need "
                                  f"be (its output: {job.out}/output.txt)")
    process.join()
    if error and not isinstance(error, FloatingPointError):
        raise error
    return error


def announce(job, jobs):
    """Say that a model begins. -> the time"""
    what = f"{job.steps} steps" if job.steps else "no training"
    print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}: {what}, output in {job.out}/output.txt",
          flush=True)
    return time.time()


# ---- the command ----

# flags of train.py that the study sets or cannot use, and settings that may differ from call to call
OURS = {"--stage", "--out", "--steps", "--seed", "--tasks", "--init", "--resume", "--overwrite", "--data"}
FREE = {"stage", "out", "steps", "seed", "tasks", "cache", "resume", "overwrite", "processes", "threads", "workers",
        "save_every", "picture_every", "val_samples", "stream_gb"}


def parse(argv):
    """The command line, with what is made of it: `train` and `alone` (flags for train.py, in any case and to resume)
    and `settings` (what these come to). ValueError or OSError names what is wrong."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", default="study", type=partial(writable, folder=True), help="folder of the study (default: study)")
    flag("--seeds", type=whole(1), default=3, help="how many; more can be added later (default: %(default)s)")
    flag("--suite", choices=tuple(SUITES), default="stablemtl", help="what is compared: parts of StableMTL, or it and "
         "the other systems of the papers (default: %(default)s)")
    left_out = "; ".join(f"in {name}, {', '.join(suite.extra)}" for name, (suite, _) in SUITES.items())
    flag("--only", default="", help="comma-separated variants, or all; others can be added later (default: all but, "
         f"{left_out})")
    flag("--tasks", default="all", help="comma-separated task names, at least two (default: %(default)s)")
    flag("--steps", type=whole(1), help="optimizer steps of a single stream (default: stage 1 of the preset)")
    flag("--steps2", type=whole(1), help="further steps of a multi or a continued single stream (default: stage 2 of "
         "the preset)")
    flag("--single-steps", type=whole(1), help="steps of each single-task model (default: --steps / number of tasks)")
    flag("--limit", type=whole(1), default=64, help="test scenes per world (default: %(default)s)")
    flag("--jobs", type=whole(1, 1024), default=1, help="models at a time; above 1 each has one process of one thread "
         "(default: %(default)s)")
    args, flags = parser.parse_args(argv[:at]), argv[at + 1:]
    (args.suite, _), args.flags = SUITES[args.suite], flags
    if taken := OURS & {f.split("=")[0] for f in flags}:
        raise ValueError(f"{', '.join(sorted(taken))} after --: the study sets this itself, or cannot use it")
    args.tasks = parse_tasks(",".join(ALL) if args.tasks == "all" else args.tasks)      # all of the toy worlds
    if len(args.tasks) < 2:
        raise ValueError(f"--tasks {args.tasks[0]}: expected at least two tasks, for a multi stream needs another one "
                         "to attend to")
    args.only = parse_variants(args.only, args)
    first = accepted(flags, args)
    args.steps = args.steps or first.steps
    args.steps2 = args.steps2 or PRESETS[first.preset]["steps"][2]
    args.single_steps = args.single_steps or max(1, round(args.steps / len(args.tasks)))
    args.settings = {k: v for k, v in dataclasses.asdict(first).items() if k not in FREE}
    args.device = str(parse_device(args.settings["device"]))
    args.alone = ["--processes", "1", "--threads", "1"] if args.jobs > 1 else []     # evaluate.py takes the first
    # no held-out samples: the last checkpoint is the one that is measured
    args.train = ["--val-samples", "0", *args.alone, *flags]
    return args


def parse_variants(text, args):
    """"multi,single" -> ["single", "multi"] in the order of the suite's variants; "": the usual ones. ValueError names
    what is unknown or missing."""
    variants = args.suite.variants
    usual = [name for name, row in variants.items()
             if name not in args.suite.extra and set(tasks_of(row, args)) <= set(args.tasks)]
    wanted = text.split(",") if text else usual
    if text == "all":
        wanted = list(variants)
    if unknown := set(wanted) - variants.keys():
        raise ValueError(f"--only {text}: the suite {args.suite.name} has no variant {', '.join(sorted(unknown))}; "
                         f"there are {', '.join(variants)}")
    names = [name for name in variants if name in wanted]
    for name in names:
        if variants[name].parent and variants[name].parent not in wanted:
            raise ValueError(f"--only {text}: {name} starts from {variants[name].parent}, which is missing")
        if absent := set(tasks_of(variants[name], args)) - set(args.tasks):
            raise ValueError(f"--only {text}: {name} is about {', '.join(sorted(absent))}, which --tasks leaves out")
    return names


def accepted(flags, args):
    """The settings that flags for train.py come to in a single stream. ValueError if some variant cannot take them:
    better now than after hours of other models."""
    nowhere = str(Path(args.out) / "nowhere")       # no checkpoint there whose settings would be taken over
    parsers = {"train.py": (train.parse_args, [*flags, "--out", nowhere]),
               "tools.oracle": (oracle.parse, ["--ckpt", nowhere, "--out", nowhere]),
               "tools.discover": (discover.parse, ["--ckpt", nowhere])}
    for name in args.only:
        row = args.suite.variants[name]
        own = row.filled(task=args.tasks[0], parent=f"{nowhere}/parent", out=nowhere, fifth=1)
        try:
            if row.program == "tools.oracle":
                own = for_oracle(own, flags)
            if row.program in parsers:
                parser, before = parsers[row.program]
                parser([*before, *own])
        except ValueError as error:
            raise ValueError(f"after --, for the variant {name}: {error}") from None
    return train.parse_args([*flags, "--out", nowhere])


def keep(args):
    """Write the study's settings to study.json, or refuse (ValueError) if they differ from those already there. New
    rows and seeds do not."""
    path = Path(args.out) / "study.json"
    now = {k: getattr(args, k) for k in ("steps", "steps2", "single_steps", "limit")}
    now |= {"suite": args.suite.name, "tasks": ",".join(args.tasks), **args.settings}
    now |= {f"variant {name}": args.suite.variants[name].told() for name in args.only}
    # the first studies do not say which suite they are of
    old = {"suite": "stablemtl"} | read_json(path, "") if path.is_file() else {}
    differs = [f"{k} {old[k]}, now {now[k]}" for k in now if k in old and old[k] != now[k]]
    if differs:
        raise ValueError(f"{args.out} holds a study with other settings ({'; '.join(differs)}): name another --out, or "
                         "delete that folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, old | now)


def all_rows(args):
    """args, with the rows and the seeds of earlier calls beside those of this one: a page has whatever its folder
    has."""
    kept, variants = read_json(Path(args.out) / "study.json", ""), args.suite.variants
    names = [name for name, row in variants.items() if name in args.only or kept.get(f"variant {name}") == row.told()]
    seeds = [int(n) + 1 for folder in Path(args.out).glob("seed*") if (n := folder.name[len("seed"):]).isdecimal()]
    return argparse.Namespace(**{**vars(args), "only": names, "seeds": max([args.seeds, *seeds])})


def forget_streams(args):
    """Delete what stage 2 keeps of a seed's single stream, gigabytes that no later seed reads."""
    for folder in (Path(args.out) / "cache").glob("streams-*"):
        shutil.rmtree(folder, ignore_errors=True)


def remaining(jobs, pace):
    """Seconds that one model after the other would take; pace: {variant: seconds per step}, of a variant not seen yet
    that of the slowest."""
    slowest = max(pace.values(), default=0)
    return sum(job.steps * pace.get(job.variant, slowest) for job in jobs if not job.finished)


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    report = SUITES[args.suite.name][1]
    keep(args)
    page = all_rows(args)
    jobs, ended, pace, failed = list(runs(args)), set(), {}, []
    performing = one_by_one(jobs, args) if args.jobs == 1 else side_by_side(jobs, args)
    try:
        with contextlib.closing(performing):
            for job, seconds, error in performing:
                ended.add(job)
                if error:
                    failed.append(f"{job.name}: {error}")
                    print(f"    {job.name} failed: {error}", flush=True)
                    continue
                if job.steps:
                    pace[job.variant] = seconds / job.steps
                left = remaining(jobs, pace) / args.jobs
                print(f"    {job.name}: {seconds / 60:.1f} min; about {left / 60:.0f} min to go", flush=True)
                seed = [j for j in jobs if j.seed == job.seed]
                if all(j in ended or j.finished or not j.ready for j in seed) and left:
                    report(page)
                    if args.jobs == 1:      # else models of another seed may still read theirs
                        forget_streams(args)
    except KeyboardInterrupt:
        done = sum(job.finished for job in jobs)
        print(f"\nstopped with {done} of {len(jobs)} models finished: the same command continues", file=sys.stderr)
        return 130
    forget_streams(args)
    if any(job.finished for job in jobs):
        print("\n".join(["", *report(page), "", f"written to {args.out}: {args.suite.page}, results.json, "
                         "pictures"]))
    if failed:
        raise FloatingPointError(f"{len(failed)} models are missing from the tables, the same command tries them "
                                 f"again: {'; '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
