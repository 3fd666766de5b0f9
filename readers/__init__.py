"""Raw readers: eight public datasets exactly as downloaded, and a folder of one's own as the ninth.

    name             used for  labelled tasks                                     native HxW      size after preparation
    hypersim         train     normal, depth, shading, albedo                     768x1024        288x384
    virtual_kitti_2  train     semantic, normal, depth, optical_flow, scene_flow  375x1242        187x621
    flyingthings3d   train     optical_flow, scene_flow                           540x960         268x480
    cityscapes       test      semantic                                           1024x2048       256x512
    kitti_eigen      test      depth                                              about 375x1242  176x608
    kitti_2015       test      optical_flow, scene_flow                           about 375x1242  176x608
    diode            test      normal, depth                                      768x1024        384x512
    mid              test      shading, albedo                                    1000x1500       256x384
    folder           both      any subset                                         any             as the first image

A dataset lives in <root>/<name>/, its archives extracted there as they come. A reader lists its samples without opening an image;
load(i, tasks) reads only what the named tasks need, at native resolution after the dataset's fixed crop (data.py resizes to `size`).
Labels are those of tasks.py: OpenCV camera axes, normals pointing away from the camera, metres, pixels, linear [0,1], class ids with
255 = ignore. They are finite everywhere: a pixel without a number is 0 and invalid.
"""
from pathlib import Path

from readers.cityscapes import Cityscapes
from readers.diode import Diode
from readers.flyingthings3d import FlyingThings3D
from readers.folder import Folder
from readers.hypersim import Hypersim
from readers.kitti import Kitti2015, KittiEigen
from readers.mid import Mid
from readers.virtual_kitti_2 import VirtualKitti2

READERS = {r.name: r for r in (Hypersim, VirtualKitti2, FlyingThings3D, Cityscapes, KittiEigen, Kitti2015, Diode, Mid, Folder)}


def found(root, role):
    """The readers of all datasets under `root` that serve as "train", "val" or "test"; FileNotFoundError if none is, or one is empty."""
    readers = [r for r in READERS.values() if role in r.use and r.there(root)]
    if not readers:
        names = ", ".join(f"{r.name}/" for r in READERS.values() if role in r.use)
        raise FileNotFoundError(f"no {role} dataset in {root}: expected one or more of {names} or images/ (README: Data)")
    return [r(root, r.use[role]) for r in readers]


def check(root, full=False):
    """Printable lines: for every dataset the samples per task and the first label that does not load, of the first, middle and last one
    (full: of all), or what was looked for and not found."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is no folder: expected one that holds some of {', '.join(READERS)} (README: Data)")
    lines = []
    for reader in READERS.values():
        if not reader.there(root):
            lines.append(f"{reader.name}: not here, expected in {reader.place(root)}; get it from {reader.page}")
            continue
        for split in reader.use.values():
            try:
                data = reader(root, split)
            except (OSError, ValueError) as e:
                lines.append(f"{reader.name} {split}: {e}")
                continue
            lines.append(f"{reader.name} {split}: {len(data)} samples in {data.folder}")
            lines += [f"    {task:12} {len(data.labelled(task)):6}  {trial(data, task, full)}" for task in data.tasks]
    return lines


def trial(data, task, full):
    """The first problem in loading labels of a task, as a sentence, or how many were tried."""
    known = data.labelled(task)
    tried = known if full else sorted({known[k] for k in (0, len(known) // 2, -1)} if known else ())
    for i in tried:
        try:
            data.load(i, [task])
        except (OSError, ValueError) as e:
            return str(e)
    return f"{len(tried)} tried, all well" if known else "no sample of this split has this label"
