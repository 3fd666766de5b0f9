"""Files that survive: everything is written under a temporary name, what a run goes on from flushed to disk, and
renamed.

    out/state/         what --resume needs: settings, step, trained weights, Adam's moments
                       (json + safetensors, with a checksum)
    out/state.prev/    the one before, used with a notice if state/ turns out damaged

Nothing is pickled. Nothing random has a state: what step s sees (data.Mixture) and draws (train.optimizer_step)
follows from (seed, s) alone.
"""
import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# ---- json ----

KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
         float: "a number", None: "null"}


def misfit(value, shape, name="it"):
    """What of a parsed json is not as its shape says, as a phrase; "" if all is.

    shape: dict, list, str, bool, int, float (takes whole numbers too) or None; {"key": shape, ...}, an object with at
    least these keys; {str: shape}, an object with any keys; [shape], a list of such; [shape, shape], a list of so many;
    (shape, shape), one of them. What may be None may also be missing.
    """
    if isinstance(shape, tuple):
        reasons = [misfit(value, one, name) for one in shape]
        return reasons[-1] if all(reasons) else ""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    fits = type(value) in (int, float) if kind is float else type(value) is (kind or type(None))
    if not fits:
        found = "missing or null" if value is None else json.dumps(value)[:40]
        return f"{name} is {found}, expected {KINDS[kind]}"
    parts = []
    if isinstance(shape, dict):
        inside = dict.fromkeys(value, shape[str]) if str in shape else shape
        parts = [(value.get(key), one, key if name == "it" else f"{name}.{key}") for key, one in inside.items()]
    elif isinstance(shape, list):
        inside = shape * len(value) if len(shape) == 1 else shape
        if len(inside) != len(value):
            return f"{name} has {len(value)} entries, expected {len(inside)}"
        parts = [(one, inner, f"{name}[{i}]") for i, (one, inner) in enumerate(zip(value, inside, strict=True))]
    return next(filter(None, (misfit(*part) for part in parts)), "")


def _parse(text, shape, where, remedy):
    """The value of a json text; ValueError says what is wrong with it, where, and what to do."""
    try:
        value = json.loads(text)
        reason = misfit(value, shape)
    except (ValueError, RecursionError) as error:
        reason = error
    if reason:
        raise ValueError(f"{where} is damaged, or of another program ({reason}): {remedy}")
    return value


def read_json(path, absent, shape=dict, remedy="delete it, or restore it from a copy"):
    """The parsed file, checked against its `shape` (misfit says how to write one).

    FileNotFoundError(absent) if there is none; another OSError or ValueError names the file, what is wrong with it, and
    the remedy.
    """
    try:
        text = Path(path).read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):     # the latter where its folder is a file
        raise FileNotFoundError(absent) from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder: {remedy}") from None
    except PermissionError:
        raise PermissionError(f"{path} may not be read: ask its owner for the right to (chmod +r)") from None
    return _parse(text, shape, path, remedy)


def read_lines(path, shape=dict):
    """The values of a .jsonl file, one a line, each checked against `shape`; [] if there is no file.

    A last line that a kill cut short is left out; ValueError names any other that is damaged.
    """
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    if lines:
        try:
            json.loads(lines[-1])
        except ValueError:
            del lines[-1]
    return [_parse(line, shape, f"{path}, line {n},", "delete this line") for n, line in enumerate(lines, 1)]


SETTINGS = {"stage": int, "steps": int, "batch": int, "seed": int}     # of a run, at least these
CONFIG = {"train": (None, SETTINGS), "stage1": (None, SETTINGS), "size": (None, [int, int]), "held_out": (None, dict),
          "imported": (None, {"base": str}), "tasks": (None, [str]), "palette": (None, str), "step": (None, int),
          "files": (None, dict)}
SCALER = {"scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": int,
          "_growth_tracker": int}       # of torch's GradScaler
STATE = {"train": SETTINGS, "stage1": (None, SETTINGS), "step": int, "crc32": int, "scaler": (None, SCALER),
         "files": (None, {str: (str, None)})}
