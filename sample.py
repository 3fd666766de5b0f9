"""Predict every map of photos, pairs of frames, folders, animations and videos: pictures to look at, arrays to use.

    python sample.py --ckpt out/ photo.jpg               one image; motion needs a second frame and is skipped
    python sample.py --ckpt out/ photo.jpg next.jpg      two images: a frame and the one after it
    python sample.py --ckpt out/ a.png b.png c.png       three or more: the frames of one sequence, in this order
    python sample.py --ckpt out/ folder/                 numbered images (x_07.png, x_08.png) are frames of a sequence
    python sample.py --ckpt out/ clip.mp4 --stride 2     a video or an animated GIF: its frames are a sequence
    python sample.py --toy real:3                        a test sample of a toy world, labels beside predictions
    python sample.py --testset toy|<root>                whole test sets, as files for evaluate.py --predictions

Each frame of a sequence is paired with the next one; the last has none, so its motion is skipped. --single: nothing is
a sequence. Each input gets a folder <output>/<file name without ending>/ (a video: one per frame,
<output>/<name>/<frame number>/) with <task>.png, <task>.npy, panel.png, which shows them all, and made_from.json. What
is there already of the same input, checkpoint and settings is not computed again unless --overwrite is given; another
input of the same name gets <name>-2. Arrays come in other --format, too (docs/predictions.md): <task>.flo, <task>.exr,
<task>.values.png, each with a .json that says what its numbers are.
"""
import argparse
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, count, islice, zip_longest
from pathlib import Path

from cli import Parser, parse_device, run, steady, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import infer
import predictions
from baselines import load as load_model
from checkpoint import put, read_config, read_json
from draw import COMPARED, attention_table, cell, compare, draw_attention, draw_panel
from evaluate import choose, place, test_sets
from infer import as_array, check_pair, restore
from loading import checkpoint_folder
from metrics import aligned
from readers.exports import FORMATS, fits, parse_formats, save
from readers.media import IMAGES, VIDEOS, frame_reader, read_image
from readers.toyworld import WORLDS, ToyWorld
from tasks import CLASSES, TASKS, parse_tasks

# ---- what there is to predict ----

@dataclass
class Input:
    """One frame, and the next one where there is one: functions that read them, so that a list of inputs is small."""
    source: str                        # the file's absolute path: what tells inputs of one name apart
    name: str                          # folder below --output
    image: Callable                    # () -> (H,W,3) uint8
    next: Callable | None = None       # the same
    frame: str = ""                    # of a video or animation: folder below that
    truth: dict | None = None          # "labels" and "valid" of a toy sample


def _stills(paths, read, linked):
    """An Input for each image, where `linked` with the one after it."""
    return [Input(str(p.resolve()), p.stem, partial(read, p), partial(read, after) if after else None)
            for p, after in zip_longest(paths, paths[1:] if linked else ())]


def _frames(path, read, stride, linked):
    """Yield an Input for each frame of a video or animation. If that is damaged, a last one says so when it is read."""
    def one(number, frame, after=None):
        later = None if after is None else lambda: after
        return Input(str(path.resolve()), path.stem, lambda: frame, later, f"{number:06d}")

    def fail():
        raise damage

    now, damage = None, None
    try:
        for number, frame in read(path, stride):
            if now:
                yield one(*now, frame if linked else None)
            now = number, frame
    except ValueError as error:
        damage = error
    if now:
        yield one(*now)
    if damage:
        yield Input(str(path.resolve()), path.stem, fail, fail)


