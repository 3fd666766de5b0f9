"""Several processes are one: they take its steps, stop with it and end with it."""
import json
import os
import shutil
import socket
from pathlib import Path

import kill
import pytest
import torch
from kill import log_lines
from runs import TINY, close, state

ROOT = Path(__file__).parent.parent


def ranks(monkeypatch, n, argv, log):
    """train.main(argv) in n processes that share the work; waits for all of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, jobs = s.getsockname()[1], []
    for rank in range(n):
        with monkeypatch.context() as m:
            for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
                m.setenv(name, str(value))
            jobs.append(kill.start(argv, log))
    assert [os.waitpid(job, 0)[1] for job in jobs] == [0] * n, log.read_text()[-2000:]


def test_the_number_of_processes_changes_nothing(tiny_base, stage1, tmp_path, monkeypatch):
    """Two gloo ranks that share the batch take the same two steps of stage 2 as one process: losses, gradient norms, moments, weights, held-out
    losses. So do one process that resumes after the first step of two ranks, and two that resume after that of one."""
    outs, log = [tmp_path / n for n in ("one", "two", "two then one", "one then two")], tmp_path / "output.txt"
    one, two, two_one, one_two = outs
    for out, n in (one, 1), (two, 2):
        shutil.copytree(stage1, out)
        text = f"--stage 2 --base {tiny_base} {TINY} --steps 2 --save-every 1 --rho 0 --lr 0.001 --batch 5 --micro 2 --val-samples 3"
        ranks(monkeypatch, n, [*text.split(), "--out", str(out)], log)
    for begun, out, n in (two, two_one, 1), (one, one_two, 2):
        shutil.copytree(begun, out)
        shutil.rmtree(out / "state")        # back to the checkpoint before
        assert json.loads((out / "state.prev" / "state.json").read_text())["step"] == 1
        ranks(monkeypatch, n, ["--resume", "--out", str(out)], log)
    expected, moments = state(one), lambda x: {k: v for k, v in x.items() if k.endswith("exp_avg")}
    held_out = json.loads((one / "config.json").read_text())["held_out"]
    for out in outs[1:]:
        assert json.loads((out / "config.json").read_text())["held_out"] == pytest.approx(held_out, rel=1e-5) and (out / "best" / "model.json").is_file()
        assert len(log_lines(one)) == len(log_lines(out)) == 3
        for a, b in zip(log_lines(one), log_lines(out)):
            assert a["task"] == b["task"] and b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        got = state(out)
        assert got.keys() == expected.keys() and close(moments(expected), moments(got))
        # Adam divides by the gradient's own size: where that is rounding error alone, weights may differ by a part of the learning rate
        difference = torch.cat([(expected[k] - got[k]).abs().flatten() for k in got if k.startswith("weight/")])
        assert difference[::1 + len(difference) // 2 ** 23].quantile(0.99) < 1e-6 and difference.max() < 2.1e-3


