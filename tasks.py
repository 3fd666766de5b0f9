"""The seven dense tasks: how each label becomes an image a VAE can encode, how it comes back, and how it is shown.

A Task holds everything that differs from one task to the next; every other file loops over the registry. All codecs
map labels to a 3-channel code in [-1, 1] and back, on batches and on any device (StableMTL, arXiv 2506.08013, section
3.1 and appendix B.4). Axes are OpenCV camera axes throughout: x right, y down, z forward.

An eighth task is one entry in TASKS below, one metric in metrics.py, and a reader that delivers its labels.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

CLASSES = ("road", "building", "pole", "light", "sign", "vegetation", "sky", "vehicle")
IGNORE = 255

# Colours (RGB, 0..255) that stand for the class ids 0..7.
CITYSCAPES = ((128, 64, 128), (70, 70, 70), (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35),
              (70, 130, 180), (0, 0, 142))
# The corners of the colour cube: no class lies between two others, so a blurred edge never shows a third class.
CORNERS = tuple((r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255))
# Colours at equal distances in the smallest cube of a whole side B that holds them all (Diffusion Generalist).
_SIDE = next(b for b in range(1, 256) if b ** 3 >= len(CLASSES))
SPACED = tuple(tuple(256 // _SIDE * x for x in (k // _SIDE ** 2, k // _SIDE % _SIDE, k % _SIDE))
               for k in range(len(CLASSES)))
PALETTES = {"cityscapes": CITYSCAPES, "corners": CORNERS, "spaced": SPACED}

# What a label says of the scene's geometry: pixels (u, v) to the next frame, metres (x, y, z), metres from the camera.
MOTION, MOTION_3D, DISTANCE = "motion in the image", "motion in space", "distance along the axis"


@dataclass(frozen=True)
class Task:
    """One dense prediction task. B batch, C native channels, H x W pixels.

    encode(label, valid): (B,C,H,W) native label, (B,1,H,W) bool -> (B,3,H,W) code in [-1,1]; what stands at invalid
        pixels, NaN too, has no influence on the code of the others, and is replaced by a finite filler
    decode(code): (B,3,H,W), any values -> (B,C,H,W) native prediction, up to what the encoding destroyed
    colour(label, valid, scale=None): (C,H,W), (H,W) bool -> (H,W,3) uint8 picture; invalid pixels black
    scale(label, valid): what these colours reach from and to, ((low, high), ...); () = they are always the same.
        Given to `colour`, it holds for other maps, too: a prediction beside its label, all frames of a clip
    tell(label, valid): that scale in words, in the label's unit; "" = there is none
    say(value, scaled=False): what one pixel of a decoded map, C numbers, says, in words; scaled: its motion is in the
        unit, not up to a scale
    key(): what the colours mean, [(text, small map (C,h,w) to be coloured, NaN where nothing is to be seen)]
    """
    name: str            # key in files, folders and state dicts
    prompt: str          # what the text encoder reads: the task token
    frames: int          # 2 if the task is about motion to the second frame
    channels: int        # native channels C
    unit: str            # of decoded arrays, as stated in sample.py --help
    metric: str          # key of metrics.METRICS
    encode: Callable
    decode: Callable
    colour: Callable
    hflip: tuple = (1, 1, 1)   # signs of the code's channels under a horizontal flip, its first C those of the label's
    vflip: tuple = (1, 1, 1)   # and under a vertical flip
    categorical: bool = False  # labels are ids of CLASSES
    span: tuple = (-math.inf, math.inf)     # least and largest value of a label: what files store it in follows
    dense_loss: str = "l1"     # on the decoded map (train.py --loss task): l1, cosine, cross-entropy or scale-shift
    geometry: str = ""         # MOTION, MOTION_3D or DISTANCE: what a second frame can check (inference/photometric.py)
    scale: Callable = lambda label, valid: ()  # these: see above
    tell: Callable = lambda label, valid: ""
    key: Callable = list
    say: Callable = lambda value, scaled=False: ", ".join(f"{x:.2f}" for x in value)


# ---- helpers ----

def _filled(label, valid, value=0.0):
    """Invalid or non-finite pixels replaced, so that no NaN ever reaches the VAE."""
    filler = torch.as_tensor(value, dtype=label.dtype, device=label.device)
    return torch.where(valid & torch.isfinite(label), label, filler)


def _grey(x):
    return x.expand(-1, 3, -1, -1)


def _signed_max(label, valid):
    """Each channel over its largest absolute value at valid pixels: sign and zero survive, all zero stays zero.

    Invalid pixels become 0, whatever stood there: unknown motion is often marked by a huge number.
    """
    label = _filled(label.float(), valid)
    peak = label.abs().amax((2, 3), keepdim=True)
    return label / torch.where(peak > 0, peak, torch.ones_like(peak))


def _percentiles(depth, valid):
    """2nd and 98th percentile over the valid pixels of each image -> two (B,1,1,1) tensors."""
    out = []
    for d, v in zip(depth, valid, strict=True):
        d = d[v & torch.isfinite(d)].float()
        # interpolated by hand: torch.quantile refuses more than 16M elements
        if d.numel() == 0:
            out.append((0.0, 1.0))
            continue
        d = d.sort().values
        pair = []
        for q in (0.02, 0.98):
            at = q * (d.numel() - 1)
            i = int(at)
            j = min(i + 1, d.numel() - 1)
            pair.append((d[i] + (d[j] - d[i]) * (at - i)).item())
        out.append(tuple(pair))
    t = torch.tensor(out, device=depth.device, dtype=torch.float32)
    return t[:, 0].view(-1, 1, 1, 1), t[:, 1].view(-1, 1, 1, 1)


# ---- codecs ----

def _semantic_codec(palette):
    colours = torch.tensor(PALETTES[palette], dtype=torch.float32) / 127.5 - 1

    def encode(label, valid):
        ids = torch.where(valid & (label < len(CLASSES)), label, torch.zeros_like(label)).long()[:, 0]
        code = colours.to(label.device)[ids].permute(0, 3, 1, 2)
        return torch.where(valid, code, torch.zeros_like(code))

    def decode(code):
        c = colours.to(code.device)
        distance = sum((code[:, i, None].float() - c[:, i].view(1, -1, 1, 1)) ** 2 for i in range(3))
        return distance.argmin(1, keepdim=True)

    return encode, decode


def _encode_normal(label, valid):
    return _filled(label.float(), valid).clamp(-1, 1)


def _decode_normal(code):
    return F.normalize(code.float().clamp(-1, 1), dim=1, eps=1e-6)


def _encode_depth(label, valid):
    lo, hi = _percentiles(label, valid)
    span = torch.where(hi > lo, hi - lo, torch.ones_like(hi))   # flat depth encodes as -1 everywhere
    code = (_filled(label.float(), valid, float("inf")) - lo) / span * 2 - 1   # what has no depth (sky) is coded as far
    return _grey(code.clamp(-1, 1))


def _decode_unit(code):
    """Mean of the three channels, clipped, in [0,1]."""
    return code.float().mean(1, keepdim=True).clamp(-1, 1) / 2 + 0.5


def _encode_flow(label, valid):
    code = _signed_max(label, valid)
    return torch.cat([code, code[:, :1]], 1)


def _encode_intensity(label, valid):
    code = _filled(label.float(), valid).clamp(0, 1) * 2 - 1
    return _grey(code) if label.shape[1] == 1 else code


# ---- pictures (paper appendix B.5) ----
# Depth and motion are coloured in a given scale, or without it in that of the map itself: a prediction beside its label
# has the label's colours where it is right.

# ColorBrewer's Spectral, near = red, far = blue
SPECTRAL = torch.tensor([(158, 1, 66), (213, 62, 79), (244, 109, 67), (253, 174, 97), (254, 224, 139), (255, 255, 191),
                         (230, 245, 152), (171, 221, 164), (102, 194, 165), (50, 136, 189), (94, 79, 162)]) / 255


def _picture(rgb, valid):
    """(3,H,W) in [0,1] -> (H,W,3) uint8, invalid pixels black."""
    rgb = torch.nan_to_num(rgb.float()).clamp(0, 1)
    return (torch.where(valid, rgb, torch.zeros_like(rgb)) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _colour_semantic(label, valid, scale=None):
    colours = torch.tensor(CITYSCAPES, dtype=torch.float32) / 255
    ids, valid = label[0].cpu(), valid.cpu()
    rgb = colours[ids.long().clamp(0, len(CLASSES) - 1)]
    return _picture(rgb.permute(2, 0, 1), valid & (ids < len(CLASSES)))


def _colour_normal(label, valid, scale=None):
    return _picture(label / 2 + 0.5, valid)


def _depth_scale(label, valid):
    """2nd and 98th percentile over the valid pixels."""
    lo, hi = _percentiles(label[None], valid[None, None])
    return ((lo.item(), hi.item()),)


def _colour_depth(label, valid, scale=None):
    (lo, hi), = scale or _depth_scale(label, valid)
    x = _filled(label, valid[None]).sub(lo).div(max(hi - lo, 1e-9)).clamp(0, 1)[0] * (len(SPECTRAL) - 1)
    i = x.long().clamp(max=len(SPECTRAL) - 2)
    table, t = SPECTRAL.to(x.device), (x - i)[..., None]
    return _picture((table[i] * (1 - t) + table[i + 1] * t).permute(2, 0, 1), valid)


def _hsv(h, s, v):
    """HSV in [0,1] -> (3,H,W) RGB."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=h.device).view(3, 1, 1) + h * 6) % 6
    return v * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))


