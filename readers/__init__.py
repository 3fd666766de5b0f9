"""Raw readers: eight public datasets exactly as downloaded, and a folder of one's own as the ninth.

    name             used for  labelled tasks                                     native HxW      size after preparation
    hypersim         train     normal, depth, shading, albedo                     768x1024        288x384
    virtual_kitti_2  train     semantic, normal, depth, optical_flow, scene_flow  375x1242        187x621
    flyingthings3d   train     optical_flow, scene_flow                           540x960         268x480
    cityscapes       test      semantic                                           1024x2048       256x512
    kitti_eigen      test      depth                                              about 375x1242  176x608
    kitti_2015       test      optical_flow, scene_flow                           about 375x1242  176x608
    diode            test      normal, depth                                      768x1024        384x512
    mid              test      shading, albedo                                    1000x1500       256x384
    folder           both      any subset                                         any             as the first image

A dataset lives in <root>/<name>/, its archives extracted there as they come. A reader lists its samples without opening an image;
load(i, tasks) reads only what the named tasks need, at native resolution after the dataset's fixed crop (data.py resizes to `size`).
Labels are those of tasks.py: OpenCV camera axes, normals pointing away from the camera, metres, pixels, linear [0,1], class ids with
255 = ignore. They are finite everywhere: a pixel without a number is 0 and invalid.
"""

import csv
import glob
import json
import os
import re
import struct
from contextlib import contextmanager
from functools import cached_property, partialmethod, reduce
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tasks import CITYSCAPES, TASKS

# ---- file formats ----

MAX_PIXELS = 2 ** 28  # a header that declares more is a mistake or an attack