def _runs(folder):
    """Images and videos of a folder in natural order: [(None, images) or (what reads its frames, [video]), ...].

    Numbered images that follow one another share a list, any other is alone. Other files are named on stderr.
    """
    seen = [p for p in folder.iterdir() if not p.name.startswith(".")]
    paths = [p for p in seen if p.is_file() and p.suffix.lower() in IMAGES + VIDEOS]
    others = sorted(p.name for p in set(seen) - set(paths))
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: expected files that end in {', '.join(IMAGES)}")
    if others:
        names = ", ".join(others[:8]) + ", ..." * (len(others) > 8)
        print(f"{folder}: {len(others)} other files left out: {names}", file=sys.stderr)

    def natural(path):
        return [int(x) if x.isdecimal() else x for x in re.split("([0-9]+)", path.stem.lower())], path.name

    runs, expected = [], None
    for path in sorted(paths, key=natural):
        stem, number = re.fullmatch("(.*?)([0-9]*)", path.stem, re.DOTALL).groups()
        moving = frame_reader(path)
        if number and not moving and (stem, int(number)) == expected:
            runs[-1][1].append(path)
        else:
            runs.append((moving, [path]))
        expected = (stem, int(number) + 1) if number and not moving else None
    return runs


def find(paths, single=False, stride=1):
    """An Input for everything the paths name (rules: top of this file): a list, or an iterator if anything moves.

    FileNotFoundError if a path does not exist or a folder holds no image.
    """
    paths = [Path(p) for p in paths]
    for p in paths:
        if not p.exists():
            raise FileNotFoundError(f"no file or folder {p}: check the path")
    read = lru_cache(2)(read_image)     # a pair's second frame is the next pair's first
    runs = [run for p in paths for run in (_runs(p) if p.is_dir() else [(frame_reader(p), [p])])]
    moving = any(reader for reader, _ in runs)
    if not (single or moving or any(p.is_dir() for p in paths)):
        if len(paths) == 2:
            return _stills(paths, read, True)[:1]
        runs = [(None, paths)]
    parts = [_frames(*run, reader, stride, not single) if reader else _stills(run[::stride], read, not single)
             for reader, run in runs]
    inputs = chain.from_iterable(parts)
    return inputs if moving else list(inputs)


def toy(text):
    """"real:3" -> the Input of that sample of the toy world's test split, with all labels."""
    name, _, index = text.partition(":")
    world = ToyWorld(name, "test", all_labels=True)
    if not index.isdecimal() or int(index) >= len(world):
        raise ValueError(f"--toy {text}: expected world:number with a number from 0 to {len(world) - 1}, "
                         f"for example {name}:3")
    sample = world.load(int(index), world.tasks)
    return Input(f"toy world {text}", f"{name}-{index}", lambda: sample["image"], lambda: sample["next"], truth=sample)


# ---- from frames to maps ----

def read_frames(item):
    """[image] or [image, next] of an Input, each (H,W,3) uint8. ValueError if one is unreadable or of another size."""
    frames = [read() for read in (item.image, item.next) if read]
    check_pair(frames, item.name, " (or --single)")
    return frames


def predict(model, frames, tasks, args):
    """({task: (1,C,h,w) at the network's size}, attention table or None); errors: infer.predict."""
    model.attention_log = [] if args.attention else None
    maps = infer.predict(model, *([f] for f in frames), tasks=tasks, size=args.size, rows=args.rows)
    return maps, attention_table(model.attention_log, model.tasks) if args.attention else None


# ---- what is written ----

MADE_FROM = {"input": str, "key": (None, str), "files": (None, [str])}


def made_from(folder):
    """What `write` noted in a folder: (input, key, names of the files); None, None and none if nothing is legible."""
    note = {}
    with suppress(OSError, ValueError):
        note = read_json(folder / "made_from.json", "", MADE_FROM)
    return note.get("input"), note.get("key"), set(note.get("files") or ())


def own_folder(output, item, taken):
    """The folder of an Input: <output>/<name>, or <name>-2, ... where that is another's; taken: {folder: source}."""
    for n in count(1):
        top = output / (item.name if n == 1 else f"{item.name}-{n}")
        if top not in taken:
            taken[top] = made_from(top)[0] or item.source
        if taken[top] == item.source:
            return top / item.frame


def fingerprint(frames, settings):
    """Eight hexadecimal digits for what maps follow from."""
    facts = [settings, [(f.shape, zlib.crc32(np.ascontiguousarray(f))) for f in frames]]
    return f"{zlib.crc32(json.dumps(facts).encode()):08x}"