def _flow_scale(label, valid):
    """(0, longest vector in the image plane), (least, largest v_z) over the valid pixels; v_z is 0 if there is none."""
    x = label[:, valid & label.isfinite().all(0)].float()
    if not x.numel():
        return (0.0, 0.0), (0.0, 0.0)
    z = x[2] if len(x) == 3 else torch.zeros(1)
    return (0.0, x[:2].norm(dim=0).max().item()), (z.min().item(), z.max().item())


def _colour_flow(label, valid, scale=None):
    """Hue = direction atan2(-vy, -vx), saturation = magnitude; scene flow also value = inverse of v_z."""
    (_, longest), (near, far) = scale or _flow_scale(label, valid)
    x = _filled(label.float(), valid[None])
    s = (x[:2].norm(dim=0) / max(longest, 1e-9)).clamp(max=1)
    h = (torch.atan2(-x[1], -x[0]) / (2 * torch.pi)) % 1
    v = torch.ones_like(s)
    if len(x) == 3:
        v = 1 - 0.7 * ((x[2] - near) / max(far - near, 1e-9)).clamp(0, 1)
    return _picture(_hsv(h, s, v), valid)


def _colour_intensity(label, valid, scale=None):
    """Linear light, gamma-coded as screens expect it."""
    return _picture(label.float().clamp(0, 1).pow(1 / 2.2).expand(3, -1, -1), valid)