STATES = "state", "state.tmp", "state.prev"     # newest first; .tmp: complete, but killed before its renaming
RELEASED_SIZE = [288, 384]      # H x W of Hypersim's training images: the size of imported weights, which say none


def read_config(folder):
    """config.json of a checkpoint, with at least "train" and "stage1" (settings of the run, and of the stage 1 it
    started from) and "size" ([H, W]), each None if it is not known or there is no config.json."""
    path = Path(folder) / "config.json"
    unknown = {"train": None, "stage1": None, "size": None}
    config = unknown | (read_json(path, "", CONFIG, "copy the whole checkpoint again") if path.is_file() else {})
    if config.get("imported") and not config["size"]:
        config["size"] = RELEASED_SIZE
    return config


def stage1_settings(folder):
    """Settings of the stage 1 in a checkpoint; None if it does not say (imported weights, no checkpoint)."""
    config = read_config(folder)
    train = config["train"]
    return config["stage1"] if train and train["stage"] == 2 else train


def write_json(path, value):
    """Write in one piece or not at all, also should the power fail; a link stays one. OSError as of `put`."""
    path = Path(path)
    put(path.resolve() if path.is_symlink() else path, json.dumps(value, indent=1).encode(), flush=True)


def put(path, data, flush=False):
    """Write bytes, in one piece or not at all; OSError says which file and why. flush: to the disk before the renaming.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            if flush:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if full else "make it writable"
        raise OSError(f"{path} cannot be written ({error.strerror}): {remedy}; what is finished is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def settle(folder):
    """Force every file of a folder to disk, so that a rename never points at unwritten data; and let those read weights
    whom the umask lets, for safetensors writes them for their owner alone."""
    mask = os.umask(0)      # the only way to see it is to set it
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        if path.suffix == ".safetensors":
            path.chmod(0o666 & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def digest(facts):
    """Eight hexadecimal digits for anything that json can hold."""
    return f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def stamps(paths, top):
    """[(path relative to `top`, bytes, time of its last change)]: what tells, unread, whether files are still the same.
    """
    about = [(path, path.stat()) for path in sorted(paths)]
    return [(path.relative_to(top).as_posix(), s.st_size, s.st_mtime_ns) for path, s in about]


def crc(path):
    """Checksum of a file, read in pieces."""
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _emptied(folder):
    """The folder, made anew."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


ON = "continue with --resume"


def _room(out, error, need, then):
    """The sentence for a write that failed; then: what to do as soon as there is room."""
    free = shutil.disk_usage(out).free
    cause = error.__cause__ or error        # of `put`
    reason = cause.strerror if isinstance(cause, OSError) else cause
    return OSError(f"could not save to {out}: {reason}; about {need / 2**20:.0f} MiB are needed and "
                   f"{free / 2**20:.0f} MiB are free. What was there is untouched: make room, then {then}")


