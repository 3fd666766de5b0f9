"""A checkpoint for others: its files on the hub, with a card that says what it does, what made it and how good it is.

`python -m tools.convert --push org/name --ckpt out/` calls `push`; the way back is StableMTL.from_pretrained.
"""
import json
import re
import sys
from pathlib import Path
from shlex import quote

import evaluate
import toy
from checkpoint import read_config, read_json, read_lines
from inference.report import read_report, weights_of
from network.generalist import STABLEMTL
from network.loading import HUB_ID, SHARED, on_hub, read_checkpoint, reason
from tasks import TASKS
from training.about import stages_of

# of an absolute path in a text, wherever it starts, all but its last name; a folder's name may have spaces inside
NAME = r"""[^/\s:,;"'()]+"""
FOLDERS = re.compile(rf"""(?<![^\s=:,;"'`(\[])/(?:{NAME}(?: {NAME})*/)*(?=[^/\s])""")
RAIL = "CreativeML Open RAIL++-M"
CARD = """---
{header}
---

# {name}

Dense maps of a photograph by [StableMTL](https://arxiv.org/abs/2506.08013), stage {stage}: {steps} of a
{space} diffusion UNet for each of {tasks}.

## Use

In a checkout of the code{commit}:

```python
from model import StableMTL

model = StableMTL.from_pretrained("{repository}")
maps = model.infer("photo.jpg", next="next.jpg")      # numpy arrays of the photo's size; without next, no motion
maps["{first}"]
```

| map | channels | unit |
|---|---|---|
{units}

## Training

{training}

## Results

{results}

## Licence

{licence}
"""


def push(ckpt, repository):
    """Upload the checkpoint in the folder `ckpt` with its card, without what only training needs and without the paths
    of this machine -> the address.

    A new repository is public; one made before stays as private as it is. Token and so on are huggingface_hub's.
    FileNotFoundError, ValueError: the checkpoint is not whole, or the name is none; OSError: the hub did not take it.
    """
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"--push {repository}: expected a name on the hub, org/name")
    folder, spec = Path(ckpt), read_checkpoint(ckpt)["spec"]
    files = {path.relative_to(folder).as_posix(): shared(path, folder) for path in files_of(folder, spec)}
    files["README.md"] = without_folders(card(folder, spec, repository)).encode()
    from huggingface_hub import CommitOperationAdd, HfApi
    try:
        address = HfApi().create_repo(repository, exist_ok=True)
        HfApi().create_commit(repository, [CommitOperationAdd(*file) for file in files.items()],
                              commit_message=f"{len(files)} files of {folder.resolve().name}")
    except Exception as error:      # each version of the hub's client has errors of its own
        raise OSError(f"could not push {ckpt} to {repository} ({reason(error)}): it takes a network, and a token that "
                      "may write there (HF_TOKEN, or `hf auth login`)") from error
    return str(address)


def files_of(folder, spec):
    """What of SHARED belongs to the model of this model.json: no parts of an earlier one, and of reports no others than
    whole ones of these weights."""
    paths = sorted(path for pattern in SHARED for path in folder.glob(pattern))
    gone = () if spec["multi"] else ("main_unet", "task_attention.safetensors")
    return [path for path in paths if path.relative_to(folder).parts[0] not in gone and not outdated(path, folder)]


def shared(path, folder):
    """A file as it is uploaded: itself, by its path, or the bytes of a config or report that names folders of this
    machine. Those of vae/ and unet/ count as weights, and name none (network.loading.save_part)."""
    if path.parent != folder or path.suffix != ".json":
        return str(path)
    value = read_json(path, "", (dict, list))
    told = without_folders(value)
    return str(path) if told == value else json.dumps(told, indent=1).encode()