@contextmanager
def reading(path, kind):
    """Whatever goes wrong inside becomes one sentence that names the file: FileNotFoundError if missing, ValueError if unreadable."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: extract its archive again (README: Data)") from None
    except Exception as e:  # decoders of damaged files raise anything
        raise ValueError(f"{path} is not a readable {kind}, perhaps truncated: download or extract it again ({e})") from e


def opencv():
    """cv2, imported where real data is read, as the toy worlds do without. Single-threaded, because data loaders run many processes."""
    os.environ["OPENCV_IO_ENABLE_OPENEXR"] = "1"  # without it cv2 refuses EXR files
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    import cv2
    cv2.setNumThreads(0)
    return cv2


def decode(path, flags):
    """One PNG or JPEG file as cv2 decodes it: (H,W) or (H,W,C), channels still in BGR order."""
    cv2 = opencv()
    with reading(path, "image"):
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, flags) if data.size else None
        if image is None:
            raise ValueError(f"{data.size} bytes that do not decode")
        return image


def read_image(path):
    """Picture -> (H,W,3) uint8 RGB. Grey is repeated, alpha dropped, 16 bits reduced to 8, EXIF rotation applied."""
    cv2 = opencv()
    return cv2.cvtColor(decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_png(path, dtypes, *channels):
    """The stored numbers of a PNG: (H,W), or (H,W,3) in RGB order. dtypes: "uint8", "uint16" or "uint8 uint16"; others raise ValueError."""
    cv2 = opencv()
    image = decode(path, cv2.IMREAD_UNCHANGED)
    has = 1 if image.ndim == 2 else image.shape[2]
    if str(image.dtype) not in dtypes.split() or has not in channels:
        want = " or ".join(map(str, channels))
        raise ValueError(f"{path} has {has} channels of {image.dtype}: expected {want} of {dtypes.replace(' ', ' or ')}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if has == 3 else image


def read_pfm(path):
    """One-channel PFM -> (H,W) float32, top row first (the file begins with the bottom row); a negative scale means little endian."""
    with reading(path, "PFM file"), open(path, "rb") as f:
        kind, size, scale = f.readline().strip(), f.readline().split(), f.readline()
        if kind != b"Pf":
            raise ValueError(f"starts with {kind[:8]!r}, not Pf")
        w, h = map(int, size)
        return np.frombuffer(f.read(), "<f4" if float(scale) < 0 else ">f4").reshape(h, w)[::-1].astype(np.float32)


def read_flo(path):
    """Middlebury flow -> (H,W,2) float32: (u,v) in pixels from frame t to t+1, rows top to bottom."""
    with reading(path, "FLO file"):
        data = Path(path).read_bytes()
        magic, w, h = struct.unpack_from("<fii", data)
        if magic != 202021.25:
            raise ValueError(f"magic number {magic}, not 202021.25")
        return np.frombuffer(data, "<f4", offset=12).reshape(h, w, 2).astype(np.float32)


def read_hdf5(path):
    """The array called `dataset` of an HDF5 file, in its stored dtype (Hypersim: float16, int16, float64)."""
    import h5py
    with reading(path, "HDF5 file"), h5py.File(path, "r", locking=False) as f:  # network disks often refuse locks
        if f["dataset"].size > 4 * MAX_PIXELS:
            raise ValueError(f"declares {f['dataset'].size} numbers")
        return f["dataset"][()]


def read_npy(path, channels):
    """Array of numbers -> (H,W,channels) in its stored dtype, (H,W) alone counts as one channel. Pickled objects are refused."""
    with reading(path, "NPY file"):
        x = np.array(np.lib.format.open_memmap(path, "r"))  # mapped first: a header cannot make it reserve more than the file holds
    if x.shape[2:] != (channels,) and (x.ndim, channels) != (2, 1) or x.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {x.dtype} of shape {x.shape}: expected numbers of shape (H, W, {channels})")
    return x.reshape(*x.shape[:2], channels)


def read_exr(path):
    """OpenEXR picture -> (H,W,3) float32 linear RGB, unbounded."""
    cv2 = opencv()
    if re.search(r"OpenEXR:\s+NO", cv2.getBuildInformation()):
        raise ValueError(f"{path} needs OpenEXR, which OpenCV {cv2.__version__} is built without: pip install 'opencv-python-headless<5'")
    with reading(path, "EXR file"):
        open(path, "rb").close()  # cv2 does not tell a missing file from a broken one
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is None or image.ndim != 3:
            raise ValueError("no colour picture in it")
        return cv2.cvtColor(image[..., :3], cv2.COLOR_BGR2RGB).astype(np.float32)


# ---- geometry, light, classes ----


def every(mask):
    """(H,W,C) bool -> (H,W): true in all channels. Channel by channel, as numpy is slow at reducing short axes."""
    return reduce(np.logical_and, np.moveaxis(mask, -1, 0))


def length(n):
    """(H,W,C) -> (H,W) Euclidean norm."""
    return np.sqrt(np.einsum("...c,...c", n, n))


def backproject(u, v, z, f, cx, cy):
    """Pixels u, v at plane depth z, all (H,W) -> (H,W,3) points in OpenCV camera axes, in the unit of z."""
    return np.stack([(u - cx) / f * z, (v - cy) / f * z, z], -1)


def scene_flow(flow, z0, z1, f, cx, cy):
    """(H,W,3) motion in the unit of z, from flow (H,W,2) in pixels and the depth (H,W) of the same scene point at t and at t+1."""
    v, u = np.mgrid[:z0.shape[0], :z0.shape[1]].astype(np.float32)
    return backproject(u + flow[..., 0], v + flow[..., 1], z1, f, cx, cy) - backproject(u, v, z0, f, cx, cy)


def normals_from_depth(z, f, cx, cy, r=3):
    """Outward unit normals (H,W,3) float32 of a plane-depth map z (H,W), pixels counted from 0.

    On a plane the inverse depth is linear in the pixel, w = a u + b v + e, and the normal is (f a, f b, e + a cx + b cy) up to a
    positive factor. The fit runs over windows of 2r+1 pixels, wide enough to average out centimetre steps; a pixel takes the best of the
    nine windows that hold it in the middle, on an edge or in a corner, so that windows do not reach across depth edges.
    """
    cv2 = opencv()
    w = 1 / np.maximum(z, 1e-3).astype(np.float64)  # float32 cannot resolve the residual of a good fit
    d = np.arange(-r, r + 1.0)
    mean, slope, spread = np.full(d.size, 1 / d.size), d / (d @ d), (d @ d) / d.size
    m, square = cv2.sepFilter2D(w, -1, mean, mean), cv2.sepFilter2D(w * w, -1, mean, mean)
    a, b = cv2.sepFilter2D(w, -1, slope, mean), cv2.sepFilter2D(w, -1, mean, slope)
    residual = np.maximum(square - m * m - (a * a + b * b) * spread, 0) / (m * m) + 1e-12
    residual[:r], residual[-r:], residual[:, :r], residual[:, -r:] = (np.inf,) * 4  # these windows leave the image
    rows, cols = z.shape
    v, u = np.mgrid[:rows, :cols]
    n = np.stack([f * a, f * b, m - a * (u - cx) - b * (v - cy)], -1)
    n = (n / length(n)[..., None]).astype(np.float32)
    padded, cost, move = np.pad(residual, r, constant_values=np.inf), residual / 16, np.zeros((rows, cols), int)
    for y in (-r, 0, r):  # a moved window must fit clearly better: where the surface curves, it is biased
        for x in (-r, 0, r):
            there = padded[r + y:r + y + rows, r + x:r + x + cols]
            better = there < cost
            np.copyto(cost, there, where=better)
            np.copyto(move, y * cols + x, where=better)
    return n.reshape(-1, 3)[v * cols + u + move]


def unit_vectors(n):
    """(H,W,3) -> (unit vectors, valid (H,W)): a length outside 0.5..1.5, or NaN, marks a pixel without a normal."""
    norm = length(n)
    return n / np.maximum(norm, 0.5)[..., None], (norm > 0.5) & (norm < 1.5)


def linear(raw):
    """Stored linear RGB (H,W,3) -> float32 in 0..65504 (the largest float16): NaN and less than 0 become 0."""
    return np.fmin(np.fmax(raw.astype(np.float32), 0), 65504)


def grey(rgb):
    """Brightness (H,W) of (H,W,3) float32."""
    return rgb @ np.float32([0.3, 0.59, 0.11])


def exposure(rgb, where):
    """The scale that puts the 90th percentile of brightness over the pixels `where` at 0.8 after gamma 2.2. No pixel: 1; black: 0."""
    p = np.percentile(grey(rgb)[where], 90) if where.any() else 0.8 ** 2.2
    return np.float32(0.8 ** 2.2 / p if p >= 1e-4 else 0)


def tonemap(rgb):
    """Linear float32 -> uint8: clip, gamma 2.2, truncate."""
    return (opencv().pow(np.clip(rgb, 0, 1), 1 / 2.2) * 255).astype(np.uint8)


def ids_from_colours(rgb, table, path):
    """(H,W,3) uint8 -> (H,W) uint8 class ids by table {(r,g,b): id}; ValueError names the file and a colour that is not in the table."""
    code = rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]
    ids = np.full(code.shape, 254, np.uint8)
    for (r, g, b), i in table.items():
        ids[code == (r << 16 | g << 8 | b)] = i
    if (ids == 254).any():
        raise ValueError(f"{path} holds the colour {rgb[ids == 254][0].tolist()} of no class: expected one of {sorted(map(list, table))}")
    return ids


# ---- what all readers share ----


def stars(template):
    """A path template as a glob pattern: every {} or {0} becomes *."""
    return re.sub(r"{\d?}", "*", template)


class Frame:
    """One sample being loaded: image(0), image(1) where there is a second frame, and a method per labelled task -> (label, valid (H,W)).
    Files that several of these need are cached properties, so that each is read once."""

    def __init__(self, reader, key):
        self.reader, self.key = reader, key

    def path(self, kind, ahead=0):
        """Built forwards from the key, never by rewriting another path. ahead: frames to go on; the last part of a key is its frame."""
        *scene, t = self.key
        return self.reader.top(kind) / self.reader.tree[kind].format(*scene, f"{int(t) + ahead:0{len(t)}}" if ahead else t)

    def image(self, t):
        return read_image(self.path("image", t))

    def extra(self, tasks):
        """Further masks {name: (H,W) bool} for evaluation to report on."""
        return {}


class Reader:
    """Base of all datasets: Reader(root, split). A subclass states facts, lists its samples and decodes one of them in its Frame.

    samples: a key (tuple of strings) for each; paired: the numbers of those that have a second frame.
    """

    name = page = licence = download = ""  # folder under root, where to obtain it, terms, size of the download where known
    tree = {}                              # kind of file: path template, to be filled in with the key; the first one lists the samples
    splits, use = (), {}                   # all splits; role (train, val, test): the split that plays it
    tasks, size = (), None                 # labelled tasks; (H,W) that data.py resizes to, nearest-exact, values never rescaled
    crop, bottom = None, False             # (H,W) of the fixed crop, central but for its rows if `bottom`
    mix = {}                               # task: weight among the datasets that label it
    train_crop = {}                        # task: (H,W) of the random crop in training, before resizing
    vflip = False                          # vertical flips in training
    jitter = {}                            # task: (brightness, contrast, saturation, hue), the same for both frames
    depth_range = (1e-5, float("inf"))     # aligned depth predictions are clipped to it in evaluation
    version = 1                            # raised when what load() returns changes: latent caches made before are refused

    def __init__(self, root, split):
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}: expected one of {', '.join(self.splits)}")
        self.split, self.folder = split, self.place(root)
        self.tree = {kind: template.replace("<split>", split) for kind, template in self.tree.items()}
        self.tops = {}
        self.samples = self.find()
        if not self.samples:
            there = sorted(p.name for p in self.folder.glob("*"))
            there = f"holds {len(there)} entries ({', '.join(there[:3])})" if there else "is empty or does not exist"
            raise FileNotFoundError(f"no {self.name} {split} samples: expected {stars(next(iter(self.tree.values())))} in {self.folder}, "
                                    f"which {there}; get it from {self.page} (README: Data)")
        self.paired = self.pairs()

    @classmethod
    def place(cls, root):
        """The dataset's folder under the data root."""
        return Path(root) / cls.name

    @classmethod
    def there(cls, root):
        return cls.place(root).is_dir()

    def top(self, kind):
        """Where the archive with this kind of file was extracted: the dataset's folder, or a subfolder that the archive brought along."""
        if kind not in self.tops:
            tops = (self.folder, *sorted(p for p in self.folder.glob("*") if p.is_dir()))
            self.tops[kind] = next((top for top in tops if any(top.glob(stars(self.tree[kind])))), self.folder)
        return self.tops[kind]

    def find(self):
        """Sorted keys, read off the paths of the first kind of file."""
        kind, template = next(iter(self.tree.items()))
        parts = re.compile(re.sub(r"\\{\d?\\}", "([^/]+)", re.escape(template)))
        return sorted(parts.fullmatch(path.replace(os.sep, "/")).groups() for path in glob.glob(stars(template), root_dir=self.top(kind)))

    def pairs(self):
        return frozenset(range(len(self)) if any(TASKS[task].frames == 2 for task in self.tasks) else ())

    def window(self, h, w):
        """(rows, columns) slices of the fixed crop of an h x w image."""
        height, width = self.crop or (h, w)
        if h < height or w < width:
            raise ValueError(f"{self.name} in {self.folder}: an image is {h}x{w}, smaller than the crop of {height}x{width}")
        top, left = (h - height) // (1 if self.bottom else 2), (w - width) // 2
        return slice(top, top + height), slice(left, left + width)

    def __len__(self):
        return len(self.samples)

    def labelled(self, task):
        """Numbers of the samples that come with a label of the task; none if the dataset does not label it."""
        if task not in self.tasks:
            return []
        return sorted(self.paired) if TASKS[task].frames == 2 else range(len(self))

    def indices(self, task):
        """Numbers of the samples to use for the task: `labelled`, less what a dataset leaves out."""
        return self.labelled(task)

    def load(self, i, tasks, with_next=False):
        """Sample i -> {"name": str, "image": (H,W,3) uint8 RGB, "labels": {task: (H,W,C) float32, semantic uint8},
        "valid": {task: (H,W) bool}}; "next" like "image" where a second frame exists and with_next or a task of two frames asks for it;
        "extra" {name: (H,W) bool} where the dataset has any.

        ValueError: a task without labels here; an unreadable file; label and image of different sizes. FileNotFoundError: a missing file.
        """
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"{self.name} has no labels for {', '.join(unknown)}: it has {', '.join(self.tasks)}")
        frame = self.Frame(self, self.samples[i])
        name, image = "/".join((self.name, self.split, *frame.key)), frame.image(0)
        h, w = image.shape[:2]
        rows, cols = self.window(h, w)

        def cut(x, what):
            if x.shape[:2] != (h, w):
                raise ValueError(f"{name} in {self.folder}: the {what} is {'x'.join(map(str, x.shape[:2]))}, but the image {h}x{w}")
            return np.ascontiguousarray(x[rows, cols])

        sample = {"name": name, "image": cut(image, "image"), "labels": {}, "valid": {}}
        if i in self.paired and (with_next or any(TASKS[task].frames == 2 for task in tasks)):
            sample["next"] = cut(frame.image(1), "second frame")
        for task in tasks:
            label, valid = getattr(frame, task)()
            label, valid = cut(label.reshape(*label.shape[:2], -1), f"{task} label"), cut(valid, f"{task} mask")
            if label.dtype != np.uint8:
                number = every(np.isfinite(label))
                if not number.all():
                    label, valid = np.where(number[..., None], label, 0), valid & number
                label = label.astype(np.float32, copy=False)
            sample["labels"][task], sample["valid"][task] = label, valid
        extra = {what: cut(mask, what) for what, mask in frame.extra(tasks).items()}
        return {**sample, "extra": extra} if extra else sample


