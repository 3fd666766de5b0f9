"""Pictures hold what they should: a prediction in its label's colours, keys, texts that do not overlap, all data."""
import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

import data
import draw
from metrics import aligned
from readers.toyworld import ToyWorld
from tasks import CITYSCAPES, CLASSES, TASKS

UP_TO_SCALE = ("depth", "optical_flow", "scene_flow", "shading", "albedo")


def pictured(entry):
    """The colours of a cell, one per pixel of the map that was drawn (H,W,3)."""
    _, image = entry
    return np.asarray(image)[3::6, 3::6]


def sample(name, h=30, w=48, seed=0):
    """(label, valid) of a task, with a corner that is not valid and holds what may lie there."""
    g = torch.Generator().manual_seed(seed)
    task = TASKS[name]
    label = torch.rand(task.channels, h, w, generator=g)
    if task.categorical:
        label = torch.randint(len(CITYSCAPES), (1, h, w), generator=g)
    elif task.frames == 2:
        label = label * 4 - 1
    elif name == "normal":
        label = torch.nn.functional.normalize(label * 2 - 1, dim=0)
    elif name == "depth":
        label = label * 30 + 2
    valid = torch.ones(h, w, dtype=torch.bool)
    valid[:5, :7] = False
    if not task.categorical:
        label[:, :5, :7] = torch.nan if name == "depth" else 1e4
    return label, valid


# ---- labels beside predictions ----

@pytest.mark.parametrize("name", UP_TO_SCALE)
def test_a_perfect_prediction_has_the_colours_of_its_label(name):
    """What is known up to scale (and for depth shift) was drawn as it came: a good flow had another hue and brightness
    than its label. Each channel of a flow has a scale of its own, so hues turned."""
    task, (label, valid) = TASKS[name], sample(name)
    factors = torch.tensor([0.3, 2.0, 0.7])[:task.channels, None, None] if task.frames == 2 else 0.4
    predicted = torch.where(valid, label, 1.0) * factors + 5 * (name == "depth")
    cells = draw.compare(task, label, valid, aligned(task, predicted, label, valid))
    seen, drawn = map(pictured, cells)
    assert np.abs(seen[valid].astype(int) - drawn[valid]).max() <= 1
    assert not seen[~valid.numpy()].any() and drawn[~valid.numpy()].any()


@pytest.mark.parametrize("name", ["depth", "optical_flow", "scene_flow"])
def test_a_wrong_scale_shows(name):
    """The colours are those of the label's scale, whatever else the prediction holds: half the flow is paler, half the
    depth nearer, and one wild pixel changes no other."""
    task, (label, valid) = TASKS[name], sample(name)
    half = torch.where(valid, label, 1.0) / 2
    wild = half.clone()
    wild[:, -1, -1] = 1e3
    own = pictured(draw.compare(task, label, valid, half)[0])
    seen, other = (pictured(draw.compare(task, label, valid, x)[1]) for x in (half, wild))
    assert np.abs(own[valid].astype(int) - seen[valid]).mean() > 10
    assert (seen != other).any(2).sum() == 1


def test_without_a_label():
    """The title says so, the label's place is black, and the prediction has its own scale."""
    task, (label, valid) = TASKS["depth"], sample("depth")
    x = torch.linspace(0, 1, valid.numel()).view(1, *valid.shape)
    black, drawn = draw.compare(task, label, torch.zeros_like(valid), x)
    assert black[0] == "depth: no label here" and not np.asarray(black[1]).any()
    assert np.array_equal(pictured(drawn), task.colour(x, torch.ones_like(valid)))


def test_titles_tell_the_labels_scale():
    """Metres, pixels, and of scene flow the range along the view; nothing of a label that is not in its unit."""
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1] = False
    flow = torch.full((3, 2, 10), 9.0)
    flow[:, 0] = torch.tensor([3.0, 4.0, -0.5])[:, None]
    flow[2, 0, 0] = 2
    depth = torch.linspace(0, 10, 20).view(1, 2, 10)
    titles = {name: draw.compare(TASKS[name], label, valid, label)[0][0] for name, label in
              {"depth": depth, "optical_flow": flow[:2], "scene_flow": flow, "albedo": flow / 9}.items()}
    lo, hi = np.percentile(depth[0, 0].numpy(), [2, 98])
    assert titles == {"depth": f"depth label, {lo:.3g} to {hi:.3g} m", "optical_flow": "optical_flow label, up to 5 px",
                      "scene_flow": "scene_flow label, up to 5 m, z -0.5 to 2 m", "albedo": "albedo label"}
    assert draw.compare(TASKS["depth"], depth, valid, depth, native=False)[0][0] == "depth label"


