"""Predict every map of photos, pairs of frames, folders, animations and videos: pictures to look at, arrays to use.

    python sample.py --ckpt out/ photo.jpg               one image; motion needs a second frame and is skipped
    python sample.py --ckpt out/ photo.jpg next.jpg      two images: a frame and the one after it
    python sample.py --ckpt out/ a.png b.png c.png       three or more: the frames of one sequence, in this order
    python sample.py --ckpt out/ folder/                 numbered images (x_07.png, x_08.png) are frames of a sequence
    python sample.py --ckpt out/ clip.mp4 --stride 2     a video or an animated GIF: its frames are a sequence
    python sample.py --ckpt out/ clip.mp4 --video        also a film of each task, in colours that hold throughout
    python sample.py --toy real:3                        a test sample of a toy world, labels beside predictions
    python sample.py --testset toy|<root>                whole test sets, as files for evaluate.py --predictions

Each frame of a sequence is paired with the next one; the last has none, so its motion is skipped. --single: nothing is
a sequence. Each input gets a folder <output>/<file name without ending>/ (a video: one per frame,
<output>/<name>/<frame number>/) with <task>.png, <task>.npy, panel.png, which shows them all, and made_from.json. What
is there already of the same input, checkpoint and settings is not computed again unless --overwrite is given; where
something else has that name, <name>-2 is taken. Arrays come in other --format, too (docs/predictions.md): <task>.flo,
<task>.exr, <task>.values.png, each with a .json that says what its numbers are. Films come to <output>/<name of the
video>/ or <output>/<first>_to_<last image>/.
"""
import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from shlex import quote

from cli import Parser, number, parse_device, run, steady, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
from tqdm import tqdm

from baselines import load as load_model
from checkpoint import crc, digest, read_config, stamps
from draw import attention_table
from evaluate import choose, data_name, test_sets
from inference import infer, predictions
from inference.infer import LARGEST, check_pair, in_pixels, restore, restore_confidence
from inference.photometric import Camera
from inference.report import source_files, weight_files
from inference.results import Result, array_files, fingerprint, finished, own_folder, write
from inference.video import Place, check_film, write_clips
from network.loading import checkpoint_folder, read_model_json
from readers.exports import FORMATS, fits, parse_formats
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
        parts = re.split("([0-9]+)", path.stem.lower())
        return [int(x) if x.isascii() and x.isdecimal() else x for x in parts], path.name

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


def _check_once(paths):
    """ValueError if two of them are one file of one name: the later maps would take the place of the earlier ones."""
    known = set()
    for p in paths:
        if (p.stem, p.resolve()) in known:
            raise ValueError(f"{p} comes twice, and its maps have one folder: name it once, or a copy of another name")
        known.add((p.stem, p.resolve()))