# ---- training sets ----


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


class VirtualKitti2(Reader):
    """Driving renderings (release 2.0.3), both cameras, six of the ten variations. train: four scenes; test: Scene01, for validation."""

    name, splits, use = "virtual_kitti_2", ("train", "test"), {"train": "train", "val": "test"}
    page, licence = "https://europe.naverlabs.com/proxy-virtual-worlds-vkitti-2/", "CC BY-NC-SA 3.0"
    tree = {"image": "{}/{}/frames/rgb/{}/rgb_{}.jpg", "depth": "{}/{}/frames/depth/{}/depth_{}.png",
            "semantic": "{}/{}/frames/classSegmentation/{}/classgt_{}.png", "flow": "{}/{}/frames/forwardFlow/{}/flow_{}.png",
            "motion": "{}/{}/frames/forwardSceneFlow/{}/sceneFlow_{}.png"}
    tasks, size = ("semantic", "normal", "depth", "optical_flow", "scene_flow"), (187, 621)
    mix = {"semantic": 1.0, "normal": 0.1, "depth": 0.1, "optical_flow": 0.5, "scene_flow": 0.5}
    train_crop, jitter = {"optical_flow": (256, 1024)}, {"optical_flow": (0.4, 0.4, 0.2, 0.127)}
    scenes = {"train": ("Scene02", "Scene06", "Scene18", "Scene20"), "test": ("Scene01",)}
    variations = ("clone", "morning", "overcast", "sunset", "15-deg-left", "15-deg-right")
    camera = 725.0087, 620.5, 187.0  # f, cx, cy
    colours = {(210, 0, 200): 255, (90, 200, 255): 6, (0, 199, 0): 5, (90, 240, 0): 5, (140, 140, 140): 1, (100, 60, 100): 0,
               (250, 100, 255): 255, (0, 0, 0): 255, (255, 255, 0): 4, (200, 200, 0): 3, (255, 130, 0): 2, (80, 80, 80): 255,
               (160, 60, 60): 7, (255, 127, 80): 7, (0, 139, 139): 7}

    def find(self):
        return [key for key in super().find() if key[0] in self.scenes[self.split] and key[1] in self.variations]

    def pairs(self):
        """All but the last frame of a sequence, which has no next one and no flows."""
        have = set(self.samples)
        return frozenset(i for i, (*where, t) in enumerate(self.samples) if (*where, f"{int(t) + 1:05}") in have)

    class Frame(Frame):
        @cached_property
        def z(self):
            """16-bit plane depth in centimetres, 65535 = far plane and sky -> metres."""
            return read_png(self.path("depth"), "uint16", 1) / np.float32(100)

        @cached_property
        def flow(self):
            """16-bit RGB: R, G = flow / (W-1), flow / (H-1) mapped from [-1,1]; B = 0: no flow."""
            raw = read_png(self.path("flow"), "uint16", 3)
            h, w = raw.shape[:2]
            valid = raw[..., 2] > 0
            return (raw[..., :2] / np.float32(65535) * 2 - 1) * np.float32([w - 1, h - 1]) * valid[..., None], valid

        def semantic(self):
            """8-bit RGB colours of 15 classes."""
            ids = ids_from_colours(read_image(self.path("semantic")), self.reader.colours, self.path("semantic"))
            return ids, ids != 255

        def depth(self):
            return self.z, (self.z > 1e-5) & (self.z < 80)

        def normal(self):
            """Not in the dataset: derived from depth."""
            return normals_from_depth(self.z, *self.reader.camera), self.depth()[1]

        def optical_flow(self):
            return self.flow

        def scene_flow(self):
            """16-bit RGB: x, y, z motion mapped from [-10,10] metres, meaningless where there is no flow."""
            raw, valid = read_png(self.path("motion"), "uint16", 3), self.flow[1]
            return (raw / np.float32(65535) * 20 - 10) * valid[..., None], valid


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