def test_shading_and_albedo_are_gamma_coded():
    """Linear light looked too dark: half the light is 186 of 255 on a screen."""
    for name in ("shading", "albedo"):
        grey = torch.full((TASKS[name].channels, 2, 2), 0.5)
        assert (TASKS[name].colour(grey, torch.ones(2, 2, dtype=torch.bool)) == 186).all()


def test_a_shown_sample_tells_its_units(monkeypatch):
    """data.py --show: how much of each label is valid, how far its colours reach, and what they mean."""
    titles, panel = [], data.draw_panel

    def recorded(cells, *rest):
        titles.extend(title for title, _ in cells)
        return panel(cells, *rest)
    monkeypatch.setattr(data, "draw_panel", recorded)
    world = ToyWorld("streets", "train", 4, (32, 48))
    picture = data.show(world, 0)
    plain = panel([(title, Image.new("RGB", (288, 192))) for title in titles], 3)
    assert [t.split(",")[0] for t in titles] == ["image", "second frame", *world.tasks]
    assert picture.height > plain.height
    depth, = (t for t in titles if t.startswith("depth"))
    assert re.fullmatch(r"depth, \d+% valid, [\d.]+ to [\d.]+ m", depth)


# ---- panels ----

def test_a_sample_shows_its_frames_once():
    """Rows of a sample: frames one below the other in the first column, labels beside predictions, full rows."""
    frames, pairs = [("image", 1), ("second frame", 2)], [[(f"{t} label", t), (f"{t} predicted", t)] for t in "abcde"]
    rows = draw.sample_rows(frames, pairs, 5)
    titles = [c[0] if c else "" for c in rows]
    assert titles == ["image", "a label", "a predicted", "b label", "b predicted",
                      "second frame", "c label", "c predicted", "d label", "d predicted",
                      "", "e label", "e predicted", "", ""]
    assert [c and c[0] for c in draw.sample_rows(frames, pairs[:1], 3)] == [
        "image", "a label", "a predicted", "second frame", None, None]


def test_panel_places_every_cell():
    """Each image is where its place is, empty places are white, the key is below and the images above are untouched."""
    colours = ["red", "green", "blue", None, "black"]
    cells = [(c, Image.new("RGB", (288, 192), c)) if c else None for c in colours]
    panel = draw.draw_panel(cells, 3)
    for k, c in enumerate(colours):
        at = 10 + k % 3 * 298 + 144, 6 + k // 3 * 220 + 18 + 96
        assert panel.getpixel(at) == Image.new("RGB", (1, 1), c or "white").getpixel((0, 0))
    keyed = draw.draw_panel(cells, 3, TASKS.values(), draw.COMPARED)
    assert keyed.width == panel.width and panel.height + 100 < keyed.height < panel.height + 250
    assert list(keyed.crop((0, 0, *panel.size)).getdata()) == list(panel.getdata())


def test_key_explains_every_colour():
    """All classes in their colours and by name; a wheel whose right side is motion to the right; near and far."""
    key = np.asarray(draw.draw_key(TASKS.values(), draw.LABELS, 1200))
    found = {tuple(c) for c in key.reshape(-1, 3)}
    assert found >= {*CITYSCAPES, (158, 1, 66), (94, 79, 162)}
    assert [text for text, _ in TASKS["semantic"].key()] == [
        "road", "building", "pole", "light", "sign", "vegetation", "sky", "vehicle"]
    (_, wheel), = TASKS["optical_flow"].key()
    assert wheel[:, 22, 44].round().tolist() == [1, 0] and wheel[:, 0, 22].round().tolist() == [0, -1]
    assert wheel[:, 0, 0].isnan().all()
    for name in TASKS:
        for text, label in TASKS[name].key():
            assert text and len(label) in (1, TASKS[name].channels)


