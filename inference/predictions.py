"""Predictions of test sets as files: what sample.py --testset writes, and evaluate.py --predictions scores, whoever
made them.

    <folder>/<dataset>/<task>/<sample>.npy      or .png, .flo, .exr (readers/exports.py says what a task may be)
    <folder>/made_from.json                     only of sample.py: which test sets at which size, of which checkpoint

<sample> is the sample's key in its dataset, with subfolders where that has several parts (docs/predictions.md).
"""
import shutil
from collections import Counter
from operator import ge
from pathlib import Path

import torch

from checkpoint import digest, read_json, stamps, write_json
from data import or_skip, tasks_with_labels, test_batches
from inference.infer import as_array, network_maps, restore
from readers.exports import FORMATS, decode, endings, fits, save
from readers.folder import SAME_ASPECT, same_aspect
from readers.reader import some
from tasks import IGNORE, TASKS

SAME_CROP = 1.005   # the least that a whole image and its crop differ by in aspect ratio is 1.0075
NOTE = {"data": str, "split": str, "size": (None, [int, int]), "checkpoint": str, "stage": int, "key": str,
        "test_sets": (None, {str: str})}


def read_note(folder):
    """What sample.py --testset noted in a folder, {} if it holds no such note."""
    path = Path(folder) / "made_from.json"
    try:
        return read_json(path, "", NOTE) if path.is_file() else {}
    except ValueError:      # damaged, or that of sample.py on photos
        return {}


# ---- writing ----

def begin(folder, note, overwrite):
    """Make the folder ready for predictions of this note: those made from the same stay, of other test sets too.
    FileExistsError if it holds anything else, unless overwrite: then the predictions of another note make room."""
    folder, old = Path(folder), read_note(folder)
    known, now = old.get("test_sets") or {}, note["test_sets"]
    alike = all(old.get(k) == x for k, x in note.items() if k != "test_sets")
    alike = alike and all(known[name] == now[name] for name in known.keys() & now.keys())
    if folder.is_dir() and any(folder.iterdir()) and not old:
        raise FileExistsError(f"{folder} holds other things than predictions of a test set: name another --output")
    if old and (overwrite or not alike):
        if not overwrite:
            raise FileExistsError(f"{folder} holds predictions of {old['checkpoint']} on the {old['split']} split of "
                                  f"{old['data']}, made with other weights, data or settings: name another --output, "
                                  "or replace them with --overwrite")
        for path in folder.iterdir():
            if path.is_dir() and any((path / t).is_dir() for t in TASKS):
                shutil.rmtree(path)
        (folder / "results.json").unlink(missing_ok=True)
        known = {}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "made_from.json", note | {"test_sets": known | now})


def write(model, reader, tasks, folder, forms, batch, rows=None, limit=None, skip_bad=False):
    """Predict the samples of a test set for those of the tasks that it labels, as evaluate.py does, one file for each
    of the forms (exports.FORMATS) that fits. -> (Counter of samples "done" and "kept", names of skipped ones)."""
    device, skipped, tally = next(model.parameters()).device, [], Counter()
    wanted = tasks_with_labels(reader, tasks)
    for group in test_batches(reader, wanted, batch, 2, limit, skip_bad=skip_bad, skipped=skipped):
        wanted = [t for t in group[0][1] if t in TASKS]
        files = [(n, t, form, Path(folder, reader.name, t, f"{reader.stem(index)}{FORMATS[form]}"))
                 for n, (_, _, index, _) in enumerate(group) for t in wanted for form in forms if fits(TASKS[t], form)]
        if not files:       # none of the forms fits these labels
            continue
        if all(path.is_file() for *_, path in files):
            tally["kept"] += len(group)
            continue
        pair = [torch.stack(f).to(device) for f in zip(*(frames for frames, *_ in group), strict=True)]
        predicted = network_maps(model, *pair, tasks=wanted, rows=rows)
        for n, t, form, path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, as_array(predicted[t][n].float().cpu(), TASKS[t]), TASKS[t], form)
        tally["done"] += len(group)
    return tally, skipped


# ---- reading ----