# ---- test sets ----


class Cityscapes(Reader):
    """Street photographs. load() takes every odd row and column; halving that with nearest-exact leaves rows and columns 3, 7, 11, ..."""

    name, splits, use = "cityscapes", ("train", "val"), {"test": "val"}
    page, licence = "https://www.cityscapes-dataset.com/downloads/", "registration, non-commercial, no redistribution"
    download = "leftImg8bit_trainvaltest about 11 GB, gtFine_trainvaltest about 241 MB"
    tree = {"image": "leftImg8bit/<split>/{}/{}_leftImg8bit.png", "semantic": "gtFine/<split>/{}/{}_gtFine_labelIds.png"}
    tasks, size = ("semantic",), (256, 512)
    classes = {7: 0, 11: 1, 17: 2, 19: 3, 20: 4, 21: 5, 23: 6, 26: 7, 28: 7}  # label id: class; all others are ignored, wall (12) too

    def window(self, h, w):
        return slice(1, None, 2), slice(1, None, 2)

    class Frame(Frame):
        def semantic(self):
            """8-bit full label ids, not train ids."""
            table = np.full(256, 255, np.uint8)
            table[list(self.reader.classes)] = list(self.reader.classes.values())
            ids = table[read_png(self.path("semantic"), "uint8", 1)]
            return ids, ids != 255