@pytest.mark.parametrize("width", [310, 600, 1200])
def test_key_fits_any_panel(width):
    """Nothing is cut off at the right: the last columns of pixels are white; a narrow panel grows with its key."""
    key = np.asarray(draw.draw_key(TASKS.values(), draw.COMPARED, width))
    assert width <= key.shape[1] <= max(width, 400) and (key[:, -4:] == 255).all()
    panel = draw.draw_panel([("image", Image.new("RGB", (4, 288)))], 3, TASKS.values(), draw.COMPARED)
    assert panel.width == draw.draw_key(TASKS.values(), draw.COMPARED, 10).width + 20


def test_a_key_of_many_classes():
    """An eighth task may have forty: the panel grows, nothing is cut off."""
    many = replace(TASKS["semantic"], key=lambda: [(f"class number {i}", torch.zeros(1, 12, 12)) for i in range(40)])
    key = np.asarray(draw.draw_key([many], "", 300))
    assert key.shape[1] > 1000 and (key[:, -4:] == 255).all() and (key[:, -60:] < 128).any()


def test_tasks_without_a_key():
    """An eighth task need not have one; without tasks and note nothing is added."""
    assert draw.draw_key([], "", 300).height == 0
    assert draw.draw_key([replace(TASKS["depth"], key=list)], "", 300).height == 0


# ---- charts ----

def texts(figure):
    """[(text, its box in pixels)] of all that is to be read in a figure, once it is laid out."""
    figure.draw_without_rendering()
    found, hidden = figure.findobj(lambda artist: isinstance(artist, Text)), set()
    for axis in figure.findobj(lambda artist: isinstance(artist, Axis)):
        low, high = sorted(axis.get_view_interval())
        places = axis.get_majorticklocs()
        for place, tick in zip(places, axis.get_major_ticks(), strict=False):
            hidden |= {tick.label1, tick.label2}        # kept, even of ticks beyond the limits
            if low - 1e-9 <= place <= high + 1e-9 and tick.label1.get_visible():
                hidden.remove(tick.label1)
        hidden |= {text for tick in axis.get_minor_ticks() for text in (tick.label1, tick.label2)}
        hidden.add(axis.offsetText)
    shown = [t for t in found if t.get_text().strip() and t.get_visible() and t not in hidden]
    return [(t.get_text(), t.get_window_extent()) for t in shown]


def readable(figure):
    """Assert that no two texts overlap and none is cut off; the texts."""
    found, (width, height) = texts(figure), figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text} is cut off"
    for (a, first), (b, second) in itertools.combinations(found, 2):
        apart = (first.x1 <= second.x0 + 1 or second.x1 <= first.x0 + 1
                 or first.y1 <= second.y0 + 1 or second.y1 <= first.y0 + 1)
        assert apart, f"{a} overlaps {b}"
    return [text for text, _ in found]


ROWS = ["single-task models", "single stream", "single stream w/o task-gradient isolation", "single stream, continued",
        "multi stream, rho 0.4", "multi stream, rho 0", "multi stream, rho 0, w/o separate projections",
        "multi stream, rho 0, w/o single-stream init"]
MEANS = [(0, 0), (3.48, 0.7), (2.55, 2.1), (4.03, 2.5), (4.21, 2.2), (4.19, 2.2), (4.27, 2.3), (-52.29, 1.1)]
TABLE = [[mean - error, mean, mean + error] for mean, error in MEANS]      # the study, three seeds


def shares(figure, table):
    """Of the first panel: the share of its width that each row's values take."""
    figure.draw_without_rendering()
    parts = [a for a in figure.axes if a.get_lines()]
    spans = [a.get_xlim() for a in parts]
    whole = sum(high - low for low, high in spans)
    return [sum(max(0, min(high, max(row)) - max(low, min(row))) for low, high in spans) / whole for row in table]


def test_a_far_row_squeezes_no_other():
    """The variant at -52 left the others, at 0 to 4, a fifteenth of the axis. It is cut, on one scale, and says so."""
    figure = draw.draw_intervals(ROWS, {"unseen": TABLE}, "Delta_m, %")
    said = readable(figure)
    left, right = figure.axes
    assert [t for t in said if "axis cut from -50" in t] and set(ROWS) <= set(said)
    assert left.get_xlim()[0] < -53.39 and -51.19 < left.get_xlim()[1] < right.get_xlim()[0] < 0
    assert right.get_xlim()[1] > 6.57
    scales = [a.get_window_extent().width / (a.get_xlim()[1] - a.get_xlim()[0]) for a in (left, right)]
    assert scales[0] == pytest.approx(scales[1], rel=0.05)
    assert shares(figure, TABLE)[3] > 0.25       # 5 of 62 points without a cut


