"""FlyingThings3D, flying objects, rendered: the DispNet/FlowNet2.0 subset, not the full release, of
https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html

Licence: research only, no commercial use. Download: the subset's image_clean, disparity, disparity_change and flow
(sizes on the page), all into flyingthings3d/.

optical_flow   .flo, pixels to the next frame; 500 and more in either direction is invalid, occluded pixels are valid
scene_flow     OpenCV axes, in the dataset's own unit (the baseline of its cameras), which counts as a metre; from flow,
               disparity and its change, float32 .pfm in pixels that this subset stores negated; valid where the first
               depth is below 35

Training set: a sample per forward flow (19,640; val: 3,824), 540x960, centre crop 536x960, at 268x480; horizontal and
vertical flips and colour jitter.
"""
from functools import cached_property

import numpy as np

from readers.formats import read_flo, read_pfm
from readers.geometry import every, scene_flow
from readers.reader import Frame, Reader


class FlyingThings3D(Reader):
    name, splits, use = "flyingthings3d", ("train", "val"), {"train": "train", "val": "val"}
    page = "https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html"
    tree = {"flow": "<split>/flow/left/into_future/{}.flo", "image": "<split>/image_clean/left/{}.png",
            "disparity": "<split>/disparity/left/{}.pfm", "change": "<split>/disparity_change/left/into_future/{}.pfm"}
    tasks, size, crop = ("optical_flow", "scene_flow"), (268, 480), (536, 960)
    mix = {"optical_flow": 0.5, "scene_flow": 0.5}
    vflip = True
    jitter = {"optical_flow": (0.3, 0.3, 0.3, 0.159), "scene_flow": (0.3, 0.3, 0.3, 0.159)}
    camera = 1050.0, 479.5, 269.5  # f, cx, cy; the baseline is 1
    version = 2  # since 2 invalid pixels do not scale the codes of flows

    class Frame(Frame):
        @cached_property
        def flow(self):
            return read_flo(self.path("flow"))

        def optical_flow(self):
            return self.flow, every(np.abs(self.flow) < 500)

        def scene_flow(self):
            f, cx, cy = self.reader.camera
            d, change = -read_pfm(self.path("disparity")), -read_pfm(self.path("change"))
            with np.errstate(divide="ignore", invalid="ignore"):  # zero disparity is infinitely far, hence invalid
                z0, z1 = f / d, f / (d + change)
                return scene_flow(self.flow, z0, z1, f, cx, cy), (d > 0) & (z0 < 35) & (d + change > 0)
