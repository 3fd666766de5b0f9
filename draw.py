"""Small charts drawn with Pillow: curves, dots and intervals over axes in data units. bench.py and study.py draw with them."""
import math

from PIL import Image, ImageDraw, ImageFont

COLOURS = (31, 119, 180), (214, 39, 40), (44, 160, 44)      # blue, red, green
FONT = ImageFont.load_default(14)


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
