"""A folder of one's own images and labels."""
from functools import partialmethod
from pathlib import Path

import numpy as np

from readers.formats import read_flo, read_image, read_npy, read_png, reading
from readers.geometry import ids_from_colours, unit_vectors
from readers.reader import Frame, Reader
from tasks import CITYSCAPES, TASKS


class Folder(Reader):
    """A folder of one's own, <root>/folder/ or <root> itself. The files of a sample share their stem X:

        images/X.png|jpg        frame t
        next/X.png|jpg          frame t+1, needed where X has a flow
        semantic/X.png          8-bit class ids 0..7, 255 = ignore; or the Cityscapes display colours, black = ignore
        normal/X.npy            (H,W,3), pointing away from the camera, OpenCV axes; (0,0,0) = invalid
        depth/X.npy|png         (H,W) metres, NaN or <= 0 invalid; or 16-bit millimetres, 0 invalid
        optical_flow/X.flo|npy  (H,W,2) pixels, NaN invalid
        scene_flow/X.npy        (H,W,3) metres, OpenCV axes, NaN invalid
        shading/X.npy|png       (H,W) in [0,1], linear, NaN invalid; or 8- or 16-bit grey, linear too
        albedo/X.npy|png        (H,W,3) in [0,1], linear, NaN invalid; or 8- or 16-bit RGB, linear too

    Any subset of the label folders, any subset of the samples in each. <split>.txt, if there is one, lists the stems of a split;
    otherwise every split is everything. size: (H,W) to resize to, by default that of the first image.
    """

    name, splits, use = "folder", ("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}
    tree, page = {"image": "images/{}.*"}, "your own camera"
    suffixes = {"semantic": (".png",), "normal": (".npy",), "depth": (".npy", ".png"), "optical_flow": (".flo", ".npy"),
                "scene_flow": (".npy",), "shading": (".npy", ".png"), "albedo": (".npy", ".png")}
    tasks, mix = tuple(suffixes), dict.fromkeys(suffixes, 1.0)
    colours = {**{colour: i for i, colour in enumerate(CITYSCAPES)}, (0, 0, 0): 255}

    def __init__(self, root, split, size=None):
        super().__init__(root, split)
        self.size = tuple(size or read_image(self.images[self.samples[0][0]]).shape[:2])

    @classmethod
    def place(cls, root):
        return Path(root) / "folder" if (Path(root) / "folder").is_dir() else Path(root)

    @classmethod
    def there(cls, root):
        return (cls.place(root) / "images").is_dir()

    def files(self, sub, suffixes=(".png", ".jpg", ".jpeg")):
        """{stem: path} of one subfolder; ValueError if two files share a stem."""
        found = {}
        for path in sorted((self.folder / sub).glob("*")):
            if path.suffix.lower() in suffixes and found.setdefault(path.stem, path) != path:
                raise ValueError(f"{path} and {found[path.stem].name} are the same sample twice: keep one of them")
        return found

    def find(self):
        self.images, self.second = self.files("images"), self.files("next")
        self.labels = {task: self.files(task, suffixes) for task, suffixes in self.suffixes.items()}
        self.tasks = tuple(task for task, files in self.labels.items() if files)
        for task in self.tasks:
            for sub, pictures in (("images", self.images), ("next", self.second))[:TASKS[task].frames]:
                for stem in self.labels[task].keys() - pictures.keys():
                    raise ValueError(f"{self.labels[task][stem]} belongs to no picture: expected {self.folder / sub / stem}.png or .jpg")
        chosen, stems = self.folder / f"{self.split}.txt", list(self.images)
        if chosen.exists():
            with reading(chosen, "list of stems"):
                stems = [line.strip() for line in chosen.read_text().splitlines() if line.strip()]
            for stem in set(stems) - self.images.keys():
                raise ValueError(f"{chosen} names {stem!r}, no picture of {self.folder / 'images'}: expected stems, without .png or .jpg")
        return [(stem,) for stem in stems]

    def pairs(self):
        return frozenset(i for i, (stem,) in enumerate(self.samples) if stem in self.second)

    def labelled(self, task):
        return [i for i, (stem,) in enumerate(self.samples) if stem in self.labels.get(task, ())]

    class Frame(Frame):
        def image(self, t):
            return read_image((self.reader.second if t else self.reader.images)[self.key[0]])

        def file(self, task):
            if self.key[0] not in self.reader.labels[task]:
                raise ValueError(f"{self.key[0]} in {self.reader.folder} has no {task} label: indices({task!r}) are the samples that have")
            return self.reader.labels[task][self.key[0]]

        def semantic(self):
            path = self.file("semantic")
            ids = read_png(path, "uint8", 1, 3)
            ids = ids_from_colours(ids, self.reader.colours, path) if ids.ndim == 3 else ids
            for wrong in np.setdiff1d(ids, [*range(len(CITYSCAPES)), 255]):
                raise ValueError(f"{path} holds the id {wrong}: expected class ids 0..{len(CITYSCAPES) - 1}, or 255 for ignore")
            return ids, ids != 255

        def normal(self):
            return unit_vectors(read_npy(self.file("normal"), 3))

        def depth(self):
            path = self.file("depth")
            z = read_png(path, "uint16", 1) / np.float32(1000) if path.suffix.lower() == ".png" else read_npy(path, 1)[..., 0]
            return z, z > 0

        def flow(self, task, channels):
            path = self.file(task)
            x = read_flo(path) if path.suffix.lower() == ".flo" else read_npy(path, channels)
            return x, np.ones(x.shape[:2], bool)

        def intensity(self, task, channels):
            path = self.file(task)
            if path.suffix.lower() == ".png":
                x = read_png(path, "uint8 uint16", channels)
                x = x / np.float32(np.iinfo(x.dtype).max)
            else:
                x = read_npy(path, channels)
            if (x < 0).any() or (x > 1).any():
                raise ValueError(f"{path} ranges from {np.nanmin(x):.3g} to {np.nanmax(x):.3g}: expected linear values in [0,1]")
            return x, np.ones(x.shape[:2], bool)

        optical_flow, scene_flow = partialmethod(flow, "optical_flow", 2), partialmethod(flow, "scene_flow", 3)
        shading, albedo = partialmethod(intensity, "shading", 1), partialmethod(intensity, "albedo", 3)