# The scale of a label's colours in words: what beside the key below one needs to read numbers off a picture.

def _tell_depth(label, valid):
    return "{:.3g} to {:.3g} m".format(*_depth_scale(label, valid)[0])


def _tell_optical_flow(label, valid):
    return f"up to {_flow_scale(label, valid)[0][1]:.3g} px"


def _tell_scene_flow(label, valid):
    (_, longest), z = _flow_scale(label, valid)
    return "up to {:.2g} m, z {:.2g} to {:.2g} m".format(longest, *z)


# One pixel of a prediction in words: what a pointer on it reads.

def _say_semantic(value, scaled=False):
    k = int(value[0])
    return CLASSES[k] if k < len(CLASSES) else "no class"


def _say_normal(value, scaled=False):
    """The vector, and its angle to the optical axis: 0 degrees is a wall seen frontally, 90 one seen from its edge."""
    x, y, z = map(float, value)
    angle = math.degrees(math.atan2(math.hypot(x, y), z))
    return f"x {x:+z.2f}, y {y:+z.2f}, z {z:+z.2f}: {angle:.0f} degrees from frontal"


def _say_depth(value, scaled=False):
    return f"{value[0]:.2f} of the way from near to far"


def _say_motion(axes, unit, value, scaled=False):
    numbers = ", ".join(f"{axis} {x:+z.2f}" for axis, x in zip(axes, value, strict=True))
    return f"{numbers} {unit}" if scaled else f"{numbers}, up to scale"


def _say_albedo(value, scaled=False):
    return "red {:.2f}, green {:.2f}, blue {:.2f}".format(*value)


# Keys: [(text, map of a few pixels that `colour` shows beside it, NaN where nothing is to be seen)]

def _ramp(low=0.0, high=1.0):
    """(1,12,72), growing to the right."""
    return torch.linspace(low, high, 72).expand(1, 12, 72)


def _disc(size=45):
    """x, y in [-1,1], (2,size,size), right and down; NaN outside the circle."""
    axis = torch.linspace(-1, 1, size)
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    return torch.where(xy.norm(dim=0) <= 1, xy, torch.nan)


def _key_semantic():
    return [(name, torch.full((1, 12, 12), float(i))) for i, name in enumerate(CLASSES)]


