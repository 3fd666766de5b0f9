"""Every path at Stable Diffusion 2's true size, on a CPU: whether it works, its seconds, and its peak memory.

    python -m tests.raw data                            small files in the formats of three datasets
    python -m tools.fullsize --data data --out big      a random base of Stable Diffusion 2's shape, then every command

It takes an hour or more, 60 GB of disk and up to 20 GB of memory; a command that needs more than is free, such as a
plain stage 2 on most machines, is left out, and what it needs is said. stage-2-lora needs the package peft. Weights are
random: what comes out is noise. --only stage-1,resume runs some of them, on what is in --out already.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cli import ROOT, Parser, run, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import torch
from PIL import Image

from network import stock
from tools.bench import SD2_UNET, SD2_VAE
from toy.make import new_text

TEXT = dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
            max_position_embeddings=77, hidden_act="gelu", projection_dim=512)
TRAIN = "train.py --data {data} --batch 1 --micro 1 --val-samples 0 --picture-every 0 --workers 0 --overwrite"
STAGE_1 = f"{TRAIN} --stage 1 --base {{base}} --steps 3"
STAGE_2 = f"{TRAIN} --stage 2 --out {{out}}/run --steps 1"
CACHED = f"{STAGE_1} --optimizer adam-bf16 --cache {{out}}/cache"
SAMPLE = "sample.py {out}/photo.png --ckpt {out}/run --output {out}/maps --overwrite --size 0 --rows 1 --vae-tiling"
COMMANDS = {        # name: (command, gigabytes of memory that it should take, by its weights and what was measured)
    "stage-1": (f"{STAGE_1} --out {{out}}/run", 18),
    "resume": ("train.py --resume --out {out}/run --steps 4", 18),
    "adam-bf16": (f"{STAGE_1} --out {{out}}/bf16 --optimizer adam-bf16", 14),
    "resume-bf16": ("train.py --resume --out {out}/bf16 --steps 4", 14),
    "cache": (f"{CACHED} --out {{out}}/bf16", 14),
    "checkpointing": (f"{CACHED} --out {{out}}/bf16 --checkpointing", 14),
    "stage-2": (STAGE_2, 28),
    "stage-2-bf16": (f"{STAGE_2} --frozen bf16 --optimizer adam-bf16", 20),
    "stage-2-lora": (f"{STAGE_2} --frozen bf16 --lora 16", 14),
    "resume-2": ("train.py --resume --out {out}/run --steps 2", 14),
    "sample-1": (f"{SAMPLE} --stage 1 --tasks depth", 10),
    "sample-2": (SAMPLE, 14),
    "evaluate": ("evaluate.py --ckpt {out}/run --data {data} --limit 1 --trivial 0 --rows 1", 12),
    "export": ("-m tools.convert --export {out}/released --ckpt {out}/run", 14),
    "import": ("-m tools.convert --base {base} --single {out}/released/single.pth --multi {out}/released/multi.pth "
               "--out {out}/imported", 14),
}


# ---- what the commands are given ----

@torch.no_grad()
def random_weights(module):
    """Weights of a size that keeps signals alive, drawn faster than by the layers themselves; float16."""
    module.to_empty(device="cpu").half()
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, x in module.named_buffers():
        if name.endswith("position_ids"):
            x.copy_(torch.arange(x.shape[-1]))
    return module


def make_base(folder):
    """Write a diffusers folder of Stable Diffusion 2's classes and shapes, fp16 files: 866 million parameters in the
    UNet, 84 in the VAE, 340 in the text encoder; the same each time. The tokenizer is the toy base's."""
    torch.manual_seed(0)
    made = {"unet": (stock.UNet2DConditionModel, SD2_UNET), "vae": (stock.AutoencoderKL, SD2_VAE)}
    for part, (kind, config) in made.items():
        with torch.device("meta"):
            empty = kind.from_config(config)
        random_weights(empty).save_pretrained(folder / part, variant="fp16")
    tokenizer, small = new_text()
    special = {k: getattr(small.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device("meta"):
        empty = stock.CLIPTextModel(stock.CLIPTextConfig(**TEXT, **special))
    random_weights(empty).save_pretrained(folder / "text_encoder", variant="fp16")
    tokenizer.save_pretrained(folder / "tokenizer")


def make_photo(path):
    """A picture of 1024x768: a few coloured waves."""
    y, x = torch.meshgrid(torch.linspace(0, 9, 768), torch.linspace(0, 12, 1024), indexing="ij")
    waves = torch.stack([torch.sin(x + k * y) for k in (0.3, 1, 2.2)], -1)
    Image.fromarray((127.5 * (waves + 1)).byte().numpy()).save(path)


# ---- one command ----

def launch(argv):
    """Run Python with these arguments in the project's folder -> (exit code, seconds, peak gigabytes, those of them
    that are no pages of files, which a system takes back when it is short of memory)."""
    start, own = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9, own
        own = max(own, kilobytes(f"/proc/{process.pid}/status", "RssAnon") * 1024 / 1e9)
        time.sleep(0.2)


def kilobytes(path, key):
    """A line's number in one of the system's tables; 0 where there is no such table, or line."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def free_memory():
    """Gigabytes that programs could have; infinite where the system does not say. A container's limit may be less."""
    return kilobytes("/proc/meminfo", "MemAvailable") * 1024 / 1e9 or float("inf")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="root of datasets, as python -m tests.raw makes one")
    parser.add_argument("--out", default="fullsize", help="folder for all that is written (default: %(default)s)")
    parser.add_argument("--base", help="diffusers folder to take (default: a random one, made in --out/base)")
    parser.add_argument("--only", default=",".join(COMMANDS), help="comma-separated commands (default: all)")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in COMMANDS]:
        raise ValueError(f"--only {','.join(unknown)}: choose from {', '.join(COMMANDS)}")
    if not Path(args.data).is_dir():
        raise FileNotFoundError(f"--data {args.data}: no such folder; python -m tests.raw {args.data} makes one")
    if args.base and not Path(args.base).is_dir():
        raise FileNotFoundError(f"--base {args.base}: no such folder")
    out = Path(writable(args.out, folder=True)).absolute()
    if out.is_dir() and any(out.iterdir()) and not (out / "photo.png").is_file():    # runs in it are overwritten
        raise ValueError(f"--out {args.out} holds other things: name a new folder, or one of an earlier fullsize")
    out.mkdir(parents=True, exist_ok=True)
    make_photo(out / "photo.png")
    base = Path(args.base or out / "base").absolute()
    if not base.is_dir():
        print(f"making a random base in {base}", file=sys.stderr)
        shutil.rmtree(out / "base.tmp", ignore_errors=True)
        make_base(out / "base.tmp")
        os.replace(out / "base.tmp", base)
    if "import" in names:       # the one command that replaces nothing
        shutil.rmtree(out / "imported", ignore_errors=True)
    large = sum(file.stat().st_size for file in base.glob("unet/*")) > 1e9      # a small base needs no such memory
    failed = []
    for name in names:
        command, need = COMMANDS[name]
        if large and free_memory() < need:
            print(f"{name:14}left out: it should take {need} GB, and {free_memory():.1f} GB are free", flush=True)
            failed.append(name)
            continue
        filled = [word.format(data=Path(args.data).absolute(), out=out, base=base) for word in command.split()]
        code, seconds, peak, own = launch(filled)
        print(f"{name:14}{'done' if code == 0 else f'failed ({code})':12}{seconds:9.1f} s{peak:8.2f} GB at most, "
              f"{own:.2f} GB without pages of files", flush=True)
        failed += [name] * (code != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
