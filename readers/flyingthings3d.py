"""FlyingThings3D, the DispNet/FlowNet2.0 subset: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html"""
from functools import cached_property

import numpy as np

from readers.formats import read_flo, read_pfm
from readers.geometry import every, scene_flow
from readers.reader import Frame, Reader


class FlyingThings3D(Reader):
    """Flying objects: the DispNet/FlowNet2.0 subset, not the full release. A sample per forward flow; its length unit counts as a metre."""

    name, splits, use = "flyingthings3d", ("train", "val"), {"train": "train", "val": "val"}
    page = "https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html"
    licence = "research only, no commercial use"
    tree = {"flow": "<split>/flow/left/into_future/{}.flo", "image": "<split>/image_clean/left/{}.png",
            "disparity": "<split>/disparity/left/{}.pfm", "change": "<split>/disparity_change/left/into_future/{}.pfm"}
    tasks, size, crop = ("optical_flow", "scene_flow"), (268, 480), (536, 960)
    mix = {"optical_flow": 0.5, "scene_flow": 0.5}
    vflip, jitter = True, {"optical_flow": (0.3, 0.3, 0.3, 0.159), "scene_flow": (0.3, 0.3, 0.3, 0.159)}
    camera = 1050.0, 479.5, 269.5  # f, cx, cy; the baseline is 1

    class Frame(Frame):
        @cached_property
        def flow(self):
            return read_flo(self.path("flow"))

        def optical_flow(self):
            """Pixels; 500 and more is invalid, occluded pixels are valid."""
            return self.flow, every(np.abs(self.flow) < 500)

        def scene_flow(self):
            """Disparity and its change are float32 pixels, both stored negated; valid where the first depth is below 35."""
            f, cx, cy = self.reader.camera
            d, change = -read_pfm(self.path("disparity")), -read_pfm(self.path("change"))
            with np.errstate(divide="ignore", invalid="ignore"):  # zero disparity is infinitely far, hence invalid
                return scene_flow(self.flow, f / d, f / (d + change), f, cx, cy), (d > 0) & (f / d < 35) & (d + change > 0)
