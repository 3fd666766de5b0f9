"""The codecs: what goes in comes back, up to what the encoding's normalisation destroys."""
import numpy as np
import pytest
import torch

from evaluate import PAPER_TASKS
from tasks import CITYSCAPES, CLASSES, PALETTES, TASKS, Task, parse_tasks, registry


def label(task, h=9, w=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    if task.categorical:
        return torch.randint(len(CLASSES), (2, 1, h, w), generator=g).float()
    x = torch.randn(2, task.channels, h, w, generator=g)
    if task.name == "normal":
        return torch.nn.functional.normalize(x, dim=1)
    if task.name == "depth":
        return x * 5 + 30
    return x.abs() % 1 if task.unit.endswith("[0,1]") else x * 5


ALL = torch.ones(2, 1, 9, 14, dtype=torch.bool)


@pytest.mark.parametrize("palette", PALETTES)
def test_semantic_round_trip(palette):
    """Every class survives encode and decode exactly, also under noise below half the palette's smallest distance."""
    t = registry(palette)["semantic"]
    y = label(t)
    assert torch.equal(t.decode(t.encode(y, ALL)), y.long())
    assert torch.equal(t.decode(t.encode(y, ALL) + 0.1 * torch.rand(2, 3, 9, 14)), y.long())


@pytest.mark.parametrize("name", ["normal", "shading", "albedo"])
def test_exact_round_trip(name):
    """Normals, shading and albedo lose nothing."""
    t = TASKS[name]
    y = label(t)
    torch.testing.assert_close(t.decode(t.encode(y, ALL)), y, atol=1e-6, rtol=1e-5)


def pixels(*columns):
    """Pixels in a row, each a tuple of its channels -> (1,C,1,n)."""
    return torch.tensor(columns).T[None, :, None]


@pytest.mark.parametrize("name", ["depth", "shading"])
def test_one_channel_is_the_clipped_mean_of_three(name):
    """Of a code whose channels differ: first the mean, then the cut to [-1,1], then [0,1]. (0.9 - 0.6 + 0.3) / 3 = 0.2
    is 0.6, (3 - 1 - 0.5) / 3 = 0.5 is 0.75, and means of 2 and -2 are 1 and 0."""
    code = pixels((0.9, -0.6, 0.3), (3.0, -1.0, -0.5), (1.0, 2.0, 3.0), (-1.0, -2.0, -3.0))
    torch.testing.assert_close(TASKS[name].decode(code).flatten(), torch.tensor([0.6, 0.75, 1.0, 0.0]))


def test_normals_are_clipped_and_then_renormalised():
    """(3, 1, -2) is cut to (1, 1, -1) before its length becomes 1, as (0.3, 0, -0.4)'s does."""
    found = TASKS["normal"].decode(pixels((3.0, 1.0, -2.0), (0.3, 0.0, -0.4)))
    torch.testing.assert_close(found, pixels((3 ** -0.5, 3 ** -0.5, -3 ** -0.5), (0.6, 0.0, -0.8)))


@pytest.mark.parametrize("unknown", [0.0, float("nan"), 655.35])
def test_what_has_no_depth_is_coded_as_far(unknown):
    """The sky has no valid depth, whatever stands in its place; it is behind all that has."""
    y, valid = torch.linspace(1, 50, 64).view(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    y[..., :2, :], valid[..., :2, :] = unknown, False
    code = TASKS["depth"].encode(y, valid)
    assert (code[:, :, :2] == 1).all() and (code[:, :, 2] < 0).all()


def test_depth_is_the_affine_image_of_the_2nd_and_98th_percentile():
    """Against numpy's percentiles over the valid pixels of each image; near = 0, far = 1."""
    t, valid = TASKS["depth"], torch.rand(2, 1, 9, 14) > 0.3
    y = label(t)
    out = t.decode(t.encode(y, valid))
    for i in range(2):
        lo, hi = np.percentile(y[i][valid[i]].numpy().astype(np.float64), [2, 98])
        expected = ((y[i] - lo) / (hi - lo)).clamp(0, 1)
        torch.testing.assert_close(out[i][valid[i]], expected[valid[i]].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["optical_flow", "scene_flow"])
def test_flows_keep_sign_zero_and_proportion(name):
    """Each channel is divided by its largest absolute value in the image: one positive factor per image and channel."""
    t = TASKS[name]
    y = label(t)
    y[:, :, 0, 0] = 0
    out = t.decode(t.encode(y, ALL))
    assert out.shape == y.shape and (out[:, :, 0, 0] == 0).all() and out.abs().amax() == 1
    torch.testing.assert_close(out * y.abs().amax((2, 3), keepdim=True), y)


def test_the_third_channel_of_optical_flow_repeats_the_first():
    """A code has three channels, optical flow two."""
    code = TASKS["optical_flow"].encode(label(TASKS["optical_flow"]), ALL)
    assert torch.equal(code[:, 2], code[:, 0])


@pytest.mark.parametrize("name", ["optical_flow", "scene_flow"])
def test_invalid_pixels_do_not_scale_flows(name):
    """What moves too fast or is too far to be valid, or unknown, set the scale of all others: 3000 pixels in a corner
    left 0.7% of the range for a flow of 20. It has no say now, and its own code is 0."""
    t = TASKS[name]
    y, valid = torch.full((1, t.channels, 8, 8), 20.0), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    y[..., :2, :2], valid[..., :2, :2] = 3000, False
    code = t.encode(y, valid)
    assert (code[:, :, valid[0, 0]] == 1).all() and (code[:, :, ~valid[0, 0]] == 0).all()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("case", ["constant", "nan", "all invalid"])
def test_degenerate_labels_encode_without_nan(name, case):
    """No motion, flat depth, NaN outside the mask, no valid pixel at all: codes stay finite and within [-1, 1]."""
    t = TASKS[name]
    y = torch.zeros(1, t.channels, 8, 8) if case == "constant" else torch.full((1, t.channels, 8, 8), float("nan"))
    valid = torch.full((1, 1, 8, 8), case == "constant")
    code = t.encode(y if not t.categorical else y.nan_to_num(255), valid)
    assert code.shape == (1, 3, 8, 8) and code.isfinite().all() and code.abs().max() <= 1
    assert t.decode(code).isfinite().all()


@pytest.mark.parametrize("name", TASKS)
def test_flip_signs_undo_themselves_and_match_the_geometry(name):
    """Flipping a label's vectors and then encoding equals encoding and then flipping with the registry's signs."""
    t = TASKS[name]
    signs = {"normal": (-1, 1, 1), "optical_flow": (-1, 1), "scene_flow": (-1, 1, 1)}
    signs = signs.get(name, (1, 1, 1) if name in PAPER_TASKS else t.hflip)[:t.channels]
    y = label(t)
    mirrored = y.flip(-1) * torch.tensor(signs).view(1, -1, 1, 1)
    code = t.encode(y, ALL).flip(-1) * torch.tensor(t.hflip).view(1, 3, 1, 1)
    torch.testing.assert_close(t.encode(mirrored, ALL), code)


@pytest.mark.parametrize("name", TASKS)
def test_pictures(name):
    """Pictures are (H,W,3) uint8 and black where invalid."""
    t, valid = TASKS[name], torch.ones(9, 14, dtype=torch.bool)
    valid[:3] = False
    picture = t.colour(label(t)[0], valid)
    assert picture.shape == (9, 14, 3) and picture.dtype == np.uint8 and (picture[:3] == 0).all() and picture[3:].any()


@pytest.mark.parametrize("name", ["optical_flow", "scene_flow"])
def test_directions_of_flow_pictures(name):
    """Hue = atan2(-v_y, -v_x), saturation = magnitude (appendix B.2): to the left is red (0 degrees), to the right cyan
    (180), up yellow-green (90), down violet (270), at rest white."""
    motion = torch.tensor([[-1.0, 1, 0, 0, 0], [0, 0, -1, 1, 0], [0] * 5])[:TASKS[name].channels, None]
    picture = TASKS[name].colour(motion, torch.ones(1, 5, dtype=torch.bool))
    wheel = [(255, 0, 0), (0, 255, 255), (128, 255, 0), (128, 0, 255), (255, 255, 255)]
    assert np.abs(picture[0].astype(int) - wheel).max() <= 1


def test_what_comes_is_bright_in_pictures_of_scene_flow():
    """Value = inverse of v_z (appendix B.2), scaled per image: the least v_z has the full value, more has less."""
    motion = torch.tensor([[-1.0] * 4, [0] * 4, [-2, -1, 0, 3]])[:, None]
    red, *others = TASKS["scene_flow"].colour(motion, torch.ones(1, 4, dtype=torch.bool))[0].T.astype(int)
    assert red[0] == 255 and (np.diff(red) < 0).all() and not np.any(others)


def test_semantic_picture_uses_display_colours():
    """Whatever palette codes the classes, the picture shows the Cityscapes colours."""
    y = torch.arange(8).view(1, 1, 8).float()
    for palette in PALETTES:
        picture = registry(palette)["semantic"].colour(y, torch.ones(1, 8, dtype=torch.bool))
        assert (picture[0] == np.array(CITYSCAPES)).all()


def test_names():
    """Order of the registry, and a sentence for a misspelt task."""
    assert parse_tasks("depth, semantic") == ("semantic", "depth") and parse_tasks("all") == tuple(TASKS)
    with pytest.raises(ValueError, match="unknown task deph"):
        parse_tasks("deph")
    with pytest.raises(ValueError, match="unknown palette"):
        registry("rainbow")


def test_a_pixel_in_words():
    """What stands under a pointer, by hand: class, angle, place between near and far, motion with or without a unit."""
    said = {t: TASKS[t].say for t in TASKS}
    assert [said["semantic"]([k]) for k in (5, 255)] == ["vegetation", "no class"]
    assert said["normal"]([0.0, 0.6, 0.8]) == "x +0.00, y +0.60, z +0.80: 37 degrees from frontal"     # atan(3/4)
    assert said["normal"]([1.0, 0.0, 0.0]).endswith(": 90 degrees from frontal")
    assert said["depth"]([0.256]) == "0.26 of the way from near to far"
    assert said["optical_flow"]([1.5, -0.25], True) == "u +1.50, v -0.25 pixels"
    assert said["scene_flow"]([1.5, -0.25, 0.0]) == "x +1.50, y -0.25, z +0.00, up to scale"
    assert said["shading"]([0.5]) == "0.50" and said["albedo"]([0.5, 0.25, 1.0]) == "red 0.50, green 0.25, blue 1.00"
    assert Task("new", "new", 1, 2, "", "", *[None] * 3).say([1.0, 2.0]) == "1.00, 2.00"
