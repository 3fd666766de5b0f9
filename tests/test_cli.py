"""What every command shares: flags with limits, outputs that are tried first, Ctrl-C without a traceback, tables on any
terminal."""
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from runs import TINY, unfinished

import cli
import evaluate
import sample
import settings
import train
from checkpoint import write_json
from network import stock

ROOT = Path(__file__).parent.parent


# ---- flags ----

def test_traceback_shows_where_a_mistake_was_made(monkeypatch):
    """TRACEBACK=1, for who writes a reader: one sentence does not say which line it was."""
    def main():
        raise ValueError("no such thing")
    assert cli.run(main) == 2
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such thing"):
        cli.run(main)


@pytest.mark.parametrize("kind, good, bad", [
    (cli.whole(), ["0", "7", "2147483647"], ["-1", "2147483648", "1.0", "1e3", "nan", "", " 1", "+1", "9" * 5000]),
    (cli.whole(1, 1024), ["1", "1024"], ["0", "1025", "100000"]),
    (cli.whole(0, 2**64 - 1), ["18446744073709551615"], ["18446744073709551616", "99999999999999999999999"]),
    (cli.number(0, 1), ["0", "1", "0.4", "1e-3"], ["-0.1", "1.5", "nan", "inf", "x", ""]),
    (cli.number(0, 1, ends=False), ["0.5"], ["0", "1", "nan"]),
    (cli.number(0), ["0", "1e30"], ["inf", "-inf", "nan", "-1e-9"]),
    (cli.number(), ["-5", "1e300"], ["inf", "-inf", "nan"])])
def test_numbers_have_limits(kind, good, bad):
    """inf, NaN, negative and huge values went through: to a segmentation fault with --threads 100000."""
    for text in good:
        value = kind(text)
        assert value == type(value)(text) and math.isfinite(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_the_flag_is_named_as_typed():
    """The sentence names the flag and the value as they were typed."""
    parser = cli.Parser()
    parser.add_argument("--beta2", type=cli.number(0, 1, ends=False))
    with pytest.raises(ValueError, match="argument --beta2: '1.5' is not a finite number above 0 and below 1"):
        parser.parse_args(["--beta2", "1.5"])


def test_outputs_are_tried_before_the_work(tmp_path):
    """A file whose folder is missing, is a file, or takes nothing is refused, and the trial leaves nothing behind."""
    (tmp_path / "file").touch()
    assert cli.writable(f"{tmp_path}/new.json") == f"{tmp_path}/new.json"
    assert cli.writable(tmp_path / "file") == tmp_path / "file"
    assert cli.writable(tmp_path / "a" / "b" / "c", folder=True) == tmp_path / "a" / "b" / "c"
    with pytest.raises(OSError, match="cannot be written: there is no folder .*/a$"):
        cli.writable(tmp_path / "a" / "new.json")
    with pytest.raises(OSError, match="cannot be written: it is a folder"):
        cli.writable(tmp_path)
    for wrong, options in ((tmp_path / "file" / "new.json", {}), (tmp_path / "file" / "maps", {"folder": True})):
        with pytest.raises(OSError, match="cannot be written: there is no folder .*/file"):
            cli.writable(wrong, **options)
    with pytest.raises(OSError, match="/proc/new cannot be written: .* in /proc"):
        cli.writable("/proc/new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_output_is_a_file_or_leads_to_one(tmp_path):
    """A regular file was renamed over /dev/null, for all programs of the machine, and over a link."""
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("link", "file"), ("lost", "nowhere/file"), ("piped", "pipe"), ("null", "/dev/null")):
        (tmp_path / name).symlink_to(target)
    for name in ("pipe", "piped", "null"):
        with pytest.raises(OSError, match=f"/{name} cannot be written: it is a device or a pipe, name a file"):
            cli.writable(tmp_path / name)
    with pytest.raises(OSError, match="/lost cannot be written: there is no folder .*/nowhere"):
        cli.writable(tmp_path / "lost")
    write_json(cli.writable(tmp_path / "link"), [1])
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "file").read_text()) == [1]


