"""What a study compares, and the models that takes. A further comparison is a row of VARIANTS and, for a verdict, a
Claim; rows of a subject of their own are another Suite (tools/study_systems.py)."""
from pathlib import Path
from typing import NamedTuple

from data import TOY_TEST, TOY_TRAIN
from tasks import parse_tasks

# ---- what a suite is made of ----

class Variant(NamedTuple):
    title: str
    flags: str                      # of the program; with {task}: one model per task; {parent}, {out}: the two folders;
                                    # {fifth} of its steps; of tools.oracle those of stage 2, its own before a --
    parent: str = ""                # the variant whose model it starts from
    program: str = "train.py"       # or evaluate.py, of the parent; or tools.oracle, tools.discover, from the parent
    length: str = ""                # how many steps, a key of `lengths`; "": by what it starts from
    tasks: str = ""                 # which, where they are not all of the study's
    cache: str = "cache"            # folder of what is encoded once, shared by rows that encode alike

    def told(self):
        """What makes it this variant, in one line; settings that are as usual are left out."""
        return " ".join(self[:4]) + "".join(f" {x}" for x in self[4:] if x not in ("", "cache"))

    def filled(self, **values):
        """The flags as a list, with these in their braces."""
        return [word.format(**values) for word in self.flags.split()]


class Claim(NamedTuple):
    """That some variant has a higher Delta_m than another. "a + b": the sum of two, so that the difference of two
    differences is a claim as well."""
    claim: str
    better: str
    worse: str
    paper: float | str | None = None    # the paper's difference of Delta_m on unseen data, or its numbers as text
    tasks: str = ""                     # those that Delta_m is over, where they are not all
    zero: int = 0                       # which zero line of the suite Delta_m is against

    def sides(self):
        """(variants that should be better, variants than which)"""
        return self.better.split(" + "), self.worse.split(" + ")


class Zero(NamedTuple):
    """A row that others have a Delta_m against."""
    variant: str
    key: str                # of that Delta_m in results.json
    column: str             # and in tables
    picture: str            # the file that shows it
    rows: tuple = ()        # which others; () = all


class Suite(NamedTuple):
    name: str
    variants: dict          # {name: Variant}, parents before children
    extra: tuple            # those of them that --only has to name
    claims: list
    zeros: tuple            # the first one is for all rows
    page: str               # the file of its report

    def against(self, variant):
        """The zero lines that a variant has a Delta_m against."""
        return [zero for zero in self.zeros if not zero.rows or variant in zero.rows]

    def ancestors(self, variant):
        """What a variant starts from, what that starts from, and so on."""
        while variant := self.variants[variant].parent:
            yield variant


