"""Kill training at random moments, resume it until it is done, compare with a run that nobody disturbed, bit for bit.

    python tests/kill.py --kills 20 --stage 1
    python tests/kill.py --kills 20 --stage 2

Every second kill waits until a checkpoint is being written. Tiny model, CPU; minutes for 20 kills. Exit code 0 if the
weights (of the last and of the best checkpoint), Adam's moments, the latent cache, the held-out
losses and the log (all but img_per_s) are the same, 1 if not.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from cli import run  # noqa: E402


def start(argv, log):
    """Run the command in a forked process (no imports to wait for), its output in the file `log`. -> its process id"""
    pid = os.fork()
    if pid:
        return pid
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1) for descriptor in (1, 2))     # pytest has its own
    code = 1
    try:
        code = run(lambda: train.main(argv))
    finally:
        os._exit(code)


def finish(argv, log):
    """Run the command to its end; SystemExit with what it printed if that is a failure."""
    _, status = os.waitpid(start(argv, log), 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"exit code {code} of train.py {' '.join(argv)}:\n{log.read_text()[-2000:]}")


def kill_once(argv, log, out, rng, reach):
    """Start the command and SIGKILL it after at most `reach` seconds. -> whether it was still running"""
    pid, begin, delay, saving = start(argv, log), time.time(), rng.uniform(0, reach), rng.random() < 0.5
    names = ("state.tmp", "model.tmp", "model.new", "best/model.tmp", "best/model.new", "config.json.tmp")
    writing = [out / name for name in names]
    while time.time() - begin < reach:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"train.py {' '.join(argv)} failed:\n{log.read_text()[-2000:]}")
            return False
        if time.time() - begin >= delay and (not saving or any(p.exists() for p in writing)):
            time.sleep(rng.uniform(0, 0.02) if saving else 0)
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def begun(out, stage):
    """Whether a checkpoint of this stage is complete: from then on --resume must work."""
    return any(f'"stage": {stage},' in path.read_text() for path in out.glob("state*/state.json"))


def log_lines(out):
    """The log without what depends on the clock."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "img_per_s"} for entry in entries]


def held_out(out):
    return json.loads((out / "config.json").read_text())["held_out"]


def compare(a, b):
    """Sentences on what differs between two output folders."""
    files = [p.relative_to(a) for p in sorted(a.rglob("*")) if p.suffix in (".safetensors", ".npy")]
    files = [p for p in files if "state.prev" not in p.parts]
    assert any(p.name == "state.safetensors" for p in files)
    out = [f"{p} differs" for p in files if not (b / p).is_file() or (a / p).read_bytes() != (b / p).read_bytes()]
    for what, read in (("log lines", log_lines), ("held-out losses", held_out)):
        if read(a) != read(b):
            out.append(f"{what} differ")
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps (default: three per kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill"))
    whole, killed, log = folder / "whole", folder / "killed", folder / "output.txt"
    steps = args.steps or 3 * args.kills + 2
    base = tiny.base(folder / "base")
    flags = (f"--base {base} --tasks normal,depth,optical_flow --scenes 3 --size 16x24 --batch 2 --micro 2 "
             "--save-every 1 --val-samples 1 --picture-every 0 --workers 0 --warmup 2 --threads 1").split()
    if args.stage == 2:
        finish([*flags, "--steps", "1", "--out", str(whole)], log)
        shutil.copytree(whole, killed)
    masks = ["--rho", "1"] if args.stage == 2 else []
    command = [*flags, "--stage", str(args.stage), *masks, "--steps", str(steps)]
    begin = time.time()
    finish([*command, "--out", str(whole)], log)
    reach, kills, resumes = (time.time() - begin) / steps * 3 + 1, 0, 0
    for _ in range(10 * args.kills + 1):
        resume = begun(killed, args.stage)
        resumes += resume
        argv = ["--resume", "--out", str(killed)] if resume else [*command, "--out", str(killed), "--overwrite"]
        if kills == args.kills:
            finish(argv, log)
            break
        if not kill_once(argv, log, killed, rng, reach):
            break
        kills += 1
    differences = compare(whole, killed)
    told = "; ".join(differences) or "bit-identical to the undisturbed run"
    print(f"stage {args.stage}: {kills} kills, {resumes} resumes, {steps} steps: {told}")
    if not differences:
        shutil.rmtree(folder)
    else:
        print(f"kept in {folder}")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
