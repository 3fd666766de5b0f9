"""Hypersim, indoor renderings: https://github.com/apple/ml-hypersim"""
import csv
import json
import os
from functools import cached_property

import numpy as np
from tqdm import tqdm

from readers.formats import read_hdf5, reading
from readers.geometry import every, exposure, grey, length, linear, tonemap
from readers.reader import Frame, Reader


class Hypersim(Reader):
    """Indoor renderings: the scenes of the public split that are in the folder, less six broken frames. For depth, shading and albedo,
    training also leaves out frames with NaN in the depth: the first indices() reads all depth files and notes them in nan_frames.json."""

    name, splits, use = "hypersim", ("train", "val", "test"), {"train": "train", "val": "val"}
    page, licence, download = "https://github.com/apple/ml-hypersim", "CC BY-SA 3.0", "about 1.9 TB with everything, most of it not needed"
    tree = {"split": "metadata_images_split_scene_v1.csv",  # from evermotion_dataset/analysis of the repository
            **{what: f"{{0}}/images/scene_{{1}}_final_hdf5/frame.{{2}}.{what}.hdf5" for what in ("color", "diffuse_reflectance")},
            **{what: f"{{0}}/images/scene_{{1}}_geometry_hdf5/frame.{{2}}.{what}.hdf5"
               for what in ("render_entity_id", "depth_meters", "normal_cam", "normal_world", "position")},
            "eyes": "{0}/_detail/{1}/camera_keyframe_positions.hdf5"}
    tasks, size = ("normal", "depth", "shading", "albedo"), (288, 384)
    mix = {"normal": 0.9, "depth": 0.9, "shading": 1.0, "albedo": 1.0}
    broken = {("ai_004_009", "cam_01", "0000"), ("ai_008_001", "cam_01", "0000"), ("ai_008_001", "cam_02", "0000"),
              ("ai_011_005", "cam_01", "0000"), ("ai_016_009", "cam_00", "0000"), ("ai_052_002", "cam_01", "0021")}

    def find(self):
        path, scenes = self.top("split") / self.tree["split"], {p.name for p in self.top("color").glob("ai_*")}
        if not path.exists():
            return []
        with reading(path, "split table"), open(path, newline="") as f:
            keys = [(row["scene_name"], row["camera_name"], f"{int(row['frame_id']):04}") for row in csv.DictReader(f)
                    if (row["included_in_public_release"], row["split_partition_name"]) == ("True", self.split)]
        return [key for key in keys if key[0] in scenes and key not in self.broken]

    def indices(self, task):
        return self.complete if self.split == "train" and task in ("depth", "shading", "albedo") else self.labelled(task)

    @cached_property
    def complete(self):
        """Numbers of the samples whose depth file has no NaN."""
        path, has_nan = self.folder / "nan_frames.json", {}
        if path.is_file():
            with reading(path, "list of frames with NaN (delete it, it is made again)"):
                has_nan = json.loads(path.read_text())
        todo = [key for key in self.samples if "/".join(key) not in has_nan]
        try:
            for key in tqdm(todo, "hypersim: looking for NaN in depth files", disable=not todo):
                has_nan["/".join(key)] = bool(np.isnan(self.Frame(self, key).read("depth_meters")).any())
        finally:  # an interrupted scan is not lost
            if todo:
                self.remember(path, has_nan)
        complete = [i for i, key in enumerate(self.samples) if not has_nan["/".join(key)]]
        print(f"hypersim: {len(complete)} of {len(self)} training frames have complete depth")
        return complete

    def remember(self, path, has_nan):
        try:
            path.with_suffix(".tmp").write_text(json.dumps(has_nan))
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as e:
            print(f"hypersim: {path} cannot be written ({e.strerror}): the next run has to read the depth files again")

    class Frame(Frame):
        def read(self, what):
            """float16, the entity id int16, the eyes float64."""
            return read_hdf5(self.path(what))

        @cached_property
        def color(self):
            return linear(self.read("color"))

        @cached_property
        def reflectance(self):
            return linear(self.read("diffuse_reflectance"))

        @cached_property
        def hit(self):
            """Entity id -1: the ray hit nothing (window, background), there is no geometry."""
            return self.read("render_entity_id") != -1

        @cached_property
        def exposure(self):
            return exposure(self.color, self.hit)

        def image(self, t):
            return tonemap(self.exposure * self.color)

        def depth(self):
            """Metres along the ray, NaN = none; made plane depth by the nominal 60 degree camera (a few scenes have tilted lenses)."""
            distance = self.read("depth_meters").astype(np.float32)
            h, w = distance.shape
            v, u = np.mgrid[:h, :w].astype(np.float32)
            f = 886.81 * w / 1024
            z = distance * f / np.sqrt((u - (w - 1) / 2) ** 2 + (v - (h - 1) / 2) ** 2 + f * f)
            return z, self.hit & (z > 1e-5) & (z < 65)

        def normal(self):
            """x right, y up, z to the viewer, facing either way; NaN or 0 = none. Positions are in asset units."""
            n, world, point = (self.read(what).astype(np.float32) for what in ("normal_cam", "normal_world", "position"))
            eye = self.read("eyes")[int(self.key[2])].astype(np.float32)
            hidden = np.einsum("...c,...c", world, eye - point) < 0
            n = np.where(hidden[..., None], -n, n) * np.float32([-1, 1, 1])  # facing the viewer with y up -> pointing away with y down
            norm = length(n)
            valid = self.hit & every(np.isfinite(point)) & (norm > 1e-3) & (length(world) > 1e-3)
            return n / np.maximum(norm, 1e-3)[..., None], valid

        def albedo(self):
            """Reflectance in the exposure of the picture; invalid below 2/255 in any channel, too dark to divide by."""
            albedo = np.clip(self.exposure * self.reflectance, 0, 1)
            return albedo, every(albedo >= 2 / 255)

        def shading(self):
            return grey(np.clip(self.color / (self.reflectance + 1e-6), 0, 1)), self.albedo()[1]