TOOLS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]


def test_a_tool_that_is_run_as_a_file_says_how_to_run_it(tmp_path):
    """`python tools/bench.py` ended in an ImportError, wherever one stood."""
    assert len(TOOLS) > 8
    for path, folder in zip(TOOLS, cycle([ROOT, ROOT / "tools", tmp_path]), strict=False):
        done = subprocess.run([sys.executable, os.path.relpath(path, folder), "--size", "9"], cwd=folder, text=True,
                              capture_output=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == f"{path.name}: run it in the folder {ROOT.resolve()} as python -m tools.{path.stem}\n"


# ---- devices ----

@pytest.mark.parametrize("cuda, mps, found", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_gpu_there_is(monkeypatch, cuda, mps, found):
    """NVIDIA's before Apple's before none; on Apple's, precision auto is fp32, and inference is not in half."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = cli.parse_device("auto")
    assert device.type == found
    if found == "mps":
        assert train.precision(settings.Config(precision="auto"), device) == (contextlib.nullcontext, None)
        assert train.number_of_processes(settings.Config(processes=0)) == 1
        assert not cli.has_bf16(device)


# ---- Ctrl-C ----

def python(folder, *arguments, torch="class OutOfMemoryError(Exception): pass", **environment):
    """Run Python in the root of this project, with stand-ins for what takes long to import."""
    stand_ins = folder / "modules"
    stand_ins.mkdir()
    for name in ("torch", "numpy", "diffusers"):
        (stand_ins / f"{name}.py").write_text(torch)
    (stand_ins / "safetensors.py").write_text("class SafetensorError(Exception): pass")
    environment = os.environ | {"PYTHONPATH": str(stand_ins)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, timeout=50)


SCRIPT = """
import os, signal, sys, time
sys.path.append({root!r})
{before}
import cli

def stop(name):
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(60 if name not in {ignored!r} else 0)

def main():
    try:
        for name in {signals!r}[:1]:
            stop(name)
    finally:
        print("tidied up", flush=True)
        for name in {signals!r}[1:]:
            stop(name)

sys.exit(cli.run(main))
"""


def script(tmp_path, *signals, before="", ignored=()):
    path = tmp_path / "command.py"
    path.write_text(SCRIPT.format(root=str(ROOT), signals=signals, before=before, ignored=ignored))
    done = python(tmp_path, path)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("signals", ["SIGINT", "SIGTERM", "SIGHUP", "SIGINT SIGINT", "SIGTERM SIGINT"])
def test_a_stop_is_one_line(tmp_path, signals):
    """Ctrl-C, kill and a closed terminal: the command tidies up, says one line, exit code 130. Asked a second time it
    leaves at once; it printed a traceback."""
    assert script(tmp_path, *signals.split()) == (130, "tidied up\n", "command.py: interrupted\n")


@pytest.mark.parametrize("wrapped", ["ValueError('the weights are damaged')", "RuntimeError('native code failed')"])
def test_a_stop_is_no_other_error(tmp_path, wrapped):
    """Ctrl-C while weights were loaded came out as the sentence for a damaged checkpoint: safetensors turns it into an
    error of its own."""
    path = tmp_path / "command.py"
    path.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nimport os, signal, cli\ndef main():\n    try:\n"
                    f"        os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt:\n"
                    f"        raise {wrapped}\nsys.exit(cli.run(main))\n")
    done = python(tmp_path, path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"command.py: interrupted\n")


def test_nohup_keeps_its_meaning(tmp_path):
    """A command that was started to outlive its terminal does."""
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert script(tmp_path, "SIGHUP", before=before, ignored=("SIGHUP",)) == (0, "tidied up\n", "")


@pytest.mark.parametrize("command", ["train.py", "evaluate.py", "sample.py", "data.py", "-m tools.bench",
                                     "-m tools.study", "-m tools.convert"])
def test_a_stop_while_importing_is_one_line(tmp_path, command):
    """Ctrl-C in the seconds in which a command imports torch printed the traceback of whatever was being imported."""
    stop = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    done = python(tmp_path, *command.split(), torch=stop)
    name = command.replace("-m tools.", "").removesuffix(".py") + ".py"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (130, b"", f"{name}: interrupted\n")


ANSWERS = """
import contextlib, io, json, runpy, sys
sys.modules |= dict.fromkeys(("diffusers", "transformers"))     # importing them fails
heard = {}
for command in COMMANDS:
    for flag in ("--help", "--hlep"):
        sys.argv = [command, flag]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                (runpy.run_path if command.endswith(".py") else runpy.run_module)(command, run_name="__main__")
            except SystemExit as end:
                heard[f"{command} {flag}"] = end.code, said.getvalue()
print(json.dumps(heard))
"""


def test_help_and_a_wrong_flag_wait_for_torch_alone():
    """They took 6 s of CPU instead of 1.5, most of it for diffusers and transformers: here importing these fails."""
    commands = ["train.py", "evaluate.py", "sample.py", "data.py"]
    commands += [f"tools.{path.stem}" for path in TOOLS]
    done = subprocess.run([sys.executable, "-c", ANSWERS.replace("COMMANDS", repr(commands))], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)
    for command in commands:
        code, said = heard[f"{command} --help"]
        assert code == 0 and "usage: " in said and "--" in said
        code, said = heard[f"{command} --hlep"]
        assert code == 2 and said.count("\n") == 1 and said.endswith(" (--help lists every flag)\n"), said


def test_stock_is_the_libraries_own():
    """The very classes, and a name that is not in its list says where to put it."""
    stock.load()
    assert stock.UNet2DConditionModel is diffusers.UNet2DConditionModel
    assert {name: vars(stock)[name].__module__.split(".")[0] for name in stock.PLACES} == {
        name: place.split(".")[0] for name, place in stock.PLACES.items()}
    with pytest.raises(AttributeError, match="no DiT2: name its module in stock.PLACES"):
        _ = stock.DiT2


def test_handlers_come_and_go():
    """on_stop answers while its block runs, and what answered before answers after it."""
    heard, before = [], [signal.getsignal(s) for s in cli.STOPS]
    with cli.on_stop(lambda number, frame: heard.append(number)):
        for stop in cli.STOPS:
            signal.raise_signal(stop)
    assert heard == cli.STOPS and [signal.getsignal(s) for s in cli.STOPS] == before


# ---- tables ----

@pytest.mark.parametrize("encoding, shown", [("utf-8", "↑ ± é"), ("ascii", "^ +- ?"), ("latin-1", "^ ± é")])
def test_tables_on_any_terminal(tmp_path, encoding, shown):
    """Where stdout is not UTF-8, a table of results that took hours died at its first arrow."""
    code = "import sys, cli; sys.exit(cli.run(lambda: print('↑ ± é')))"
    done = python(tmp_path, "-c", code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.decode(encoding)) == (0, f"{shown}\n")


def test_markdown():
    """Columns in which nothing stands are left out."""
    rows = [{"a": "1", "b": ""}, {"a": "2", "c": "x"}]
    assert cli.markdown(rows, ("a", "b", "c")) == ["| a | c |", "|---|---|", "| 1 |  |", "| 2 | x |"]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or cli.counted(), reason="none here")
def test_what_is_freed_is_kept_in_huge_pages():
    """The kernel's list of a process's memory: what 100 blocks of 2 MB take is marked for huge pages, and stays."""
    program = """
import ctypes, re
from cli import keep_memory
keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(1 << 21) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 21)
    libc.free(ctypes.c_void_p(block))
areas = re.findall(r"Rss: +(\\d+) kB.*?VmFlags: (.*?)\\n", open("/proc/self/smaps").read(), re.DOTALL)
print(sum(int(rss) for rss, flags in areas if "hg" in flags.split()))
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(told) >= 100 * 2048


@pytest.mark.skipif(sys.platform != "linux", reason="such limits are Linux's")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_can_be_used_up(limit):
    """Under ulimit -v or -d a heap that asks for a gigabyte at a time is refused it, while most of that is free."""
    program = f"""
import ctypes, resource
from cli import keep_memory
resource.setrlimit(resource.{limit}, (2 << 30, 2 << 30))
keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
print(sum(libc.malloc(1 << 20) is not None for _ in range(1700)))
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == "1700\n"


@pytest.mark.parametrize("error", [RuntimeError("received 0 items of ancdata"), OSError(24, "Too many open files")])
def test_a_lack_of_open_files_is_one_sentence(capsys, error):
    """Each tensor of a loader process takes one: of many, or where few are allowed, it was a traceback."""
    def main():
        settings.parse_args([])
        raise error
    assert cli.run(main) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ulimit -n, or load in one process by --workers 0" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_a_command_may_open_as_many_files_as_the_system_allows():
    program = """
import resource
import cli
LIMIT = resource.RLIMIT_NOFILE
resource.setrlimit(LIMIT, (256, 512))
cli.run(lambda: print(*resource.getrlimit(LIMIT)))
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == "512 512\n"


@pytest.mark.parametrize("much", [np.empty, torch.empty])
def test_a_lack_of_memory_is_one_sentence(capsys, much):
    """Of numpy, of torch on the CPU; other errors of torch are the program's own."""
    assert cli.run(lambda: much(1 << 55)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory: use smaller images" in said
    with pytest.raises(RuntimeError, match="size of tensor"):
        cli.run(lambda: torch.ones(2) + torch.ones(3))


@pytest.mark.parametrize(("read", "remedy"), [
    (settings.parse_args, "smaller images, or lower --size or --micro or --processes, or add --checkpointing or "
     "--optimizer adam-bf16 or --frozen bf16 ("),
    (evaluate.parse, "smaller images, or lower --rows or --processes ("),
    (lambda argv: sample.parse(["--toy", "real:1"]), "smaller images, or lower --size or --rows, or add "
     "--vae-slicing or --vae-tiling ("),
    (lambda argv: cli.Parser().parse_args(argv), "smaller images ("),
])
def test_a_lack_of_memory_names_the_flags_of_the_command(capsys, read, remedy):
    """Those that it has, and no other."""
    def command():
        read([])
        np.empty(1 << 55)
    assert cli.run(command) == 2
    assert remedy in capsys.readouterr().err


def test_what_is_printed_can_be_pasted(tiny_base, stage1, tmp_path, monkeypatch, capsys):
    """Commands that a sentence names say a folder with a space so that a shell reads one word."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stage1, "stage 1")
    unfinished(Path("stage 1"), Path("stopped run"))
    short = f"--base {tiny_base} {TINY}".split()
    for command, code, words in [
            (lambda: train.main([*short, "--stage", "2", "--out", "no run"]), 2, ["--stage", "1", "--out", "no run"]),
            (lambda: train.main(["--resume", "--out", "stage 1"]), 0, ["--stage", "2", "--out", "stage 1,"]),
            (lambda: train.main([*short, "--stage", "1", "--init", "stopped run"]), 2,
             ["--resume", "--out", "stopped run"]),
            (lambda: sample.main(["--ckpt", "stage 1", *"--testset toy --limit 1 --tasks depth --output".split(),
                                  "my maps"]), 0, ["--predictions", "my maps"])]:
        assert cli.run(command) == code
        said = "".join(capsys.readouterr())
        pasted = shlex.split(said[said.index("python "):])
        assert [word.replace(f"{tmp_path}/", "") for word in pasted[2:2 + len(words)]] == words, said