def finished(folder, key, files):
    """Are these files there, made with this fingerprint?"""
    _, before, there = made_from(folder)
    return before == key and all(f in there and (folder / f).is_file() for f in files)


def put_made(path, save, *args):
    """What save(file, *args) writes."""
    buffer = io.BytesIO()
    save(buffer, *args)
    put(path, buffer.getvalue())


def put_json(path, value):
    put(path, json.dumps(value, indent=1).encode())


def array_name(task, form):
    """The file of a map in one of exports.FORMATS: <task>.png is its picture already."""
    return f"{task}.values.png" if FORMATS[form] == ".png" else f"{task}{FORMATS[form]}"


def array_files(tasks, forms):
    """Names of the arrays of these tasks, where a form fits."""
    return [array_name(t, form) for t in tasks for form in forms if fits(TASKS[t], form)]


def write(folder, item, key, frames, maps, table=None, forms=("npy",)):
    """The maps {task: (1,C,h,w)} of an Input with its frames, 1 or 2 of (H,W,3) uint8, and table: attention. forms: of
    the arrays, of exports.FORMATS.

    Without made_from.json, which comes last, an input is not finished. Maps of another input or checkpoint do not stay.
    """
    (_, before, there), size = made_from(folder), frames[0].shape[:2]
    arrays = array_files(TASKS, FORMATS)
    ours = {"panel.png", "attention.png", "attention.json", *(f"{t}.png" for t in TASKS), *arrays,
            *(f"{name}.json" for name in arrays)}
    files = ours & there if before == key else set()
    folder.mkdir(parents=True, exist_ok=True)
    for name in {"made_from.json"} | ours - files:
        (folder / name).unlink(missing_ok=True)
    if item.frame:      # the frames' common folder belongs to this video, too
        put_json(folder.parent / "made_from.json", {"input": item.source})
    cells = [(name, cell(f)) for name, f in zip(("image", "second frame"), frames, strict=False)]
    for t, x in maps.items():
        task, x = TASKS[t], restore(x, TASKS[t], size)[0]
        picture = task.colour(x, torch.ones(size, dtype=torch.bool))
        put_made(folder / f"{t}.png", Image.fromarray(picture).save, "PNG")
        for form in (form for form in forms if fits(task, form)):
            save(folder / array_name(t, form), as_array(x, task), task, form)
        if item.truth:
            label = torch.from_numpy(item.truth["labels"][t]).permute(2, 0, 1)
            valid = torch.from_numpy(item.truth["valid"][t])
            cells += compare(task, label, valid, aligned(task, x, label, valid))
        else:
            cells.append((t, cell(picture)))
    if table:
        put_json(folder / "attention.json", table)
        put_made(folder / "attention.png", draw_attention(table).savefig)
    panel = draw_panel(cells, 4 if item.truth else 3, [TASKS[t] for t in maps], COMPARED if item.truth else "")
    put_made(folder / "panel.png", panel.save, "PNG")
    files = sorted(files | {name for name in ours if (folder / name).is_file()})
    put_json(folder / "made_from.json", {"input": item.source, "key": key, "files": files})


# ---- command line ----

