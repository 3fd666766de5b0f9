"""DIODE, indoor and outdoor photographs with laser depth: https://diode-dataset.org

Licence: MIT. Download: val.tar.gz (2.6 GB) and val_normals.tar.gz (4.6 GB), both into diode/.

depth    float32 metres; valid where the mask file says 1, whatever the depth
normal   float32 or float64; stored with x right, y up, z to the viewer, facing the camera; (0,0,0) = none

Test set: the 771 images of val, 768x1024, at 384x512. Aligned depth is clipped to 0.6..350 m.
"""
import numpy as np

from readers.formats import read_npy
from readers.geometry import unit_vectors
from readers.reader import Frame, Reader


class Diode(Reader):
    name, page, splits, use = "diode", "https://diode-dataset.org", ("val",), {"test": "val"}
    tree = {"image": "<split>/{}/{}/{}/{}.png", "depth": "<split>/{}/{}/{}/{}_depth.npy",
            "mask": "<split>/{}/{}/{}/{}_depth_mask.npy", "normal": "<split>/{}/{}/{}/{}_normal.npy"}
    tasks, size, depth_range = ("normal", "depth"), (384, 512), (0.6, 350.0)

    class Frame(Frame):
        def depth(self):
            return read_npy(self.path("depth"), 1), read_npy(self.path("mask"), 1)[..., 0] > 0.5

        def normal(self):
            return unit_vectors(read_npy(self.path("normal"), 3).astype(np.float32) * np.float32([-1, 1, 1]))
