"""MIT Multi-Illumination with the albedo of MIDIntrinsics: https://projects.csail.mit.edu/illumination/"""
from functools import cached_property

import numpy as np

from readers.formats import read_exr
from readers.geometry import every, exposure, grey, linear, tonemap
from readers.reader import Frame, Reader


class Mid(Reader):
    """MIT Multi-Illumination test set (30 scenes, 25 light directions each) with the albedo of MIDIntrinsics, one per scene."""

    name, splits, use = "mid", ("test",), {"test": "test"}
    page = "https://projects.csail.mit.edu/illumination/ and https://github.com/compphoto/MIDIntrinsics"
    licence, download = "images CC BY 4.0, albedo CC BY-NC-SA 4.0", "multi_illumination_test_mip2_exr.zip about 1.6 GB"
    tree = {"image": "{0}/dir_{1}_mip2.exr", "albedo": "{0}/albedo.exr"}
    tasks, size = ("shading", "albedo"), (256, 384)

    class Frame(Frame):
        @cached_property
        def lit(self):
            """32-bit linear RGB, times the exposure of the picture."""
            hdr = linear(read_exr(self.path("image")))
            return hdr * exposure(hdr, np.ones(hdr.shape[:2], bool))

        @cached_property
        def reflectance(self):
            return np.clip(linear(read_exr(self.path("albedo"))), 0, 1)

        def image(self, t):
            return tonemap(self.lit)

        def albedo(self):
            """Invalid below 0.004 in any channel."""
            return self.reflectance, every(self.reflectance >= 0.004)

        def shading(self):
            return grey(np.clip(np.clip(self.lit, 0, 1) / np.maximum(self.reflectance, 1e-6), 0, 1)), self.albedo()[1]
