"""Metrics against hand arithmetic, naive loops, numpy, scikit-image and the paper's own table."""
import math

import numpy as np
import pytest
import torch

import metrics
from evaluate import PAPER, PAPER_TASKS
from metrics import METRICS, delta_m
from tasks import CLASSES, TASKS

LOWER = {name: METRICS[task.metric].lower for name, task in TASKS.items()}
CLIP = {"depth": {"clip": (1e-5, 80.0)}}


def make(metric):
    return METRICS[metric].accumulator(**CLIP.get(metric, {}))


def rand(*shape, seed=0, lo=0.05, hi=1.0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(lo, hi, shape))


def mask(*shape, seed=9, p=0.7):
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < p)


def example(metric, size=(20, 24), seed=0):
    """A plausible prediction, label and full mask for any metric."""
    if metric == "semantic":
        pred, label = ((rand(1, *size, seed=seed + k, lo=0, hi=7.99)).long() for k in (1, 2))
    else:
        channels = {"normal": 3, "epe": 2, "albedo": 3}.get(metric, 1)
        pred, label = (rand(channels, *size, seed=seed + k) for k in (1, 2))
    return pred, label, torch.ones(size, dtype=torch.bool)


def at(*xs, channels=1):
    """Numbers -> (C,1,N) map."""
    return torch.tensor(xs, dtype=torch.float64).reshape(channels, 1, -1)


ALL2, ALL3, ALL4 = (torch.ones(1, n, dtype=torch.bool) for n in (2, 3, 4))


# ---- alignment ----

def test_scale_shift_is_lstsq():
    """Depth alignment equals numpy's least squares on [prediction, 1], over valid pixels only, and is clipped."""
    p, y, v = rand(1, 9, 11), 5 * rand(1, 9, 11, seed=1), mask(9, 11)
    a = np.stack([p[:, v].ravel(), np.ones(int(v.sum()))], 1)
    s, t = np.linalg.lstsq(a, y[:, v].numpy().ravel(), rcond=None)[0]
    torch.testing.assert_close(metrics.align_scale_shift(p, y, v, -99, 99), s * p + t)
    torch.testing.assert_close(metrics.align_scale_shift(p, y, v, 2.4, 2.6), (s * p + t).clamp(2.4, 2.6))


def test_scale_shift_of_a_constant_is_the_mean():
    """A constant prediction, and a single valid pixel, become the label's mean without NaN."""
    y = at(1, 2, 6)
    torch.testing.assert_close(metrics.align_scale_shift(at(4, 4, 4), y, ALL3, 0, 10), at(3, 3, 3))
    one = torch.tensor([[False, True, False]])
    torch.testing.assert_close(metrics.align_scale_shift(at(7, 8, 9), y, one, 0, 10)[:, one], y[:, one])


def test_flow_scale_is_per_channel_and_never_negative():
    """Each flow channel gets numpy's own one-parameter fit; a fit below zero, or a zero channel, gives zero."""
    p, y, v = rand(3, 6, 7, lo=-1), rand(3, 6, 7, seed=1, lo=-1), mask(6, 7)
    y[0], y[1] = p[0] * 3 + 0.1 * y[0], -p[1]
    p[2] = 0
    got = metrics.align_scale_nonneg(p, y, v)
    s = np.linalg.lstsq(p[0][v][:, None].numpy(), y[0][v].numpy(), rcond=None)[0][0]
    torch.testing.assert_close(got, torch.stack([s * p[0], 0 * p[1], 0 * p[2]]))


def test_intensity_scale_is_shared_by_channels():
    """Shading and albedo get one scale for all channels (numpy's), then are clipped to [0,1]; black stays black."""
    p, y, v = rand(3, 6, 7), rand(3, 6, 7, seed=1), mask(6, 7)
    s = np.linalg.lstsq(p[:, v].ravel()[:, None].numpy(), y[:, v].ravel().numpy(), rcond=None)[0][0]
    torch.testing.assert_close(metrics.align_scale(p, y, v), (s * p).clamp(0, 1))
    assert not metrics.align_scale(0 * p, y, v).any()