def link(source, target):
    """The file once more, without another copy of its bytes where the system can do that."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


OPTIONAL = "main_unet", "task_attention.safetensors", "stem.safetensors"    # parts that only some models have


def not_ours(out):
    """ValueError if a folder without a checkpoint holds what `save_model` and config.json would replace, a base for
    example, and no training or import was stopped there."""
    begun = state_file(out) or any((Path(out) / name).is_dir() for name in ("model.tmp", "model.new"))
    there = [name for name in ("unet", "vae", "config.json") if (Path(out) / name).exists()]
    if there and not begun:
        raise ValueError(f"{out} holds {' and '.join(there)}, but no checkpoint, which would replace "
                         f"{'it' if len(there) == 1 else 'them'}: name another --out")


def save_model(model, out, frozen=None, then=ON):
    """StableMTL.save into out/, file by file: each is replaced in one step, so that none is ever missing or cut short.
    Parts of an earlier model that this one lacks do not stay.

    While out/model.new exists, some files are of this model and some of the one before: StableMTL.load refuses them.
    """
    out, temporary, complete = Path(out), Path(out) / "model.tmp", Path(out) / "model.new"
    try:
        _emptied(temporary)
        model.save(temporary, **({"frozen": frozen} if frozen else {}))      # only a multi stream has such parts
        settle(temporary)
    except (OSError, SafetensorError) as error:
        need = sum(p.numel() * p.element_size() for p in model.parameters())
        shutil.rmtree(temporary, ignore_errors=True)
        raise _room(out, error, need, then) from None
    shutil.rmtree(complete, ignore_errors=True)
    os.replace(temporary, complete)
    files = [p for p in complete.rglob("*") if p.is_file()]
    for path in sorted(files, key=lambda p: p.name == "model.json"):    # model.json last: it says what is there
        target = out / path.relative_to(complete)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for name in {*OPTIONAL} - {path.relative_to(complete).parts[0] for path in files}:
        shutil.rmtree(out / name, ignore_errors=True)       # of a file it does nothing
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(complete)


def _keep_best(out):
    """out/best of a single stream becomes out/best_stage1, before that of the multi stream takes its place."""
    best, kept = Path(out) / "best", Path(out) / "best_stage1"
    if (best / "model.json").is_file() and not read_json(best / "model.json", "").get("multi"):
        shutil.rmtree(kept, ignore_errors=True)     # of a stage 1 that was replaced since
        os.replace(best, kept)


def save_state(out, about, step, parts, optimizer):
    """Settings, weights and optimizer of a run -> out/state, and the earlier one -> out/state.prev.

    parts: {part: {name: parameter}}, what is trained, in the optimizer's order.
    """
    out, temporary = Path(out), Path(out) / "state.tmp"
    weights = {f"{part}/{name}": p for part, own in parts.items() for name, p in own.items()}
    tensors, names = {f"weight/{name}": p for name, p in weights.items()}, list(weights)
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{names[i]}/{k}": torch.as_tensor(v) for k, v in moments.items()}
    try:
        _emptied(temporary)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "state.json", {**about, "step": step, "crc32": crc(temporary / "state.safetensors")})
        settle(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need, then = sum(t.numel() * t.element_size() for t in tensors.values()), ON if step else "start it again"
        raise _room(out, error, need, then) from None
    if (out / "state").exists():
        shutil.rmtree(out / "state.prev", ignore_errors=True)
        os.replace(out / "state", out / "state.prev")
    os.replace(temporary, out / "state")
    if step == 0:   # what came before belongs to another run
        shutil.rmtree(out / "state.prev", ignore_errors=True)
    if about["train"]["stage"] == 2:
        _keep_best(out)


def state_file(out):
    """state.json of the newest state whose writing was completed; None if there is none, nothing to resume."""
    return next((path for name in STATES if (path := Path(out) / name / "state.json").is_file()), None)


def read_state(out):
    """The newest undamaged state: (what state.json says, {name: tensor}). FileNotFoundError if there is none."""
    unusable = []
    for name in STATES:
        folder = Path(out) / name
        if not folder.is_dir():
            continue
        try:
            about = read_json(folder / "state.json", "no state.json", STATE, "it cannot be continued")
            if crc(folder / "state.safetensors") != about["crc32"]:
                raise ValueError("its checksum differs")
            tensors = load_file(folder / "state.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            unusable.append(f"{folder} is not usable: {error}")
            continue
        if unusable:
            print(f"notice: {'; '.join(unusable)}; continuing from {folder}, step {about['step']}", file=sys.stderr)
        return about, tensors
    raise FileNotFoundError(f"nothing to resume in {out} ({'; '.join(unusable) or 'no state/'}): "
                            "start a run by --stage 1 in its place")


@torch.no_grad()
def restore(tensors, parts, optimizer):
    """Put the tensors of `read_state` in place, parts as in `save_state`; ValueError if they are of another model."""
    weights = {f"{part}/{name}": p for part, own in parts.items() for name, p in own.items()}
    saved = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    moments = {tuple(k.removeprefix("adam/").rsplit("/", 1)): v for k, v in tensors.items() if k.startswith("adam/")}
    differ = (saved.keys() ^ weights.keys()) | {name for name, _ in moments} - weights.keys()
    if differ := sorted(differ) or [name for name, p in weights.items() if saved[name].shape != p.shape]:
        raise ValueError(f"the saved state is of another model (it differs in {', '.join(differ[:4])}): put the base "
                         "back as it was, or train anew with --overwrite")
    for name, p in weights.items():
        p.copy_(saved[name])
    # torch takes the step counts, to where the optimizer wants them; moments it would all convert to the weights'
    # precision before it lets any go: twice their memory where they are bfloat16
    index, counts = {name: i for i, name in enumerate(weights)}, {}
    for (name, moment), value in moments.items():
        if moment == "step":
            counts[index[name]] = {moment: value}
    optimizer.load_state_dict({"state": counts, "param_groups": optimizer.state_dict()["param_groups"]})
    for (name, moment), value in moments.items():
        if moment != "step":    # in the weight's memory format: fused Adam pairs them by their place in memory
            optimizer.state[weights[name]][moment] = torch.empty_like(weights[name], dtype=value.dtype).copy_(value)


def open_log(path, stage, step):
    """log.jsonl, opened to append, without what comes after `step` of this stage: a run was killed, or is redone."""
    entries = [e for e in read_lines(path, {"stage": int, "step": int}) if (e["stage"], e["step"]) < (stage, step)]
    put(path, "".join(json.dumps(e) + "\n" for e in entries).encode())
    return path.open("a", buffering=1)


# ---- one run at a time, or several that know of each other ----

@contextlib.contextmanager
def locked(out):
    """Hold `out` for this process; BlockingIOError says which other one has it. The system lets go when a process ends,
    however it ends, so that no lock is ever stale."""
    path = Path(out) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            raise BlockingIOError(f"another training writes to {out} ({f.read().strip() or 'just started'}): "
                                  "wait for it, stop it, or name another --out") from None
        f.seek(0)
        if before := f.read().strip():
            print(f"notice: the run that had {out} ({before}) has ended without saying so; going on", file=sys.stderr)
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        try:
            yield
        finally:
            f.truncate(0)


@contextlib.contextmanager
def in_turn(folder):
    """While the block runs, no other process is in such a block for this folder: each waits for its turn."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    # not the file of `locked`: to close it once would let go of all locks that this process has on it
    with Path(folder, "cache.lock").open("a") as f:
        fcntl.lockf(f, fcntl.LOCK_EX)       # until the file is closed
        yield