def parse(argv):
    def kind(task):
        shape = "(H,W)" if task.channels == 1 else f"(H,W,{task.channels})"
        return f"{shape} {'uint8' if task.categorical else 'float32'}"

    units = "\n".join(f"  {t.name + '.npy':18}{kind(t):17}{t.unit}" for t in TASKS.values())
    classes = ", ".join(f"{i} {c}" for i, c in enumerate(CLASSES))
    parser = Parser(description=__doc__, epilog=f"arrays, at the size of the input:\n{units}\nclasses: {classes}",
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("paths", nargs="*", metavar="path", help="images, folders, videos, animations")
    flag("--toy", metavar="WORLD:N", help=f"sample N of the test split of a toy world: {', '.join(WORLDS)}")
    flag("--ckpt", help="folder written by train.py, or a hub id (default: out, else the trained toy model)")
    flag("--testset", metavar="ROOT", help="predict the test sets under a root, or `toy`, as evaluate.py does, into "
         "<output>/<dataset>/<task>/<sample>.npy: no pictures; evaluate.py --predictions scores them")
    flag("--split", choices=("val", "test"), help="which held-out part of --testset (default: test)")
    flag("--output", "--out", type=partial(writable, folder=True), help="folder of the results (default: samples, of "
         "--testset: predictions)")
    flag("--format", default="npy", help=f"of the arrays, comma-separated: {', '.join(FORMATS)}, each for the "
         "tasks that it fits (default: %(default)s; docs/predictions.md)")
    flag("--overwrite", action="store_true", help="compute finished inputs again")
    flag("--stage", type=int, choices=(1, 2), help="which stage of the checkpoint (default: 2 where it exists)")
    flag("--tasks", default="all", help="comma-separated (default: all that the checkpoint knows)")
    flag("--single", action="store_true", help="the images or frames are unrelated: no second frames")
    flag("--stride", type=whole(1), default=1, help="use every STRIDE-th frame of a sequence (default: 1)")
    flag("--limit", type=whole(1), help="at most this many inputs, or samples of each test set")
    flag("--size", type=whole(0, 16384), help="longer side in pixels that the network sees; 0 = the input's own "
         "(default: the shorter side as in training); smaller is faster and needs less memory")
    flag("--rows", type=whole(1), help="tasks that pass the UNet at once (default: all); 1 needs least memory")
    flag("--decoder", help="folder or hub id of an AutoencoderTiny that decodes in the VAE's place: faster "
         "(tools.distil makes one)")
    flag("--vae-slicing", action="store_true", help="decode one map at a time: less memory, same results")
    flag("--vae-tiling", action="store_true", help="encode and decode large images in overlapping tiles: much less "
         "memory, faint seams")
    flag("--device", default="auto", help="cpu, cuda (in bfloat16) or mps (default: a GPU where there is one)")
    flag("--attention", action="store_true", help="also write attention.png, .json: which tasks a task attends to")
    flag("--skip-bad", action="store_true", help="name, skip and count unreadable inputs instead of stopping there")
    return parser.parse_args(argv)


def load(args):
    """(model, the tasks asked for); args.ckpt becomes the folder of its checkpoint."""
    args.device = parse_device(args.device)
    wanted, args.ckpt = parse_tasks(args.tasks), checkpoint_folder(args.ckpt)
    model = steady(load_model(args.ckpt, args.stage, args.device))
    if args.decoder:
        model.use_decoder(args.decoder)
    tasks = [t for t in model.tasks if t in wanted]
    if args.tasks != "all" and len(tasks) < len(wanted):
        raise ValueError(f"--tasks {args.tasks}: the checkpoint in {args.ckpt} knows only {', '.join(model.tasks)}")
    if args.attention and model.main is None:
        raise ValueError(f"--attention needs stage 2, and {args.ckpt} gave stage 1: train stage 2, or drop --stage 1")
    if args.vae_slicing:
        (model.decoder or model.vae).enable_slicing()
    if args.vae_tiling:
        model.vae.enable_tiling()
    return model, tasks


def predict_testset(args):
    """What --testset asks for, written; returns 130 if stopped, else 0."""
    idle = {"paths": [], "--toy": None, "--single": False, "--stride": 1, "--size": None, "--attention": False}
    if wrong := [name for name, default in idle.items() if vars(args)[name.strip("-")] != default]:
        raise ValueError(f"{' and '.join(wrong)} would do nothing here: --testset takes images, order and size from "
                         "the test sets")
    model, asked = load(args)
    forms, split = parse_formats(args.format, [TASKS[t] for t in asked]), args.split or "test"
    config, whose, output = read_config(args.ckpt), str(args.ckpt), Path(args.output or "predictions")
    home = place((config["train"] or {}).get("data"))
    data, size = choose(args.testset, home, config["size"], whose)
    readers = test_sets(data, size, split, asked, whose)
    key = f"{zlib.crc32(json.dumps(settings(args, model)).encode()):08x}"
    predictions.begin(output, {"data": data, "split": split, "size": size and list(size), "checkpoint": whose,
                               "stage": 2 if model.multi else 1, "key": key}, args.overwrite)
    tally, skipped = Counter(), []
    try:
        for reader in readers:
            done, bad = predictions.write(model, reader, asked, output, forms, 16 if data == "toy" else 1, args.rows,
                                          args.limit, args.skip_bad)
            tally += done
            skipped += bad
    except KeyboardInterrupt:
        print(f"\nstopped: what is finished is in {output}; the same command does the rest", file=sys.stderr)
        return 130
    for sentence in skipped:
        print(f"skipped: {sentence}", file=sys.stderr)
    print(f"{tally['done']} samples of {', '.join(r.name for r in readers)} predicted, {tally['kept']} kept, "
          f"{len(skipped)} skipped; in {output}, score them with: python evaluate.py --predictions {output}"
          + f" --split {split}" * (split != "test"))
    return 0


def settings(args, model):
    """What maps follow from beside their frames, as json; weights by size and time, since checksums would take long."""
    def stated(folder, *patterns):
        files = sorted(p for pattern in patterns for p in Path(folder).glob(pattern))
        return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    weights = stated(args.ckpt, "model.json", "*.safetensors", "*/*model*.safetensors")
    decoder = [args.decoder, stated(args.decoder, "*")] if args.decoder else []
    return [weights, model.multi is None, args.size, model.size, args.vae_tiling, args.device.type, *decoder]


def main(argv=None):
    """Predict what the command line names. Returns 130 if stopped, else 0; ValueError, OSError: a user's mistake."""
    args = parse(argv)
    if args.testset:
        return predict_testset(args)
    if args.split:
        raise ValueError(f"--split {args.split} chooses among test sets: it goes with --testset only")
    if bool(args.paths) == bool(args.toy):
        raise ValueError("nothing to predict, or too much: give images, folders or a video, or else --toy real:3, "
                         "or --testset toy")
    inputs = [toy(args.toy)] if args.toy else find(args.paths, args.single, args.stride)
    inputs = inputs[:args.limit] if isinstance(inputs, list) else islice(inputs, args.limit)
    model, asked = load(args)
    forms = parse_formats(args.format, [TASKS[t] for t in asked])
    output, taken, tally, common = Path(args.output or "samples"), {}, Counter(), settings(args, model)
    bar = tqdm(inputs, unit="input", disable=None)
    try:
        for item in bar:
            tasks, folder = [t for t in asked if TASKS[t].frames == 1 or item.next], own_folder(output, item, taken)
            if not tasks:
                tally["motionless"] += 1
                continue
            try:
                frames = read_frames(item)
            except (OSError, ValueError) as error:
                if not args.skip_bad:
                    raise
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                tally["bad"] += 1
                continue
            tally["motionless"] += len(tasks) < len(asked)
            key = fingerprint(frames, common)
            files = ["panel.png", *array_files(tasks, forms), *["attention.json"] * args.attention]
            if not args.overwrite and finished(folder, key, files):
                tally["kept"] += 1
                continue
            write(folder, item, key, frames, *predict(model, frames, tasks, args), forms)
            tally["done"] += 1
    except KeyboardInterrupt:
        done = tally["done"] + tally["kept"]
        print(f"\nstopped: {done} finished in {output}; the same command does the rest", file=sys.stderr)
        return 130
    finally:
        bar.close()
    motion = ", ".join(t for t in asked if TASKS[t].frames == 2)
    if not tally["done"] + tally["kept"] + tally["bad"]:
        raise ValueError(f"nothing to predict: {motion} need a second frame and no input has one; "
                         "give two images, a sequence or a video")
    alone = tally["done"] + tally["kept"] == 1 and not tally["bad"]
    print(f"{tally['done']} predicted, in {folder / 'panel.png' if alone else output}")
    for what, text in (("kept", "already finished, kept (--overwrite computes them again)"),
                       ("bad", "unreadable, skipped"), ("motionless", f"without a second frame: {motion} skipped")):
        if tally[what]:
            print(f"{tally[what]} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
