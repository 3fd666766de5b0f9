"""KITTI, street photographs with laser depth. Licence of both sets: CC BY-NC-SA 3.0, free account.

kitti_eigen: https://www.cvlibs.net/datasets/kitti/eval_depth.php?benchmark=depth_prediction
Download: annotated depth (14 GB) and the raw synced drives of the Eigen list, into kitti_eigen/.

depth          16-bit, 256 x metres, 0 = no measurement; valid up to 80 m inside the Eigen window

Test set: the 652 images with ground truth of the list eigen_test_files_with_gt.txt ("image depth focal" per line) if it
is in the folder, otherwise every image that has ground truth, with a notice. About 375x1242, bottom crop 352x1216, at
176x608. Aligned depth is clipped to 80 m.

kitti_2015: https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php
Download: data_scene_flow.zip (2 GB) and data_scene_flow_calib.zip (1 MB), into kitti_2015/.

optical_flow   16-bit RGB: R, G = 64 x pixels + 32768, B = 0: no flow
scene_flow     metres, OpenCV axes, from flow and two disparities: 16-bit, 256 x pixels, 0 = none

Test set: the 200 training scenes, size as above. Both flows are valid where flow and both disparities are, as in the
published evaluation; extra["optical_flow:flow_occ"] is the mask of the flow alone.
"""
from functools import cached_property
from pathlib import Path

import numpy as np

from readers.formats import read_flow_png, read_png, reading, visible
from readers.geometry import scene_flow
from readers.reader import Frame, Reader, notice


class KittiEigen(Reader):
    name, splits, use = "kitti_eigen", ("test",), {"test": "test"}
    page = "https://www.cvlibs.net/datasets/kitti/eval_depth.php?benchmark=depth_prediction"
    tree = {"image": "{}/{}/image_02/data/{}.png", "list": "eigen_test_files_with_gt.txt"}
    tasks, size, crop, bottom, depth_range = ("depth",), (176, 608), (352, 1216), True, (1e-5, 80.0)

    def find(self):
        levels = "", "*/", "*/*/"  # with or without a level train or val, and perhaps in a folder of its own
        files = [self.folder / name for up in levels
                 for name in visible(self.folder, f"{up}*_sync/proj_depth/groundtruth/image_02/*.png")]
        self.truth = {(path.parents[3].name, path.stem): path for path in files}
        have = [key for key in super().find() if key[1:] in self.truth]
        path = self.top("list") / self.tree["list"]
        if not path.exists():
            notice(f"kitti_eigen: no {path}, so all {len(have)} images with ground truth stand in for the Eigen split")
            return have
        with reading(path, "list of files"):
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
            images = [Path(image) for image, depth, *_ in lines if depth != "None"]
            wanted = [(image.parts[0], image.parts[1], image.stem) for image in images]
        missing = sorted(set(wanted) - set(have))
        if missing:
            raise FileNotFoundError(f"{len(missing)} of the {len(wanted)} samples of {path} lack image or ground "
                                    f"truth, first {'/'.join(missing[0])}: get them from {self.page} (docs/data.md)")
        return wanted

    class Frame(Frame):
        def depth(self):
            z = read_png(self.reader.truth[self.key[1:]], "uint16", 1) / np.float32(256)
            h, w = z.shape
            window = np.zeros((h, w), bool)  # a fraction of the uncropped image
            window[int(0.3324324 * h):int(0.91351351 * h), int(0.0359477 * w):int(0.96405229 * w)] = True
            return z, window & (z > 1e-5) & (z < 80)


class Kitti2015(Reader):
    """baseline: "calibration" takes each scene's own (0.533 to 0.538 m), "paper" the constant 0.54 m."""

    name, splits, use = "kitti_2015", ("training",), {"test": "training"}
    page = "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php"
    tree = {"flow": "<split>/flow_occ/{}_{}.png", "image": "<split>/image_2/{}_{}.png",
            "disparity": "<split>/disp_occ_0/{}_{}.png", "later": "<split>/disp_occ_1/{}_{}.png",
            "calibration": "<split>/calib_cam_to_cam/{0}.txt"}  # keys: ("000042", "10")
    tasks, size, crop, bottom = ("optical_flow", "scene_flow"), (176, 608), (352, 1216), True

    def __init__(self, root, split="training", baseline="calibration"):
        if baseline not in ("calibration", "paper"):
            raise ValueError(f"unknown baseline {baseline!r}: expected calibration or paper")
        self.baseline = baseline
        super().__init__(root, split)

    class Frame(Frame):
        @cached_property
        def flow(self):
            return read_flow_png(self.path("flow"))

        @cached_property
        def disparities(self):
            """At t, and at t+1 of the same scene points (in the pixel grid of frame t)."""
            return [read_png(self.path(kind), "uint16", 1) / np.float32(256) for kind in ("disparity", "later")]

        @cached_property
        def valid(self):
            return self.flow[1] & (self.disparities[0] > 0) & (self.disparities[1] > 0)

        def camera(self):
            """f, cx, cy in pixels of the uncropped image, and the baseline in metres."""
            path = self.path("calibration")
            with reading(path, "calibration"):
                rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
                f, _, cx, left, _, _, cy, *_ = map(float, rows["P_rect_02"].split())
                right = float(rows["P_rect_03"].split()[3])
                return f, cx, cy, 0.54 if self.reader.baseline == "paper" else (left - right) / f

        def optical_flow(self):
            return self.flow[0], self.valid

        def scene_flow(self):
            f, cx, cy, baseline = self.camera()
            z0, z1 = (f * baseline / np.where(self.valid, d, 1) for d in self.disparities)
            return scene_flow(self.flow[0], z0, z1, f, cx, cy) * self.valid[..., None], self.valid

        def extra(self, tasks):
            return {"optical_flow:flow_occ": self.flow[1]} if "optical_flow" in tasks else {}
