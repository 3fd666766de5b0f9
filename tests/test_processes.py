"""Several processes are one: they take its steps, stop with it and end with it."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import kill
import pytest
import torch
from kill import log_lines
from raw import own_folder
from runs import THREE, TINY, close, saved, state

import cli
import settings
import train


def ranks(monkeypatch, n, argv, log):
    """train.main(argv) in n processes that share the work, as torchrun starts them; waits for all of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs = []
    for rank in range(n):
        with monkeypatch.context() as m:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for name, value in names.items():
                m.setenv(name, str(value))
            jobs.append(kill.start(argv, log))
    assert [os.waitpid(job, 0)[1] for job in jobs] == [0] * n, log.read_text()[-2000:]


def moments(tensors):
    return {k: v for k, v in tensors.items() if k.endswith("exp_avg")}


def test_notices_are_told_once(tiny_base, tmp_path, monkeypatch):
    """Each of the processes told what the data has labels for, and of another commit."""
    log = tmp_path / "output.txt"
    own_folder(tmp_path / "my", 8, 16, 24)
    shutil.rmtree(tmp_path / "my/albedo")
    flags = [*TINY.replace("--scenes 2 ", "").split(), "--data", str(tmp_path / "my"), "--out", str(tmp_path / "out")]
    ranks(monkeypatch, 2, ["--stage", "1", "--base", str(tiny_base), *flags], log)
    assert log.read_text().count("tasks with labels in") == 1 and "Traceback" not in log.read_text()


def test_the_number_of_processes_changes_nothing(tiny_base, stage1, tmp_path, monkeypatch):
    """Two gloo ranks that share the batch take the same two steps of stage 2 as one process: losses, gradient norms,
    moments, weights, held-out losses. So do one process that resumes after the first step of two ranks, and two that
    resume after that of one."""
    outs, log = [tmp_path / n for n in ("one", "two", "two then one", "one then two")], tmp_path / "output.txt"
    one, two, two_one, one_two = outs
    flags = "--steps 2 --save-every 1 --rho 0.7 --lr 0.001 --batch 5 --micro 2 --val-samples 3"
    for out, n in (one, 1), (two, 2):
        shutil.copytree(stage1, out)
        ranks(monkeypatch, n, f"--stage 2 --base {tiny_base} {TINY} {flags}".split() + ["--out", str(out)], log)
    for begun, out, n in (two, two_one, 1), (one, one_two, 2):
        shutil.copytree(begun, out)
        shutil.rmtree(out / "state")        # back to the checkpoint before
        assert json.loads((out / "state.prev" / "state.json").read_text())["step"] == 1
        ranks(monkeypatch, n, ["--resume", "--out", str(out)], log)
    expected, held_out = state(one), saved(one)["held_out"]
    for out in outs[1:]:
        assert saved(out)["held_out"] == pytest.approx(held_out, rel=1e-5) and (out / "best" / "model.json").is_file()
        assert len(log_lines(one)) == 3
        for a, b in zip(log_lines(one), log_lines(out), strict=True):
            assert (a["task"], a["dataset"]) == (b["task"], b["dataset"])
            assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=1e-5)
            for name in (k for k in a if k.startswith("attention_")):       # of stage 2
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7)
        got = state(out)
        assert got.keys() == expected.keys() and close(moments(expected), moments(got))
        # Adam divides by the gradient's own size: where that is rounding error alone, weights may differ by a part of
        # the learning rate
        difference = torch.cat([(expected[k] - got[k]).abs().flatten() for k in got if k.startswith("weight/")])
        assert difference[::1 + len(difference) // 2 ** 23].quantile(0.99) < 1e-6 and difference.max() < 2.1e-3


# ---- processes that train.py starts itself ----

def test_processes_of_its_own_change_nothing(tiny_base, stage1, tmp_path):
    """--processes 3 with a cache of latents and streams: losses, moments and held-out losses of one process, cache and
    all; as many processes as samples and more work, too."""
    for n in (1, 3):
        out = shutil.copytree(stage1, tmp_path / str(n))
        flags = (f"--stage 2 --rho 0.7 --steps 3 --save-every 1 --lr 0.001 --batch 2 --micro 2 --val-samples 3 "
                 f"--processes {n} --cache {out / 'cache'}")
        kill.finish([*f"--base {tiny_base} {TINY}".split(), *flags.split(), "--out", str(out)], tmp_path / "output.txt")
    one, three = tmp_path / "1", tmp_path / "3"
    assert saved(three)["held_out"] == pytest.approx(saved(one)["held_out"], rel=1e-4)
    for a, b in zip(log_lines(one), log_lines(three), strict=True):
        assert a["task"] == b["task"] and b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    close_enough = close(moments(state(one)), moments(state(three)), tolerance=1e-3)
    assert close_enough     # streams are rounded to float16 after passes of other batch sizes
    assert [p.name for p in sorted(three.glob("cache/streams-*/*.f16"))] == ["rooms.f16", "streets.f16", "things.f16"]


@pytest.fixture
def begin(tiny_base, tmp_path):
    """begin(n) -> the process that a user sees of a training of many steps in n processes, well under way. Whatever
    becomes of the test, it does not outlive it."""
    begun = []

    def call(n=2):
        flags = [*TINY.split(), "--steps", "5000", "--save-every", "5000", "--tasks", THREE, "--processes", str(n)]
        place = ["--base", str(tiny_base), "--out", str(tmp_path / "out")]
        begun.append(kill.start([*place, *flags], tmp_path / "output.txt"))
        lines = tmp_path / "out" / "log.jsonl"
        wait_for(lambda: lines.is_file() and len(lines.read_text().splitlines()) > 2)
        return begun[-1]
    yield call
    for pid in begun:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=60):
    """Until it holds; a test fails where it never does."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s in vain"
        time.sleep(0.02)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether it runs: not gone, nor a zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_no_process_outlives_the_one_a_user_sees(begin, tmp_path, stop):
    """Stopped, hung up or killed: all processes end; after a stop the run says how to go on, and does."""
    pid = begin()
    others = children(pid)
    assert len(others) == 1 and alive(others[0])
    os.kill(pid, getattr(signal, stop))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wait_for(lambda: not alive(others[0]), 10)
    told = (tmp_path / "output.txt").read_text()
    if stop == "SIGKILL":
        return
    assert code == 130 and "continue with: python train.py --resume" in told and "Traceback" not in told
    done = json.loads((tmp_path / "out" / "state" / "state.json").read_text())["step"]
    assert done == len(log_lines(tmp_path / "out")) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_who_asks_three_times_does_not_wait(begin, tmp_path):
    """A step may take long; the third Ctrl-C ends the run at once, in a line, and no process stays."""
    pid = begin()
    others = children(pid)
    os.kill(pid, signal.SIGSTOP)    # in the middle of something
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, stop)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    wait_for(lambda: not alive(others[0]), 10)
    told = (tmp_path / "output.txt").read_text()
    assert "interrupted" in told and "Traceback" not in told and "continue with" not in told


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_dies_ends_the_run_in_a_sentence(begin, tmp_path):
    """The others do not wait for it for ever."""
    pid = begin()
    os.kill(children(pid)[0], signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    told = (tmp_path / "output.txt").read_text()
    assert "ended with exit code -9 before it was done" in told and "--processes 1" in told and "Traceback" not in told


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loader_process_that_dies_ends_the_run_in_a_sentence(tiny_base, tmp_path, processes):
    """Killed for lack of memory, or of /dev/shm: it was a traceback."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=Path(kill.__file__).parent.parent, base=tiny_base, out=tmp_path / "out",
                                    tiny=TINY.replace("--workers 0", "--workers 1"), processes=processes))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2 and "a loader process died, perhaps for lack of memory" in done.stderr
    assert "--workers 0" in done.stderr and "Traceback" not in done.stderr


