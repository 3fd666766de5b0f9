"""A page in the browser: drop an image, two frames or a short clip, and look at its maps.

    python -m tools.app --ckpt out/                     on http://127.0.0.1:7860, for this machine alone
    python -m tools.app --ckpt out/ --host 0.0.0.0      for whoever reaches this machine

The slider lies over the input and one map; a click on another map takes that one, and shows which tasks its prediction
attended to (stage 2). Below are the numbers under the pointer. The arrays that can be fetched are the .npy files of
`python sample.py --pixels`: with a second frame, flow is in pixels where the two frames tell its scale.

It needs gradio (pip install "gradio>=6"), which nothing else here does. Nothing goes over a network but the page itself
to its visitor: no public link, no statistics. What is dropped on it stays in a temporary folder, about an hour after
its visitor has left, and goes with the page.
"""
import argparse
import os
import shutil
import socket
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from pathlib import Path

from cli import Parser, parse_device, run, steady, whole  # before torch, for Ctrl-C meanwhile

# isort: split
import numpy as np
import torch

from baselines import load as load_model
from checkpoint import read_config
from draw import attention_table, cell, draw_attention, draw_key
from inference.infer import infer
from inference.results import own_folder
from inference.video import clip_scale, read_map
from network.loading import checkpoint_folder, read_model_json
from sample import find
from tasks import TASKS

FRAMES = 16         # of a clip, at most
PIXELS = 2 ** 25    # of all its frames together: 16 of full HD; the arrays take up to 53 bytes a pixel, on disk
INPUT = "image"     # the picture of the input among those of its maps

# The numbers follow the pointer: gradio itself only knows clicks on images. Told are fractions of the picture's sides.
POINTER = """
let last = 0;
document.addEventListener('pointermove', (event) => {
    const seen = document.querySelector('#compare img'), now = Date.now();
    if (!seen || now - last < 80 || !event.target.closest('#compare')) return;
    const box = seen.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return;
    last = now;
    trigger('select', {x, y});
});
"""


# ---- from what was dropped to what is shown: all of it works without gradio ----

@dataclass
class Frame:
    """One frame: its arrays are on disk, <folder>/<task>.npy; pictures are of a readable size, {task: Pillow image}."""
    folder: Path
    tasks: list
    scaled: set                 # the tasks of motion whose scale is known
    attention: dict | None      # draw.attention_table
    pictures: dict = field(default_factory=dict)


@dataclass
class Shown:
    """What one visitor sees. Its folder goes when nothing refers to it any more."""
    folder: tempfile.TemporaryDirectory
    frames: list
    archive: Path               # of all arrays


def predict(model, paths, home, size=None, rows=None):
    """Yield a Frame for each frame that the files at `paths` hold, its arrays below the folder `home`.

    size, rows: as of StableMTL.infer. ValueError, OSError: a file cannot be read, the frames of a pair differ in size,
    or all together have more than PIXELS.
    """
    pixels, taken = 0, {}
    for item in islice(find(paths), FRAMES):
        frame, after = item.image(), item.next and item.next()
        pixels += frame.shape[0] * frame.shape[1]
        if pixels > PIXELS:
            raise ValueError(f"{item.name} has too many pixels: the page takes {PIXELS / 1e6:.0f} million in all; make "
                             "it smaller or shorter, or use python sample.py")
        model.attention_log = None if model.main is None else []
        maps = infer(model, frame, after, size=size, rows=rows, pixels=True)
        table = None if model.main is None else attention_table(model.attention_log, model.tasks)
        tasks = [t for t in model.tasks if t in maps]
        shown = Frame(own_folder(home, item, taken), tasks, {t for t in tasks if maps.get(f"scale_{t}")}, table)
        shown.folder.mkdir(parents=True)
        for t in tasks:
            np.save(shown.folder / f"{t}.npy", maps[t])
        shown.pictures[INPUT] = cell(frame)
        yield shown


def colour(frames):
    """Add the pictures of all maps, in colours that hold over the clip (motion in pixels and up to scale apart)."""
    for task in dict.fromkeys(t for f in frames for t in f.tasks):
        for scaled in (True, False):
            alike = [f for f in frames if task in f.tasks and (task in f.scaled) == scaled]
            maps = [thinned(read_map(f.folder, task)) for f in alike]
            scale = clip_scale(TASKS[task], maps) if alike else None
            for f, x in zip(alike, maps, strict=True):
                f.pictures[task] = cell(TASKS[task].colour(x, torch.ones(x.shape[1:], dtype=torch.bool), scale))