@pytest.mark.parametrize("metric", ["depth", "epe", "shading", "albedo"])
def test_alignment_is_part_of_the_metric(metric):
    """Scaling the prediction (for depth also shifting it) changes no number."""
    p, y, v = example(metric)
    a, b = make(metric), make(metric)
    a.add(p, y, v)
    b.add(p * 3 + (2 if metric == "depth" else 0), y, v)
    assert a.result() == pytest.approx(b.result())


@pytest.mark.parametrize("name", TASKS)
def test_pictures_see_what_the_metric_sees(name, monkeypatch):
    """A prediction is fitted to its label by one function, for its metric and to be drawn beside it; without a valid
    pixel it is drawn as it is."""
    task, seen = TASKS[name], []
    p, y, _ = example(task.metric)
    v = mask(*y.shape[1:])
    m = make(task.metric)
    monkeypatch.setattr(m, "update", lambda pred, label, valid: seen.append(pred))
    m.add(p, y, v)
    assert torch.equal(metrics.aligned(task, p.double(), y.double(), v), seen[0])
    assert torch.equal(metrics.aligned(task, p, y, v & ~v), p)
    assert name not in PAPER_TASKS or torch.equal(seen[0], p) == (name in ("semantic", "normal"))


# ---- formulas ----

def test_iou_by_hand():
    """Three classes out of eight: IoU 1/3, 1/2 and 0 give mIoU 27.8 %; classes absent from both are left out, ignored
    pixels too."""
    m = make("semantic")
    label = torch.tensor([[[0, 0, 1, 1, 255, 1]]], dtype=torch.uint8)
    pred = torch.tensor([[[0, 2, 1, 1, 5, 0]]])
    m.add(pred, label, torch.ones(1, 6, dtype=torch.bool))
    r = m.result()
    assert list(r)[0] == "mIoU" and r["mIoU"] == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)
    assert [k for k in r if k.startswith("IoU")] == [f"IoU {c}" for c in CLASSES[:3]]
    assert r[f"IoU {CLASSES[1]}"] == pytest.approx(100 * 2 / 3)
    assert metrics.confusion(pred, label, label[0] != 255, 8)[:3, :3].tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 0]]


def test_unknown_class_ids_are_refused():
    """An id that is neither a class nor 255 is an error, not a count in some other cell."""
    with pytest.raises(ValueError, match="class ids below 8, found 0 to 9 in the label"):
        make("semantic").add(torch.zeros(1, 1, 2).long(), torch.tensor([[[0, 9]]]), ALL2)


def test_normal_by_hand():
    """Angles 0, 20, 45 and 180 degrees: mean 61.25, and 25/50/50 % within the thresholds; lengths do not matter, a zero
    vector counts 90."""
    a = torch.tensor([0, 20, 45, 180], dtype=torch.float64).deg2rad()
    pred = torch.stack([a.sin(), 0 * a, a.cos()])[:, None] * torch.tensor([1.0, 0.5, 2.0, 1.0])
    label = torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 1, 4)
    m = make("normal")
    m.add(pred, label, ALL4)
    expected = {"mAE": 61.25, "<11.25": 25, "<22.5": 50, "<30": 50, "images": 1, "skipped": 0}
    assert m.result() == pytest.approx(expected, abs=1e-4)
    assert metrics.angles(0 * pred, label.double(), ALL4).tolist() == pytest.approx([90] * 4)


def test_depth_by_hand():
    """Predictions 4, 4 m for labels 2, 4 m, without alignment."""
    r = metrics.depth_errors(at(4, 4), at(2, 4), ALL2)
    expected = {"AbsRel": 50, "SqRel": 1, "RMSE": 2**0.5, "RMSElog": math.log(2) / 2**0.5, "log10": math.log10(2) / 2}
    assert r == pytest.approx(expected | {"delta1": 50, "delta2": 50, "delta3": 50})
    edges = at(1.2, 1.5, 1.9, 2.0)  # ratios below 1.25, 1.25^2 = 1.5625, 1.25^3 = 1.953, none
    assert [metrics.depth_errors(edges, at(1, 1, 1, 1), ALL4)[f"delta{k}"] for k in (1, 2, 3)] == [25, 50, 75]