def test_intervals_show_mean_deviation_and_seeds():
    """Every seed is a dot, in the row of its name; several panels share the names and are equally wide."""
    figure = draw.draw_intervals(ROWS, {"unseen": TABLE, "held-out scenes of the training worlds": TABLE[::-1]}, "%")
    readable(figure)
    for axes in figure.axes:
        dots = [line for line in axes.get_lines() if line.get_label() == "one seed"]
        assert [set(line.get_ydata()) for line in dots] == [{i} for i in range(len(ROWS))]
    assert [list(line.get_xdata()) for line in dots] == TABLE[::-1]
    widths = [a.get_window_extent().width for a in figure.axes]
    assert widths[0] + widths[1] == pytest.approx(widths[2] + widths[3], rel=0.02)


@pytest.mark.parametrize("table", [
    [[-0.0115, -0.0112], [0.0], [0.0002, -0.0001], [0.0004, 0.0001]],
    [[-2.1e-6, -2e-6], [0.0], [1e-7], [-1.01e-5, -1e-5]],
    [[-14.0, -12.7], [-1.4, -0.9], [0.0], [0.6, 0.05]]])
def test_numbers_of_an_axis_do_not_touch(table):
    """Of tiny effects they ran into one another ("-0.0114-0.0112"), a factor 1e-6 lay on the label, and the labels of
    two panels on each other. Each part has a number still."""
    panels = {"The unseen world": table, "Held-out scenes of the training worlds": table[::-1]}
    figure = draw.draw_intervals([f"multi stream, variant {i}" for i in range(4)], panels,
                                 "Delta_m %, single stream continued: 0")
    said = readable(figure)
    assert sum("single stream continued: 0\naxis cut from" in text for text in said) == 2
    for axes in figure.axes:
        low, high = axes.get_xlim()
        shown = [label.get_text() for x, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                 if low <= x <= high]
        assert 1 <= len(shown) == len(set(shown)) and not axes.xaxis.offsetText.get_text()


@pytest.mark.parametrize("table", [[[0.0], [3.0]], [[], []], [[0.0], [0.0], [0.0]], [[0.0, 0.0], [], [-1.0, 2.0]],
                                   [[0.0], [100.0], [101.0]], [[0.0], [1.0], [2.0], [50.0], [90.0]]])
def test_intervals_of_few_values(table):
    """One seed, none, all equal, rows without values: every value is within the limits of exactly one part."""
    figure = draw.draw_intervals([f"row {i}" for i in range(len(table))], {"unseen": table}, "Delta_m, %")
    readable(figure)
    limits = draw.axis_limits(table)
    assert len(limits) == len(figure.axes)
    for x in [0.0, *(x for values in table for x in values)]:
        assert sum(low < x < high for low, high in limits) == 1


def test_scatter_tells_points_apart():
    """Two tasks with nearly equal numbers had labels on top of each other: now a legend names the markers."""
    points = {t: (1 + i / 5, i - 3.0) for i, t in enumerate(TASKS)}
    points |= {"depth": (1.1, 2.2), "optical_flow": (1.11, 2.25)}
    figure = draw.draw_scatter("gain from isolation", points, "mean gradient norm", "gain, %")
    said = readable(figure)
    assert {"gain from isolation", "mean gradient norm", "gain, %", *TASKS} <= set(said)
    axes, = figure.axes
    shown = {line.get_label(): line for line in axes.get_lines() if line.get_label() in points}
    assert {t: tuple(line.get_xydata()[0]) for t, line in shown.items()} == points
    assert len({(line.get_color(), line.get_marker()) for line in shown.values()}) == len(TASKS)
    frame = axes.get_window_extent()
    assert axes.get_xlim()[0] == 0
    for x, y in [(0.5, 0), *points.values()]:       # markers are whole: none was, at the right edge
        px, py = axes.transData.transform((x, y))
        assert frame.x0 < px < frame.x1 - 8 and frame.y0 + 8 < py < frame.y1 - 8


