"""What config.json and the saved state say of a run: settings, sizes, versions, data, the commits it ran under."""
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from checkpoint import read_config, stage1_settings

KEPT = "commit", "versions", "stage1", "imported", "held_out", "resumed"      # of config.json, when a run goes on


def commit():
    """The code's git commit, or None outside a checkout or where git is not installed."""
    if not shutil.which("git"):
        return None
    git = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def about_run(cfg, model, readers, saved):
    """The run of these settings (settings.Config) as config.json has it, but for what it goes on to find out; saved: of
    --resume, what the state says (checkpoint.read_state), else None. A notice where it goes on under another commit."""
    now = {"commit": commit(), "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                                            "diffusers": version("diffusers")}}
    about = {"train": asdict(cfg), "size": list(readers[0].size), "tasks": list(model.tasks), "palette": cfg.palette,
             "seed": cfg.seed, **now, "files": identities(readers), "stage1": None, "imported": None, "held_out": {},
             "resumed": []}
    if saved:
        about |= {k: saved[k] for k in KEPT if k in saved}
        steps = [saved["train"]["steps"], cfg.steps]
        if now["commit"] != saved["commit"] or steps[0] != steps[1]:
            about["resumed"].append({"step": saved["step"], "steps": steps, **now})
        if now["commit"] != saved["commit"]:
            print(f"notice: {cfg.out} was trained under commit {saved['commit']} so far, and goes on under "
                  f"{now['commit']}; config.json keeps both", file=sys.stderr)
    elif cfg.init or cfg.stage == 2:
        about["stage1"] = stage1_settings(cfg.init or cfg.out)
        about["imported"] = read_config(cfg.init or cfg.out).get("imported")
    return about


def identities(readers):
    """{dataset: what tells, no file opened, which samples these are}"""
    return {r.name: r.identity() for r in readers}


def check_data(cfg, saved, readers):
    """What --resume does where the data differs from what the run has learned from so far: ValueError for other
    datasets, a notice for other files in the same ones (or the same files copied: their times of change tell)."""
    now = identities(readers)
    was = saved.get("files")
    if was is None:     # a run of an earlier version, which says no more than whether it was the toy worlds
        was = now if bool(saved["train"].get("data")) == bool(cfg.data) else {"other data": None}
    if was.keys() != now.keys():
        raise ValueError(f"the run in {cfg.out} learns from {', '.join(was)}, and {cfg.data or 'the toy worlds'} has "
                         f"{', '.join(now)}: name the folder where its data is now, --resume --data <folder>")
    if changed := [name for name in now if now[name] != was[name]]:
        print(f"notice: the files of {', '.join(changed)} are not those that the run in {cfg.out} has had so far, or "
              "are copies; it goes on with them", file=sys.stderr)


# ---- told in a line ----

TOLD_OF_2 = "heads", "shared_qkv", "main_init", "attention", "rho", "mask"     # of stage 2 alone
TOLD = ("tasks", "drop", "palette", "second_frame", "space", "objective", "condition", "pseudo", "isolation", "loss",
        *TOLD_OF_2)
TOLD_OTHERS = "system", "options", "teacher", "discover", "tasks", "drop"      # of the other systems


def trained(settings, step=None):
    """How a stage was trained, in a line: what the paper varies. step: where the checkpoint is of the run's middle."""
    keys = TOLD if settings.get("system", "stablemtl") == "stablemtl" else TOLD_OTHERS
    keys = [k for k in keys if settings["stage"] == 2 or k not in TOLD_OF_2]
    told = ", ".join(f"{k} {settings[k]}" for k in keys if settings.get(k, "") != "")
    done = "" if step in (None, settings["steps"]) else f"{step} of "
    return f"stage {{stage}}, {done}{{steps}} steps of {{batch}}, seed {{seed}}: ".format(**settings) + told


def stages_of(config):
    """`trained` of each stage that a checkpoint.read_config knows of."""
    known = (config["stage1"], None), (config["train"], config.get("step"))
    return [trained(settings, step) for settings, step in known if settings]