class Predictions:
    """The predictions in a folder, in the place of a model: `tasks`, those that any dataset has a folder for.

    FileNotFoundError if there is no folder, ValueError if nothing in it is laid out as told at the top.
    """

    def __init__(self, folder):
        self.folder, self.note, self.found = Path(folder), read_note(folder), {}
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: --predictions names one that holds <dataset>/<task>/"
                                    "<sample>.npy (docs/predictions.md)")
        self.tasks = tuple(t for t in TASKS if any(path.is_dir() for path in self.folder.glob(f"*/{t}")))
        if not self.tasks:
            raise ValueError(f"no predictions in {folder}: expected {folder}/<dataset>/<task>/<sample>.npy with a task "
                             f"of {', '.join(TASKS)} (docs/predictions.md)")

        self.config = {"train": None, "stage1": None, "size": self.note.get("size")}
        self.told = {"checkpoint": self.note.get("checkpoint"), "stage": self.note.get("stage"),
                     "predictions": str(folder)}

    def home(self, data, split):
        """Which data they are of: what sample.py noted, else --data. ValueError if neither says, or of another split.
        """
        if not (self.note or data):
            raise ValueError(f"nothing says what the predictions in {self.folder} are of: name the root of the test "
                             "sets (--data <root>), or --data toy")
        if self.note.get("split", split) != split:
            raise ValueError(f"the predictions in {self.folder} are of the split {self.note['split']}: add --split "
                             f"{self.note['split']}")
        home = self.note.get("data") or data
        if not (data or home == "toy" or Path(home).is_dir()):
            raise FileNotFoundError(f"the predictions in {self.folder} are of {home}, which is not here: say where it "
                                    "is now (--data <root>)")
        return home

    def files(self, reader, task):
        """{sample: path} of one task in the folder of a dataset; of several formats the first of FORMATS counts."""
        top, suffixes = self.folder / reader.name / task, endings(TASKS[task])
        if (reader.name, task) not in self.found:
            paths = [p for p in top.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".")]
            paths.sort(key=lambda p: suffixes.index(p.suffix.lower()), reverse=True)
            self.found[reader.name, task] = {p.relative_to(top).as_posix()[:-len(p.suffix)]: p for p in paths}
        return self.found[reader.name, task]

    def wanted(self, reader, limit=None):
        """{task: samples that evaluation asks for}."""
        known = {t: {int(i) for i in reader.indices(t)} for t in tasks_with_labels(reader, self.tasks)}
        asked = some(reader, sorted(set().union(*known.values())), limit)
        return {t: [reader.stem(i) for i in asked if i in numbers] for t, numbers in known.items()}

    def covered(self, readers):
        """Those test sets that there are predictions of. ValueError if there are none, or if files of one are all
        named otherwise than its samples."""
        for reader, (t, names) in ((r, pair) for r in readers for pair in self.wanted(r).items()):
            if (files := self.files(reader, t)) and not files.keys() & set(names):
                raise ValueError(f"no file in {self.folder / reader.name / t} is named as a sample of {reader.name}: "
                                 f"the first is {min(files.values())}, expected names like {names[0]}.npy")
        found = [r for r in readers if any(self.files(r, t) for t in self.wanted(r))]
        if not found:
            raise ValueError(f"no predictions in {self.folder} of {', '.join(r.name for r in readers)}: expected "
                             f"{self.folder}/<dataset>/<task>/<sample>.npy (docs/predictions.md)")
        return found

    def missing(self, reader, limit=None):
        """Names of the predictions that evaluation asks for and does not find."""
        return [f"{reader.name}/{t}/{name}" for t, names in self.wanted(reader, limit).items()
                for name in names if name not in self.files(reader, t)]

    def state(self, reader):
        """Eight hexadecimal digits for the predictions of a dataset: names, sizes and times of their files."""
        return digest(stamps((p for p in (self.folder / reader.name).rglob("*") if p.is_file()), self.folder))

    def maps(self, reader, group, skipped=None):
        """A group of data.test_batches -> {task: [(C,H,W) of the label's size, or None where there is no file, ...]}.

        What cannot be read, or scored, is named in the list `skipped` and None; without a list it is a ValueError.
        """
        out = {t: [] for t in group[0][1] if t in TASKS}
        for _, labels, index, _ in group:
            for t in out:
                path, x = self.files(reader, t).get(reader.stem(index)), None
                valid = torch.stack([mask for name, (_, mask) in labels.items() if name.split(":")[0] == t]).any(0)
                try:
                    x = path and self.read(path, TASKS[t], reader, valid)
                except (OSError, ValueError) as error:
                    if skipped is None:
                        raise ValueError(f"{error}{or_skip(False)}") from error
                    skipped.append(f"{reader.name}:{index}: {error}")
                out[t].append(x)
        return out

    def read(self, path, task, reader, valid):
        """A file -> (C,H,W) on the grid of its label's mask `valid` (H,W). ValueError: unreadable, another number of
        channels, another aspect ratio, or unknown where the label is not."""
        x, (height, width) = decode(path, task), valid.shape
        size = x.shape[:2]
        close = SAME_CROP if reader.crop else SAME_ASPECT
        if reader.crop and not same_aspect(size, reader.crop, close) and all(map(ge, size, reader.crop)):
            x = x[reader.window(*size)]     # it is of the whole image
        elif not same_aspect(size, (height, width), close):
            raise ValueError(f"{path} is {size[0]}x{size[1]}, its label {height}x{width}: predict that at any size of "
                             "its aspect ratio" + ", or the whole image at its own size" * bool(reader.crop))
        x = torch.from_numpy(x).permute(2, 0, 1)
        if x.shape[1:] != valid.shape:
            x = restore(x[None], task, (height, width))[0]
        unknown = (x == IGNORE if task.categorical else ~x.isfinite()).any(0) & valid
        if unknown.any():
            raise ValueError(f"{path} says nothing at {int(unknown.sum())} of the {int(valid.sum())} pixels where its "
                             "label does: every pixel is scored")
        return x