class KittiEigen(Reader):
    """Street photographs with laser depth. Samples: the list eigen_test_files_with_gt.txt if it is in the folder ("image depth focal" per
    line, 652 with ground truth), otherwise every image that has ground truth, with a notice."""

    name, splits, use = "kitti_eigen", ("test",), {"test": "test"}
    page = "https://www.cvlibs.net/datasets/kitti/eval_depth.php?benchmark=depth_prediction"
    licence, download = "CC BY-NC-SA 3.0, free account", "annotated depth about 14 GB, plus the raw synced drives of the list"
    tree = {"image": "{}/{}/image_02/data/{}.png", "list": "eigen_test_files_with_gt.txt"}
    tasks, size, crop, bottom, depth_range = ("depth",), (176, 608), (352, 1216), True, (1e-5, 80.0)

    def find(self):
        levels = ("", "*/", "*/*/")  # ground truth comes with or without a level train or val, and perhaps in a folder of its own
        folders = [p for up in levels for p in self.folder.glob(f"{up}*_sync/proj_depth/groundtruth/image_02")]
        self.truth = {(folder.parents[2].name, p.stem): p for folder in folders for p in folder.glob("*.png")}
        have = [key for key in super().find() if key[1:] in self.truth]
        path = self.top("list") / self.tree["list"]
        if not path.exists():
            print(f"kitti_eigen: no {path}, so all {len(have)} images with ground truth stand in for the Eigen split")
            return have
        with reading(path, "list of files"):
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
            wanted = [(Path(image).parts[0], Path(image).parts[1], Path(image).stem) for image, depth, *_ in lines if depth != "None"]
        missing = sorted(set(wanted) - set(have))
        if missing:
            raise FileNotFoundError(f"{len(missing)} of the {len(wanted)} samples of {path} lack image or ground truth, first "
                                    f"{'/'.join(missing[0])}: get them from {self.page} (README: Data)")
        return wanted

    class Frame(Frame):
        def depth(self):
            """16-bit, 256 x metres, 0 = no measurement. Valid up to 80 m inside the Eigen window, a fraction of the uncropped image."""
            z = read_png(self.reader.truth[self.key[1:]], "uint16", 1) / np.float32(256)
            h, w = z.shape
            window = np.zeros((h, w), bool)
            window[int(0.3324324 * h):int(0.91351351 * h), int(0.0359477 * w):int(0.96405229 * w)] = True
            return z, window & (z > 1e-5) & (z < 80)


