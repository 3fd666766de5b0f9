"""Hypersim, indoor renderings: https://github.com/apple/ml-hypersim

Licence: CC BY-SA 3.0. Download: 1.9 TB with everything; needed, into hypersim/, are metadata_images_split_scene_v1.csv
(from evermotion_dataset/analysis of the repository), color, diffuse_reflectance, depth_meters, normal_cam,
normal_world, position and render_entity_id of every frame, and _detail of every camera.

depth     float16 metres along the ray, made plane depth; NaN = none; valid below 65 m
normal    float16, stored with x right, y up, z to the viewer, facing either way; NaN or 0 = none
albedo    float16 linear diffuse reflectance, in the exposure of the picture, clipped to [0,1]; invalid below 2/255 in
          any channel, too dark to divide by, and where it is NaN or infinite
shading   linear colour over reflectance, clipped to [0,1] per channel, then grey; valid where albedo is and colour is
          not NaN

Entity id -1 (window, background): no depth, no normal. The pictures are exposed so that the 90th percentile of their
brightness is 0.8 after gamma 2.2; infinite colour is over-exposed.

Training set: the frames of the public split whose scenes are in the folder, less six broken ones, 768x1024, at 288x384.
For depth, shading and albedo, training also leaves out frames with NaN in the depth (39,373 of the 53,885 in
Marigold's list have none).
"""
import csv
from functools import cached_property

import numpy as np
from tqdm import tqdm

from checkpoint import read_json, write_json
from readers.formats import read_hdf5, reading, visible
from readers.geometry import every, exposure, grey, length, linear, tonemap
from readers.reader import Frame, Reader, notice


class Hypersim(Reader):
    """The first indices() of depth, shading or albedo in training reads all depth files; nan_frames.json, beside the
    data, remembers what it found."""

    name, splits, use = "hypersim", ("train", "val", "test"), {"train": "train", "val": "val"}
    page = "https://github.com/apple/ml-hypersim"
    tree = {"split": "metadata_images_split_scene_v1.csv",
            **{k: f"{{0}}/images/scene_{{1}}_final_hdf5/frame.{{2}}.{k}.hdf5"
               for k in ("color", "diffuse_reflectance")},
            **{k: f"{{0}}/images/scene_{{1}}_geometry_hdf5/frame.{{2}}.{k}.hdf5"
               for k in ("render_entity_id", "depth_meters", "normal_cam", "normal_world", "position")},
            "eyes": "{0}/_detail/{1}/camera_keyframe_positions.hdf5"}
    tasks, size = ("normal", "depth", "shading", "albedo"), (288, 384)
    mix = {"normal": 0.9, "depth": 0.9, "shading": 1.0, "albedo": 1.0}
    broken = {("ai_004_009", "cam_01", "0000"), ("ai_008_001", "cam_01", "0000"), ("ai_008_001", "cam_02", "0000"),
              ("ai_011_005", "cam_01", "0000"), ("ai_016_009", "cam_00", "0000"), ("ai_052_002", "cam_01", "0021")}

    def find(self):
        path = self.top("split") / self.tree["split"]
        if not path.exists():
            return []
        with reading(path, "split table"), open(path, newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["included_in_public_release"] == "True"]
            keys = [(row["scene_name"], row["camera_name"], f"{int(row['frame_id']):04}") for row in rows
                    if row["split_partition_name"] == self.split]
        scenes = set(visible(self.top("color"), "ai_*"))
        return [key for key in keys if key[0] in scenes and key not in self.broken]

    def indices(self, task):
        incomplete_too = self.split != "train" or task not in ("depth", "shading", "albedo")
        return self.labelled(task) if incomplete_too else self.complete

    @cached_property
    def complete(self):
        """Numbers of the samples whose depth file has no NaN. One that cannot be read is not left out: who loads its
        depth stops there or, with --skip-bad, skips and counts it."""
        path, unread = self.folder / "nan_frames.json", []
        has_nan = read_json(path, "", remedy="delete it, it is made again") if path.is_file() else {}
        todo = [key for key in self.samples if "/".join(key) not in has_nan]
        try:
            for key in tqdm(todo, "hypersim: looking for NaN in depth files", disable=not todo):
                try:
                    has_nan["/".join(key)] = bool(np.isnan(self.Frame(self, key).read("depth_meters")).any())
                except (OSError, ValueError) as error:
                    unread.append(error)
        finally:  # an interrupted scan is not lost
            if todo:
                self.remember(path, has_nan)
        complete = [i for i, key in enumerate(self.samples) if not has_nan.get("/".join(key))]
        damaged = f"; the depth of {len(unread)} of them cannot be read, first: {unread[0]}" if unread else ""
        notice(f"{self.folder}: {len(complete)} of {len(self)} training frames have no NaN in their depth{damaged}")
        return complete

    def remember(self, path, has_nan):
        try:
            write_json(path, has_nan)
        except OSError as e:
            notice(f"{e}; the next run has to read the depth files again")

    class Frame(Frame):
        def read(self, what):
            """float16, the entity id int16, the eyes float64."""
            return read_hdf5(self.path(what))

        @cached_property
        def raw(self):
            return self.read("color")

        @cached_property
        def color(self):
            return linear(self.raw)

        @cached_property
        def reflectance(self):
            """Linear RGB, 0 = unknown."""
            raw = self.read("diffuse_reflectance")
            return linear(np.where(np.isinf(raw), np.float16(0), raw))

        @cached_property
        def hit(self):
            """Where there is geometry."""
            return self.read("render_entity_id") != -1

        @cached_property
        def exposure(self):
            return exposure(self.color, self.hit)

        def image(self, t):
            return tonemap(self.exposure * self.color)

        def depth(self):
            """Plane depth, by the nominal 60 degree camera: a few scenes have tilted lenses."""
            distance = self.read("depth_meters").astype(np.float32)
            h, w = distance.shape
            v, u = np.mgrid[:h, :w].astype(np.float32)
            f = 886.81 * w / 1024
            z = distance * f / np.sqrt((u - (w - 1) / 2) ** 2 + (v - (h - 1) / 2) ** 2 + f * f)
            return z, self.hit & (z > 1e-5) & (z < 65)

        def normal(self):
            n, world, point = (self.read(k).astype(np.float32) for k in ("normal_cam", "normal_world", "position"))
            eye = self.read("eyes")[int(self.key[2])].astype(np.float32)
            hidden = np.einsum("...c,...c", world, eye - point) < 0
            # facing the viewer with y up -> pointing away with y down
            n = np.where(hidden[..., None], -n, n) * np.float32([-1, 1, 1])
            norm = length(n)
            valid = self.hit & every(np.isfinite(point)) & (norm > 1e-3) & (length(world) > 1e-3)
            return n / np.maximum(norm, 1e-3)[..., None], valid

        def albedo(self):
            """Reflectance in the exposure of the picture."""
            albedo = np.clip(self.exposure * self.reflectance, 0, 1)
            return albedo, every(albedo >= 2 / 255)

        def shading(self):
            shading = np.clip(self.color / (self.reflectance + 1e-6), 0, 1)
            return grey(shading), self.albedo()[1] & every(~np.isnan(self.raw))