def test_depth_is_clipped_and_must_be_positive():
    """The dataset's range limits aligned predictions, so logarithms stay finite; a label of zero metres is an error."""
    m = make("depth")
    m.add(at(0, 0, 1, 30), at(0.1, 5, 0.1, 60), ALL4)
    assert all(math.isfinite(x) for x in m.result().values())
    with pytest.raises(ValueError, match="above 0 m"):
        make("depth").add(at(1, 2), at(0, 1), ALL2)
    with pytest.raises(ValueError, match="0 < lo < hi"):
        metrics.Depth((0, 80))


def test_epe_by_hand():
    """Prediction u right up to scale, v against the label's sign: the error is |v| alone, 3 and 4 px."""
    m = make("epe")
    m.add(at(1, 2, 5, 5, channels=2), at(10, 20, -3, -4, channels=2), ALL2)
    assert m.result() == {"EPE": pytest.approx(3.5), "pixels": 2, "images": 1, "skipped": 0}
    m = make("epe")
    m.add(torch.zeros(3, 1, 2), at(1, 0, 2, 3, 2, 4, channels=3), ALL2)  # vectors (1,2,2) and (0,3,4)
    assert m.result()["EPE"] == pytest.approx((3 + 5) / 2)


def test_albedo_rmse_divides_by_pixels():
    """Albedo RMSE is sqrt(3) times the per-element one (the paper's convention); for one channel both are the same."""
    p, y, v = torch.zeros(3, 1, 2), at(0.3, 0, 0.3, 0, 0.3, 0, channels=3), ALL2  # squared errors 3 x 0.09 and 0
    m = make("albedo")
    m.add(p, y, v)
    assert m.result()["RMSE"] == pytest.approx((3 * 0.09 / 2)**0.5)
    assert m.result()["RMSE per element"] == pytest.approx((0.09 / 2)**0.5)
    m = make("shading")
    m.add(p[:1], y[:1], v)
    assert m.result()["RMSE"] == pytest.approx((0.09 / 2)**0.5) and "RMSE per element" not in m.result()


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_scikit_images(channels):
    """With every pixel valid SSIM equals scikit-image's: 7x7 uniform window, range 1, channels averaged, no border."""
    similarity = pytest.importorskip("skimage.metrics")
    p, y = rand(channels, 19, 23), rand(channels, 19, 23, seed=1)
    p = 0.6 * y + 0.4 * p
    expected = similarity.structural_similarity(p.numpy(), y.numpy(), win_size=7, data_range=1, channel_axis=0)
    assert metrics.ssim(p, y, torch.ones(19, 23, dtype=torch.bool)) == pytest.approx(expected, abs=1e-12)


def test_masked_ssim_is_the_naive_loop():
    """With a mask SSIM equals a loop over valid pixels at least 3 from the border, on maps that are 0 where invalid."""
    p, y, v = rand(1, 12, 13), rand(1, 12, 13, seed=1), mask(12, 13)
    shown, true = ((z[0] * v).numpy() for z in (p, y))
    values = []
    for i, j in np.argwhere(v.numpy()[3:-3, 3:-3]):
        a, b = shown[i:i + 7, j:j + 7].ravel(), true[i:i + 7, j:j + 7].ravel()
        (va, c), (_, vb) = np.cov(a, b)
        means = (2 * a.mean() * b.mean() + 1e-4) / (a.mean()**2 + b.mean()**2 + 1e-4)
        values.append(means * (2 * c + 9e-4) / (va + vb + 9e-4))
    assert metrics.ssim(p, y, v) == pytest.approx(np.mean(values))