def _key_normal():
    xy = _disc()    # of a ball: what faces right points left when it points away from the camera
    return [("of a ball", torch.cat([-xy, (1 - xy.square().sum(0, keepdim=True)).clamp(min=0).sqrt()]))]


def _key_depth():
    return [("near to far", _ramp())]


def _key_optical_flow():
    return [("direction;\npale is slow", _disc())]


def _key_scene_flow():
    zero = torch.zeros(2, 12, 72)
    return [("x, y as optical flow", torch.cat([_disc(), torch.zeros(1, 45, 45)])),
            ("z: coming to going", torch.cat([zero, _ramp(-1)]))]


def _key_intensity():
    return [("0 to 1, shown as x^(1/2.2)", _ramp())]


# ---- the registry ----

TASKS = {t.name: t for t in [
    # class ids 0..7 as in CLASSES; 255 = ignore
    Task("semantic", "semantic", 1, 1, "class id 0..7", "semantic", *_semantic_codec("cityscapes"), _colour_semantic,
         categorical=True, span=(0, IGNORE), dense_loss="cross-entropy", key=_key_semantic,
         say=_say_semantic),
    # unit vectors pointing away from the camera: a wall seen frontally is (0,0,+1)
    Task("normal", "normal", 1, 3, "unit vector, OpenCV axes, pointing away from the camera", "normal",
         _encode_normal, _decode_normal, _colour_normal, hflip=(-1, 1, 1), vflip=(1, -1, 1), span=(-1, 1),
         dense_loss="cosine", key=_key_normal, say=_say_normal),
    # metres along the optical axis; the percentiles' scale and shift are lost
    Task("depth", "depth", 1, 1, "affine-invariant depth in [0,1], 0 = near", "depth",
         _encode_depth, _decode_unit, _colour_depth, span=(0, math.inf), dense_loss="scale-shift", geometry=DISTANCE,
         scale=_depth_scale, tell=_tell_depth, key=_key_depth, say=_say_depth),
    # pixels (u right, v down) from frame 1 to frame 2; each channel's scale is lost; the third code channel repeats u
    Task("optical_flow", "optical flow", 2, 2, "pixels (u, v) up to one positive scale per channel", "epe",
         _encode_flow, lambda code: code[:, :2].float(), _colour_flow, hflip=(-1, 1, -1), vflip=(1, -1, 1),
         geometry=MOTION, scale=_flow_scale, tell=_tell_optical_flow, key=_key_optical_flow,
         say=partial(_say_motion, "uv", "pixels")),
    # metres (x, y, z) of the point's motion relative to the camera; each channel's scale is lost
    Task("scene_flow", "scene flow", 2, 3, "metres (x, y, z), OpenCV axes, up to one positive scale per channel", "epe",
         _signed_max, lambda code: code.float(), _colour_flow, hflip=(-1, 1, 1), vflip=(1, -1, 1),
         geometry=MOTION_3D, scale=_flow_scale, tell=_tell_scene_flow, key=_key_scene_flow,
         say=partial(_say_motion, "xyz", "metres")),
    # grey irradiance
    Task("shading", "shading", 1, 1, "grey irradiance in [0,1]", "shading",
         _encode_intensity, _decode_unit, _colour_intensity, span=(0, 1), key=_key_intensity),
    # linear RGB reflectance, not gamma-coded
    Task("albedo", "albedo", 1, 3, "linear RGB in [0,1]", "albedo", _encode_intensity,
         lambda code: code.float().clamp(-1, 1) / 2 + 0.5, _colour_intensity, span=(0, 1), key=_key_intensity,
         say=_say_albedo),
]}


def registry(palette="cityscapes"):
    """TASKS with the colours that code the classes, one of PALETTES: "cityscapes" has the released weights."""
    if palette not in PALETTES:
        raise ValueError(f"unknown palette {palette!r}: choose one of {', '.join(PALETTES)}")
    encode, decode = _semantic_codec(palette)
    return TASKS | {"semantic": replace(TASKS["semantic"], encode=encode, decode=decode)}


def parse_tasks(names):
    """"depth,normal" -> ("normal", "depth") in registry order; "all" -> every task. ValueError on an unknown name."""
    if names == "all":
        return tuple(TASKS)
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    unknown = [n for n in wanted if n not in TASKS]
    if unknown or not wanted:
        raise ValueError(f"unknown task {', '.join(unknown) or repr(names)}: choose from {', '.join(TASKS)}")
    return tuple(t for t in TASKS if t in wanted)