def test_maps_in_rows():
    """Pictures as they are, numbers in the colours of their row, and a bar that says what these are."""
    numbers = [np.linspace(0, top, 384).reshape(16, 24) for top in (1, 9)]
    rows = [("weights", (0.5, 9), [("scene", np.zeros((16, 24, 3), np.uint8)), ("vegetation", numbers[0]),
                            ("optical_flow", numbers[1])]), ("another one", (0, 1), [("only", numbers[0])])]
    figure = draw.draw_maps(rows)
    assert {"scene", "vegetation", "optical_flow", "only", "weights", "another one"} <= set(readable(figure))
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["scene", "vegetation", "optical_flow", "only"]
    assert [axes.images[0].get_clim() for axes in shown[1:]] == [(0.5, 9), (0.5, 9), (0, 1)]
    for axes, (_, values) in zip(shown, [cell for *_, cells in rows for cell in cells], strict=True):
        assert np.array_equal(axes.images[0].get_array(), values)


def test_matrix():
    """Every number is in its square, below the name of its column."""
    values = np.linspace(-1, 1, 64).reshape(8, 8)
    figure = draw.draw_matrix("cosines\nmean of two: 0.123", CLASSES, values)
    readable(figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [f"{x:.2f}" for x in values.flat]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(CLASSES)
    assert axes.images[0].get_clim() == (-1, 1)


def test_curves():
    """Every curve is drawn whole, a name has one colour in all panels, and a legend above them; axes are labelled."""
    rng = random.Random(0)
    several = [[(i, 2 - i / 100 + rng.random()) for i in range(1, 151)] for _ in range(3)]
    panels = [(f"task {k}", "steps", "training loss", {"single-task model": several, "single stream": several[:1]})
              for k in range(7)]
    panels.append(("all tasks", "steps", "training loss", {"w/o isolation": [], "single stream": several}))
    figure = draw.draw_curves(panels)
    said = readable(figure)
    assert said.count("training loss") == said.count("steps") == 8 and said.count("single stream") == 1
    assert "w/o isolation" not in said      # it has no curve
    for axes, (title, _, _, curves) in zip(figure.axes, panels, strict=True):
        drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
        assert axes.get_title() == title and drawn == [[list(p) for p in c] for each in curves.values() for c in each]
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.9 and axes.get_xlim()[1] > 150
        assert axes.get_lines()[-1].get_color() == to_rgba("C1")        # the single stream


def test_long_runs_have_readable_ticks():
    """20,000 steps: numbers of five digits do not touch."""
    panels = [(f"task {k}", "steps", "loss", {"a": [[(1, 1.0), (20_000, 0.5)]]}) for k in range(4)]
    assert "20000" in readable(draw.draw_curves(panels))


# ---- attention ----

PARTS = ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2")
BLOCKS = [f"{part}.attentions.{j}.transformer_blocks.0" for part in PARTS for j in (0, 1)]


def attention(tasks, seed=0):
    """A log of random attention whose rows sum to 1."""
    rng, log = random.Random(seed), []
    for block, main in itertools.product(BLOCKS, tasks):
        weights = {t: rng.random() ** 3 for t in tasks if t != main}
        log.append((block, main, {t: w / sum(weights.values()) for t, w in weights.items()}))
    return log


@pytest.mark.parametrize("tasks", [tuple(TASKS), ("normal", "depth")])
def test_attention_maps_hold_the_table(tasks):
    """One map per main task and one of the means, in percent, with a colour bar; no own stream; texts are readable."""
    table = draw.attention_table(attention(tasks), tasks)
    figure = draw.draw_attention(table)
    said = readable(figure)
    *maps, bar = figure.axes
    assert "attention, %" in bar.get_ylabel() and len(maps) == 1 + len(tasks)
    assert maps[0].get_title() == "mean of the blocks" and any("a row sums to 100 %" in text for text in said)
    for axes, rows in zip(maps, [table["mean"], *table["attention"].values()], strict=True):
        expected = [[100 * row.get(t, np.nan) for t in tasks] for row in rows.values()]
        values = axes.images[0].get_array().filled(np.nan)
        np.testing.assert_allclose(values, expected)
        assert np.nanmax(values) <= bar.get_ylim()[1]
        numbers = [text.get_text() for text in axes.texts]
        assert numbers == [f"{w:.0f}" for row in expected for w in row if not np.isnan(w)]


def test_attention_of_one_task(tmp_path):
    """sample.py --tasks depth --attention: two maps, and a file of readable size."""
    log = [entry for entry in attention(tuple(TASKS)) if entry[1] == "depth"]
    figure = draw.draw_attention(draw.attention_table(log, tuple(TASKS)))
    readable(figure)
    figure.savefig(tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.width >= 600