def test_lmse_is_the_naive_loop():
    """LMSE equals a loop over 16x16 windows inside the image at step 8, each fitted with numpy's least squares."""
    p, y, v = rand(3, 37, 50), rand(3, 37, 50, seed=1), mask(37, 50)
    v[:16, :16] = False  # a window without any valid pixel
    error = total = 0
    for i in range(0, 37 - 15, 8):
        for j in range(0, 50 - 15, 8):
            w = v[i:i + 16, j:j + 16]
            a, b = (z[:, i:i + 16, j:j + 16][:, w].ravel().numpy() for z in (p, y))
            s = np.linalg.lstsq(a[:, None], b, rcond=None)[0][0] if a.size else 0
            error, total = error + ((b - s * a)**2).sum(), total + (b**2).sum()
    assert metrics.lmse(p, y, v) == pytest.approx(error / total)


def test_lmse_forgives_scale_per_window_only():
    """A window-wise rescaled prediction has LMSE 0 in its windows, a black prediction 1."""
    y = rand(1, 16, 16)
    full = torch.ones(16, 16, dtype=torch.bool)
    assert metrics.lmse(0.3 * y, y, full) == pytest.approx(0, abs=1e-12)
    assert metrics.lmse(0 * y, y, full) == 1


# ---- protocol ----

@pytest.mark.parametrize("metric", METRICS)
def test_perfect_prediction(metric):
    """The label itself scores perfectly, the headline is the first number, all are finite floats or counts."""
    _, y, v = example(metric)
    m = make(metric)
    m.add(y, y, v)
    r = m.result()
    assert list(r)[0] == METRICS[metric].headline
    assert r[METRICS[metric].headline] == pytest.approx(0 if METRICS[metric].lower else 100, abs=1e-5)
    assert all(isinstance(x, (int, float)) and math.isfinite(x) for x in r.values())


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_outside_the_mask_matters(metric):
    """NaN or nonsense under the mask, in prediction or label, changes no number; the arguments are not modified."""
    p, y, _ = example(metric)
    v = mask(*y.shape[1:])
    a, b = make(metric), make(metric)
    a.add(p, y, v)
    p2, y2 = (torch.where(v, x, 77 if metric == "semantic" else math.nan) for x in (p, y))
    before = p2.clone(), y2.clone()
    b.add(p2, y2, v)
    assert a.result() == b.result()
    torch.testing.assert_close((p2, y2), before, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_images_without_valid_pixel_are_skipped_and_counted(metric):
    """An all-invalid image changes the count of skipped images and nothing else; if it is alone, a sentence says so."""
    p, y, v = example(metric)
    m = make(metric)
    m.add(torch.full_like(p, 99), torch.full_like(y, 99), ~v)
    with pytest.raises(ValueError, match="none among 1"):
        m.result()
    m.add(p, y, v)
    alone = make(metric)
    alone.add(p, y, v)
    assert m.result() == alone.result() | {"skipped": 1} and m.result()["images"] == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (16, 16)])
def test_tiny_images_single_pixels_and_constants(metric, size):
    """One valid pixel and constant (also zero) predictions give finite numbers at any size, or none."""
    p, y, v = example(metric, size)
    one = torch.zeros_like(v)
    one[0, 0] = True
    m = make(metric)
    for pred, valid in (p, one), (0 * p, one), (0 * p, v), (0 * p + 1, v):
        m.add(pred, y, valid)
    r = m.result()
    assert r["images"] == 4 and METRICS[metric].headline in r and all(math.isfinite(x) for x in r.values())


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_input_is_accumulated_in_double(metric):
    """Half-precision maps give exactly the numbers of the same maps in double."""
    p, y, v = example(metric)
    p, y = (p, y) if metric == "semantic" else (p.bfloat16(), y.bfloat16())
    a, b = make(metric), make(metric)
    a.add(p, y, v)
    b.add(p.double(), y.double(), v)
    assert a.result() == b.result()


