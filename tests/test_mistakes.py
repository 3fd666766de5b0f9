"""A user's mistakes: exit code 2, one sentence on stderr that names it, no traceback, no file written or changed."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import raw
import tiny
import torch
from PIL import Image

import data
import evaluate
import sample
import train
from cli import run
from tasks import TASKS
from tools import bench, convert

ROOT = Path(__file__).parent.parent
COMMANDS = {"train": train, "evaluate": evaluate, "sample": sample, "data": data, "bench": bench, "convert": convert}
# progress bars, and what training says first where a task has no labels in the toy worlds
BARS = re.compile("[^\r\n]*\\d+%\\|[^\r\n]*[\r\n]*|\r|tasks with labels in the toy worlds: [^\n]*\n")


def png_header(width, height):
    """A PNG that declares a size and holds nothing."""
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")),
                       (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png


@pytest.fixture(scope="module")
def place(tiny_base, tiny_ckpt, tiny_ckpt_1, tmp_path_factory):
    """A working folder: out/ holds a stage 1, and beside it is whatever the mistakes are about."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_ckpt_1, root / "out")
    for name in ("damaged", "mixed", "half_ckpt"):
        shutil.copytree(tiny_ckpt, root / name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (root / "damaged" / weights).write_bytes((2 ** 60).to_bytes(8, "little") + b"{}")
    tiny.unet(widths=(8, 8, 8, 8)).save_pretrained(root / "mixed" / "main_unet")
    (root / "half_ckpt" / "tokens.safetensors").unlink()
    (root / "part").mkdir()
    (root / "configured").mkdir()
    (root / "configured" / "config.json").write_text("{}")
    (root / "part" / "vae").symlink_to(tiny_base / "vae")
    (root / "base").symlink_to(tiny_base)
    tiny.unet(4).save_pretrained(root / "other" / "unet")
    for name in ("vae", "tokenizer", "text_encoder"):
        (root / "other" / name).symlink_to(tiny_base / name)
    shutil.copytree(tiny_base, root / "broken")
    (root / "broken" / weights).write_bytes(b"\xff" * 99)
    for folder in ("none", "notes", "empty_root/virtual_kitti_2", "half_root/kitti_2015/training/image_2",
                   "half_root/hypersim/ai_001_001", "own/images", "own/depth"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"photo.png": (20, 30), "small.png": (9, 9), "own/images/a.png": (20, 30), "cut.png": (64, 64),
                       "half_root/kitti_2015/training/image_2/000000_10.png": (20, 30)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:2000])
    np.save(root / "own" / "depth" / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, size in {"plain": (16, 24), "thin": (1, 40)}.items():
        raw.own_folder(root / name, 2, *size)
        for split, stem in (("train", "p0"), ("val", "p1")):
            (root / name / f"{split}.txt").write_text(stem)
    (root / "bad.jpg").write_bytes(b"no image")
    (root / "bad.mp4").write_bytes(b"no video" * 99)
    (root / "bad.gif").write_bytes(b"GIF89a")
    (root / "zero.png").touch()
    (root / "bomb.png").write_bytes(png_header(60000, 60000))
    (root / "notes" / "photo.heic").touch()
    (root / "own" / "test.txt").write_text("a\n")
    (root / "bad.json").write_text("{")
    os.mkfifo(root / "pipe")
    for name, value in {"list": [], "foreign": {"accuracy": 0.5}, "null": {"results": None},
                        "other": {"results": {"rooms": {"depth": {"RMSE": 1.0}}}}, "empty": {"results": {}},
                        "part": {"results": {"rooms": {"depth": {"AbsRel": 1.0}}}, "unfinished": ["real"]}}.items():
        (root / f"{name}.json").write_text(json.dumps(value))
    for name in ("moved", "wrong_config", "wrong_results"):
        shutil.copytree(tiny_ckpt_1, root / name)
    settings = {"stage": 1, "steps": 1, "batch": 1, "seed": 0, "data": str(root / "gone")}
    (root / "moved" / "config.json").write_text(json.dumps({"train": settings, "size": [32, 48]}))
    (root / "wrong_config" / "config.json").write_text(json.dumps({"train": [], "size": [32, 48]}))
    (root / "wrong_results" / "results.json").write_text(json.dumps({"results": {"rooms": 3}}))
    torch.save({"x": print}, root / "code.pth")
    torch.save({"x": torch.zeros(1)}, root / "few.pth")
    return root


def contents(folder):
    """{path: checksum} of all that is below a folder."""
    return {p: zlib.crc32(p.read_bytes()) if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def before(place):
    """`contents` of that folder, which no mistake changes."""
    return contents(place)


NEW = "--out new --base base"
FEW = "--steps 1 --batch 1 --micro 1 --workers 0 --picture-every 0 --threads 1"
PLAIN = f"{NEW} {FEW} --tasks depth"
SHORT = f"{FEW} --scenes 1 --size 16x24"
MISTAKES = [(f"train {NEW} {flags}", says) for flags, says in {
    "--lerning-rate 1": "--lerning-rate",
    "--rh 0.5": "--rh",
    "--stage 3": "--stage",
    "--rho 1.5": "from 0 to 1",
    "--rho -0.1": "from 0 to 1",
    "--rho nan": "from 0 to 1",
    "--mask foo": "--mask",
    "--attention all": "--attention",
    "--tasks deph": "deph.*depth",
    "--tasks ,": "unknown task",
    "--palette pink": "--palette",
    "--size 30x49": "not a multiple",
    "--size 30": "HEIGHTxWIDTH",
    "--size 4x4": "at least",
    "--size axb": "HEIGHTxWIDTH",
    "--steps 0": "--steps: .*whole number from 1",
    "--steps x": "--steps",
    "--batch 0": "--batch: .*whole number from 1",
    "--micro -1": "--micro: .*whole number from 1",
    "--lr 0": "above 0",
    "--lr nan": "above 0",
    "--scenes 0": "--scenes: .*whole number from 1",
    "--workers -1": "--workers",
    "--warmup -1": "--warmup",
    "--seed -1": "--seed",
    "--val-samples -1": "--val-samples",
    "--picture-every -1": "--picture-every",
    "--device tpu": "--device",
    "--device meta": "--device meta is not available",
    "--device hpu": "--device hpu is not available",
    "--widths 8,8": "--widths",
    "--widths a,b,c,d": "--widths",
    "--loss dense": "expected latent, pixel, task, each",
    "--loss pixel --cache new/cache": "--cache none",
    "--drop nonsense": "--drop nonsense",
    "--drop streets:deph": "--drop streets:deph",
    "--drop town:depth": "--drop town:depth",
    "--drop rooms:shading": "no training labels for shading",
    "--base nowhere": "could not load.*existing diffusers folder",
    "--base part": "incomplete: no unet",
    "--base broken": "could not load --base .*broken: unet:",
    "--data nowhere": "nowhere is no folder",
    "--data none": "no train dataset in",
    "--data empty_root": "no virtual_kitti_2 train samples: expected .* is empty",
    "--data half_root --size 64x96": "--size would do nothing here: the datasets in half_root have sizes of their own",
    "--data half_root": "no hypersim train samples: expected metadata_images.*holds 1 entries",
    "--init nowhere": "no checkpoint in nowhere",
    "--init damaged": "damaged is damaged",
    "--stage 2": "run python train.py --stage 1",
}.items()] + [(f"train --base base {SHORT} {flags}", says) for flags, says in {     # beside a finished stage 1
    "": "already holds stage 1.*--overwrite",
    "--stage 2 --heads 3": "--heads 3 does not divide",
    "--stage 2 --rho 2": "from 0 to 1",
    "--stage 2 --drop rooms": "--drop rooms",
    "--stage 2 --size 15x24": "not a multiple",
    "--stage 2 --tasks depth": "contradicts the stage 1 in out",
    "--stage 2 --main-init base": "other widths than the stage 1",
    "--stage 2 --out damaged --overwrite": "damaged is damaged",
    "--stage 2 --out half_ckpt --overwrite": "incomplete: no tokens",
    "--out broken": "broken holds unet and vae, but no checkpoint, which would replace them: name another --out",
    "--out part --overwrite": "part holds vae, but no checkpoint",
    "--out configured": "configured holds config.json, but no checkpoint",
    "--out photo.png": "photo.png cannot be written: there is no folder photo.png",
    "--out new --cache photo.png": "photo.png cannot be written",
    "--out new --stage 2 --stream-gb 1e300": "--stream-gb: '1e300' is not a finite number from 0 to 1e.06",
}.items()] + [
    (f"train {PLAIN} --data plain --cache plain", "plain holds other files than a latent cache: name another folder"),
    (f"train {PLAIN} --data plain --cache plain/images", "plain/images holds other files"),
    (f"train {PLAIN} --data thin", "folder's images are 1x40, smaller than a latent cell of 2x2 pixels: .*--size"),
    ("train --stage 0 --out photo.png/new", "photo.png/new cannot be written: there is no folder photo.png"),
    ("train --resume", "nothing to resume in out.*no state"),
    ("train --resume --steps 9 --batch 2 --lr 1", "own settings: leave out (--batch, --lr|--lr, --batch)"),
    ("train --stage 1 --track nowhere", "--track nowhere: there is no such module .*pip install it"),
    ("train --stage 1 --track json", "--track json: this module has no finish, init, log"),
    ("evaluate --ckpt nowhere", "no checkpoint in nowhere"),
    ("evaluate --ckpt out/nowhere", "no checkpoint in out/nowhere: .*no such folder.*the hub .*check the path"),
    ("sample photo.png --ckpt some/body@v1", "no checkpoint in some/body@v1: .*from the hub"),
    ("evaluate --ckpt half_ckpt", "incomplete: no tokens"),
    ("evaluate --ckpt damaged", "damaged is damaged"),
    ("evaluate --ckpt mixed", "mixed is damaged, or its parts are of different models"),
    ("evaluate --ckpt out --stage 2", "holds no stage 2"),
    ("evaluate --ckpt out --stage 3", "--stage"),
    ("evaluate --ckpt out --limt 1", "--limt"),
    ("evaluate --ckpt out --limit 0", "--limit: '0' is not a whole number from 1"),
    ("evaluate --ckpt out --limit inf", "--limit: 'inf'"),
    ("evaluate --ckpt out --limit 99999999999", "--limit: '99999999999' is not .* to 2147483647"),
    ("evaluate --ckpt out --batch 100000", "--batch: '100000'"),
    ("evaluate --ckpt out --rows nan", "--rows: 'nan'"),
    ("evaluate --ckpt out --trivial -1", "--trivial"),
    ("evaluate --ckpt out --workers -1", "--workers"),
    ("evaluate --ckpt out --workers 100000", "--workers: '100000'"),
    ("evaluate --ckpt out --split train", "--split"),
    ("evaluate --ckpt out --device tpu", "--device tpu"),
    ("evaluate --ckpt out --device meta", "--device meta is not available"),
    ("evaluate --ckpt out --palette corners", "--codec only"),
    ("evaluate --ckpt out --palette pink", "--palette"),
    ("evaluate --ckpt out --baseline none.json", "no results in none.json"),
    ("evaluate --ckpt out --baseline bad.json", "bad.json is damaged"),
    ("evaluate --ckpt out --baseline list.json", "list.json is damaged, or of another program.*name the results.json"),
    ("evaluate --ckpt out --baseline foreign.json", "foreign.json .*another program .results is missing"),
    ("evaluate --ckpt out --baseline null.json", "null.json .*another program .results is missing or null"),
    ("evaluate --ckpt out --baseline other.json", "expected AbsRel among the results of depth, found RMSE"),
    ("evaluate --ckpt out --baseline empty.json", "empty.json is about nothing, and evaluated are real, rooms"),
    ("evaluate --ckpt out --baseline empty.json,", "empty.json, is about nothing, and evaluated are real, rooms"),
    ("evaluate --ckpt out --baseline part.json", "part.json is unfinished"),
    ("evaluate --ckpt out --baseline own", "own is a folder: name the results.json of an evaluated checkpoint"),
    ("evaluate --ckpt out --baseline paper", "paper is about cityscapes.* and evaluated are real, rooms"),
    ("evaluate --ckpt out --json nowhere/results.json", "no folder nowhere"),
    ("evaluate --ckpt out --json photo.png/results.json", "no folder photo.png"),
    ("evaluate --ckpt out --json own", "own cannot be written: it is a folder"),
    ("evaluate --ckpt out --json pipe", "pipe cannot be written: it is a device or a pipe, name a file"),
    ("evaluate --ckpt out --json foreign.json", "foreign.json .*another program .*: name another --json"),
    ("evaluate --ckpt out --json photo.png", "photo.png .*another program .*: name another --json"),
    ("bench --json pipe", "pipe cannot be written: it is a device or a pipe, name a file"),
    ("evaluate --ckpt moved", "moved was trained on .*/gone, which is not here.*--data toy"),
    ("evaluate --ckpt wrong_config", "wrong_config/config.json is damaged.*train is \\[\\]"),
    ("evaluate --ckpt wrong_results", "wrong_results/results.json is damaged.*rooms is 3, expected an object"),
    ("evaluate --ckpt out --data nowhere", "nowhere is no folder"),
    ("evaluate --ckpt out --data none", "no test dataset in .*/none"),
    ("evaluate --ckpt out --data half_root", "no kitti_2015 training samples: expected training/flow_occ.*1 entries"),
    ("evaluate --ckpt out --data own --trivial 0 --workers 0", "own/depth/a.npy .*Python objects.*--skip-bad"),
    ("evaluate --ckpt out --kitti-baseline paper", "KITTI 2015 is not among the test sets"),
    ("evaluate --codec --stage 1", "--stage would do nothing here: the toy base has no stages"),
    ("evaluate --codec --confidence --pixels", "--confidence and --pixels would do nothing here"),
    ("evaluate --codec --streams off", "--streams would do nothing here: .*about the codec"),
    ("data", "add --check or --show"),
    ("data --chek", "--chek"),
    ("data --check", "add --data"),
    ("data --check --data nowhere", "nowhere is no folder"),
    ("data --show moon:3", "moon"),
    ("data --show streets:x", "samples 0 to"),
    ("data --show streets:3 --full", "--full would do nothing here: it goes with --check"),
    ("data --check --data own --output new.png", "--output would do nothing here: it goes with --show"),
    ("data --check --data own --split val", "--split would do nothing here: it goes with --show"),
    ("data --check --data half_root --size 64x96", "--size would do nothing here: public datasets have sizes"),
    ("data --show hypersim:0 --data half_root --size 64x96", "--size would do nothing here: public datasets"),
    ("data --show moon:0 --data none", "expected NAME:INDEX with one of hypersim"),
    ("data --show hypersim:0 --data half_root", "no hypersim train samples"),
    ("bench --taks 3", "--taks"),
    (f"bench --tasks {len(TASKS) + 1}", f"whole number from 1 to {len(TASKS)}"),
    ("bench --device tpu", "--device tpu"),
    ("bench --graph --device cpu", "--graph records CUDA"),
    ("bench --base nowhere", "no vae/config.json"),
    ("bench --size big", "HEIGHTxWIDTH"),
    ("convert", "an import needs --base and --single"),
    ("convert --exprt back", "--exprt"),
    ("convert --export back --ckpt nowhere", "no checkpoint in nowhere"),
    ("convert --export back --ckpt out --base base --out new", "--base and --out would do nothing here: .* --export"),
    ("convert --push some/body --single few.pth --multi few.pth", "--single and --multi would do .*with --push"),
    ("convert --base base --single few.pth --ckpt damaged --out new", "--ckpt would do nothing here: .*an import"),
    ("convert --base base --single few.pth", "out already holds a checkpoint"),
    ("convert --base base --single few.pth --out broken", "broken holds unet and vae, but no checkpoint"),
    ("convert --base base --single few.pth --out configured", "configured holds config.json, but no checkpoint"),
    ("convert --base base --single nowhere.pth --out new", "no weights at nowhere.pth"),
    ("convert --base base --single code.pth --out new", "code.pth is not a plain state dict"),
    ("convert --base base --single few.pth --out new", "few.pth does not fit"),
    ("sample", "nothing to predict"),
    ("sample photo.png --overwrit", "--overwrit"),
    ("sample photo.png --stride 0", "--stride"),
    ("sample photo.png --size -3", "--size"),
    ("sample photo.png --size 20000", "--size: '20000' is not a whole number from 0 to 16384"),
    ("sample photo.png --limit 2.5", "--limit: '2.5'"),
    ("sample photo.png --output small.png", "small.png cannot be written: there is no folder small.png"),
    ("sample photo.png --output small.png/maps", "there is no folder small.png"),
    ("sample photo.png --rows x", "--rows"),
    ("sample photo.png --toy real:3", "too much"),
    ("sample photo.png --device tpu", "--device tpu"),
    ("sample photo.png --device meta", "--device meta is not available"),
    ("sample photo.png --tasks depth,colour", "colour"),
    ("sample photo.png --tasks optical_flow", "second frame"),
    ("sample photo.png --attention", "stage 2"),
    ("sample photo.png --stage 2", "holds no stage 2"),
    ("sample photo.png --ckpt none", "no checkpoint in none"),
    ("sample photo.png --ckpt damaged", "damaged is damaged"),
    ("sample photo.png small.png", "30x20 pixels and its next frame 9x9"),
    ("sample absent.png", "absent.png"),
    ("sample none", "no images in none"),
    ("sample notes", "no images in notes"),
    ("sample bad.jpg", "bad.jpg cannot be read as an image"),
    ("sample cut.png", "cut.png cannot be read as an image"),
    ("sample zero.png", "zero.png is empty"),
    ("sample bomb.png", "bomb.png cannot be read.*decompression bomb.*at most"),
    ("sample bad.mp4", "bad.mp4"),
    ("sample bad.gif", "bad.gif"),
    ("sample photo.png photo.png --video --tasks depth", "nothing to film"),
    ("sample photo.png --video --tasks depth", "nothing to film"),
    ("sample --toy real:3 --pixels --single", "--pixels finds the scales of flow in two frames: leave out --single"),
    ("data --show streets:3 --output nowhere/a.png", "nowhere/a.png cannot be written: there is no folder nowhere"),
    *((f"data --show streets:3 --output {name}", f"{name} cannot be written .*: name a .png or .jpg.*with --output")
      for name in ("x.exr", "x", "x.msp")),
    ("sample --toy real:3 --stride 2", "--stride would do nothing here: --toy is a single sample"),
    ("sample --toy real:x", "real:x"),
    ("sample --toy real:999999", "real:999999"),
    ("sample --toy moon:3", "moon"),
]


@pytest.mark.parametrize("command, says", MISTAKES, ids=[c for c, _ in MISTAKES])
def test_a_mistake_ends_in_a_sentence(place, before, monkeypatch, capsys, command, says):
    """In this process, through the same `run` as from the shell."""
    monkeypatch.chdir(place)
    name, *flags = command.split()
    assert run(lambda: COMMANDS[name].main(flags)) == 2
    error = BARS.sub("", capsys.readouterr().err)
    assert re.fullmatch(f"[^\n]*({says})[^\n]*\n", error) and "Traceback" not in error, error
    assert contents(place) == before


@pytest.mark.parametrize("command, says", [("train --stage 2 --rho 1.5", "from 0 to 1"),
                                           ("sample bomb.png --ckpt out", "decompression bomb")])
def test_a_mistake_in_the_shell(place, before, command, says):
    """The commands themselves: the sentence begins with the command's name."""
    name, *flags = command.split()
    done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *flags], cwd=place, capture_output=True, text=True)
    error = BARS.sub("", done.stderr)
    assert re.fullmatch(f"{name}.py: [^\n]*{says}[^\n]*\n", error), error
    assert done.returncode == 2 and done.stdout == ""
    assert contents(place) == before