KILLED = """
import os, sys
sys.path.insert(0, "{root}")
import cli
import train
from torch.utils.data import get_worker_info
from readers.toyworld import ToyWorld
load = ToyWorld.load

def killed(*args, **options):
    if get_worker_info():
        os.kill(os.getpid(), 9)
    return load(*args, **options)

ToyWorld.load = killed
sys.exit(cli.run(lambda: train.main("--base {base} --out {out} {tiny} --processes {processes}".split())))
"""


def fails_in(rank, mistaken, error):
    if rank == mistaken:
        raise error
    if mistaken == 1 and rank == 0:
        raise RuntimeError("a peer is gone")    # what a collective says
    return rank


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_in_any_process_is_told_once(mistaken):
    """Whichever process meets it, the sentence is its own."""
    with pytest.raises(ValueError, match="^a.png is truncated$"):
        cli.spread(partial(fails_in, mistaken=mistaken, error=ValueError("a.png is truncated")), 2)
    assert cli.spread(partial(fails_in, mistaken=9, error=None), 3) == [0, 1, 2]


def test_how_many_processes(monkeypatch, tiny_base):
    """One per core while each has two samples; of a base of one's own, and on one core, one."""
    def number(text, cores):
        monkeypatch.setattr(cli, "cores", lambda: cores)
        return train.number_of_processes(settings.parse_args(text.split()))
    assert [number("", cores) for cores in (1, 2, 3, 8, 64)] == [1, 2, 3, 4, 4]
    assert number("--batch 32", 64) == 16 and number("--processes 5", 2) == 5
    assert number(f"--base {tiny_base}", 8) == 1


# ---- two trainings in one folder ----

def test_two_trainings_in_one_folder(go, begin, tmp_path):
    """The second is refused with the number of the first, which goes on; what a killed run left is no obstacle."""
    pid = begin(n=1)
    code, _, error = go("--resume")
    assert code == 2 and f"process {pid} on {socket.gethostname()}" in error and alive(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    code, _, error = go(f"--tasks {THREE} --overwrite")
    assert code == 0 and f"notice: the run that had {tmp_path / 'out'} (process {pid}" in error
    code, _, error = go("--resume")
    assert code == 0 and "notice" not in error