def without_folders(value):
    """A text, or all texts of a parsed json, with the last name alone of each absolute path."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def outdated(path, folder):
    """Whether it is a report of other weights, not whole, or put aside."""
    if not path.match("results*.json"):
        return False
    try:
        return ".before" in path.name or bool(faults(path, folder))
    except ValueError:      # none of ours
        return False


def faults(path, folder):
    """Why a report does not tell of the weights in the folder, in words; "" if it does."""
    report = read_report(path)
    if not report:
        return f"there is no {path}"
    if report.get("unfinished"):
        return f"{path} is unfinished"
    if "weights" in report:
        same = report["weights"] == weights_of(folder, report.get("stage"))
    else:       # of an earlier version of this code
        same = report.get("settings") == read_config(folder)["train"]
    return "" if same else f"{path} is of other weights"


def card(folder, spec, repository):
    """The README.md of a checkpoint on the hub, made from its config.json, results.json and log.jsonl."""
    config = read_config(folder)
    base = (config.get("imported") or config["train"] or {}).get("base")
    licence, terms = licence_of(base)
    axes = spec.get("generalist") or STABLEMTL
    steps = f"{axes['ddim_steps']} DDIM steps" if axes["objective"] == "diffuse" else "one step"
    tags = ", ".join(["stablemtl", *spec["tasks"]])
    header = [f"license: {licence}", "pipeline_tag: image-to-image", f"tags: [{tags}]"]
    if licence != "apache-2.0" and on_hub(base):
        header.append(f"base_model: {base}")
    stages = [f"- {stage}" for stage in stages_of(config)]
    size = "{} x {} (height x width)".format(*config["size"] or "??")
    training = [*stages, f"- data: {data_of(folder, config)}", f"- size of the images: {size}"]
    stage = 2 if spec["multi"] else 1
    return CARD.format(
        header="\n".join(header), name=repository.split("/")[-1], repository=repository,
        stage=stage, tasks=", ".join(TASKS[t].prompt for t in spec["tasks"]), steps=steps,
        space=axes["space"],
        commit=f" (commit {config['commit'][:10]})" if config.get("commit") else "", first=spec["tasks"][0],
        units="\n".join(f"| {t} | {TASKS[t].channels} | {TASKS[t].unit} |" for t in spec["tasks"]),
        training="\n".join(training), results=results_of(folder, stage), licence=terms)


def licence_of(base):
    """(the hub's name of a licence, what to say about it) of weights that come from `base`; None: it is not known."""
    if base == "" or base and Path(base).resolve() == toy.BASE.resolve():
        return "apache-2.0", "Apache-2.0: made from nothing but this code and its procedural worlds."
    if base and "stable-diffusion-2" in base:
        return "openrail++", (f"The weights derive from Stable Diffusion 2 and are under its {RAIL} licence, use "
                              "restrictions included. The training data have terms of their own.")
    return "other", (f"The weights derive from {base or 'a base that is not recorded'} and are under its licence. "
                     "The training data have terms of their own.")


def data_of(folder, config):
    """What it was trained on, as far as its files tell."""
    lines = read_lines(folder / "log.jsonl", {"dataset": [str]})
    names = ", ".join(sorted({name for line in lines for name in line["dataset"]} or config.get("files") or ()))
    if config["train"] and not config["train"].get("data"):
        return f"the built-in procedural worlds{f' ({names})' if names else ''}"
    return names or ("that of the released weights" if config.get("imported") else "not recorded")


def results_of(folder, stage):
    """The table of results.json; without one of this model, that there is none, and a notice on stderr."""
    path = folder / "results.json"
    report = read_report(path)
    why = faults(path, folder)
    if not why and report.get("stage") != stage:
        why = f"{path} is of stage {report.get('stage')}"
    if why:
        print(f"notice: {why}, so the card has no results: python evaluate.py --ckpt {quote(str(folder))}, then push "
              "again", file=sys.stderr)
        return "Not evaluated yet."
    limit = (report.get("flags") or {}).get("limit")
    told = ["", f"At most {limit} samples of each test set."] if limit else []
    return "\n".join([*evaluate.table(report["results"], report["trivial"]), *told])