class Kitti2015(Reader):
    """KITTI scene flow 2015, the 200 training scenes. Both flows are valid where flow and both disparities are;
    extra["optical_flow:flow_occ"] is the mask of flow_occ alone.
    baseline: "calibration" takes each scene's own (0.533 to 0.538 m), "paper" the constant 0.54 m."""

    name, splits, use = "kitti_2015", ("training",), {"test": "training"}
    page, licence = "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php", "CC BY-NC-SA 3.0, free account"
    download = "data_scene_flow.zip about 2 GB, data_scene_flow_calib.zip about 1 MB"
    tree = {"flow": "<split>/flow_occ/{}_{}.png", "image": "<split>/image_2/{}_{}.png", "disparity": "<split>/disp_occ_0/{}_{}.png",
            "later": "<split>/disp_occ_1/{}_{}.png", "calibration": "<split>/calib_cam_to_cam/{0}.txt"}  # keys: ("000042", "10")
    tasks, size, crop, bottom = ("optical_flow", "scene_flow"), (176, 608), (352, 1216), True

    def __init__(self, root, split="training", baseline="calibration"):
        if baseline not in ("calibration", "paper"):
            raise ValueError(f"unknown baseline {baseline!r}: expected calibration or paper")
        self.baseline = baseline
        super().__init__(root, split)

    class Frame(Frame):
        @cached_property
        def flow(self):
            """16-bit RGB: R, G = 64 x pixels + 32768, B = 0: no flow."""
            raw = read_png(self.path("flow"), "uint16", 3)
            valid = raw[..., 2] > 0
            return (raw[..., :2].astype(np.float32) - 32768) / 64 * valid[..., None], valid

        @cached_property
        def disparities(self):
            """Two 16-bit maps, 256 x pixels, 0 = none: at t, and at t+1 of the same scene points (in the pixel grid of frame t)."""
            return [read_png(self.path(kind), "uint16", 1) / np.float32(256) for kind in ("disparity", "later")]

        @cached_property
        def valid(self):
            return self.flow[1] & (self.disparities[0] > 0) & (self.disparities[1] > 0)

        def camera(self):
            """f, cx, cy in pixels of the uncropped image, and the baseline in metres."""
            with reading(self.path("calibration"), "calibration"):
                rows = dict(line.split(":", 1) for line in self.path("calibration").read_text().splitlines() if ":" in line)
                (f, _, cx, left, _, _, cy, *_), (_, _, _, right, *_) = ([float(x) for x in rows[f"P_rect_0{c}"].split()] for c in (2, 3))
                return f, cx, cy, 0.54 if self.reader.baseline == "paper" else (left - right) / f

        def optical_flow(self):
            return self.flow[0], self.valid

        def scene_flow(self):
            f, cx, cy, baseline = self.camera()
            z0, z1 = (f * baseline / np.where(self.valid, d, 1) for d in self.disparities)
            return scene_flow(self.flow[0], z0, z1, f, cx, cy) * self.valid[..., None], self.valid

        def extra(self, tasks):
            return {"optical_flow:flow_occ": self.flow[1]} if "optical_flow" in tasks else {}


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


