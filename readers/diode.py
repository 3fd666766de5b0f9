"""DIODE, indoor and outdoor photographs with laser depth: https://diode-dataset.org"""
import numpy as np

from readers.formats import read_npy
from readers.geometry import unit_vectors
from readers.reader import Frame, Reader


class Diode(Reader):
    """Indoor and outdoor photographs with laser depth, the validation set (771 images)."""

    name, splits, use = "diode", ("val",), {"test": "val"}
    page, licence, download = "https://diode-dataset.org", "MIT", "val.tar.gz about 2.6 GB, val_normals.tar.gz about 4.6 GB"
    tree = {"image": "<split>/{}/{}/{}/{}.png", "depth": "<split>/{}/{}/{}/{}_depth.npy", "mask": "<split>/{}/{}/{}/{}_depth_mask.npy",
            "normal": "<split>/{}/{}/{}/{}_normal.npy"}
    tasks, size, depth_range = ("normal", "depth"), (384, 512), (0.6, 350.0)

    class Frame(Frame):
        def depth(self):
            """float32 metres; the mask file has 1 = valid."""
            return read_npy(self.path("depth"), 1), read_npy(self.path("mask"), 1)[..., 0] > 0.5

        def normal(self):
            """float32 or float64, x right, y up, z to the viewer, facing the camera; (0,0,0) = none."""
            return unit_vectors(read_npy(self.path("normal"), 3).astype(np.float32) * np.float32([-1, 1, 1]))
