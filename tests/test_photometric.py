"""Flow in pixels: the scales of known motions come back, and where the frames do not tell, no scale is invented."""
import math

import cv2
import numpy as np
import pytest
import torch

from inference import photometric
from inference.photometric import Camera, Flow, SceneFlow, find_scales, fit, warp
from metrics import METRICS
from readers.toyworld import render
from tasks import TASKS

rng = np.random.default_rng(3)


def texture(height, width, grain=4):
    """A random image (3,H,W) in [0,1] whose blobs are about `grain` pixels wide."""
    coarse = rng.uniform(0, 1, (height // grain + 2, width // grain + 2, 3)).astype(np.float32)
    return torch.from_numpy(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)).permute(2, 0, 1)


def bent(height, width, u, v):
    """A smooth flow (2,H,W) whose channels reach u and v pixels and change sign nowhere."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    shape = np.stack([0.4 + 0.6 * np.sin(1 + 2 * y / height), 0.4 + 0.6 * np.cos(1.4 * x / width)])
    return torch.from_numpy(shape * np.array([u, v], np.float32)[:, None, None])


def looked_back(image, flow):
    """What OpenCV sees of the second frame (3,H,W) at x + flow: the first frame."""
    height, width = image.shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = flow.numpy()
    seen = cv2.remap(image.permute(1, 2, 0).numpy(), x + u, y + v, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return torch.from_numpy(seen).permute(2, 0, 1)


# ---- known motion ----

@pytest.mark.parametrize("size, u, v", [((32, 48), 2.5, 1.5), ((90, 140), 9, -6), ((90, 140), 0.8, 20),
                                        ((360, 500), -40, 12)])
def test_the_scales_of_a_known_flow_come_back(size, u, v):
    """Of flow / (3, 0.02), for small and large motion of either sign, at any size: within 5 per cent."""
    second, flow, scale = texture(*size), bent(*size, u, v), torch.tensor([3.0, 0.02])
    found = fit(looked_back(second, flow), second, Flow(flow / scale[:, None, None]))
    np.testing.assert_allclose(found.scales, scale, rtol=0.05)


def test_noise_brightness_and_occlusion_are_borne():
    """A square that moves over a moving background, sensor noise, another exposure: within 10 per cent."""
    behind, square = texture(90, 140), texture(90, 140)
    flow, inside = bent(90, 140, 5, 3), torch.zeros(90, 140, dtype=torch.bool)
    flow[:, 30:60, 40:90] = torch.tensor([-7.0, 5.0])[:, None, None]
    inside[30:60, 40:90] = True
    first = torch.where(inside, looked_back(square, flow), looked_back(behind, flow))
    arrived = torch.zeros_like(inside)
    arrived[35:65, 33:83] = True
    second = torch.where(arrived, square, behind)
    first, second = first + 0.03 * torch.randn(3, 90, 140), 0.93 * second + 0.03 * torch.randn(3, 90, 140)
    np.testing.assert_allclose(fit(first, second, Flow(flow / 4)).scales, [4, 4], rtol=0.1)


@pytest.mark.parametrize("world, index", [("streets", 0), ("things", 1), ("real", 2)])
def test_exact_flow_of_the_worlds(world, index):
    """Ray-cast frames with noise, occlusions and what leaves the image: exact flow over 7 is 7 times too small."""
    s = render(world, "val", index, (64, 96))
    image, after = (torch.from_numpy(s[k]).permute(2, 0, 1) / 255 for k in ("image", "next"))
    flow = torch.from_numpy(s["labels"]["optical_flow"]).permute(2, 0, 1)
    np.testing.assert_allclose(fit(image, after, Flow(flow / 7)).scales, [7, 7], rtol=0.07)


def test_scene_flow_of_a_known_camera():
    """With exact depth and camera the motion that the image sees is that of the label, and the metres come back."""
    s = render("things", "val", 2, (64, 96))
    image, after = (torch.from_numpy(s[k]).permute(2, 0, 1) / 255 for k in ("image", "next"))
    depth, moved, flow = (torch.from_numpy(s["labels"][t]).permute(2, 0, 1)
                          for t in ("depth", "scene_flow", "optical_flow"))
    motion = SceneFlow(moved, depth, s["intrinsics"])
    torch.testing.assert_close(motion.displaced(torch.ones(1, 3), (64, 96))[0], flow, atol=1e-3, rtol=1e-3)
    near, far = depth.min().item(), depth.max().item()
    maps = {"depth": (depth - near) / (far - near), "scene_flow": moved / 5, "optical_flow": flow, "shading": depth}
    fits = find_scales(maps, image, after, Camera(*s["intrinsics"], near, far))
    assert set(fits) == {"scene_flow", "optical_flow"}
    np.testing.assert_allclose(fits["scene_flow"].scales, [5, 5, 5], rtol=0.15)
    np.testing.assert_allclose(fits["optical_flow"].scales, [1, 1], rtol=0.07)
    np.testing.assert_allclose(fits["scene_flow"].apply(moved / 5), moved, rtol=0.2)


def test_scene_flow_stays_up_to_scale_without_a_camera():
    """It is said, not guessed; with a camera, but without depth, too. Nonsense is no camera."""
    frames, moved = (texture(32, 48), texture(32, 48)), torch.ones(3, 32, 48)
    for camera, missing in ((None, "a camera and a depth map"), (Camera(40, 23.5, 15.5, 1, 20), "a depth map")):
        found = find_scales({"scene_flow": moved}, *frames, camera)["scene_flow"]
        assert found.scales is None and missing in found.why and found.apply(moved) is moved
    for wrong in ((0, 1, 1, 1, 2), (40, 1, 1, 0, 2), (40, 1, 1, 3, 2), (40, 1, 1, 1, math.inf), (math.nan, 1, 1, 1, 2)):
        with pytest.raises(ValueError, match="expected focal length"):
            Camera(*wrong)


def test_warp_is_remap():
    """Bilinear like OpenCV's inside the image, and outside is said."""
    image, flow = texture(20, 30), bent(20, 30, 6, -4)
    seen, inside = warp(image[None], flow[None])
    y, x = np.mgrid[:20, :30].astype(np.float32)
    expected = cv2.remap(image.permute(1, 2, 0).numpy(), x + flow[0].numpy(), y + flow[1].numpy(), cv2.INTER_LINEAR)
    stays = ((x + flow[0].numpy() <= 29) & (y + flow[1].numpy() >= 0))
    assert np.array_equal(inside[0].numpy(), stays) and 0 < stays.sum() < stays.size
    np.testing.assert_allclose(seen[0].permute(1, 2, 0).numpy()[stays], expected[stays], atol=0.02)   # 1/32 pixel


# ---- what the frames do not tell ----

def stripes():
    """Vertical stripes: the same at any height."""
    return texture(64, 96)[:, :1].expand(-1, 64, -1).contiguous()


def test_without_evidence_there_is_no_scale():
    """Grey frames, noise alone, still frames, no motion, motion backwards, other scenes: no scale, and the reason."""
    flow, second = bent(64, 96, 4, 3), texture(64, 96)
    grey, noise = torch.full((3, 64, 96), 0.5), (torch.rand(3, 64, 96), torch.rand(3, 64, 96))
    first = looked_back(second, flow)
    for image, after, motion, why in [
            (grey, grey, flow, "better than standing still"), (*noise, flow, "better than"),
            (second, second, flow, "better than standing still"), (first, second, 0 * flow, "nothing moves"),
            (first, second, flow * torch.tensor([1.0, 0])[:, None, None], "nothing moves"),
            (first, second, -flow, "better than"), (first, texture(64, 96), flow, "")]:
        found = fit(image, after, Flow(motion))
        assert found.scales is None and why in found.why and found.why, found
        assert found.apply(motion) is motion


def test_stripes_tell_one_axis_only():
    """Vertical stripes show how far things go sideways, and nothing of up and down: that is said of the axis."""
    flow, second = bent(64, 96, 4, 3), stripes()
    found = fit(looked_back(second, flow), second, Flow(flow))
    assert found.scales is None and found.why.endswith("whatever the motion along y")


def test_tiny_images():
    """Of a few pixels nothing is known, and nothing fails."""
    for size in ((1, 1), (2, 3), (1, 40)):
        assert fit(torch.rand(3, *size), torch.rand(3, *size), Flow(torch.rand(2, *size))).scales is None


# ---- what it is worth ----

def test_end_point_errors_of_the_three_scales():
    """The label's scale gives the metric of the protocol; the label itself over 2 is found; pairs that are not found
    are counted and left out; merged halves give the whole."""
    flow, second, label = bent(64, 96, 4, 3), texture(64, 96), TASKS["optical_flow"]
    first, everywhere = looked_back(second, flow), torch.ones(64, 96, dtype=torch.bool)
    half, other, whole = photometric.Scaled(), photometric.Scaled(), photometric.Scaled()
    for counted in (half, whole):
        counted.add(flow / 2, flow, everywhere, (first, second))
    half_alone = half.result()
    for counted in (other, whole):
        counted.add(flow / 2, flow, everywhere, (first, first))
    assert half.merge(other).result() == (result := whole.result())
    protocol = METRICS[label.metric].accumulator()
    protocol.add(flow / 2, flow, everywhere)
    assert result["EPE, label's scale"] == pytest.approx(protocol.result()["EPE"], abs=1e-6)
    assert result["EPE, as predicted"] == pytest.approx((flow / 2).norm(dim=0).mean().item(), rel=1e-5)
    assert result["EPE, photometric scale"] < 0.1 * result["EPE, as predicted"]
    assert (result["pairs"], result[photometric.FOUND]) == (2, 1)
    row = photometric.table({"here": {"optical_flow": result, "depth": {"AbsRel": 1.0}}})[-1]
    assert row.startswith("| here | optical_flow | 1 of 2 |") and len(photometric.table({"here": {}})) == 0
    small, twice = photometric.Scaled(), photometric.Scaled()       # a label that was resized keeps its values
    small.add(flow / 2, 2 * flow, everywhere, (first, second), (128, 192))
    twice.add(flow / 2, 2 * flow, everywhere, (first, second))
    assert small.result()["EPE, photometric scale"] == pytest.approx(2 * half_alone["EPE, photometric scale"], rel=1e-4)
    assert twice.result()["EPE, photometric scale"] > 5 * small.result()["EPE, photometric scale"]
    lost = photometric.Scaled()
    lost.add(flow, flow, everywhere, (first, first))
    assert lost.result() == {"pairs": 1, photometric.FOUND: 0}
    assert "0 of 1" in photometric.table({"here": {"optical_flow": lost.result()}})[-1]