def test_pooled_and_per_image_averages():
    """One image with 1 valid pixel and one with 3: flow and IoU pool the 4 pixels, other metrics average 2 images."""
    one = torch.tensor([[True, False, False]])
    m = make("epe")
    m.add(torch.zeros(2, 1, 3), at(*[4] * 3, *[0] * 3, channels=2), one)
    m.add(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3), ALL3)
    assert m.result()["EPE"] == pytest.approx(4 / 4)
    m = make("shading")
    m.add(torch.zeros(1, 1, 3), at(0.4, 0, 0), one)
    m.add(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), ALL3)
    assert m.result()["RMSE"] == pytest.approx(0.4 / 2)
    m = make("semantic")
    m.add(torch.ones(1, 1, 3), torch.zeros(1, 1, 3), one)
    m.add(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), ALL3)
    assert m.result()[f"IoU {CLASSES[0]}"] == pytest.approx(75)  # per image it would be (0 + 100) / 2


def test_non_finite_and_misshapen_maps_are_refused():
    """NaN at a valid pixel and a prediction of another size are errors that say which map is wrong."""
    with pytest.raises(ValueError, match="found 1 at valid pixels of the prediction"):
        make("shading").add(at(math.nan, 1), at(1, 1), ALL2)
    with pytest.raises(ValueError, match="found 1 at valid pixels of the label"):
        make("depth").add(at(1, 1), at(1, math.inf), ALL2)
    with pytest.raises(ValueError, match="resize the prediction"):
        make("depth").add(at(1, 1, 1), at(1, 1), ALL2)


# ---- trivial predictors ----

def trivial(task, labels):
    """The predictions from all labels; in which parts they are summed up does not matter."""
    labels = list(labels)
    found = metrics.trivial(task, [metrics.code_sums(task, labels)])
    for one, other in zip(found, metrics.trivial(task, [metrics.code_sums(task, [x]) for x in labels]), strict=True):
        torch.testing.assert_close(one, other)
    return found


def test_trivial_semantic():
    """The constant is the most frequent class overall, the map that of each pixel, or the constant if none is valid."""
    labels = torch.tensor([[[[3, 5, 5, 255]]], [[[3, 5, 1, 255]]], [[[2, 5, 1, 255]]]])
    constant, pixels = trivial(TASKS["semantic"], [(y, y[0] != 255) for y in labels])
    assert constant.tolist() == [[[5, 5, 5, 5]]] and pixels.tolist() == [[[3, 5, 1, 5]]]


def test_trivial_albedo_and_shading_are_masked_means():
    """In native units, shading's and albedo's trivial predictors are plain means over the valid labels, NaN elsewhere
    notwithstanding."""
    a, b = at(0.2, math.nan, 0.6), at(0.4, 0.8, math.nan)
    constant, pixels = trivial(TASKS["shading"], [(x, ~x.isnan()[0]) for x in (a, b)])
    torch.testing.assert_close(constant.double(), at(0.5, 0.5, 0.5))
    torch.testing.assert_close(pixels.double(), at(0.3, 0.8, 0.6))
    rgb = rand(4, 3, 5, 6)
    constant, pixels = trivial(TASKS["albedo"], [(x, torch.ones(5, 6, dtype=torch.bool)) for x in rgb])
    torch.testing.assert_close(constant[:, 2, 3].double(), rgb.mean((0, 2, 3)))
    torch.testing.assert_close(pixels.double(), rgb.mean(0))


def test_trivial_flow_ignores_each_images_scale():
    """Flows are averaged after division by each image's largest value: a fast image does not outvote two slow ones."""
    label = torch.tensor([1.0, 0.5]).view(1, 1, 2).expand(2, 1, 2)
    labels = [(scale * label, ALL2) for scale in (1, 0.1, -100)]
    constant, pixels = trivial(TASKS["optical_flow"], labels)
    torch.testing.assert_close(pixels, label / 3)
    torch.testing.assert_close(constant, torch.full_like(label, 0.25))


