"""What the study compares, and the models that takes. A new row in VARIANTS is all that a further comparison needs."""
from pathlib import Path
from typing import NamedTuple

from data import TOY_TEST, TOY_TRAIN


class Variant(NamedTuple):
    title: str
    flags: str                      # of the program; with {task}: one model per task
    parent: str = ""                # the variant whose model it starts from
    program: str = "train.py"       # or evaluate.py, of the parent; or tools.oracle, from the parent


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
    "streams-off": Variant("multi stream, rho 0.4, evaluated without its streams", "--streams off", "multi",
                           "evaluate.py"),
    "oracle": Variant("multi stream, rho 0.4, streams that hold the truth", "--rho 0.4", "single", "tools.oracle"),
    # named by --only alone: each of these costs as much as those above
    "attention-lr-1": Variant("multi stream, rho 0.4, attention at the common learning rate",
                              "--stage 2 --rho 0.4 --attention-lr 1", "single"),
    # the kinds of masking of the supplement's Table 6
    "score-k": Variant("multi stream, rho 0.4, several tasks masked", "--stage 2 --rho 0.4 --mask score-k", "single"),
    "argmax": Variant("multi stream, rho 0.4, highest masked", "--stage 2 --rho 0.4 --mask argmax", "single"),
    "uniform": Variant("multi stream, rho 0.4, any masked", "--stage 2 --rho 0.4 --mask uniform", "single"),
    # fewer labels, as in Table 3, but of the single stream
    "no-street-motion": Variant("single stream w/o motion in streets",
                                "--stage 1 --drop streets:optical_flow,streets:scene_flow"),
    "no-thing-motion": Variant("single stream w/o motion in things",
                               "--stage 1 --drop things:optical_flow,things:scene_flow"),
    "no-street-geometry": Variant("single stream w/o normals and depth in streets",
                                  "--stage 1 --drop streets:normal,streets:depth"),
    "no-room-geometry": Variant("single stream w/o normals and depth in rooms",
                                "--stage 1 --drop rooms:normal,rooms:depth"),
}
EXTRA = ("attention-lr-1", "score-k", "argmax", "uniform", "no-street-motion", "no-thing-motion", "no-street-geometry",
         "no-room-geometry")

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
    ("what the multi stream has learned needs its streams", "multi", "streams-off", None),
    ("streams that hold the truth beat the single stream trained for as many steps", "oracle", "continued", None),
    ("streams that hold the truth beat those of stage 1", "oracle", "multi", None),
    ("a learning rate of its own helps the task attention", "multi", "attention-lr-1", None),
    ("masking one task by its score beats masking several", "multi", "score-k", None),
    ("masking by score beats masking the highest", "multi", "argmax", None),
    ("masking by score beats masking any", "multi", "uniform", None),
    # in the paper, whose Table 3 has the multi stream: 28.44, 4.13, 7.24 and 27.60
    ("labels of motion in streets help", "single", "no-street-motion", None),
    ("labels of motion in things help", "single", "no-thing-motion", None),
    ("labels of geometry in streets help", "single", "no-street-geometry", None),
    ("labels of geometry in rooms help", "single", "no-room-geometry", None),
]

WORLDS = {"unseen": tuple(w for w in TOY_TEST if w not in TOY_TRAIN), "in-domain": TOY_TRAIN}


class Run(NamedTuple):
    """One model to train and to evaluate, or to evaluate in another way."""
    seed: int
    variant: str
    task: str            # of a single-task model, else empty
    steps: int           # 0: it trains nothing
    out: Path
    parent: Path | None

    @property
    def finished(self):
        return (self.out / "results.json").is_file()

    @property
    def program(self):
        return VARIANTS[self.variant].program

    @property
    def filling(self):
        """Up to its first checkpoint a model fills the latent cache, which all share."""
        return self.program == "train.py" and not (self.finished or (self.out / "state").is_dir())

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
                steps = args.steps2 if parent else args.steps
                yield Run(seed, name, "", 0 if variant.program == "evaluate.py" else steps, place / name, parent)
