"""Raw readers: eight public datasets exactly as downloaded, and a folder of one's own as the ninth.

A dataset lives in <root>/<name>/, its archives extracted there as they come. A reader lists its samples without opening
an image; load(i, tasks) reads only what the named tasks need, at native resolution after the dataset's fixed crop
(data.py resizes to `size`). Labels are those of tasks.py: OpenCV camera axes, normals pointing away from the camera,
metres, pixels, linear [0,1], class ids with 255 = ignore. They are finite everywhere: a pixel without a number is 0 and
invalid. The top of each file says what a dataset holds, its licence, and how it is used.

Adding a dataset is one file and one line, its class in DATASETS.
"""
from pathlib import Path
from pkgutil import resolve_name

from tasks import TASKS

DATASETS = (                           # for    labels                                             native -> used HxW
    "hypersim:Hypersim",               # train  normal, depth, shading, albedo                     768x1024 -> 288x384
    "virtual_kitti_2:VirtualKitti2",   # train  semantic, normal, depth, optical_flow, scene_flow  375x1242 -> 187x621
    "flyingthings3d:FlyingThings3D",   # train  optical_flow, scene_flow                           540x960 -> 268x480
    "cityscapes:Cityscapes",           # test   semantic                                           1024x2048 -> 256x512
    "kitti:KittiEigen",                # test   depth                                              varies -> 176x608
    "kitti:Kitti2015",                 # test   optical_flow, scene_flow                           varies -> 176x608
    "diode:Diode",                     # test   normal, depth                                      768x1024 -> 384x512
    "mid:Mid",                         # test   shading, albedo                                    1000x1500 -> 256x384
    "folder:Folder",                   # both   any subset                                         any -> one for all
)
READERS = {reader.name: reader for reader in (resolve_name(f"readers.{place}") for place in DATASETS)}


def make(reader, root, split, size=None):
    """The reader of one dataset; size: (H,W) for those that have none of their own (folder)."""
    return reader(root, split) if reader.size else reader(root, split, size)


def found(root, role, size=None):
    """The readers of all datasets under `root` that serve as "train", "val" or "test".

    size: (H,W) to which one's own images are resized, by default theirs; public datasets have sizes of their own.
    FileNotFoundError: there is none, or one is empty. ValueError: one's own images need a size, or files contradict.
    """
    check_folder(root)
    readers = [r for r in READERS.values() if role in r.use and r.there(root)]
    if not readers:
        names = ", ".join(f"{r.name}/" for r in READERS.values() if role in r.use)
        raise FileNotFoundError(f"no {role} dataset in {root}: expected one or more of {names} or images/ "
                                "(docs/data.md)")
    return [make(r, root, r.use[role], size) for r in readers]


def check_folder(root):
    """FileNotFoundError if the root is no folder."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is no folder: expected one that holds some of {', '.join(READERS)} "
                                "(docs/data.md)")


def sized(root, role=None):
    """Whether all datasets under `root` (that serve as `role`) have sizes of their own, so that no other one acts."""
    readers = [r for r in READERS.values() if role in (None, *r.use) and r.there(root)]
    return bool(readers) and all(r.size for r in readers)


def check(root, full=False, size=None):
    """-> (printable lines, whether all is well): for every dataset the samples per task and the first thing that is
    wrong with a label, of the first, middle and last one (full: of all), or what was looked for and not found, which
    is well as long as there is one. size: as in `found`."""
    check_folder(root)
    own = any(r.there(root) and r.place(root) == Path(root) for r in READERS.values())
    lines, faults = [], 0
    for reader in READERS.values():
        if not reader.there(root):
            if own:     # the root itself is a folder of one's own: no dataset is expected in it
                continue
            lines.append(f"{reader.name}: not here, expected in {reader.place(root)}; get it from {reader.page}")
            continue
        for role, split in reader.use.items():
            try:
                data = make(reader, root, split, size)
            except (OSError, ValueError) as error:
                lines.append(f"{reader.name} {split}: {error}")
                faults += 1
                continue
            lines.append(f"{reader.name} {split}: {len(data)} samples in {data.folder}")
            if role == "train" and not any(map(len, map(data.labelled, data.tasks))):
                lines.append(f"    no label: expected some in {', '.join(f'{task}/' for task in TASKS)}")
                faults += 1
            for task in data.tasks:
                try:
                    told = trial(data, task, full, role)
                except (OSError, ValueError) as error:
                    told = str(error)
                    faults += 1
                lines.append(f"    {task:12} {len(data.labelled(task)):6}  {told}")
    return lines, not faults and any(r.there(root) for r in READERS.values())


def trial(data, task, full, role):
    """How many labels of a task were tried and how much of them is valid, as a sentence. OSError, ValueError: the first
    that cannot be read; ValueError: not one has a valid pixel."""
    known, shares, whole, blank = data.labelled(task), [], [], []
    if not known:
        return "no sample of this split has this label"
    for i in known if full else sorted({known[k] for k in (0, len(known) // 2, -1)}):
        valid = data.load(i, [task])["valid"][task]
        if not valid.any():     # it is no mistake, and others may be
            blank.append(i)
        shares.append(valid.mean())
        whole.append(whole_blocks(valid))
    if len(blank) == len(shares):
        raise ValueError(f"{data.source(blank[0], task)} has no valid pixel")
    told = f"{len(shares)} tried, all load, {sum(shares) / len(shares):.0%} of their pixels valid"
    if role != "test" and sum(whole) < 0.01 * len(whole):
        told += ", but hardly any block of 8x8 in full: too sparse to train Stable Diffusion on"
    if blank:
        told += f"; {len(blank)} without any valid pixel, first {data.source(blank[0], task)}"
    return told


def whole_blocks(valid, side=8):
    """The share of blocks of side x side pixels, latent cells of Stable Diffusion, that are valid as a whole; 1 if
    there are none. valid: (H,W) bool."""
    h, w = (length // side for length in valid.shape)
    return valid[:h * side, :w * side].reshape(h, side, w, side).all((1, 3)).mean() if h * w else 1