def test_trivial_normal_is_a_unit_vector_and_depth_a_fraction():
    """The mean of two orthogonal normals is renormalised; a depth ramp in any unit has the same relative mean."""
    x, z = (torch.eye(3)[i].view(3, 1, 1).expand(3, 1, 2) for i in (0, 2))
    constant, _ = trivial(TASKS["normal"], [(x, ALL2), (z, ALL2)])
    torch.testing.assert_close(constant[:, 0, 0], torch.tensor([1.0, 0, 1]) / 2**0.5)
    ramp = torch.linspace(1, 9, 101).view(1, 1, -1)
    full = torch.ones(1, 101, dtype=torch.bool)
    (_, near), (_, far) = (trivial(TASKS["depth"], [(d, full)]) for d in (ramp, 1000 * ramp + 7))
    torch.testing.assert_close(near, far)
    assert near[0, 0, 0] == 0 and near[0, 0, -1] == 1 and near[0, 0, 50] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_trivial_predictions_can_be_scored(task):
    """Both predictors of every task fit its metric; the per-pixel map is no worse on the labels it was made of. No
    label at all is an error."""
    t, shape = TASKS[task], (20, 24)
    base = rand(t.channels, *shape, seed=3, lo=0.2)
    if t.categorical:
        labels = [torch.where(rand(1, *shape, seed=k) < 0.8, base * 8, 0).long().clamp(0, 7) for k in range(4)]
    else:
        labels = [base + 0.1 * rand(t.channels, *shape, seed=k) for k in range(4)]
    v = torch.ones(shape, dtype=torch.bool)
    scores = []
    for pred in trivial(t, [(y, v) for y in labels]):
        assert pred.shape == labels[0].shape
        m = make(t.metric)
        for y in labels:
            m.add(pred, y, v)
        scores.append(m.result()[METRICS[t.metric].headline] * (1 if LOWER[task] else -1))
    assert scores[1] < scores[0]
    with pytest.raises(ValueError, match=f"expected a {task} label"):
        trivial(t, [(labels[0], ~v)])


# ---- Delta_m ----

def rounding(row, base):
    """How far Delta_m can move if every printed number moves by half a unit of its last digit, to first order."""
    width = 0.005
    for task in row:
        for data, x in row[task].items():
            b, half = base[task][data], 0.005 if x > 1 else 0.00005
            width += 100 * half * (1 + x / b) / b / 7 / len(row[task])
    return width


@pytest.mark.parametrize("name, printed", [("single-task", 0), ("JTR*", -106.87), ("DiffusionMTL*", -78.76),
                                           ("StableMTL-S", -1.57), ("StableMTL", 4.78)])
def test_delta_m_of_the_papers_rows(name, printed):
    """Every Delta_m the paper prints follows from its rows within their rounding, but not with shading and albedo as it
    prints them."""
    base = PAPER["single-task"]
    assert abs(delta_m(PAPER[name], base, LOWER) - printed) < min(0.03, rounding(PAPER[name], base))
    if name != "single-task":
        swapped = base | {"shading": base["albedo"], "albedo": base["shading"]}
        assert abs(delta_m(PAPER[name], swapped, LOWER) - printed) > 0.2


def test_delta_m_by_hand():
    """mIoU up 10 % counts +10; AbsRel 20 % worse on one dataset and 10 % better on the other counts -5 once: +2.5."""
    base = {"semantic": {"a": 50.0}, "depth": {"a": 10.0, "b": 20.0}}
    assert delta_m({"semantic": {"a": 55.0}, "depth": {"b": 18.0, "a": 12.0}}, base, LOWER) == pytest.approx(2.5)


def test_delta_m_wants_the_same_test_sets():
    """A task or dataset in one table only, an empty table and a baseline of zero are errors."""
    base = {"semantic": {"a": 50.0}, "depth": {"a": 10.0}}
    extra = {"normal": {"a": 1.0}}, {"depth": {"b": 10.0}}, {"depth": {"a": 10.0, "b": 10.0}}
    more = [base | e for e in extra]
    for new, old in ({}, {}), ({"semantic": {"a": 50.0}}, base), *((m, base) for m in more), *((base, m) for m in more):
        with pytest.raises(ValueError, match="same test sets"):
            delta_m(new, old, LOWER)
    with pytest.raises(ValueError, match="above zero"):
        delta_m(base, base | {"depth": {"a": 0.0}}, LOWER)
