"""Training steps on a CPU: processes against threads, idle and beside other programs. Called by tools/bench.py."""
import contextlib
import subprocess
import sys
import tempfile
import time
from functools import partial

import cli

# isort: split
import torch
import torch.distributed as dist

from settings import PRESETS, Config, check
from train import make_optimizer, optimizer_step, trainable
from training.losses import LatentObjective

ROWS = [(1, "cached latents"), (2, "cached latents and streams"), (2, "cached latents")]
LOADS = {"busy": "while True: pass",
         "load": "import torch; torch.set_num_threads(2); a = torch.rand(1024, 1024)\nwhile True: a @ a"}


@contextlib.contextmanager
def beside(**numbers):
    """While the block runs, so many programs of each of LOADS run too."""
    others = [subprocess.Popen([sys.executable, "-c", LOADS[kind]]) for kind, n in numbers.items() for _ in range(n)]
    try:
        time.sleep(4 if others else 0)      # until they have imported what they need
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def peak(rank, seconds=1.0):
    """Floating-point operations per second of one thread that multiplies matrices, rank by rank of `cli.spread`."""
    torch.set_num_threads(1)
    a, done, start = torch.rand(1024, 1024), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        done += 2 * 1024 ** 3
    return done / (time.perf_counter() - start)


class Known:
    """In place of a cache of auxiliary streams: the same ones again."""

    def __init__(self, feats):
        self.feats = feats

    def fetch(self, keys, tasks, z_i, z_j):
        return self.feats


def seconds_per_step(rank, world_size, threads, assembled, stage, source, size, batch, steps, meeting):
    """Median time of train.py's optimizer step of `batch` samples of one task, shared by `world_size` processes."""
    torch.set_num_threads(threads)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    model = assembled(stage)
    model.training = True
    cfg = check(Config(stage=stage, preset="toy"))
    optimizer = make_optimizer(cfg, trainable(model))
    share, task = len(range(rank, batch, world_size)), model.tasks[-1]
    z, valid = (torch.rand(share, c, *(s // model.factor for s in size)) for c in (4, 1))
    keys = [("bench", k, False) for k in range(share)]
    given = [{"tasks": (task,), "keys": keys, "frames": [z, z], "labels": {task: z}, "valid": {task: valid >= 0}}]
    streams = Known(model.streams(z, z, model.tasks)) if "streams" in source else None
    objective, times = LatentObjective(model, {"latent": 1.0}, False, streams), []
    for step in range(steps + 2):       # two to warm up
        start = time.perf_counter()
        optimizer_step(cfg, step, model, objective, given if share else [], optimizer, contextlib.nullcontext)
        times.append(time.perf_counter() - start)
    if world_size > 1:
        dist.destroy_process_group()
    return sorted(times[2:])[steps // 2]


def measure(assembled, counted, size, busy=0, load=0, steps=15):
    """[{"stage", "source", "processes", "threads", "seconds", "images_per_s", "peak"}] of train.py's steps.

    assembled(stage) -> a StableMTL; counted: {(stage, source): operations of one image}. One process of a thread per
    core against one process per core, which is train.py's default; peak: share of the machine's measured GEMM rate,
    which is idle. busy, load: programs that spin, or multiply matrices on two threads each, meanwhile.
    """
    cores, batch, out = cli.cores(), PRESETS["toy"]["batch"], []
    machine = sum(cli.spread(peak, cores))
    with beside(busy=busy, load=load):
        for stage, source in ROWS:
            for processes, threads in ((1, cores), (cores, 1)) if cores > 1 else ((1, 1),):
                with tempfile.TemporaryDirectory() as place:
                    work = partial(seconds_per_step, world_size=processes, threads=threads, assembled=assembled,
                                   stage=stage, source=source, size=size, batch=batch, steps=steps,
                                   meeting=f"file://{place}/ranks")
                    seconds = cli.spread(work, processes)[0]
                rate = batch / seconds
                out.append({"stage": stage, "source": source, "processes": processes, "threads": threads,
                            "seconds": seconds, "images_per_s": rate,
                            "peak": rate * counted[stage, source] / machine})
    return out


def lines(rows, busy, load):
    """The rows as text."""
    others = [f"{n} {what}" for n, what in ((busy, "busy loops"), (load, "matrix multipliers of 2 threads")) if n]
    out = [f"CPU training steps of {PRESETS['toy']['batch']} images, beside {' and '.join(others) or 'nothing'}:"]
    for r in rows:
        how = f"{r['processes']} x {r['threads']} threads"
        out.append(f"  stage {r['stage']}, {r['source']:27}{how:>14}{r['seconds'] * 1e3:9.0f} ms"
                   f"{r['images_per_s']:8.1f} img/s{100 * r['peak']:6.0f}% of the GEMM peak")
    return out
