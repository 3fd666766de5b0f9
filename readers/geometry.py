"""Geometry, light and classes that the raw datasets share. Axes are OpenCV camera axes: x right, y down, z forward."""
from functools import reduce

import numpy as np

from readers.formats import opencv


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
    """Flow (H,W,2) in pixels and the depth (H,W) of the same scene points at t and t+1 -> (H,W,3) motion, unit of z."""
    v, u = np.mgrid[:z0.shape[0], :z0.shape[1]].astype(np.float32)
    return backproject(u + flow[..., 0], v + flow[..., 1], z1, f, cx, cy) - backproject(u, v, z0, f, cx, cy)


def normals_from_depth(z, f, cx, cy, r=3):
    """Outward unit normals (H,W,3) float32 of a plane-depth map z (H,W), pixels counted from 0.

    On a plane the inverse depth is linear in the pixel, w = a u + b v + e, and the normal is (f a, f b, e + a cx +
    b cy) up to a positive factor. The fit runs over windows of 2r+1 pixels, wide enough to average out centimetre
    steps; a pixel takes the best of the nine windows that hold it in the middle, on an edge or in a corner, so that
    windows do not reach across depth edges.
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
    """The scale that puts the 90th percentile of brightness over the pixels `where` at 0.8 after gamma 2.2.

    1 if there is no such pixel, 0 if they are black.
    """
    p = np.percentile(grey(rgb)[where], 90) if where.any() else 0.8 ** 2.2
    return np.float32(0.8 ** 2.2 / p if p >= 1e-4 else 0)


def tonemap(rgb):
    """Linear float32 -> uint8: clip, gamma 2.2, truncate."""
    return (opencv().pow(np.clip(rgb, 0, 1), 1 / 2.2) * 255).astype(np.uint8)


def colour_codes(rgb):
    """(...,3) colours 0..255 -> (...) one number for each."""
    r, g, b = np.moveaxis(np.asarray(rgb, np.int32), -1, 0)
    return r << 16 | g << 8 | b


def ids_from_colours(rgb, table, path):
    """(H,W,3) uint8 -> (H,W) uint8 class ids by table {(r,g,b): id}.

    ValueError names the file and a colour that is not in the table.
    """
    code, ids = colour_codes(rgb), np.full(rgb.shape[:2], 254, np.uint8)
    for colour, i in table.items():
        ids[code == colour_codes(colour)] = i
    if (ids == 254).any():
        raise ValueError(f"{path} holds the colour {rgb[ids == 254][0].tolist()} of no class: "
                         f"expected one of {sorted(map(list, table))}")
    return ids


def shows_classes(rgb, table):
    """Whether all colours (H,W,3) are those of a table {(r,g,b): id}, and one of a class (not 255 = ignore) occurs."""
    used, known = np.unique(colour_codes(rgb)), colour_codes(list(table))
    classes = colour_codes([colour for colour, i in table.items() if i != 255])
    return bool(np.isin(used, known).all() and np.isin(used, classes).any())
