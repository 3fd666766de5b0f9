"""What the study compares, and the models that takes. A new row in VARIANTS is all that a further comparison needs."""
from pathlib import Path
from typing import NamedTuple

from data import TOY_TEST, TOY_TRAIN


class Variant(NamedTuple):
    title: str
    flags: str           # of train.py; with {task}: one model per task
    parent: str = ""     # the variant whose single stream it starts from


VARIANTS = {
    "single-task": Variant("single-task models", "--stage 1 --tasks {task}"),
    "single": Variant("single stream", "--stage 1"),
    "no-isolation": Variant("single stream w/o task-gradient isolation", "--stage 1 --no-isolation"),
    "continued": Variant("single stream, continued", "--stage 1 --init {parent}", "single"),
    "multi": Variant("multi stream, rho 0.4", "--stage 2 --rho 0.4", "single"),
    # the paper's Table 4 takes parts away from the multi stream without masking: its differences are to that row
    "rho-0": Variant("multi stream, rho 0", "--stage 2 --rho 0", "single"),
    "shared-qkv": Variant("multi stream, rho 0, w/o separate projections", "--stage 2 --rho 0 --shared-qkv", "single"),
    "base-init": Variant("multi stream, rho 0, w/o single-stream init", "--stage 2 --rho 0 --main-init base", "single"),
}

# (claim, what should have the higher Delta_m, than what, the paper's difference on unseen data)
CLAIMS = [
    ("the multi stream beats the single-task models", "multi", "single-task", 4.78),
    ("the multi stream beats the single stream", "multi", "single", 4.78 + 1.57),
    ("the multi stream beats the single stream trained for as many steps", "multi", "continued", None),
    ("the single stream stays behind the single-task models", "single-task", "single", 1.57),
    ("task-gradient isolation helps", "single", "no-isolation", -1.57 + 4.11),
    ("attention-guided masking helps", "multi", "rho-0", 4.78 - 3.41),
    ("separate projections help", "rho-0", "shared-qkv", 3.41 - 0.85),
    ("single-stream initialisation helps", "rho-0", "base-init", 3.41 + 3.11),
]

WORLDS = {"unseen": tuple(w for w in TOY_TEST if w not in TOY_TRAIN), "in-domain": TOY_TRAIN}


class Run(NamedTuple):
    """One model to train and to evaluate."""
    seed: int
    variant: str
    task: str            # of a single-task model, else empty
    steps: int
    out: Path
    parent: Path | None

    @property
    def finished(self):
        return (self.out / "results.json").is_file()

    @property
    def ready(self):
        return self.parent is None or (self.parent / "results.json").is_file()

    @property
    def name(self):
        return f"seed {self.seed}, {self.out.name}"


def runs(args):
    """Every model of a study (tools.study.parse), parents before children."""
    for seed in range(args.seeds):
        place = Path(args.out) / f"seed{seed}"
        for name in args.only:
            variant = VARIANTS[name]
            parent = place / variant.parent if variant.parent else None
            if "{task}" in variant.flags:
                for task in args.tasks:
                    yield Run(seed, name, task, args.single_steps, place / f"{name}-{task}", parent)
            else:
                yield Run(seed, name, "", args.steps2 if parent else args.steps, place / name, parent)
