"""Pictures: panels of images with the key of their colours, charts, small maps, heat maps of the attention over tasks.

Panels are Pillow images. Charts and heat maps are matplotlib figures, drawn by Agg without a screen and without
pyplot's global state: figure.savefig(path) writes them. matplotlib is imported only where something is drawn with it.
"""
import re
import textwrap
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.load_default(13)

# ---- panels ----

# what draw_panel should note below labels, and below predictions beside their labels
LABELS = "black: no label"
COMPARED = LABELS + ". A prediction that is known only up to scale is fitted to its label first, as for its metric."


def cell(picture):
    """(H,W,3) uint8 -> a Pillow image of readable size: small ones enlarged by a whole number, large ones reduced to
    512 pixels."""
    image = Image.fromarray(picture)
    enlarge = max(1, 288 // max(image.size))
    if enlarge > 1:
        return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    image.thumbnail((512, 512))
    return image


def compare(task, label, valid, predicted, native=True):
    """A label and a prediction of a tasks.Task in the label's colour scale -> their two cells, label first.

    label, predicted: (C,H,W) of one unit, so a prediction up to scale has been fitted (metrics.aligned); valid: (H,W)
    bool, the label's; without a valid pixel the prediction has its own scale. native: the label has the dataset's unit
    (metres, pixels), and its title says how far its colours reach.
    """
    title = f"{task.name}: no label here"
    everywhere, scale = torch.ones_like(valid), None
    if valid.any():
        scale = task.scale(label, valid)
        reach = task.tell(label, valid) if native else ""
        title = f"{task.name} label" + (f", {reach}" if reach else "")
    return [(title, cell(task.colour(label, valid))),
            (f"{task.name} predicted", cell(task.colour(predicted, everywhere, scale)))]


def sample_rows(frames, pairs, columns):
    """Cells of one sample for a panel of an odd number of columns, ending with a full row.

    frames: its cells, one below the other in the first column; pairs: what `compare` returned, beside each other.
    """
    beside, cells = (columns - 1) // 2, []
    for k in range(max(len(frames), -(-len(pairs) // beside))):
        row = [frames[k] if k < len(frames) else None]
        for pair in pairs[k * beside:(k + 1) * beside]:
            row += pair
        cells += row + [None] * (columns - len(row))
    return cells


def draw_panel(cells, columns, tasks=(), note=""):
    """[(title, Pillow image), or None for an empty place, ...] -> one Pillow image, row by row.

    tasks: the tasks.Task whose colours the key below explains; note: a sentence below that.
    """
    shown = [c for c in cells if c]
    width = int(max(max(image.width, FONT.getlength(title)) for title, image in shown)) + 10
    height = max(image.height for _, image in shown) + 28
    columns = min(columns, len(cells))
    key = draw_key(tasks, note, columns * width - 10)
    bottom = -(-len(cells) // columns) * height + 8
    panel = Image.new("RGB", (key.width + 20, bottom + key.height), "white")
    draw = ImageDraw.Draw(panel)
    for k, (title, image) in ((k, c) for k, c in enumerate(cells) if c):
        x, y = 10 + k % columns * width, 6 + k // columns * height
        draw.text((x, y), title, "black", FONT)
        panel.paste(image, (x, y + 18))
    panel.paste(key, (10, bottom))
    return panel


def draw_key(tasks, note, width):
    """What the colours of these tasks mean, above a note -> Pillow image of that width, or as wide as one key needs;
    without height if all is empty. Tasks that share a key are named together.
    """
    alike = {}
    for task in tasks:
        alike.setdefault(task.key, []).append(task)
    keys = [_task_key(", ".join(t.name for t in group), group[0]) for group in alike.values() if group[0].key()]
    width = max([width, *(image.width for image in keys)])
    places, x, y, row = [], 0, 0, 0
    for image in keys:
        if x and x + image.width > width:
            x, y, row = 0, y + row, 0
        places.append((x, y))
        x, row = x + image.width, max(row, image.height)
    bottom = y + row
    note = textwrap.fill(note, width // 7)
    strip = Image.new("RGB", (width, bottom + (18 * (1 + note.count("\n")) if note else 0)), "white")
    for image, place in zip(keys, places, strict=True):
        strip.paste(image, place)
    if note:
        ImageDraw.Draw(strip).text((0, bottom), note, "black", FONT)
    return strip


def _task_key(title, task):
    """One task's key: its small maps with their texts beside them; low ones share a column."""
    columns, below = [], 0
    for text, label in task.key():
        shown = label.isfinite().all(0)
        picture = task.colour(label, shown)
        picture[~shown.numpy()] = 255
        if not columns or below + len(picture) > 48:
            columns.append([])
            below = 0
        columns[-1].append((20 + below, Image.fromarray(picture), text))
        below += len(picture) + 4
    key = Image.new("RGB", (500 * len(columns), 100), "white")
    draw, left = ImageDraw.Draw(key), 0
    draw.text((0, 0), title, "black", FONT)
    for column in columns:
        beside = left + max(image.width for _, image, _ in column) + 6
        for y, image, text in column:
            key.paste(image, (left, y))
            draw.text((beside, y + image.height / 2), text, "black", FONT, anchor="lm")
        left = beside + 16 + max(int(draw.textbbox((0, 0), text, FONT)[2]) for *_, text in column)
    bottom = max(column[-1][0] + column[-1][1].height for column in columns)
    return key.crop((0, 0, max(left, int(FONT.getlength(title)) + 16), bottom + 6))


# ---- charts ----

MARKERS = "os^DvP*X<>"


def _figure(width, height):
    """An empty matplotlib figure of width x height inches, 100 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(panels):
    """Charts of quantities, from zero up, over whole numbers -> matplotlib figure.

    panels: [(title, x label, y label, {name: [curve, ...]})], a curve being [(x, y), ...]. A name has one colour in all
    panels; curves of few points show them.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, lines = _figure(3.5 * columns, 2.9 * rows + 0.4), {}
    figure.get_layout_engine().set(w_pad=0.1)
    names = dict.fromkeys(name for *_, curves in panels for name in curves)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for k, (title, xlabel, ylabel, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        for name, curve in [(name, curve) for name, several in curves.items() for curve in several]:
            xs, ys = zip(*curve, strict=True)
            lines[name], = axes.plot(xs, ys, colours[name], marker="o" if len(xs) < 20 else "", markersize=4)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=7, integer=True)
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=max(1, len(lines)), frameon=False)
    return figure


def draw_intervals(rows, panels, xlabel):
    """Mean and standard deviation of each row's values, and each value, against zero -> matplotlib figure.

    rows: their names, top to bottom; panels: {title: [values of a row, ...]}, a row without values stays empty. An axis
    of which one gap would take more than two thirds is cut there, and says so.
    """
    figure = _figure(4 + 4.4 * len(panels), 1.4 + 0.36 * len(rows))
    limits, shares = {title: axis_limits(table) for title, table in panels.items()}, {}
    for title, parts in limits.items():     # an inch is worth the same in all parts of a panel
        whole = sum(high - low for low, high in parts)
        shares[title] = [(high - low) / whole for low, high in parts]
    widths = [width for parts in shares.values() for width in (*parts, 0.03)]       # a blank follows each panel
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths, wspace=0.02)
    places, most = iter(range(len(widths))), {}
    for title, table in panels.items():
        parts = [figure.add_subplot(grid[next(places)], xlim=ends) for ends in limits[title]]
        next(places)
        for axes, share in zip(parts, shares[title], strict=True):
            _plot_rows(axes, rows, table)
            most[axes] = max(2, round(6 * share))
            axes.tick_params(labelleft=axes is figure.axes[0])
        parts[0].set_title(title, loc="left", pad=10)
        _label_axis(parts, xlabel)
    named = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside upper center", ncols=2, frameon=False)
    _space_numbers(figure, most)
    return figure


def axis_limits(table):
    """Ends [(low, high)] of an axis that shows zero and all rows' values with their deviations; two pairs if it is cut
    between them, since more than two thirds of it would be empty. Two rows alone squeeze nobody."""
    reach = [0.0, *(x for values in table for x in values)]
    for mean, error in map(_mean_and_deviation, filter(None, table)):
        reach += [mean - error, mean + error]
    reach.sort()
    low, high = max(pairwise(reach), key=lambda pair: pair[1] - pair[0], default=(0.0, 0.0))
    ends = [(reach[0], reach[-1])]
    if high - low > 2 / 3 * (reach[-1] - reach[0]) and sum(map(bool, table)) > 2:
        ends = [(reach[0], low), (high, reach[-1])]
    margin = 0.15 * max(b - a for a, b in ends) or 1.0
    return [(a - margin, b + margin) for a, b in ends]


def _mean_and_deviation(values):
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _plot_rows(axes, rows, table):
    """The rows' intervals and values into one pair of axes, whatever part of them these show."""
    axes.axvline(0, color="grey", lw=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(axis="x", alpha=0.3)
    for i, values in enumerate(table):
        if values:
            mean, error = _mean_and_deviation(values)
            axes.errorbar(mean, i, xerr=error, fmt="o", color="C0", capsize=3, label="mean ± standard deviation")
            axes.plot(values, [i] * len(values), "k.", markersize=4, label="one seed")


def _label_axis(parts, xlabel):
    """Numbers and label of one panel's x axis; if it is cut, also slanted strokes at the cut and a note."""
    widths = [high - low for low, high in (axes.get_xlim() for axes in parts)]
    for axes in parts:
        axes.xaxis.set_major_formatter("{x:.10g}")      # a factor beside the axis would lie on its label
    for left, right in pairwise(parts):
        xlabel += f"\naxis cut from {left.get_xlim()[1]:.2g} to {right.get_xlim()[0]:.2g}"
        left.spines.right.set_visible(False)
        right.spines.left.set_visible(False)
        right.tick_params(left=False)
        for axes, x in ((left, 1), (right, 0)):
            axes.plot([x, x], [0, 1], marker=[(-0.5, -1), (0.5, 1)], markersize=9, color="black", ls="none",
                      clip_on=False, transform=axes.transAxes)
    widest = widths.index(max(widths))
    parts[widest].set_xlabel(xlabel, loc="center" if len(parts) == 1 else ("left", "right")[widest])


def _space_numbers(figure, most):
    """Ticks of axes side by side, {axes: at most so many steps}; fewer where numbers touch one another or those of the
    axes beside them."""
    crowded = True
    while crowded:
        for axes, steps in most.items():
            axes.locator_params(axis="x", nbins=steps, min_n_ticks=min(steps, 2))
        figure.draw_without_rendering()
        numbers = []
        for axes in most:
            low, high = axes.get_xlim()
            labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            numbers += [(axes, label.get_window_extent()) for x, label in labels if low <= x <= high]
        close = [pair for pair in pairwise(numbers) if pair[0][1].x1 + 4 > pair[1][1].x0]
        crowded = {axes for pair in close for axes, _ in pair if most[axes] > 1}
        for axes in crowded:
            most[axes] -= 1


def draw_scatter(title, points, xlabel, ylabel):
    """One marker per name, told apart in a legend beside the chart, against the line y = 0 -> matplotlib figure.

    points: {name: (x, y)}.
    """
    figure = _figure(6.6, 4)
    axes = figure.add_subplot()
    axes.axhline(0, color="grey", lw=1)
    for i, (name, (x, y)) in enumerate(points.items()):
        axes.plot(x, y, f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], markersize=8, ls="none", label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.15)
    axes.set_xlim(0, 1.1 * max(x for x, _ in points.values()))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", frameon=False)
    return figure


# ---- small maps, matrices ----

def draw_maps(rows):
    """Rows of maps of one size, a colour bar at the end of each row -> matplotlib figure.

    rows: [(what the bar says, the numbers at its ends, [(title, map), ...])]. A map is a picture (H,W,3) uint8, or
    numbers (H,W), as the last one of a row is.
    """
    columns = max(len(cells) for *_, cells in rows)
    figure = _figure(1.2 * columns + 0.8, 1.3 * len(rows))
    places = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, (low, high), cells) in zip(places, rows, strict=True):
        for axes in line:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for axes, (title, values) in zip(line, cells, strict=False):
            axes.set_title(title, fontsize=9)
            image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=list(line), pad=0.01, aspect=12).set_label(label, fontsize=9)
    return figure


def draw_matrix(title, names, values):
    """Numbers (N,N) from -1 to 1 of each pair of N names -> matplotlib figure."""
    figure = _figure(2.6 + 0.42 * len(names), 1.8 + 0.36 * len(names))
    axes = figure.add_subplot()
    image = _heat(axes, values, names, names, "RdBu_r", (-1, 1), ".2f")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def _heat(axes, values, rows, columns, colours, ends, form):
    """Numbers (rows, columns) as coloured squares with the number in each; NaN stays empty -> the image."""
    image = axes.imshow(values, cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    for (i, j), x in np.ndenumerate(values):
        if np.isfinite(x):
            colour = "white" if abs(x) > 0.55 * ends[1] else "black"
            axes.text(j, i, format(x, form), ha="center", va="center", fontsize=8, color=colour)
    return image


# ---- which task looks at which (paper Figs. 7 and 9) ----

def attention_table(log, tasks):
    """model.attention_log ->
    {"tasks": [...], "mean": {main: {task: weight}}, "attention": {main: {block: {task: weight}}}}.

    weight: mean over pixels and heads of the attention that predicting `main` pays to the auxiliary stream of `task`;
    each row sums to 1. Blocks are in running order; "mean" is over blocks. Of a block's weights for a task the first
    count: with confidence, the mirror image's come later.
    """
    attention = {}
    for block, main, weights in log:
        short = re.sub(r"_blocks?|attentions\.|\.transformer_blocks\.0$", "", block)
        attention.setdefault(main, {}).setdefault(short, weights)
    attention = {t: attention[t] for t in tasks if t in attention}
    mean = {main: {t: fmean(row[t] for row in rows.values()) for t in tasks if t != main}
            for main, rows in attention.items()}
    return {"tasks": list(tasks), "mean": mean, "attention": attention}


def draw_attention(table):
    """The table as heat maps in percent, averaged over blocks, then of each main task's blocks -> matplotlib figure."""
    tasks = table["tasks"]
    panels = {"mean of the blocks": table["mean"]}
    panels |= {f"{main}, by block": rows for main, rows in table["attention"].items()}
    even = 100 / (len(tasks) - 1)
    most = max(100 * w for rows in panels.values() for row in rows.values() for w in row.values())
    peak = min(100, max(2 * even, most))        # the darkest colour is at least twice an even share
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    width, height = 0.9 + 0.32 * len(tasks), 1.4 + 0.22 * max(map(len, panels.values()))
    figure = _figure(max(7, 1 + columns * width), lines * height)
    for k, (title, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, k + 1)
        values = np.array([[100 * row.get(t, np.nan) for t in tasks] for row in rows.values()])
        image = _heat(axes, values, list(rows), tasks, "Blues", (0, peak), ".0f")
        axes.set_facecolor("0.85")      # a task has no stream of its own to attend to
        axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=figure.axes, aspect=40, pad=0.01, label="attention, %")
    figure.supxlabel("row: task that is predicted, or block; column: stream that it attends to\n"
                     f"a row sums to 100 %; even shares are {even:.3g} %", fontsize=9)
    return figure
