"""What StableMTL costs: counted operations, which no machine changes, and, where the device allows, time and memory.

    python -m tools.bench                       the toy base on this machine
    python -m tools.bench --load 2              beside two programs that multiply matrices on two threads each
    python -m tools.bench --base sd2            Stable Diffusion 2's size with random weights, nothing downloaded;
                                                on a CPU it is only counted
    python -m tools.bench --base sd2 --decoder new              with a small decoder in the VAE's place
    python -m tools.bench --base sd2 --memory   what fits which GPU in training: the table in docs/cost.md
    python -m tools.bench --base sd2 --channels-last --graph --json cost.json --plot cost.png

Operations are those of convolutions, matrix products and attention for one pair of images, 1 multiply-add = 2. A model
of n tasks has n auxiliary streams. Weights are random: they change no cost. Inference runs in --dtype throughout,
training in float32 under autocast to --dtype.
"""
import argparse
import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cli import Parser, parse_device, parse_size, run, whole, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import write_json
from draw import draw_curves
from model import StableMTL, widen_input
from network import stock
from network.loading import check_decoder
from settings import PRESETS, Config, check
from tasks import TASKS
from tools import bench_cpu, bench_memory, bench_systems
from tools.distil import new_decoder
from toy.make import new_unet, new_vae
from train import compile_blocks, make_optimizer, optimizer_step, trainable
from training.losses import LatentObjective