def hold(folder):
    """Keep the folder from `remove_unheld`, together with others that hold it: as long as the returned file is open.

    Both want to be called `in_turn`, so that none removes what another is about to hold.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    f = Path(folder, "lock").open("a+")
    fcntl.flock(f, fcntl.LOCK_SH)
    return f


def remove_unheld(folder):
    """Delete the folder, unless a process holds it."""
    with Path(folder, "lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        shutil.rmtree(folder, ignore_errors=True)


# ---- records: what can be computed again, and is cheaper to read ----

class Records:
    """`count` vectors of `numbers` float16 in one file, each with a checksum: one never finished, or damaged, reads as
    None. A full disk or a file that cannot be written ends the writing with a notice, not the run."""

    def __init__(self, path, count, numbers):
        self.path, self.count, self.bytes = Path(path), count, 2 * numbers
        self.file, self.full = None, False

    def _open(self):
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        return self.file

    def read(self, k):
        """Record k: (numbers,) float16, or None."""
        if not 0 <= k < self.count:
            return None
        data = os.pread(self._open(), self.bytes + 4, k * (self.bytes + 4))
        if len(data) < self.bytes + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        return np.frombuffer(data[:-4], np.float16).copy()

    def write(self, k, vector):
        """Keep a (numbers,) float16 vector as record k, if there is room for it."""
        if self.full or not 0 <= k < self.count:
            return
        data = vector.tobytes()
        try:
            os.pwrite(self._open(), data + zlib.crc32(data).to_bytes(4, "little"), k * (self.bytes + 4))
        except OSError as error:
            print(f"notice: {self.path} keeps no more ({error.strerror}); what is missing is computed anew each time",
                  file=sys.stderr)
            self.full = True
