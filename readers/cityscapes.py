"""Cityscapes, street photographs: https://www.cityscapes-dataset.com"""
import numpy as np

from readers.formats import read_png
from readers.reader import Frame, Reader


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
