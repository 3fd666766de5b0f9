"""What StableMTL costs: counted operations, which no machine changes, and, where the device allows, time and memory.

    python bench.py                               the toy base on this machine
    python bench.py --base sd2                    Stable Diffusion 2's size with random weights, nothing downloaded; on a CPU it is only counted
    python bench.py --base sd2 --channels-last --graph --json cost.json --plot cost.png

Operations are those of convolutions, matrix products and attention for one pair of images, 1 multiply-add = 2. A model of n tasks has n
auxiliary streams. Weights are random: they change no cost. Inference runs in --dtype throughout, training in float32 under autocast to --dtype.
"""
import argparse
import contextlib
import gc
import sys
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import write_json
from cli import Parser, parse_device, run
from draw import COLOURS, Chart, grid
from model import StableMTL, compile_blocks, widen_input
from tasks import TASKS
from toy.make import new_unet, new_vae
from train import PRESETS, parse_size, step_gradients, trainable

SD2_VAE = dict(latent_channels=4, sample_size=768, scaling_factor=0.18215, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
               down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
SD2_UNET = dict(in_channels=4, out_channels=4, sample_size=96, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
KINDS, STEPS, BATCH = ("single", "multi"), {1: 20_000, 2: 10_000}, 32      # the paper's training: steps of each stage, images per step
DTYPES, PREFIXES = {"fp32": torch.float32, "bf16": torch.bfloat16}, {0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


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
        raise FileNotFoundError(f"--base {base}: expected toy, sd2 or a diffusers folder, and found no {' and no '.join(absent)} there")
    return AutoencoderKL.load_config(base, subfolder="vae"), UNet2DConditionModel.load_config(base, subfolder="unet")


def networks(base, device, main=True):
    """VAE, auxiliary UNet and, with `main`, main UNet, made on the device itself ("meta": shapes without storage)."""
    vae, unet = configs(base)
    with torch.device(device):
        return [AutoencoderKL.from_config(vae)] + [widen_input(UNet2DConditionModel.from_config(unet)) for _ in range(1 + main)]


def assemble(nets, tasks, dtype=torch.float32, multi=True):
    """A StableMTL of the named tasks around `networks`, which may have been part of another one before."""
    vae, unet, *main = nets
    for net in (unet, *main):
        net.set_attn_processor(AttnProcessor2_0())      # lets go of the model whose taps it had
    with torch.device(vae.device):
        tokens = {t: torch.zeros(2 + len(TASKS[t].prompt.split()), unet.config.cross_attention_dim) for t in tasks}
        model = StableMTL(vae, unet.requires_grad_(True), tokens)
        if multi:
            model.add_main_stream(*main)
    return model.to(dtype).eval()


def trials(tasks):
    """[(stage, kind, numbers of tasks to try)]: the multi stream needs two tasks, for one alone has no other to attend to."""
    return [(s, kind, range(s, len(tasks) + 1)) for s, kind in zip((1, 2), KINDS) if s <= len(tasks)]


# ---- counted operations ----

def operations(f):
    """Floating-point operations of f(): 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def step_operations(model, z, task):
    """Operations of one image's forward and backward pass in training from cached latents z (1,4,h,w)."""
    return operations(lambda: model(z, z, [task])[task].square().mean().backward())


def count(base, size, tasks):
    """Operations for one pair of images of `size` (H, W), on the meta device.

    {"parts": {name: operations of one row}, "single" | "multi": {number of tasks: operations}, "training": {name: operations per image}}
    """
    nets, image, task = networks(base, "meta"), torch.empty(1, 3, *size, device="meta"), tasks[-1]
    out = {"parts": {}, "training": {}}
    for stage, kind, numbers in trials(tasks):
        out[kind] = {n: operations(lambda: assemble(nets, tasks[:n], multi=stage == 2).predict(image, image)) for n in numbers}
        model, parts = assemble(nets, tasks, multi=stage == 2), out["parts"]
        with torch.no_grad():
            z = model.encode(image)
            forward = operations(lambda: model(z, z, [task]))
            if stage == 1:
                parts |= {"VAE encode": operations(lambda: model.encode(image)), "VAE decode": operations(lambda: model.decode(z)), "UNet": forward}
            else:
                parts[f"main UNet with {len(tasks) - 1} streams"] = forward - operations(lambda: model.streams(z, z, tasks[:-1]))
        cached = step_operations(model, z, task)
        frames = 3 if stage == 2 else 2 + sum(TASKS[t].frames - 1 for t in tasks) / len(tasks)     # label and one or two images
        out["training"] |= {f"stage {stage}, cached latents": cached, f"stage {stage}, images": cached + frames * parts["VAE encode"]}
    return out


def saved_bytes(model, size, task):
    """Bytes that autograd keeps of one image's forward pass for the backward pass, each storage once, weights left out. H and W must differ."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}

    def pack(t):
        if t.ndim < 3 or t.shape[-1] != t.shape[-2]:    # square ones are spatial attention's weights: fused attention does not keep them
            kept[t.untyped_storage()._cdata] = t.untyped_storage()      # held, so that no other storage gets its identity
        return t
    z = torch.empty(1, 4, *(s // model.factor for s in size), device="meta", dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(z, z, [task])[task].sum()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def memory(base, tasks, size=(288, 384)):
    """{stage: {"fixed", "per image", "per image, checkpointing"}} bytes of training: fixed are float32 weights, gradients and Adam's moments;
    per image of a micro-batch is what autograd keeps, counted from shapes in bfloat16.
    """
    out = {}
    for stage, _, _ in trials(tasks):
        model = assemble(networks(base, "meta", main=stage == 2), tasks, torch.bfloat16, stage == 2)
        fixed = 4 * sum(p.numel() for p in model.parameters()) + 12 * sum(p.numel() for m in trainable(model).values() for p in m.parameters())
        out[stage] = {"fixed": fixed, "per image": saved_bytes(model, size, tasks[-1])}
        (model.main or model.unet).enable_gradient_checkpointing()
        out[stage]["per image, checkpointing"] = saved_bytes(model, size, tasks[-1])
    return out


# ---- time and memory ----

def hardware(device):
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


def adapt(module, args):
    """Apply --channels-last and --compile in place."""
    if args.channels_last:
        module.to(memory_format=torch.channels_last)
    if args.compile:
        compile_blocks(module)


def measured(f, images, device, graph=False):
    """{"seconds" (median after a burn-in), "images_per_s", "gigabytes" (peak on a GPU, else None)} of f(), which handles `images` images."""
    cuda = device.type == "cuda"
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    gc.collect()        # earlier models are cycles: their taps refer to them
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if cuda else 1):
        f()
    if graph:       # record the kernels once, then replay them without Python in between
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            f()
        f = recorded.replay
    synchronise()
    times = []
    for _ in range(20 if cuda else 3):
        start = time.perf_counter()
        f()
        synchronise()
        times.append(time.perf_counter() - start)
    t = sorted(times)[len(times) // 2]
    return {"seconds": t, "images_per_s": images / t, "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if cuda else None}


def inference(args, size, tasks, device, dtype):
    """{"single" | "multi": {n: measured}}: all maps of the first n tasks from a batch of pairs, through `predict`."""
    out, image = {}, torch.rand(args.batch, 3, *size, device=device, dtype=dtype)
    for stage, kind, numbers in trials(tasks):
        nets, out[kind] = networks(args.base, device, main=stage == 2), {}
        for net in nets:
            adapt(net, args)
        for n in numbers:
            model = assemble(nets, tasks[:n], dtype, stage == 2)
            out[kind][n] = measured(partial(model.predict, image, image), args.batch, device, args.graph)
        del model, nets, net        # their memory is not the next one's
    return out


def training(args, size, tasks, device, dtype):
    """{"stage s, cached latents" | "stage s, images": measured and projected hours} of train.py's steps of BATCH images of one task."""
    out, task = {}, tasks[-1]
    autocast = contextlib.nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)
    for stage, _, _ in trials(tasks):
        model = assemble(networks(args.base, device, main=stage == 2), tasks, multi=stage == 2)
        adapt(model, args)
        params = [p for m in trainable(model).values() for p in m.parameters()]
        optimizer = torch.optim.Adam(params, 1e-4, fused=device.type == "cuda")
        model.training, model.rho = True, 0.4
        for source in ("cached latents", "images"):
            shape = (3, *size) if source == "images" else (4, *(s // model.factor for s in size))
            x, valid = torch.rand(args.micro, *shape), torch.ones(args.micro, 1, *shape[1:], dtype=torch.bool)
            batches = [{"tasks": (task,), "frames": [x, x], "labels": {task: x}, "valid": {task: valid}}] * max(1, BATCH // args.micro)

            def step():
                step_gradients(model, batches, {"latent": 1.0}, source == "images", device, autocast)
                torch.nn.utils.clip_grad_norm_(params, 5.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            row = measured(step, len(batches) * args.micro, device)
            out[f"stage {stage}, {source}"] = row | {"hours": STEPS[stage] * BATCH / row["images_per_s"] / 3600}
        del model, params, optimizer, step
    return out


# ---- the picture (paper Fig. 13): cost and time against the number of tasks ----

def plot(path, result):
    """Operations and, where measured, time of single and multi stream over the number of tasks, one panel each, as a PNG."""
    kinds = [k for k in KINDS if k in result["counted"]]
    power = prefix(result["counted"]["single"][1])
    panels = [(f"operations (10^{power})", {k: {n: v / 10 ** power for n, v in result["counted"][k].items()} for k in kinds})]
    if "inference" in result:
        panels.append(("time (ms)", {k: {n: v["seconds"] * 1e3 for n, v in result["inference"][k].items()} for k in kinds}))
    charts = []
    for title, curves in panels:
        numbers, most = curves["single"], max(v for c in curves.values() for v in c.values())
        charts.append(Chart(title, (1, max(numbers)), (0, 1.1 * most), "number of tasks", {n: str(n) for n in numbers}))
        for kind, colour in zip(kinds, COLOURS):
            charts[-1].curve(curves[kind].items(), colour)
            charts[-1].dots(curves[kind].items(), colour)
        charts[-1].legend([(f"{kind} stream", colour) for kind, colour in zip(kinds, COLOURS)])
    grid(charts, len(charts)).save(path)


def prefix(v):
    """The power of ten, a multiple of 3 up to 12, in which v is written."""
    return min(12, (len(str(int(v))) - 1) // 3 * 3)


def table(result):
    """The result as lines of text."""
    counted, cost = result["counted"], lambda v: f"{v / 10 ** prefix(v):.4g} {PREFIXES[prefix(v)]}"
    speed = lambda r: (f"{r['seconds'] * 1e3:10.1f} ms {r['images_per_s']:8.2f} img/s"
                       + (f"{r['gigabytes']:7.2f} GB" if r["gigabytes"] else "") + (f"{r['hours']:8.2f} h for all steps" if "hours" in r else ""))
    lines = [f"{title}: " + ", ".join(f"{k} {cost(v)}" for k, v in counted[key].items())
             for title, key in (("operations of one row", "parts"), ("training, operations per image", "training"))]
    for stage, m in result["memory"].items():
        lines.append(f"training memory, stage {stage}: {m['fixed'] / 1e9:.2f} GB + {m['per image'] / 1e9:.2f} GB per image of a micro-batch "
                     f"({m['per image, checkpointing'] / 1e9:.2f} GB with --checkpointing), counted at 288x384 in bf16")
    for n in counted["single"]:
        for kind in (k for k in KINDS if n in counted.get(k, ())):
            lines.append(f"{n} tasks, {kind:6}{cost(counted[kind][n]):>10}" + (speed(result["inference"][kind][n]) if "inference" in result else ""))
    return "\n".join(lines + [f"training step, {name:24}{speed(r)}" for name, r in result.get("training", {}).items()])


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", default="toy", help="toy, sd2, or a diffusers folder: whose shapes (default: %(default)s)")
    parser.add_argument("--size", help="images of HEIGHTxWIDTH (default: 256x256, the paper's; for toy that of its training)")
    parser.add_argument("--tasks", type=int, default=len(TASKS), metavar="N", help="1..N tasks are tried (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pairs per inference (default: %(default)s)")
    parser.add_argument("--micro", type=int, default=16, help=f"images per training pass; a step has {BATCH} (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on GPUs, fp32 on the CPU")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the convolutions")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (the first call of each takes a while)")
    parser.add_argument("--graph", action="store_true", help="replay inference as one CUDA graph")
    parser.add_argument("--count-only", action="store_true", help="no timing; on a CPU the default for all bases but toy")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers here")
    parser.add_argument("--plot", metavar="FILE", help="also draw cost and time against the number of tasks (paper Fig. 13), as PNG")
    args = parser.parse_args(argv)
    device = parse_device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    size = parse_size(args.size or (PRESETS["toy"]["size"] if args.base == "toy" else "256x256"))
    if not 1 <= args.tasks <= len(TASKS) or args.batch < 1 or args.micro < 1:
        raise ValueError(f"--tasks {args.tasks} --batch {args.batch} --micro {args.micro}: expected 1 to {len(TASKS)} tasks, and at least 1 image")
    if args.graph and device.type != "cuda":
        raise ValueError(f"--graph records CUDA kernels, and the device is {device}: leave it out, or give --device cuda")
    tasks = tuple(TASKS)[:args.tasks]
    result = {"base": args.base, "size": size, "batch": args.batch, "micro": args.micro, "device": hardware(device), "dtype": str(dtype).removeprefix("torch."),
              "torch": torch.__version__, "channels_last": args.channels_last, "compile": args.compile, "graph": args.graph}
    print(", ".join(f"{k} {v}" for k, v in result.items()))
    result["counted"], result["memory"] = count(args.base, size, tasks), memory(args.base, tasks)
    if not args.count_only and (device.type != "cpu" or args.base == "toy"):
        result["inference"] = inference(args, size, tasks, device, dtype)
        result["training"] = training(args, size, tasks, device, dtype)
    print(table(result))
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(args.plot, result)


if __name__ == "__main__":
    sys.exit(run(main))
