"""MIT Multi-Illumination with the albedo of MIDIntrinsics, indoor photographs:
https://projects.csail.mit.edu/illumination/ and https://github.com/compphoto/MIDIntrinsics

Licence: images CC BY 4.0, albedo CC BY-NC-SA 4.0. Download: multi_illumination_test_mip2_exr.zip (1.6 GB) and
midi_test_albedo.zip, both into mid/.

albedo    linear RGB, one file per scene; invalid below 0.004 in any channel, too dark to divide by
shading   exposed light (at most 1) over albedo, per channel, then grey; valid where albedo is

The pictures are 32-bit linear EXR, exposed so that the 90th percentile of their brightness is 0.8 after gamma 2.2. NaN
is invalid; infinite light is over-exposed, infinite albedo invalid.

Test set: 30 scenes x 25 light directions, 1000x1500, at 256x384.
"""
from functools import cached_property

import numpy as np

from readers.formats import read_exr
from readers.geometry import every, exposure, grey, linear, tonemap
from readers.reader import Frame, Reader


class Mid(Reader):
    name, splits, use = "mid", ("test",), {"test": "test"}
    page = "https://projects.csail.mit.edu/illumination/ and https://github.com/compphoto/MIDIntrinsics"
    tree = {"image": "{0}/dir_{1}_mip2.exr", "albedo": "{0}/albedo.exr"}
    tasks, size = ("shading", "albedo"), (256, 384)

    class Frame(Frame):
        @cached_property
        def raw(self):
            return read_exr(self.path("image"))

        @cached_property
        def lit(self):
            """Linear RGB, times the exposure of the picture."""
            hdr = linear(self.raw)
            return hdr * exposure(hdr, np.ones(hdr.shape[:2], bool))

        @cached_property
        def reflectance(self):
            """Linear RGB in [0,1], 0 = unknown."""
            raw = read_exr(self.path("albedo"))
            return np.clip(linear(np.where(np.isinf(raw), 0, raw)), 0, 1)

        def image(self, t):
            return tonemap(self.lit)

        def albedo(self):
            return self.reflectance, every(self.reflectance >= 0.004)

        def shading(self):
            shading = np.clip(np.clip(self.lit, 0, 1) / np.maximum(self.reflectance, 1e-6), 0, 1)
            return grey(shading), self.albedo()[1] & every(~np.isnan(self.raw))
