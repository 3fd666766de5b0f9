"""What a user sees of flags and mistakes: one sentence that names the cause and the remedy, exit code 2, no traceback.

A command imports this file before torch, which takes seconds: from then on Ctrl-C ends in one line, whatever goes on.
"""
import argparse
import codecs
import ctypes
import gc
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMAND = Path(*sys.argv[:1]).resolve()
COMMANDS = [ROOT / f"{name}.py" for name in ("train", "evaluate", "sample", "data")]    # and all in tools/


# of malloc.h and mman.h
ARENA_MAX, MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD = -8, -3, -2, -1
KEEP = {ARENA_MAX: 1, MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 1 << 30}
MADV_HUGEPAGE, HUGE_PAGE = 14, 1 << 21


# ---- flags ----

class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing its usage: a wrong flag ends as any other mistake does, in one sentence."""

    usage_at_hand = ""      # of the command whose flags were read last

    def __init__(self, **options):
        tool = COMMAND.parent == ROOT / "tools"     # usage: how the command at hand is typed
        super().__init__(prog=f"python -m tools.{COMMAND.stem}" if tool else f"python {COMMAND.name}", **options)

    def parse_known_args(self, *args, **options):
        Parser.usage_at_hand = self.format_usage()
        return super().parse_known_args(*args, **options)

    def error(self, message):
        raise ValueError(f"{message} (--help lists every flag)")

    def refuse_idle(self, args, rules):
        """ValueError if a flag was given that does nothing. rules: (whether the rule holds, flags' names, why), ..."""
        for holds, names, why in rules:
            idle = ["--" + name.replace("_", "-") for name in names if vars(args)[name] != self.get_default(name)]
            if holds and idle:
                raise ValueError(f"{' and '.join(idle)} would do nothing here: {why}")


def whole(least=0, most=2**31 - 1):
    """argparse type: an integer from `least` to `most`."""
    def parse(text):
        if not (text.isdecimal() and len(text) < 99 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)
    return parse


def number(low=-math.inf, high=math.inf, ends=True):
    """argparse type: a finite number from `low` to `high`; these themselves only if `ends`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high if ends else low < value < high
        if not (inside and math.isfinite(value)):
            limits = f"from {low:g} to {high:g}" if ends else f"above {low:g} and below {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {limits}")
        return value
    return parse


def parse_size(text, flag="--size"):
    """"32x48" -> (32, 48), height x width; None or "" -> None: that of the data."""
    if not text:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and len(text) < 12):
        raise ValueError(f"{flag} {text}: expected HEIGHTxWIDTH, for example 32x48")
    if min(int(height), int(width)) < 8:
        raise ValueError(f"{flag} {text}: at least 8x8")
    return int(height), int(width)


def writable(path, folder=False, remedy=""):
    """The path, if a file (with `folder`: a folder of files) can be written there; also an argparse type.

    OSError names what is in the way, and the remedy: better before hours of work than after. Nothing is left behind.
    """
    file = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    place = file if folder else file.parent
    while folder and not place.exists():
        place = place.parent    # the nearest one there is: what is missing below it will be made
    if not folder and file.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder, name a file in it{remedy}")
    if not folder and file.exists() and not file.is_file():
        raise OSError(f"{path} cannot be written: it is a device or a pipe, name a file{remedy}")
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: there is no folder {place}{remedy}")
    try:
        with tempfile.TemporaryFile(dir=place) as f:
            f.write(b"0")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror} in {place.resolve()}{remedy}") from None
    return path


# ---- devices ----

def parse_device(text, flag="--device"):
    """"auto" -> cuda where there is one, else mps (Apple's GPUs), else cpu. ValueError if it holds no values here."""
    import torch
    if text == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else apple)
    with suppress(RuntimeError, AssertionError, ImportError, TypeError):    # one for each kind that is not there
        if not torch.empty(0, device=text).is_meta:
            return torch.device(text)
    raise ValueError(f"{flag} {text} is not available here: use cpu, or cuda on a machine with a GPU")


def steady(model):
    """One CPU thread for a small network, unless OMP_NUM_THREADS says otherwise: more are hardly faster, and beside
    other programs they wait for one another, spinning, many times longer than the work takes."""
    import torch
    if small(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model


def keep_memory():
    """Let glibc keep what is freed, up to 1.25 GB of it in huge pages: a small network on a CPU spends a tenth of its
    time, on a virtual machine whose host is busy half of it, on getting every activation from the system in pages of
    4 KB and on finding them (docs/log.md)."""
    with suppress(OSError, AttributeError):     # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        if counted():
            return
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        # all threads share one heap, which grows by 1 GB and does not shrink; nothing is mapped apart from it
        for option, value in KEEP.items():
            libc.mallopt(option, value)
        start = libc.malloc(ctypes.c_size_t(1 << 28))
        libc.free(ctypes.c_void_p(start))
        if start:
            first, end = start + HUGE_PAGE - 1 & -HUGE_PAGE, libc.sbrk(ctypes.c_ssize_t(0))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_HUGEPAGE)


def counted():
    """Whether Linux counts what a process asks for, used or not (ulimit -v or -d, strict overcommit): then a heap that
    asks for a gigabyte at a time is refused it long before memory is short."""
    import resource  # Windows has none
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    return strict or any(limit != resource.RLIM_INFINITY for limit in limits)


def open_files():
    """Let this process have as many files open as the system allows: each tensor that a loader process hands over takes
    one, a batch of real images some hundreds, and often no more than 1024 are given."""
    with suppress(ImportError, OSError, ValueError):        # Windows has none; a system that counts otherwise
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def small(model):
    """Whether a network is on the CPU and so small that one thread serves it best."""
    weights = list(model.parameters())
    return weights[0].device.type == "cpu" and sum(p.numel() for p in weights) < 5e7


def shares(model, processes=0):
    """How many processes predict with a network side by side: one per core for a small one, unless told otherwise.

    ValueError for several where each would need its own copy of the weights: on a GPU, or where processes cannot fork.
    """
    forks = sys.platform == "linux" and next(model.parameters()).device.type == "cpu"
    if processes > 1 and not forks:
        raise ValueError(f"--processes {processes} is for the CPU under Linux: leave it out here")
    return processes or (cores() if forks and small(model) else 1)


def has_bf16(device):
    """Whether it is a GPU that has bfloat16 itself (T4 and V100 emulate it, slowly)."""
    import torch
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def half(device):
    """The autocast context of inference: bfloat16 on GPUs that have it."""
    import torch
    return torch.autocast("cuda", torch.bfloat16, enabled=has_bf16(device))


# ---- tables ----

def markdown(rows, columns):
    """[{column: text}] -> the lines of a table of those columns that hold anything."""
    columns = [c for c in columns if any(r.get(c) for r in rows)]
    lines = [columns, *([r.get(c, "") for c in columns] for r in rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, "|---" * len(columns) + "|", *body]


# ---- Ctrl-C and its kin ----

STOPS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]    # not every system has the last


def _answer(handler):
    """Let `handler` answer all STOPS but those ignored (SIGHUP under nohup). -> {signal: who answered before}"""
    heard = [s for s in STOPS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    return {s: signal.signal(s, handler) for s in heard}


@contextmanager
def on_stop(handler):
    """While the block runs, Ctrl-C, SIGTERM and SIGHUP call handler(number, frame)."""
    before = _answer(handler)
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _leave(*_):
    """At once, without a traceback: every file is written under another name first, so what is on disk is whole."""
    os.write(2, f"{COMMAND.name}: interrupted\n".encode())
    os._exit(130)


@contextmanager
def interruptible():
    """While the block runs, a stop is a KeyboardInterrupt, also where a library turns that into an error of its own."""
    stopped = []

    def interrupt(*_):
        stopped.append(True)
        _answer(_leave)     # what is going on may tidy up, but is not waited for when asked a second time
        raise KeyboardInterrupt

    with on_stop(interrupt):
        try:
            yield
        except Exception:
            if stopped:
                raise KeyboardInterrupt from None
            raise


def note_stop(stops, *_):
    """A handler for `on_stop` that only notes it in the list `stops`; the third time, it is not waited for."""
    stops.append(True)
    if len(stops) > 2:
        _leave()


if COMMAND in COMMANDS or COMMAND.parent == ROOT / "tools":     # still importing, and later on its way out
    _answer(_leave)
    if not multiprocessing.parent_process():
        gc.disable()    # until `run`: to look for garbage among what imports make costs a tenth of their time


# ---- several processes as one ----

def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def spread(work, world_size):
    """work(rank) in `world_size` processes at once, rank 0 in this one -> [what each returned].

    On the CPU several processes of one thread each do not collapse when other programs run beside them, as one process
    of several threads does: threads that wait for each other spin. `work` is a function that can be pickled.
    The other processes leave Ctrl-C to this one and never outlive it. A mistake in one of them is raised here as
    ValueError, its death as ChildProcessError.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")     # they meet right here
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    others = {}
    for rank in range(1, world_size):
        here, there = context.Pipe(False)
        process = context.Process(target=_other, args=(work, rank, there, os.getpid()))
        process.start()
        there.close()
        others[process] = here
    try:
        try:
            first = work(0)
        except RuntimeError:    # what a collective raises when a peer is gone: the peer knows the reason
            for process, pipe in others.items():
                _report(process, pipe, 1)
            raise
        return [first, *(_report(process, pipe, None) for process, pipe in others.items())]
    finally:
        for process in others:
            process.kill()
            process.join()


@contextmanager
def one_voice(rank):
    """While the block runs, only the first of several processes tells notices; what it raises is told by whoever
    catches it."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if rank else nullcontext():
        yield


def _report(process, pipe, patience):
    """What a process of `spread` returned; None if it says nothing within `patience` seconds (None: for ever)."""
    if not pipe.poll(patience):
        return None
    try:
        well, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise ChildProcessError(f"{process.name} {end(process)}: go on with --processes 1") from None
    if well is False:
        raise ValueError(result)
    return result


def end(process):
    """How a process of multiprocessing ended that left no word."""
    process.join()
    if process.exitcode < 0:        # by a signal
        return f"ended with exit code {process.exitcode} before it was done, perhaps for lack of memory"
    return "ended before it was done, with the error above"


def _other(work, rank, pipe, parent):
    """The life of a process of `spread`."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: the kernel ends it with its parent
        if os.getppid() != parent:
            os._exit(1)
    try:
        with watch_loaders():
            told = True, work(rank)
    except (ValueError, OSError, FloatingPointError) as error:
        told = False, str(error)
    except RuntimeError as error:       # a collective whose peer is gone; if it is anything else, rank 0 fails alike
        told = None, str(error)
    pipe.send_bytes(pickle.dumps(told))     # by value: pipe.send would share tensors by files that end with the sender


TOO_MANY = "too many files are open, for what loader processes hand over: allow more by ulimit -n"
LOADERS = {     # part of what is raised: what it means
    "DataLoader worker (pid":
        "a loader process died, perhaps for lack of memory or of room in /dev/shm: make more of it",
    "ancdata": TOO_MANY, "Too many open files": TOO_MANY}


@contextmanager
def watch_loaders():
    """While the block runs, a loader process that dies, or hands over more than this one can take, is a
    ChildProcessError with a remedy: torch raises wherever the program is."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        told = next((told for sign, told in LOADERS.items() if sign in str(error)), None)
        if told is None or isinstance(error, ChildProcessError):    # which this has raised
            raise
        flag = ", or load in one process by --workers 0" if "[--workers " in Parser.usage_at_hand else ""
        raise ChildProcessError(f"{told}{flag} ({error})") from None


# ---- the frame of every command ----

# less of each takes less memory; and so do these
SMALLER = "--size", "--rows", "--micro", "--processes"
SAVING = "--checkpointing", "--optimizer adam-bf16", "--frozen bf16", "--vae-slicing", "--vae-tiling"
PLAIN = {"↓": "v", "↑": "^", "±": "+-"}


def _plain(error):
    """For a stdout that is not UTF-8: stand-ins for what tables are made of, a question mark for other characters."""
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start:error.end]), error.end