def thinned(x):
    """Every k-th pixel of a map (C,H,W), about a thousand along its longer side, by itself: a picture shows no more."""
    step = max(1, max(x.shape[1:]) // 1024)
    return x[:, ::step, ::step].clone()


def show(model, paths, size=None, rows=None, home=None, progress=list):
    """-> Shown of the files at `paths`, in a new folder in `home`; progress: runs through the frames. Errors: predict,
    without the folders that the files were put in."""
    folder = tempfile.TemporaryDirectory(dir=home)
    maps, archive = Path(folder.name) / "maps", Path(folder.name) / "arrays.zip"
    try:
        frames = list(progress(predict(model, paths, maps, size, rows)))
        colour(frames)
        with zipfile.ZipFile(archive, "w") as z:
            for path in sorted(maps.glob("**/*.npy")):
                z.write(path, path.relative_to(maps))
    except (OSError, ValueError, FloatingPointError) as error:
        folder.cleanup()
        told = str(error)
        for path in map(Path, paths):
            told = told.replace(f"{path.parent}/", "")
        raise ValueError(told) from error
    return Shown(folder, frames, archive)


def note(model, frames):
    """What a visitor may miss, or wonder about."""
    if len(frames) > 1:
        return f"{len(frames)} frames: of a clip the first {FRAMES} at most (python sample.py takes all)."
    missing = [t for t in model.tasks if t not in frames[0].tasks]
    return f"Without a second frame there is no {', '.join(missing)}." if missing else ""


def under(frame, x, y):
    """{task: words}, and which "pixel" it is, at the fractions x, y in [0,1) of the frame's width and height."""
    out = {}
    for t in frame.tasks:
        array = np.load(frame.folder / f"{t}.npy", mmap_mode="r")
        row, column = int(y * array.shape[0]), int(x * array.shape[1])
        out["pixel"] = f"x {column}, y {row}"
        out[t] = TASKS[t].say(np.atleast_1d(array[row, column]).tolist(), scaled=t in frame.scaled)
    return out


def describe(model, folder):
    """Which model this is, and what it cannot do."""
    config, kind = read_config(folder), read_model_json(folder)["kind"]
    stage = f", stage {1 if model.main is None else 2}" if kind == "stablemtl" else ""
    told = [f"Model: **{kind}{stage}** in `{folder}`, for {', '.join(model.tasks)}."]
    if model.size:
        told.append("Trained on images of {}x{} pixels.".format(*model.size))
    if config["train"] and not config["train"]["data"]:
        told.append("**It is a toy**, which has seen nothing but drawn streets, rooms and things: of a photograph it "
                    "makes a coarse sketch, often a wrong one, without small things, and its depth has no metres.")
    return " ".join(told)


# ---- the page ----

def table(rows):
    """{name: words} -> HTML."""
    if not rows:
        return "<i>Move the pointer over the picture to read its numbers.</i>"
    lines = (f"<tr><td><b>{escape(name)}</b></td><td>{escape(words)}</td></tr>" for name, words in rows.items())
    return f"<table>{''.join(lines)}</table>"


def read_gradio(home):
    """The module, told to keep to itself, and its files in `home`. ValueError if it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": home}
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f'the page needs gradio ({error}): pip install "gradio>=6"') from error
    return gradio


def build(gr, model, folder, size=None, rows=None, home=None):
    """The page of a model, as gradio's Blocks: one prediction at a time."""

    bar = gr.Progress()

    def take(paths, progress=bar):      # by its default gradio knows what to pass
        if not paths:
            return None, "", gr.DownloadButton(visible=False), gr.Slider(visible=False), *look(None, 0, None)
        try:
            shown = show(model, paths, size, rows, home, lambda frames: progress.tqdm(frames, unit="frames"))
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        many = len(shown.frames)
        return (shown, note(model, shown.frames), gr.DownloadButton(value=shown.archive, visible=True),
                gr.Slider(value=1, maximum=max(2, many), visible=many > 1), *look(shown, 1, None))

    def look(shown, number, task):
        """No numbers yet, and what `choose` gives."""
        return table({}), *pick(shown, number, task)

    def pick(shown, number, task):
        """The task that is looked at, all maps, it over the input, and its attention."""
        if shown is None:
            return None, [], None, None
        frame = shown.frames[number - 1]
        task = task if task in frame.tasks else frame.tasks[0]
        chart = None
        if frame.attention:
            chart = draw_attention(frame.attention | {"attention": {task: frame.attention["attention"][task]}})
        seen = frame.pictures
        return task, [(seen[t], t) for t in frame.tasks], (seen[INPUT], seen[task]), chart

    def choose(shown, number, event: gr.SelectData):
        return pick(shown, number, shown.frames[number - 1].tasks[event.index])

    def point(shown, number, event: gr.EventData):
        return table(under(shown.frames[number - 1], event.x, event.y) if shown else {})

    with gr.Blocks(title="StableMTL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        shown, task = gr.State(), gr.State()
        gr.Markdown(f"# StableMTL\n{describe(model, folder)}")
        with gr.Row():
            with gr.Column():
                files = gr.File(label="An image, two frames (the second follows the first) or a short clip",
                                file_count="multiple", allow_reordering=True, height=150)
                compare = gr.ImageSlider(label="input | map", elem_id="compare", format="png", interactive=False)
                number = gr.Slider(1, 2, 1, step=1, label="frame", visible=False, interactive=True)
                numbers = gr.HTML(table({}), js_on_load=POINTER, min_height=330)
            with gr.Column():
                maps = gr.Gallery(label="maps: click on one", columns=4, height=320, object_fit="contain",
                                  format="png", allow_preview=False, interactive=False)
                key = draw_key([TASKS[t] for t in model.tasks], "", 560)
                gr.Image(key, format="png", show_label=False, container=False, buttons=[], interactive=False)
                remark = gr.Markdown()
                fetch = gr.DownloadButton("Download the arrays (.npy)", visible=False)
                attends = model.main is not None
                gr.Markdown("### Attention to other tasks\n" + "There is none: stage 2 has it." * (not attends))
                chart = gr.Plot(show_label=False, visible=attends)
        view = [task, maps, compare, chart]
        files.change(take, files, [shown, remark, fetch, number, numbers, *view], api_name="predict",
                     show_progress_on=compare)
        number.input(look, [shown, number, task], [numbers, *view], api_name="frame")
        maps.select(choose, [shown, number], view, api_name=False)
        numbers.select(point, [shown, number], numbers, api_name=False, queue=False, show_progress="hidden")
    return page.queue(api_open=False, default_concurrency_limit=1)


# ---- command line ----

def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--ckpt", help="folder written by train.py, or a hub id (default: out, else the trained toy model)")
    flag("--stage", type=int, choices=(1, 2), help="which stage of the checkpoint (default: 2 where it exists)")
    flag("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    flag("--port", type=whole(1, 65535), help="default: the first free one from 7860")
    flag("--device", default="auto", help="cpu, cuda (in bfloat16) or mps (default: a GPU where there is one)")
    flag("--size", type=whole(0, 16384), help="longer side in pixels that the network sees; 0 = the input's own "
         "(default: the shorter side as in training)")
    flag("--rows", type=whole(1), help="tasks that pass the UNet at once (default: all); 1 needs least memory")
    return parser.parse_args(argv)


def check_address(host, port):
    """OSError if nobody can listen there; port None: some port."""
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, TypeError, UnicodeError) as error:     # the latter two: no name of a machine can be so
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"the page cannot listen on {host}{f', port {port}' if port else ''} ({reason}): give another "
                      "--host or --port") from error


def main(argv=None):
    """Serve the page until it is stopped. ValueError, OSError: a user's mistake."""
    args = parse(argv)
    check_address(args.host, args.port)
    device, folder = parse_device(args.device), checkpoint_folder(args.ckpt)
    home = tempfile.mkdtemp(prefix="app-")
    try:
        gr = read_gradio(home)
        page = build(gr, steady(load_model(folder, args.stage, device)), folder, args.size, args.rows, home)
        _, address, _ = page.launch(server_name=args.host, server_port=args.port, share=False, ssr_mode=False,
                                    quiet=True, prevent_thread_lock=True, max_file_size="1gb", footer_links=[])
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