# ---- your own data ----


class Folder(Reader):
    """A folder of one's own, <root>/folder/ or <root> itself. The files of a sample share their stem X:

        images/X.png|jpg        frame t
        next/X.png|jpg          frame t+1, needed where X has a flow
        semantic/X.png          8-bit class ids 0..7, 255 = ignore; or the Cityscapes display colours, black = ignore
        normal/X.npy            (H,W,3), pointing away from the camera, OpenCV axes; (0,0,0) = invalid
        depth/X.npy|png         (H,W) metres, NaN or <= 0 invalid; or 16-bit millimetres, 0 invalid
        optical_flow/X.flo|npy  (H,W,2) pixels, NaN invalid
        scene_flow/X.npy        (H,W,3) metres, OpenCV axes, NaN invalid
        shading/X.npy|png       (H,W) in [0,1], linear, NaN invalid; or 8- or 16-bit grey, linear too
        albedo/X.npy|png        (H,W,3) in [0,1], linear, NaN invalid; or 8- or 16-bit RGB, linear too

    Any subset of the label folders, any subset of the samples in each. <split>.txt, if there is one, lists the stems of a split;
    otherwise every split is everything. size: (H,W) to resize to, by default that of the first image.
    """

    name, splits, use = "folder", ("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}
    tree, page = {"image": "images/{}.*"}, "your own camera"
    suffixes = {"semantic": (".png",), "normal": (".npy",), "depth": (".npy", ".png"), "optical_flow": (".flo", ".npy"),
                "scene_flow": (".npy",), "shading": (".npy", ".png"), "albedo": (".npy", ".png")}
    tasks, mix = tuple(suffixes), dict.fromkeys(suffixes, 1.0)
    colours = {**{colour: i for i, colour in enumerate(CITYSCAPES)}, (0, 0, 0): 255}

    def __init__(self, root, split, size=None):
        super().__init__(root, split)
        self.size = tuple(size or read_image(self.images[self.samples[0][0]]).shape[:2])

    @classmethod
    def place(cls, root):
        return Path(root) / "folder" if (Path(root) / "folder").is_dir() else Path(root)

    @classmethod
    def there(cls, root):
        return (cls.place(root) / "images").is_dir()

    def files(self, sub, suffixes=(".png", ".jpg", ".jpeg")):
        """{stem: path} of one subfolder; ValueError if two files share a stem."""
        found = {}
        for path in sorted((self.folder / sub).glob("*")):
            if path.suffix.lower() in suffixes and found.setdefault(path.stem, path) != path:
                raise ValueError(f"{path} and {found[path.stem].name} are the same sample twice: keep one of them")
        return found

    def find(self):
        self.images, self.second = self.files("images"), self.files("next")
        self.labels = {task: self.files(task, suffixes) for task, suffixes in self.suffixes.items()}
        self.tasks = tuple(task for task, files in self.labels.items() if files)
        for task in self.tasks:
            for sub, pictures in (("images", self.images), ("next", self.second))[:TASKS[task].frames]:
                for stem in self.labels[task].keys() - pictures.keys():
                    raise ValueError(f"{self.labels[task][stem]} belongs to no picture: expected {self.folder / sub / stem}.png or .jpg")
        chosen, stems = self.folder / f"{self.split}.txt", list(self.images)
        if chosen.exists():
            with reading(chosen, "list of stems"):
                stems = [line.strip() for line in chosen.read_text().splitlines() if line.strip()]
            for stem in set(stems) - self.images.keys():
                raise ValueError(f"{chosen} names {stem!r}, no picture of {self.folder / 'images'}: expected stems, without .png or .jpg")
        return [(stem,) for stem in stems]

    def pairs(self):
        return frozenset(i for i, (stem,) in enumerate(self.samples) if stem in self.second)

    def labelled(self, task):
        return [i for i, (stem,) in enumerate(self.samples) if stem in self.labels.get(task, ())]

    class Frame(Frame):
        def image(self, t):
            return read_image((self.reader.second if t else self.reader.images)[self.key[0]])

        def file(self, task):
            if self.key[0] not in self.reader.labels[task]:
                raise ValueError(f"{self.key[0]} in {self.reader.folder} has no {task} label: indices({task!r}) are the samples that have")
            return self.reader.labels[task][self.key[0]]

        def semantic(self):
            path = self.file("semantic")
            ids = read_png(path, "uint8", 1, 3)
            ids = ids_from_colours(ids, self.reader.colours, path) if ids.ndim == 3 else ids
            for wrong in np.setdiff1d(ids, [*range(len(CITYSCAPES)), 255]):
                raise ValueError(f"{path} holds the id {wrong}: expected class ids 0..{len(CITYSCAPES) - 1}, or 255 for ignore")
            return ids, ids != 255

        def normal(self):
            return unit_vectors(read_npy(self.file("normal"), 3))

        def depth(self):
            path = self.file("depth")
            z = read_png(path, "uint16", 1) / np.float32(1000) if path.suffix.lower() == ".png" else read_npy(path, 1)[..., 0]
            return z, z > 0

        def flow(self, task, channels):
            path = self.file(task)
            x = read_flo(path) if path.suffix.lower() == ".flo" else read_npy(path, channels)
            return x, np.ones(x.shape[:2], bool)

        def intensity(self, task, channels):
            path = self.file(task)
            if path.suffix.lower() == ".png":
                x = read_png(path, "uint8 uint16", channels)
                x = x / np.float32(np.iinfo(x.dtype).max)
            else:
                x = read_npy(path, channels)
            if (x < 0).any() or (x > 1).any():
                raise ValueError(f"{path} ranges from {np.nanmin(x):.3g} to {np.nanmax(x):.3g}: expected linear values in [0,1]")
            return x, np.ones(x.shape[:2], bool)

        optical_flow, scene_flow = partialmethod(flow, "optical_flow", 2), partialmethod(flow, "scene_flow", 3)
        shading, albedo = partialmethod(intensity, "shading", 1), partialmethod(intensity, "albedo", 3)


# ---- what is there ----


READERS = {r.name: r for r in (Hypersim, VirtualKitti2, FlyingThings3D, Cityscapes, KittiEigen, Kitti2015, Diode, Mid, Folder)}


def found(root, role):
    """The readers of all datasets under `root` that serve as "train", "val" or "test"; FileNotFoundError if none is, or one is empty."""
    readers = [r for r in READERS.values() if role in r.use and r.there(root)]
    if not readers:
        names = ", ".join(f"{r.name}/" for r in READERS.values() if role in r.use)
        raise FileNotFoundError(f"no {role} dataset in {root}: expected one or more of {names} or images/ (README: Data)")
    return [r(root, r.use[role]) for r in readers]


def check(root, full=False):
    """Printable lines: for every dataset the samples per task and the first label that does not load, of the first, middle and last one
    (full: of all), or what was looked for and not found."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is no folder: expected one that holds some of {', '.join(READERS)} (README: Data)")
    lines = []
    for reader in READERS.values():
        if not reader.there(root):
            lines.append(f"{reader.name}: not here, expected in {reader.place(root)}; get it from {reader.page}")
            continue
        for split in reader.use.values():
            try:
                data = reader(root, split)
            except (OSError, ValueError) as e:
                lines.append(f"{reader.name} {split}: {e}")
                continue
            lines.append(f"{reader.name} {split}: {len(data)} samples in {data.folder}")
            lines += [f"    {task:12} {len(data.labelled(task)):6}  {trial(data, task, full)}" for task in data.tasks]
    return lines


def trial(data, task, full):
    """The first problem in loading labels of a task, as a sentence, or how many were tried."""
    known = data.labelled(task)
    tried = known if full else sorted({known[k] for k in (0, len(known) // 2, -1)} if known else ())
    for i in tried:
        try:
            data.load(i, [task])
        except (OSError, ValueError) as e:
            return str(e)
    return f"{len(tried)} tried, all well" if known else "no sample of this split has this label"
