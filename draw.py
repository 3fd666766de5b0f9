"""Pictures: panels of images, heat maps of the attention over tasks, charts."""
import math
import re

from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.load_default(13)


# ---- panels ----

def cell(picture):
    """(H,W,3) uint8 -> a Pillow image of readable size: small ones enlarged by a whole number, large ones reduced to 512 pixels."""
    image = Image.fromarray(picture)
    enlarge = max(1, 288 // max(image.size))
    if enlarge > 1:
        return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    image.thumbnail((512, 512))
    return image


def draw_panel(cells, columns):
    """[(title, Pillow image), ...] -> one Pillow image, row by row."""
    width = int(max(max(image.width, FONT.getlength(title)) for title, image in cells)) + 10
    height = max(image.height for _, image in cells) + 28
    panel = Image.new("RGB", (min(columns, len(cells)) * width + 10, -(-len(cells) // columns) * height + 8), "white")
    draw = ImageDraw.Draw(panel)
    for k, (title, image) in enumerate(cells):
        x, y = 10 + k % columns * width, 6 + k // columns * height
        draw.text((x, y), title, "black", FONT)
        panel.paste(image, (x, y + 18))
    return panel


# ---- which task looks at which (paper Figs. 7 and 9) ----

def attention_table(log, tasks):
    """model.attention_log -> {"tasks": [...], "mean": {main: {task: weight}}, "attention": {main: {block: {task: weight}}}}.

    weight: mean over pixels and heads of the attention that predicting `main` pays to the auxiliary stream of `task`; each row sums to
    1. Blocks are in running order; "mean" is over blocks.
    """
    attention = {}
    for block, main, weights in log:
        attention.setdefault(main, {})[re.sub(r"_blocks?|attentions\.|\.transformer_blocks\.0$", "", block)] = weights
    attention = {t: attention[t] for t in tasks if t in attention}
    mean = {main: {t: sum(row[t] for row in rows.values()) / len(rows) for t in tasks if t != main} for main, rows in attention.items()}
    return {"tasks": list(tasks), "mean": mean, "attention": attention}


def draw_attention(table):
    """The table as heat maps, in percent: main tasks averaged over blocks, then the blocks of each main task. -> Pillow image"""
    tasks, font, (cw, ch), (left, top) = table["tasks"], ImageFont.load_default(11), (28, 17), (84, 76)
    weights = [w for rows in table["attention"].values() for row in rows.values() for w in row.values()]
    peak = max(2 / (len(tasks) - 1), *weights)      # the darkest colour is at least twice an even share

    def heat(rows):
        image = Image.new("RGB", (left + cw * len(tasks), top + ch * len(rows)), "white")
        draw = ImageDraw.Draw(image)
        for j, t in enumerate(tasks):
            upright = Image.new("RGB", (top - 4, ch), "white")
            ImageDraw.Draw(upright).text((0, ch // 2), t, "black", font, anchor="lm")
            image.paste(upright.rotate(90, expand=True), (left + j * cw + 5, 0))
        for i, (name, row) in enumerate(rows.items()):
            y = top + i * ch
            draw.text((left - 6, y + ch // 2), name, "black", font, anchor="rm")
            for x, t in zip(range(left, image.width, cw), tasks):
                w = row.get(t, 0.0) / peak
                colour = tuple(round(a + (b - a) * w) for a, b in ((247, 8), (251, 48), (255, 107))) if t in row else (225, 225, 225)
                draw.rectangle((x, y, x + cw - 2, y + ch - 2), colour)
                if t in row:
                    draw.text((x + cw // 2, y + ch // 2), f"{100 * row[t]:.0f}", "white" if w > 0.55 else "black", font, anchor="mm")
        return image

    cells = [("attention in %, mean of the blocks", heat(table["mean"]))]
    return draw_panel(cells + [(f"{main} attends to (by block)", heat(rows)) for main, rows in table["attention"].items()], 4)


# ---- charts ----

COLOURS = (31, 119, 180), (214, 39, 40), (44, 160, 44)      # blue, red, green



def ticks(low, high):
    """{value: text} of the multiples of 1, 2 or 5 times a power of ten within the limits: two to five, or one if low = high."""
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return {k * step: f"{k * step:.6g}" for k in range(math.ceil(low / step), math.floor(high / step) + 1)}


class Chart:
    """One panel; `image` is the Pillow image it is drawn into.

    xlim, ylim: (low, high) of the axes; xticks, yticks: {value: text}, None = round numbers; left: pixels for the texts of the y axis.
    """

    def __init__(self, title, xlim, ylim, xlabel, xticks=None, yticks=None, size=(460, 340), left=70):
        self.image, self.xlim, self.ylim = Image.new("RGB", size, "white"), xlim, ylim
        self.draw, self.box = ImageDraw.Draw(self.image), (left, size[1] - 50, size[0] - 20, 50)    # pixels of (low, low) and (high, high)
        self.draw.text(((left + size[0] - 20) / 2, 14), title, "black", FONT, "ma")
        self.draw.text(((left + size[0] - 20) / 2, size[1] - 8), xlabel, "black", FONT, "ms")
        for v, text in (yticks or ticks(*ylim)).items():
            self.curve([(xlim[0], v), (xlim[1], v)], (225, 225, 225), 1)
            self.text((xlim[0], v), text, "black", "rm", (-8, 0))
        for v, text in (xticks or ticks(*xlim)).items():
            self.text((v, ylim[0]), text, "black", "ma", (0, 8))

    def at(self, point):
        """Pixel (x, y) of a point in data units."""
        (x0, y0, x1, y1), (a, b), (c, d) = self.box, self.xlim, self.ylim
        return x0 + (x1 - x0) * (point[0] - a) / ((b - a) or 1), y0 + (y1 - y0) * (point[1] - c) / ((d - c) or 1)

    def curve(self, points, colour, width=3):
        self.draw.line([self.at(p) for p in points], colour, width)

    def dots(self, points, colour, radius=4):
        for x, y in map(self.at, points):
            self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)

    def text(self, point, text, colour, anchor, offset=(0, 0)):
        x, y = self.at(point)
        self.draw.text((x + offset[0], y + offset[1]), text, colour, FONT, anchor)

    def legend(self, names, place="left"):
        """names: [(text, colour)], one below the other in an upper corner."""
        for row, (text, colour) in enumerate(names):
            x, anchor = (self.box[0] + 12, "la") if place == "left" else (self.box[2] - 12, "ra")
            self.draw.text((x, self.box[3] + 18 * row), text, colour, FONT, anchor)


def grid(charts, columns):
    """Charts of one size, row by row -> one Pillow image."""
    width, height = charts[0].image.size
    sheet = Image.new("RGB", (width * min(columns, len(charts)), height * -(-len(charts) // columns)), "white")
    for k, chart in enumerate(charts):
        sheet.paste(chart.image, (k % columns * width, k // columns * height))
    return sheet