# ---- which part of StableMTL helps ----

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
    "one-frame": Variant("multi stream, rho 0.4, tasks of one frame evaluated without the second", "--one-frame",
                         "multi", "evaluate.py"),
    "oracle": Variant("multi stream, rho 0.4, streams that hold the truth", "--rho 0.4", "single", "tools.oracle"),
    "told": Variant("multi stream, rho 0.4, streams that hold stage 1's predictions",
                    "--tell predictions -- --rho 0.4", "single", "tools.oracle"),
    # named by --only alone: each of these costs as much as those above
    "attention-lr-1": Variant("multi stream, rho 0.4, attention at the common learning rate",
                              "--stage 2 --rho 0.4 --attention-lr 1", "single"),
    # the kinds of masking of the supplement's Table 6
    "score-k": Variant("multi stream, rho 0.4, several tasks masked", "--stage 2 --rho 0.4 --mask score-k", "single"),
    "argmax": Variant("multi stream, rho 0.4, highest masked", "--stage 2 --rho 0.4 --mask argmax", "single"),
    "uniform": Variant("multi stream, rho 0.4, any masked", "--stage 2 --rho 0.4 --mask uniform", "single"),
    # other recipes of stage 2 (docs/log.md)
    "attention-lr-20": Variant("multi stream, rho 0.4, attention at 20 times the learning rate",
                               "--stage 2 --rho 0.4 --attention-lr 20", "single"),
    "main-lr-0.3": Variant("multi stream, rho 0.4, main UNet at 0.3 of the learning rate",
                           "--stage 2 --rho 0.4 --main-lr 0.3", "single"),
    "freeze-main": Variant("multi stream, rho 0.4, main UNet frozen for a fifth of the steps",
                           "--stage 2 --rho 0.4 --freeze-main {fifth}", "single"),
    "query-unit": Variant("multi stream, rho 0.4, queries that start with unit gain",
                          "--stage 2 --rho 0.4 --query-init unit", "single"),
    "clip-apart": Variant("multi stream, rho 0.4, attention clipped apart",
                          "--stage 2 --rho 0.4 --clip-apart", "single"),
    "rho-after": Variant("multi stream, rho 0.4 after a fifth of the steps", "--stage 2 --rho 0.4 --rho-after {fifth}",
                         "single"),
    "batch-4": Variant("multi stream, rho 0.4, twice the steps of 4 images", "--stage 2 --rho 0.4 --batch 4", "single",
                       length="longer"),
    "continued-batch-4": Variant("single stream, continued for twice the steps of 4 images",
                                 "--stage 1 --init {parent} --batch 4", "single", length="longer"),
    "longer": Variant("multi stream, rho 0.4, twice the steps", "--stage 2 --rho 0.4", "single", length="longer"),
    "longer-off": Variant("multi stream, rho 0.4, twice the steps, evaluated without its streams", "--streams off",
                          "longer", "evaluate.py"),
    "continued-longer": Variant("single stream, continued for twice the steps", "--stage 1 --init {parent}", "single",
                                length="longer"),
    "longest": Variant("multi stream, rho 0.4, as many steps as stage 1", "--stage 2 --rho 0.4", "single",
                       length="whole"),
    "longest-off": Variant("multi stream, rho 0.4, as many steps as stage 1, evaluated without its streams",
                           "--streams off", "longest", "evaluate.py"),
    "continued-longest": Variant("single stream, continued for as many steps as stage 1", "--stage 1 --init {parent}",
                                 "single", length="whole"),
    # for a comparison in equal time: a step without isolation takes 1.8 times as long
    "no-isolation-half": Variant("single stream w/o task-gradient isolation, half the steps",
                                 "--stage 1 --no-isolation", length="half"),
    # what saves memory (docs/cost.md)
    "adam-bf16": Variant("multi stream, rho 0.4, Adam's moments in bfloat16",
                         "--stage 2 --rho 0.4 --optimizer adam-bf16", "single"),
    "frozen-bf16": Variant("multi stream, rho 0.4, frozen weights in bfloat16", "--stage 2 --rho 0.4 --frozen bf16",
                           "single"),
    "lora": Variant("multi stream, rho 0.4, rank 16 in the main UNet", "--stage 2 --rho 0.4 --lora 16", "single"),
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
EXTRA = tuple(VARIANTS)[list(VARIANTS).index("attention-lr-1"):]

# the single stream and what went on from it, whose control is as many further steps of that
FURTHER = tuple(name for name, v in VARIANTS.items() if "single" in (name, v.parent, VARIANTS.get(v.parent, v).parent))
CONTROL = 1     # the zero line of these

CLAIMS = [
    Claim("the multi stream beats the single-task models", "multi", "single-task", 4.78),
    Claim("the multi stream beats the single stream", "multi", "single", 4.78 + 1.57),
    Claim("the multi stream beats the single stream trained for as many steps", "multi", "continued", zero=CONTROL),
    Claim("the single stream stays behind the single-task models", "single-task", "single", 1.57),
    Claim("task-gradient isolation helps", "single", "no-isolation", -1.57 + 4.11),
    Claim("task-gradient isolation helps, without it half the steps", "single", "no-isolation-half"),
    Claim("attention-guided masking helps", "multi", "rho-0", 4.14 - 3.41),
    Claim("separate projections help", "rho-0", "shared-qkv", 3.41 - 0.85),
    Claim("single-stream initialisation helps", "rho-0", "base-init", 3.41 + 3.11),
    Claim("what the multi stream has learned needs its streams", "multi", "streams-off", zero=CONTROL),
    Claim("the multi stream beats the single stream trained for as many steps also where tasks of one frame see no "
          "second one", "one-frame", "continued", zero=CONTROL),
    Claim("streams that hold the truth beat the single stream trained for as many steps", "oracle", "continued",
          zero=CONTROL),
    Claim("streams that hold the truth beat those of stage 1", "oracle", "multi", zero=CONTROL),
    Claim("streams that hold stage 1's predictions beat the single stream trained for as many steps", "told",
          "continued", zero=CONTROL),
    Claim("streams that hold stage 1's predictions beat those of stage 1", "told", "multi", zero=CONTROL),
    Claim("a learning rate of its own helps the task attention", "multi", "attention-lr-1", zero=CONTROL),
    Claim("masking one task by its score beats masking several", "multi", "score-k", zero=CONTROL),
    Claim("masking by score beats masking the highest", "multi", "argmax", zero=CONTROL),
    Claim("masking by score beats masking any", "multi", "uniform", zero=CONTROL),
    Claim("20 times the learning rate for the task attention beats 10 times", "attention-lr-20", "multi", zero=CONTROL),
    Claim("a slower main UNet helps", "main-lr-0.3", "multi", zero=CONTROL),
    Claim("a main UNet that is frozen at first helps", "freeze-main", "multi", zero=CONTROL),
    Claim("queries that start with unit gain help", "query-unit", "multi", zero=CONTROL),
    Claim("clipping the task attention apart helps", "clip-apart", "multi", zero=CONTROL),
    Claim("masking that starts later helps", "rho-after", "multi", zero=CONTROL),
    Claim("twice the steps of half the images help", "batch-4", "multi", zero=CONTROL),
    Claim("the multi stream beats the single stream trained for as many steps, of 4 images", "batch-4",
          "continued-batch-4", zero=CONTROL),
    Claim("the multi stream beats the single stream trained for as many steps, twice of them", "longer",
          "continued-longer", zero=CONTROL),
    Claim("what the multi stream has learned in twice the steps needs its streams", "longer", "longer-off",
          zero=CONTROL),
    Claim("in twice the steps the streams gain more", "longer + continued", "continued-longer + multi", zero=CONTROL),
    Claim("the multi stream beats the single stream trained for as many steps, as many as stage 1", "longest",
          "continued-longest", zero=CONTROL),
    Claim("what the multi stream has learned in as many steps as stage 1 needs its streams", "longest", "longest-off",
          zero=CONTROL),
    Claim("in as many steps as stage 1 the streams gain more", "longest + continued", "continued-longest + multi",
          zero=CONTROL),
    Claim("Adam's moments in float32 beat those in bfloat16", "multi", "adam-bf16", zero=CONTROL),
    Claim("frozen weights in float32 beat those in bfloat16", "multi", "frozen-bf16", zero=CONTROL),
    Claim("training all of the main UNet beats a rank of 16", "multi", "lora", zero=CONTROL),
    # in the paper, whose Table 3 has the multi stream: 28.44, 4.13, 7.24 and 27.60
    Claim("labels of motion in streets help", "single", "no-street-motion"),
    Claim("labels of motion in things help", "single", "no-thing-motion"),
    Claim("labels of geometry in streets help", "single", "no-street-geometry"),
    Claim("labels of geometry in rooms help", "single", "no-room-geometry"),
]