codecs.register_error("plain", _plain)


def less_memory(python=""):
    """What to do about a lack of memory: the flags that help, of those that the command at hand has; `python` where
    there is none, but a program of one's own."""
    if python and not Parser.usage_at_hand:
        return python
    words = Parser.usage_at_hand.replace("[", " ").replace("]", " ").split()
    remedies = ["use smaller images"]
    for verb, flags in ("lower", SMALLER), ("add", SAVING):
        if has := [flag for flag in flags if flag.split()[0] in words]:
            remedies.append(f"{verb} {' or '.join(has)}")
    return ", or ".join(remedies)


def run(main):
    """Call main(). -> exit code: what it returns, or 2 after a mistake and 130 after a stop, both told in one line."""
    import torch
    from safetensors import SafetensorError
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="plain")
    keep_memory()
    open_files()
    if not gc.isenabled():
        gc.freeze()     # what was imported stays to the end: not to be looked through again
        gc.enable()
    code, told = 2, ""
    try:
        with interruptible(), watch_loaders():
            return main() or 0
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        if os.environ.get("TRACEBACK"):     # for who writes a reader of their own, say
            raise
        told = error
    except torch.OutOfMemoryError as error:
        told = f"out of GPU memory: {less_memory()} ({error})"
    except KeyboardInterrupt:
        code, told = 130, "interrupted"
    except Exception as error:
        # the latter is torch's, on the CPU
        if not (isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        told = f"out of memory: {less_memory()} ({error!r})"
    print(f"{COMMAND.name}: {' '.join(str(told).split())}", file=sys.stderr)
    return code
