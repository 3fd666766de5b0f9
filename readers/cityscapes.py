"""Cityscapes, street photographs: https://www.cityscapes-dataset.com/downloads/

Licence: registration, non-commercial, no redistribution. Download: leftImg8bit_trainvaltest (11 GB) and
gtFine_trainvaltest (241 MB), both into cityscapes/.

semantic   8-bit full label ids (not train ids), of which nine make our classes; all others are ignored, wall (12) too
           (the paper's table lists it as vegetation; the published evaluation ignores it)

Test set: the 500 images of val, 1024x2048, at 256x512.
"""
import numpy as np

from readers.formats import read_png
from readers.reader import Frame, Reader


class Cityscapes(Reader):
    name, splits, use = "cityscapes", ("train", "val"), {"test": "val"}
    page = "https://www.cityscapes-dataset.com/downloads/"
    tree = {"image": "leftImg8bit/<split>/{}/{}_leftImg8bit.png",
            "semantic": "gtFine/<split>/{}/{}_gtFine_labelIds.png"}
    tasks, size = ("semantic",), (256, 512)
    classes = {7: 0, 11: 1, 17: 2, 19: 3, 20: 4, 21: 5, 23: 6, 26: 7, 28: 7}  # label id: class

    def window(self, h, w):
        """Every odd row and column: halving that with nearest-exact leaves rows and columns 3, 7, 11, ..."""
        return slice(1, None, 2), slice(1, None, 2)

    class Frame(Frame):
        def semantic(self):
            table = np.full(256, 255, np.uint8)
            table[list(self.reader.classes)] = list(self.reader.classes.values())
            ids = table[read_png(self.path("semantic"), "uint8", 1)]
            return ids, ids != 255