STABLEMTL = Suite("stablemtl", VARIANTS, EXTRA, CLAIMS, (
    Zero("single-task", "delta_m", "Delta_m % ↑, single-task models: 0", "delta_m.png"),
    Zero("continued", "delta_m of further steps", "Delta_m % ↑, single stream continued: 0", "delta_m_further.png",
         FURTHER)), "study.md")


# ---- the models that takes ----

WORLDS = {"unseen": tuple(w for w in TOY_TEST if w not in TOY_TRAIN), "in-domain": TOY_TRAIN}


class Run(NamedTuple):
    """One model to train and to evaluate, or to evaluate in another way, or labels to discover."""
    seed: int
    variant: str
    row: Variant
    task: str            # of a single-task model, else empty
    tasks: tuple         # all that it is about
    steps: int           # 0: it trains nothing
    out: Path
    parent: Path | None

    @property
    def finished(self):
        return (self.out / "results.json").is_file()

    @property
    def program(self):
        return self.row.program

    @property
    def flags(self):
        """Of its program, as a list."""
        return self.row.filled(task=self.task, parent=self.parent, out=self.out, fifth=self.steps // 5)

    def batch(self, args):
        """Images per step: the row's own --batch, or the study's."""
        return int(dict(zip(self.flags, self.flags[1:], strict=False)).get("--batch", args.settings["batch"]))

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


def lengths(args):
    """{what a variant's length may be: steps}: of a single stream, of half of one, of two, of what goes on from one, of
    twice that, of a single-task model, of what trains nothing."""
    return {"whole": args.steps, "half": max(1, args.steps // 2), "twice": 2 * args.steps, "further": args.steps2,
            "longer": 2 * args.steps2, "share": args.single_steps, "none": 0}


def usual_length(variant):
    if variant.program in ("evaluate.py", "tools.discover"):
        return "none"
    if "{task}" in variant.flags:
        return "share"
    return "further" if variant.parent else "whole"


def tasks_of(variant, args):
    """The tasks that a variant's models predict together."""
    return parse_tasks(variant.tasks) if variant.tasks else args.tasks


def runs(args):
    """Every model of a study (tools.study.parse), parents before children."""
    for seed in range(args.seeds):
        place = Path(args.out) / f"seed{seed}"
        for name in args.only:
            row = args.suite.variants[name]
            parent, steps = place / row.parent if row.parent else None, lengths(args)[row.length or usual_length(row)]
            if "{task}" in row.flags:
                for task in tasks_of(row, args):
                    yield Run(seed, name, row, task, (task,), steps, place / f"{name}-{task}", parent)
            else:
                yield Run(seed, name, row, "", tasks_of(row, args), steps, place / name, parent)