def find(paths, single=False, stride=1):
    """An Input for everything the paths name (rules: top of this file): a list, or an iterator if anything moves.

    FileNotFoundError if a path does not exist or a folder holds no image; ValueError if a file comes twice.
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
    _check_once(chain.from_iterable(run for _, run in runs))
    parts = [_frames(*run, reader, stride, not single) if reader else _stills(run[::stride], read, not single)
             for reader, run in runs]
    inputs = chain.from_iterable(parts)
    return inputs if moving else list(inputs)


def toy(args, single=False):
    """--toy as an Input: a sample of a toy world's test split with all labels, of the size of the images that the
    checkpoint was trained on; single: without its second frame. args.ckpt becomes its folder."""
    name, _, index = args.toy.partition(":")
    world = ToyWorld(name, "test", all_labels=True)
    if not index.isdecimal() or int(index) >= len(world):
        raise ValueError(f"--toy {args.toy}: expected world:number with a number from 0 to {len(world) - 1}, "
                         f"for example {name}:3")
    args.ckpt = checkpoint_folder(args.ckpt)
    world.size = tuple(read_config(args.ckpt)["size"] or world.size)
    sample = world.load(int(index), world.tasks)
    title = f"toy world {args.toy}"
    after = None if single else lambda: sample["next"]
    return Input(title, f"{name}-{index}", lambda: sample["image"], after, truth=sample)


# ---- from frames to maps ----

def read_frames(item, skip_bad=False):
    """(Input, its frames): [image] or [image, next], each (H,W,3) uint8. ValueError if one is unreadable or of another
    size; with skip_bad an image whose next one is has none instead, and a line on stderr says why."""
    try:
        frames = [read() for read in (item.image, item.next) if read]
        check_pair(frames, item.name, " (or --single)")
    except (OSError, ValueError) as error:
        if not (skip_bad and item.next):
            raise
        alone = read_frames(replace(item, next=None))
        tqdm.write(f"{item.name} without its next frame: {error}", file=sys.stderr)
        return alone
    return item, frames


def predict(model, frames, tasks, args):
    """The Result of one or two frames; errors: infer.predict."""
    model.attention_log = [] if args.attention else None
    maps, certain = infer.predict(model, *([f] for f in frames), tasks=tasks, size=args.size, rows=args.rows,
                                  confidence=args.confidence)
    table = attention_table(model.attention_log, model.tasks) if args.attention else None
    size, fits = frames[0].shape[:2], {}
    maps = {t: restore(x, TASKS[t], size)[0] for t, x in maps.items()}
    if args.pixels and len(frames) == 2:
        maps, fits = in_pixels(maps, frames, args.camera)
    return Result(maps, {t: restore_confidence(x, size)[0] for t, x in certain.items()}, fits, table)


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
    flag("--size", type=whole(0, LARGEST), help="longer side in pixels that the network sees; 0 = the input's own "
         "(default: the shorter side as in training); smaller is faster and needs less memory")
    flag("--rows", type=whole(1), help="tasks that pass the UNet at once (default: all); 1 needs least memory")
    flag("--decoder", help="folder or hub id of an AutoencoderTiny that decodes in the VAE's place: faster "
         "(tools.distil makes one)")
    flag("--vae-slicing", action="store_true", help="decode one map at a time: less memory, same results")
    flag("--vae-tiling", action="store_true", help="encode and decode large images in overlapping tiles, also with "
         "--decoder: much less memory, faint seams")
    flag("--device", default="auto", help="cpu, cuda (in bfloat16) or mps (default: a GPU where there is one)")
    flag("--attention", action="store_true", help="also write attention.png, .json: which tasks a task attends to")
    flag("--confidence", action="store_true", help="also confidence_<task>.png, .npy: how far to trust each pixel, in "
         "[0,1], by a second prediction, of the mirror image")
    flag("--pixels", action="store_true", help="flow in pixels: its scales are found in the two frames (scales.json)")
    flag("--camera", metavar="F,CX,CY,NEAR,FAR", help="with --pixels: scene flow in metres; focal length and centre in "
         "pixels, metres of depth 0 and 1")
    flag("--video", action="store_true", help="also an MP4 per task and one of the panel for each sequence or video")
    flag("--fps", type=number(0.1, 1000), help="frames per second of these (default: the video's own, else 10)")
    flag("--skip-bad", action="store_true", help="name, skip and count unreadable inputs instead of stopping there")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.paths, args.toy, args.testset))) != 1:
        raise ValueError("nothing to predict, or too much: give images, folders or a video, or else --toy real:3, "
                         "or --testset toy")
    parser.refuse_idle(args, (
        (args.testset, ["single", "stride", "size", "attention", "confidence", "pixels", "video"],
         "--testset takes images, order and size from the test sets"),
        (not args.testset, ["split"], "it goes with --testset"),
        (args.toy, ["stride"], "--toy is a single sample"),
        (not args.pixels, ["camera"], "it goes with --pixels"),
        (not args.video, ["fps"], "it goes with --video")))
    if args.video and (args.single or args.toy):
        raise ValueError("--video films a sequence: give frames or a video, without --single and --toy")
    if args.pixels and args.single:
        raise ValueError("--pixels finds the scales of flow in two frames: leave out --single")
    args.camera = parse_camera(args.camera) if args.camera else None
    return args


def parse_camera(text):
    """"40,23.5,15.5,0.5,80" -> photometric.Camera."""
    try:
        focal, cx, cy, near, far = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--camera {text}: expected five numbers, F,CX,CY,NEAR,FAR") from None
    return Camera(focal, cx, cy, near, far)


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
        raise ValueError(f"--attention needs stage 2, and {args.ckpt} gave {without_stage_2(args.ckpt)}")
    if args.vae_slicing:
        (model.decoder or model.vae).enable_slicing()
    if args.vae_tiling:
        for part in filter(None, (model.vae, model.decoder)):
            part.enable_tiling()
    return model, tasks


def without_stage_2(folder):
    """What the model of a checkpoint is, of which no stage 2 was loaded, and what to do about it."""
    spec = read_model_json(folder)
    if spec["kind"] != "stablemtl":
        return f"the system {spec['kind']}, which has none: leave it out"
    if spec.get("generalist"):
        return "a Generalist, which has none: leave it out"
    return "stage 1: " + ("drop --stage 1" if spec["multi"] else "train stage 2, or leave it out")


def predict_testset(args):
    """What --testset asks for, written; returns 130 if stopped, else 0."""
    model, asked = load(args)
    forms, split = parse_formats(args.format, [TASKS[t] for t in asked]), args.split or "test"
    config, whose, output = read_config(args.ckpt), str(args.ckpt), Path(args.output or "predictions")
    home = data_name((config["train"] or {}).get("data"))
    data, size = choose(args.testset, home, config, whose)
    written = [t for t in asked if any(fits(TASKS[t], form) for form in forms)]
    readers = test_sets(data, size, split, written, whose, limit=args.limit)
    predictions.begin(output, {"data": data, "split": split, "size": size and list(size), "checkpoint": whose,
                               "stage": 2 if model.multi else 1, "key": digest(map_dependencies(args, model)),
                               "test_sets": {r.name: digest([r.version, r.identity()]) for r in readers}},
                      args.overwrite)
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
          f"{len(skipped)} skipped; in {output}, score them with: python evaluate.py --predictions {quote(str(output))}"
          + f" --split {split}" * (split != "test"))
    return 0


def map_dependencies(args, model):
    """What maps follow from beside their frames, as json: code, flags and weights, these by size and time, since
    checksums would take long."""
    files = [*args.ckpt.glob("model.json"), *weight_files(args.ckpt, 2 if model.multi else 1)]
    weights = stamps(files, args.ckpt)
    decoder = [args.decoder, stamps(Path(args.decoder).glob("*"), args.decoder)] if args.decoder else []
    camera = astuple(args.camera) if args.camera else None
    code = [crc(path) for path in sorted(source_files())]
    return [code, weights, model.multi is None, args.size, model.size, args.vae_tiling, args.device.type, *decoder,
            args.pixels, camera]


def main(argv=None):
    """Predict what the command line names. Returns 130 if stopped, else 0; ValueError, OSError: a user's mistake."""
    args = parse(argv)
    if args.testset:
        return predict_testset(args)
    inputs = [toy(args, args.single)] if args.toy else find(args.paths, args.single, args.stride)
    inputs = inputs[:args.limit] if isinstance(inputs, list) else islice(inputs, args.limit)
    model, asked = load(args)
    forms = parse_formats(args.format, [TASKS[t] for t in asked])
    output, taken, tally, common = Path(args.output or "samples"), {}, Counter(), map_dependencies(args, model)
    unscaled, places = Counter(), []        # what films are made of
    if args.video and "npy" not in forms:
        raise ValueError(f"--format {args.format}: films are made of NPY files, name npy as well")
    if args.video and isinstance(inputs, list):     # else there is a video or an animation among them
        check_film(inputs, asked)
    bar = tqdm(inputs, unit="input", disable=None)
    try:
        for item in bar:
            places.append(Place(None, bool(item.next), item.source if item.frame else ""))
            folder = own_folder(output, item, taken)
            try:
                item, frames = read_frames(item, args.skip_bad)
            except (OSError, ValueError) as error:
                if not args.skip_bad:
                    raise ValueError(f"{error} (--skip-bad goes on without it)") from error
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                tally["bad"] += 1
                continue
            tasks = [t for t in asked if TASKS[t].frames == 1 or item.next]
            tally["motionless"] += len(tasks) < len(asked)
            if not tasks:
                continue
            key = fingerprint(frames, common)
            files = ["panel.png", *array_files(tasks, forms), *["attention.json"] * args.attention,
                     *(f"confidence_{t}.npy" for t in tasks if args.confidence)]
            places[-1] = replace(places[-1], folder=folder, linked=bool(item.next))
            if not args.overwrite and finished(folder, key, files):
                tally["kept"] += 1
                continue
            result = predict(model, frames, tasks, args)
            write(folder, item, key, frames, result, forms)
            tally["done"] += 1
            unscaled.update(f"{t} stays up to scale: {f.why}" for t, f in result.fits.items() if f.why)
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
    for text, times in unscaled.items():
        print(f"{times} x {text}")
    for what, text in (("kept", "already finished, kept (--overwrite computes them again)"),
                       ("bad", "unreadable, skipped"), ("motionless", f"without a second frame: {motion} skipped")):
        if tally[what]:
            print(f"{tally[what]} {text}")
    if args.video:
        write_clips(output, places, find(args.paths, stride=args.stride), asked, args.fps, args.stride)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