SD2_VAE = dict(latent_channels=4, sample_size=768, scaling_factor=0.18215, layers_per_block=2,
               block_out_channels=(128, 256, 512, 512),
               down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
SD2_UNET = dict(in_channels=4, out_channels=4, sample_size=96, layers_per_block=2,
                block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                cross_attention_dim=1024, use_linear_projection=True)
KINDS = ("single", "multi")
SOURCES = {1: ("cached latents", "images"), 2: ("cached latents and streams", "cached latents", "images")}
STEPS, BATCH = {1: 20_000, 2: 10_000}, 32       # the paper's training: steps of each stage, images per step
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE_FRAME = "Stage 1, images: of a task of one frame; of tasks of motion a second frame is encoded"
PREFIXES = {0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


# ---- models with random weights ----

def configs(base):
    """(VAE, UNet) settings of "sd2", "toy", or a diffusers folder. FileNotFoundError if the folder holds none."""
    if base == "sd2":
        return SD2_VAE, SD2_UNET
    if base == "toy":
        with torch.device("meta"):
            return new_vae().config, new_unet().config
    absent = [p for p in ("vae/config.json", "unet/config.json") if not (Path(base) / p).is_file()]
    if absent:
        raise FileNotFoundError(f"--base {base}: expected toy, sd2 or a diffusers folder, and found no "
                                f"{' and no '.join(absent)} there")
    kinds = {"vae": stock.AutoencoderKL, "unet": stock.UNet2DConditionModel}
    return tuple(kind.load_config(base, subfolder=part) for part, kind in kinds.items())


def networks(base, device, main=True):
    """VAE, auxiliary UNet and, with `main`, main UNet, made on the device ("meta": shapes without storage)."""
    vae, unet = configs(base)
    with torch.device(device):
        unets = [widen_input(stock.UNet2DConditionModel.from_config(unet)) for _ in range(1 + main)]
        return [stock.AutoencoderKL.from_config(vae), *unets]


def small_decoder(name, vae):
    """An AutoencoderTiny for the VAE, where that is: "new", of the size that tools.distil makes, or of a folder's; ""
    gives None. FileNotFoundError if the folder holds none, ValueError if it is for other latents."""
    if not name:
        return None
    with torch.device(vae.device):
        if name == "new":
            return new_decoder(vae)
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"--decoder {name}: expected new, or the folder of an AutoencoderTiny, and found "
                                    "no config.json there")
        tiny = stock.AutoencoderTiny.from_config(stock.AutoencoderTiny.load_config(name))
    check_decoder(tiny, vae)
    return tiny


def assemble(nets, tasks, dtype=torch.float32, multi=True, decoder=""):
    """A StableMTL of the named tasks around `networks`, which may have been part of another one before; decoder: what
    `small_decoder` takes."""
    vae, unet, *main = nets
    for net in (unet, *main):
        net.set_attn_processor(stock.AttnProcessor2_0())    # lets go of the model whose taps it had
    with torch.device(vae.device):
        width = unet.config.cross_attention_dim
        tokens = {t: torch.zeros(2 + len(TASKS[t].prompt.split()), width) for t in tasks}
        model = StableMTL(vae, unet.requires_grad_(True), tokens)
        if multi:
            model.add_main_stream(*main)
    model.decoder = small_decoder(decoder, vae)
    return model.to(dtype).eval()


def on_meta(base, tasks, stage):
    """A StableMTL of shapes alone, for training of this stage."""
    return assemble(networks(base, "meta", main=stage == 2), tasks, multi=stage == 2)


def trials(tasks):
    """[(stage, kind, numbers of tasks to try)]: the multi stream needs two, for one alone has no other to attend to."""
    return [(s, kind, range(s, len(tasks) + 1)) for s, kind in zip((1, 2), KINDS, strict=True) if s <= len(tasks)]


# ---- counted operations ----

def operations(f, *args):
    """Floating-point operations of f(*args): 2 per multiply-add. Attention is spelt out as matrix products: the counter
    does not see those inside the CPU's own kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


def step_operations(model, z, task, streams=None, label=None):
    """Operations of one image's forward and backward pass in training from what is cached of it, z: (1,4,h,w) or what
    else the model sees of a frame, and label, of the shape of z unless given."""
    label = z if label is None else label
    cells = torch.ones_like(label[:, :1], dtype=torch.bool)

    def step():
        predicted, wanted = model.learn(z, z, {task: label}, {task: cells}, [("bench", 0, False)], streams)
        (predicted[task] - wanted[task]).square().mean().backward()
    return operations(step)


def part_operations(model, image, tasks):
    """{part: operations} of one row: VAE and UNet of a single stream, of a multi stream its main UNet."""
    task = tasks[-1]
    with torch.no_grad():
        z = model.encode(image)
        forward = operations(model, z, z, [task])
        if model.main is None:
            decode = "VAE decode" if model.decoder is None else "small decoder"
            return {"VAE encode": operations(model.encode, image), decode: operations(model.decode, z), "UNet": forward}
        return {f"main UNet with {len(tasks) - 1} streams": forward - operations(model.streams, z, z, tasks[:-1])}


def count(base, size, tasks, decoder=""):
    """Operations for one pair of images of `size` (H, W), on the meta device; decoder: what `small_decoder` takes.

    {"parts": {name: operations of one row}, "single" | "multi": {number of tasks: operations},
    "training": {name: operations per image}}
    """
    nets, image = networks(base, "meta"), torch.empty(1, 3, *size, device="meta")
    out = {"parts": {}, "training": {}}
    for stage, kind, numbers in trials(tasks):
        made = partial(assemble, nets, multi=stage == 2, decoder=decoder)
        out[kind] = {n: operations(made(tasks[:n]).predict, image, image) for n in numbers}
        model = made(tasks)
        out["parts"] |= part_operations(model, image, tasks)
        with torch.no_grad():
            z = model.encode(image)
        cached = step_operations(model, z, tasks[-1])
        second = 1 if stage == 2 else sum(TASKS[t].frames - 1 for t in tasks) / len(tasks)
        encoded = 2 + second        # label, first frame, and how often a second one
        out["training"][f"stage {stage}, cached latents"] = cached
        out["training"][f"stage {stage}, images"] = cached + encoded * out["parts"]["VAE encode"]
    return out


# ---- time and memory ----

def hardware(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def adapt(module, args):
    """Apply --channels-last and --compile in place."""
    if args.channels_last:
        module.to(memory_format=torch.channels_last)
    if args.compile:
        compile_blocks(module)


def measured(f, images, device, graph=False, limit=math.inf):
    """{"seconds" (median after a burn-in), "images_per_s", "gigabytes" (peak on a GPU, else None), "first" (seconds of
    the first call)} of f(), which handles `images` images.

    limit: after so many seconds neither the burn-in nor the timing, of 20 calls on a GPU and else 3, begins another.
    """
    cuda = device.type == "cuda"
    synchronise = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, list)
    gc.collect()        # earlier models are cycles: their taps refer to them
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def timed(most):
        times, end = [], time.perf_counter() + limit
        while len(times) < most and (not times or time.perf_counter() < end):
            start = time.perf_counter()
            f()
            synchronise()
            times.append(time.perf_counter() - start)
        return times
    first, *_ = timed(3 if cuda else 1)
    if graph:       # record the kernels once, then replay them without Python in between
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            f()
        f = recorded.replay
    synchronise()
    t = median(timed(20 if cuda else 3))
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"seconds": t, "images_per_s": images / t, "gigabytes": peak, "first": first}


def inference(args, tasks):
    """{"single" | "multi": {n: measured}}: all maps of the first n tasks from a batch of pairs, through `predict`."""
    return {kind: inference_of(args, tasks, stage == 2, numbers) for stage, kind, numbers in trials(tasks)}


def inference_of(args, tasks, multi, numbers):
    """`inference` of one kind, whose networks are gone before those of the next are made."""
    image = torch.rand(args.batch, 3, *args.size, device=args.device, dtype=DTYPES[args.dtype])
    nets, out = networks(args.base, args.device, main=multi), {}
    for net in nets:
        adapt(net, args)
    for n in numbers:
        model = assemble(nets, tasks[:n], DTYPES[args.dtype], multi, args.decoder)
        out[n] = measured(partial(model.predict, image, image), args.batch, args.device, args.graph)
    return out


def training(args, tasks):
    """{"stage s, <one of SOURCES>": measured and projected hours} of train.py's steps of one task."""
    out = {}
    for stage, _, _ in trials(tasks):
        trainer = make_trainer(args, tasks, stage)
        out |= {f"stage {stage}, {source}": training_of(args, trainer, source) for source in SOURCES[stage]}
        del trainer     # before the next one is made
    return out


class Trainer(NamedTuple):
    """What train.py's steps of a stage need but for their batches."""
    cfg: Config
    model: StableMTL
    optimizer: torch.optim.Optimizer
    autocast: Callable


def make_trainer(args, tasks, stage):
    model = assemble(networks(args.base, args.device, main=stage == 2), tasks, multi=stage == 2)
    adapt(model, args)
    model.training = True
    cfg, autocast = check(Config(stage=stage, preset="paper")), contextlib.nullcontext
    if args.dtype != "fp32":
        autocast = partial(torch.autocast, args.device.type, DTYPES[args.dtype])
    return Trainer(cfg, model, make_optimizer(cfg, trainable(model)), autocast)


def training_of(args, trainer, source, limit=math.inf):
    """`measured` and projected hours of a trainer's steps, from random tensors in memory. They are of the last task of
    one frame: in stage 1 those of motion encode a second one, where nothing is cached."""
    cfg, model, optimizer, autocast = trainer
    *_, task = (t for t in model.tasks if TASKS[t].frames == 1)
    given, streams = batches(model, args, task, source), None
    if source.endswith("streams"):
        z = given[0]["frames"][0].to(args.device)
        with autocast():
            feats = model.streams(z, z, model.tasks)
        streams = bench_cpu.Known({block: {t: x.float() for t, x in f.items()} for block, f in feats.items()})
    objective = LatentObjective(model, {"latent": 1.0}, source == "images", streams)
    row = measured(partial(optimizer_step, cfg, 0, model, objective, given, optimizer, autocast),
                   len(given) * args.micro, args.device, limit=limit)
    return row | {"hours": STEPS[cfg.stage] * BATCH / row["images_per_s"] / 3600}


def batches(model, args, task, source):
    """The micro-batches of one step, as train.py's mixture delivers them, but of random numbers."""
    shape = (3, *args.size) if source == "images" else (4, *(s // model.factor for s in args.size))
    x, valid = torch.rand(args.micro, *shape), torch.ones(args.micro, 1, *shape[1:], dtype=torch.bool)
    keys = [("bench", k, False) for k in range(args.micro)]
    batch = {"tasks": (task,), "keys": keys, "frames": [x, x], "labels": {task: x}, "valid": {task: valid}}
    return [batch] * max(1, BATCH // args.micro)


# ---- how it is told ----

def plot(result):
    """Operations and, where measured, time of single and multi stream over the number of tasks (paper Fig. 13), a panel
    each -> matplotlib figure."""
    kinds = [k for k in KINDS if k in result["counted"]]
    power = prefix(max(v for k in kinds for v in result["counted"][k].values()))
    counted = {f"{k} stream": [[(n, v / 10 ** power) for n, v in result["counted"][k].items()]] for k in kinds}
    panels = [("counted operations", "number of tasks", f"operations, $10^{{{power}}}$", counted)]
    if "inference" in result:
        rows = {f"{k} stream": [[(n, v["seconds"] * 1e3) for n, v in result["inference"][k].items()]] for k in kinds}
        panels.append((f"time, {result['device']}", "number of tasks", "time, ms", rows))
    return draw_curves(panels)


def prefix(v):
    """The power of ten, a multiple of 3 up to 12, in which v is written."""
    return min(12, (len(str(int(v))) - 1) // 3 * 3)


def cost(v):
    """A number of operations as text, 6.14e12 -> "6.14 T"."""
    return f"{v / 10 ** prefix(v):.4g} {PREFIXES[prefix(v)]}"


def speed(row):
    """What `measured` returned as text."""
    gigabytes = f"{row['gigabytes']:7.2f} GB" if row["gigabytes"] else ""
    hours = f"{row['hours']:8.2f} h" if "hours" in row else ""
    return f"{row['seconds'] * 1e3:10.1f} ms {row['images_per_s']:8.2f} img/s{gigabytes}{hours}"


def table(result):
    """The result as lines of text."""
    counted, lines = result["counted"], []
    for title, key in (("operations of one row", "parts"), ("training, operations per image", "training")):
        lines.append(f"{title}: " + ", ".join(f"{k} {cost(v)}" for k, v in counted[key].items()))
    for n in counted["single"]:
        for kind in (k for k in KINDS if n in counted.get(k, ())):
            time = speed(result["inference"][kind][n]) if "inference" in result else ""
            lines.append(f"{n} tasks, {kind:6}{cost(counted[kind][n]):>10}{time}")
    lines += [f"training step, {name:36}{speed(row)}" for name, row in result.get("training", {}).items()]
    if "training" in result:
        lines.append(f"  h: the paper's steps at {'x'.join(map(str, result['size']))}; the paper trains at "
                     f"{'x'.join(map(str, bench_memory.SIZE))}. Reading and decoding files is not in it: images, "
                     f"latents and streams are random numbers in memory. {ONE_FRAME}")
    lines += bench_memory.table(result["memory"]) if "memory" in result else []
    return "\n".join(lines)


def on_the_cpu(args, tasks):
    """`bench_cpu.measure` of the base: training steps, processes against threads, idle or under load."""
    def assembled(stage, device="cpu"):
        return assemble(networks(args.base, device, main=stage == 2), tasks, multi=stage == 2)
    counted = {}
    for stage, source in bench_cpu.ROWS:
        model = assembled(stage, "meta")
        z = torch.empty(1, 4, *(s // model.factor for s in args.size), device="meta")
        streams = model.streams(z, z, tasks) if "streams" in source else None
        counted[stage, source] = step_operations(model, z, tasks[-1], streams)
    return bench_cpu.measure(assembled, counted, args.size, args.busy, args.load)


# ---- the command ----

def picture(path):
    """argparse type: a file that a chart can be written to."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{path} does not end in .png, .pdf or .svg")
    return writable(path)


def parse(argv):
    """The command line, with size, device and dtype settled. ValueError or OSError names what is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", default="toy", help="toy, sd2, or a diffusers folder: whose shapes (default: toy)")
    parser.add_argument("--decoder", default="", help="new, or the folder of an AutoencoderTiny, whose size decodes "
                        "in the VAE's place")
    parser.add_argument("--size", help="images of HEIGHTxWIDTH (default: 256x256, the paper's; for toy its training's)")
    parser.add_argument("--tasks", type=whole(1, len(TASKS)), default=len(TASKS), metavar="N",
                        help="1..N tasks are tried (default: %(default)s)")
    parser.add_argument("--batch", type=whole(1), default=1, help="pairs per inference (default: %(default)s)")
    parser.add_argument("--micro", type=whole(1), default=16,
                        help=f"images per training pass; a step has {BATCH} (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 with cuda, else fp32")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the convolutions")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (first calls take a while)")
    parser.add_argument("--graph", action="store_true", help="replay inference as one CUDA graph")
    parser.add_argument("--count-only", action="store_true", help="no timing; on a CPU so for all bases but toy")
    parser.add_argument("--memory", action="store_true", help="also count training memory on a GPU, for each way to "
                        "lower it (minutes)")
    parser.add_argument("--busy", type=whole(0, 64), default=0, help="CPU training beside so many busy loops")
    parser.add_argument("--load", type=whole(0, 64), default=0,
                        help="CPU training beside so many programs that multiply matrices on two threads each")
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write all numbers here")
    parser.add_argument("--gpu-report", type=writable, metavar="FILE", help="instead, all that a GPU can tell in eight "
                        "minutes, into this file; the other flags are tools.gpu_report's")
    parser.add_argument("--plot", type=picture, metavar="FILE",
                        help="also draw cost and time against the number of tasks (paper Fig. 13): .png, .pdf or .svg")
    args = parser.parse_args(argv)
    args.device = parse_device(args.device)
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    args.size = parse_size(args.size or (PRESETS["toy"]["size"] if args.base == "toy" else "256x256"))
    if args.graph and args.device.type != "cuda":
        raise ValueError(f"--graph records CUDA kernels, and the device is {args.device}: leave it out, or give "
                         "--device cuda")
    return args


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--gpu-report" for word in words):
        from tools import gpu_report  # which measures with what is here
        return gpu_report.main([word.replace("--gpu-report", "--json", 1) for word in words])
    args = parse(words)
    tasks = tuple(TASKS)[:args.tasks]
    result = {"base": args.base, "decoder": args.decoder or "the VAE's", "size": args.size, "batch": args.batch,
              "micro": args.micro, "device": hardware(args.device),
              "dtype": str(DTYPES[args.dtype]).removeprefix("torch."),
              "torch": torch.__version__, "channels_last": args.channels_last, "compile": args.compile,
              "graph": args.graph}
    print(", ".join(f"{k} {v}" for k, v in result.items()))
    result["counted"] = count(args.base, args.size, tasks, args.decoder)
    if args.memory:
        result["memory"] = bench_memory.counts(partial(on_meta, args.base, tasks), tasks)
    if not args.count_only and (args.device.type != "cpu" or args.base == "toy"):
        result |= {"inference": inference(args, tasks), "training": training(args, tasks)}
    print(table(result))
    if args.base == "toy":
        result["systems"] = bench_systems.count(operations, args.size, tasks)
        print("\n".join(bench_systems.lines(result["systems"])))
    if args.base == "toy" and args.device.type == "cpu" and not args.count_only and len(tasks) > 1:
        result["cpu"] = on_the_cpu(args, tasks)
        print("\n".join(bench_cpu.lines(result["cpu"], args.busy, args.load)))
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(result).savefig(args.plot)


if __name__ == "__main__":
    sys.exit(run(main))
