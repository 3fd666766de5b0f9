"""Virtual KITTI 2 (release 2.0.3), driving renderings: https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2/

Licence: CC BY-NC-SA 3.0. Download: the archives rgb, depth, classSegmentation, forwardFlow and forwardSceneFlow (sizes
on the page), all into virtual_kitti_2/.

semantic       8-bit RGB colours of 15 classes, some of which are ignored
depth          16-bit plane depth in centimetres, 65535 = far plane and sky; valid below 80 m
normal         not in the dataset: derived from depth, pointing away from the camera; valid where depth is
optical_flow   16-bit RGB: R, G = flow / (W-1), flow / (H-1) mapped from [-1,1]; B = 0: no flow
scene_flow     16-bit RGB: x, y, z motion mapped from [-10,10] metres, OpenCV axes; meaningless where there is no flow

Training set: four of the five scenes, six of the ten variations, both cameras (20,148 images, 20,100 pairs; Scene01 is
held out), 375x1242, at 187x621; optical flow on random crops of 256x1024 with colour jitter.
"""
from functools import cached_property

import numpy as np

from readers.formats import read_image, read_png
from readers.geometry import ids_from_colours, normals_from_depth
from readers.reader import Frame, Reader


class VirtualKitti2(Reader):
    name, splits, use = "virtual_kitti_2", ("train", "test"), {"train": "train", "val": "test"}
    page = "https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2/"
    tree = {"image": "{}/{}/frames/rgb/{}/rgb_{}.jpg", "depth": "{}/{}/frames/depth/{}/depth_{}.png",
            "semantic": "{}/{}/frames/classSegmentation/{}/classgt_{}.png",
            "flow": "{}/{}/frames/forwardFlow/{}/flow_{}.png",
            "motion": "{}/{}/frames/forwardSceneFlow/{}/sceneFlow_{}.png"}
    tasks, size = ("semantic", "normal", "depth", "optical_flow", "scene_flow"), (187, 621)
    mix = {"semantic": 1.0, "normal": 0.1, "depth": 0.1, "optical_flow": 0.5, "scene_flow": 0.5}
    train_crop, jitter = {"optical_flow": (256, 1024)}, {"optical_flow": (0.4, 0.4, 0.2, 0.127)}
    scenes = {"train": ("Scene02", "Scene06", "Scene18", "Scene20"), "test": ("Scene01",)}
    variations = ("clone", "morning", "overcast", "sunset", "15-deg-left", "15-deg-right")
    camera = 725.0087, 620.5, 187.0  # f, cx, cy
    colours = {(210, 0, 200): 255, (90, 200, 255): 6, (0, 199, 0): 5, (90, 240, 0): 5, (140, 140, 140): 1,
               (100, 60, 100): 0, (250, 100, 255): 255, (0, 0, 0): 255, (255, 255, 0): 4, (200, 200, 0): 3,
               (255, 130, 0): 2, (80, 80, 80): 255, (160, 60, 60): 7, (255, 127, 80): 7, (0, 139, 139): 7}

    def find(self):
        return [key for key in super().find() if key[0] in self.scenes[self.split] and key[1] in self.variations]

    def pairs(self):
        """All but the last frame of a sequence, which has no next one and no flows."""
        have = set(self.samples)
        return frozenset(i for i, (*where, t) in enumerate(self.samples) if (*where, f"{int(t) + 1:05}") in have)

    class Frame(Frame):
        @cached_property
        def z(self):
            """Metres."""
            return read_png(self.path("depth"), "uint16", 1) / np.float32(100)

        @cached_property
        def flow(self):
            """Pixels, 0 where there is none; valid."""
            raw = read_png(self.path("flow"), "uint16", 3)
            h, w = raw.shape[:2]
            valid = raw[..., 2] > 0
            return (raw[..., :2] / np.float32(65535) * 2 - 1) * np.float32([w - 1, h - 1]) * valid[..., None], valid

        def semantic(self):
            path = self.path("semantic")
            ids = ids_from_colours(read_image(path), self.reader.colours, path)
            return ids, ids != 255

        def depth(self):
            return self.z, (self.z > 1e-5) & (self.z < 80)

        def normal(self):
            return normals_from_depth(self.z, *self.reader.camera), self.depth()[1]

        def optical_flow(self):
            return self.flow

        def scene_flow(self):
            raw, valid = read_png(self.path("motion"), "uint16", 3), self.flow[1]
            return (raw / np.float32(65535) * 20 - 10) * valid[..., None], valid
