"""What the tests of data.py and training/cache.py share: a reader of random samples, and mixtures."""
import numpy as np

from data import Mixture
from readers.toyworld import ALL
from tasks import TASKS

SIZE = (16, 24)


class Made:
    """A reader in the manner of readers/: random pictures and labels, any facts.

    labelled: {task: numbers of the samples that carry its label}, default all; broken: number of a sample that cannot
    be read. `loads` lists the numbers it was asked for.
    """

    version, split, folder, depth_range, independent = 1, "train", None, (0.1, 80.0), False

    def __init__(self, name="made", tasks=("normal", "depth", "optical_flow"), n=4, native=(20, 36), labelled=None,
                 broken=None, mix=None, train_crop=None, jitter=None, vflip=False):
        self.name, self.tasks, self.n, self.native, self.size = name, tasks, n, native, SIZE
        self.labelled, self.broken, self.loads = labelled or {}, broken, []
        self.mix, self.train_crop, self.jitter, self.vflip = mix or {}, train_crop or {}, jitter or {}, vflip

    def __len__(self):
        return self.n

    def identity(self):
        return self.name

    def indices(self, task):
        return self.labelled.get(task, range(self.n))

    def load(self, i, tasks, with_next=False):
        self.loads.append(i)
        if i == self.broken:
            raise ValueError(f"{self.name}/{i}.png is truncated: copy it again")
        assert all(i in self.indices(t) for t in tasks), "asked for a label that is not there"
        rng = np.random.default_rng([i, *self.name.encode()])
        height, width = self.native
        small = rng.integers(0, 256, (2, height // 4, width // 4, 3), np.uint8)
        image, following = small.repeat(4, axis=1).repeat(4, axis=2)
        sample = {"name": f"{self.name}/{i}", "image": image, "next": following, "labels": {}, "valid": {}}
        for t in tasks:
            rng = np.random.default_rng([i, *t.encode()])
            label = rng.standard_normal((*self.native, TASKS[t].channels)).astype(np.float32)
            sample["labels"][t] = abs(label) if t == "depth" else label
            sample["valid"][t] = rng.random(self.native) < 0.9
        return sample


def mixture(readers, tasks=ALL, **options):
    """A Mixture of four samples a step, in one micro-batch, unless the options say otherwise."""
    return Mixture(readers, tasks, TASKS, **{"batch": 4, "micro": 4, **options})
