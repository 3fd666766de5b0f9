"""What the suite "systems" of tools.study has found: tables, verdicts and pictures across systems whose losses, labels
and costs differ. Numbers and verdicts are those of tools/study_report.py."""
import torch
from PIL import Image

import baselines
from cli import markdown, parse_size
from data import picture, prepare, tasks_with_labels, test_readers
from draw import COMPARED, cell, compare, draw_curves, draw_panel
from metrics import aligned
from tasks import TASKS
from tools import study_cost
from tools.study_report import KINDS, claim_table, draw_gains, log, made, publish, smooth, spread, summary, world_table
from tools.study_systems import CURVES, DDIM_STEPS
from tools.study_variants import WORLDS, runs

# ---- from files to numbers ----

def first_of(args, variant):
    """The models of a variant of the first seed of which all are finished."""
    seeds = {}
    for job in runs(args):
        if job.variant == variant:
            seeds.setdefault(job.seed, []).append(job)
    return next((jobs for jobs in seeds.values() if all(job.finished for job in jobs)), [])


def add_costs(args, result):
    """Add to every row what its models of one seed have seen and cost, together: "images", "labels", "weights",
    "prediction" (operations of all maps of a pair of images)."""
    for name, row in result["variants"].items():
        row |= dict.fromkeys(("images", "labels", "weights", "prediction"), 0)
        for job in first_of(args, name):
            images = job.steps * job.batch(args)
            row["images"] += images
            row["labels"] += round(images * study_cost.labels_per_image(job.out))
            for key, value in study_cost.prediction(job.out).items():
                row[key] += value
    return result


def losses(job):
    """{task: [(step, running mean over a twentieth of its values, the first such mean being 1)]} of a training."""
    found, entries = {t: [] for t in job.tasks}, log(job.out)
    for e in entries:
        for t in found:     # a step of several tasks says the loss of each
            value = e.get(f"loss/{t}", e.get("loss") if e["task"] == [t] else None)
            if value is not None:
                found[t].append((e["step"], value))
    out = {}
    for t, pairs in found.items():
        means = smooth([value for _, value in pairs])
        if means and means[0][1] > 0:
            out[t] = [(pairs[i - 1][0], mean / means[0][1]) for i, mean in means]
    return out


def curves(args):
    """{variant of CURVES: [`losses`, one per seed]}"""
    out = {}
    for job in runs(args):
        if job.finished and job.variant in CURVES:
            out.setdefault(job.variant, []).append(losses(job))
    return out


# ---- tables ----

def cost_table(result, suite):
    """A row per variant: what it has seen, with what it starts from behind a plus, and what it costs."""
    def seen(name, key):
        before = sum(result["variants"][n][key] for n in suite.ancestors(name) if n in result["variants"])
        return f"{result['variants'][name][key]:,}" + (f" + {before:,}" if before else "")

    rows = [{"variant": v["title"], "images": seen(name, "images"), "labels": seen(name, "labels"),
             "M weights": f"{v['weights'] / 1e6:.2f}", "G per step": f"{v['operations per step'] / 1e9:.3g}",
             "G per pair": f"{v['prediction'] / 1e9:.3g}", "T in all": f"{v['operations'] / 1e12:.3g}",
             "minutes": spread((s["minutes"] for s in v["seeds"].values()), ".3g")}
            for name, v in result["variants"].items()]
    columns = "variant", "images", "labels", "M weights", "G per step", "G per pair", "T in all", "minutes"
    return markdown(rows, columns) if rows else ["no row is complete yet"]


def plateau_table(args, found):
    """Of each system and task: the loss at the end relative to that at the beginning. found: `curves`."""
    rows = []
    for name, seeds in found.items():
        row = {"variant": args.suite.variants[name].title}
        for t in args.tasks:
            row[t] = spread((found[t][-1][1] for found in seeds if t in found), ".2f")
        rows.append(row)
    return markdown(rows, ["variant", *args.tasks]) if rows else ["no row is complete yet"]


ABOUT = """\
All systems but StableMTL are our adaptations at toy scale. UNets start from a base that has seen images before, unless
they say "from scratch", and trunks from random weights: part of any difference is that.

There are two zero lines. Against the single-task UNets all rows can be compared; against the STL trunk only what is
built on the trunk. A row of 3 tasks has a Delta_m over these and the same number of images: more steps of each task for
a UNet, whose steps have one task; hardly more labels for a trunk, whose steps take all that an image has."""

COST = """\
Images and labels, with those of what a row starts from (a teacher, a single stream) behind a plus. A step of a UNet
takes one label per image, a discovered one counting as one; a step of a trunk takes all that the data has, discovered
ones not counted. Weights include a VAE and what only training needs; the single-task UNets are taken together.
Operations are counted, 1 multiply-add = 2: of a step, from cached latents, of a trunk's at most (every label), a
teacher's answers included; of all maps of one pair of images; and of all training, with what a row starts from, but
without labelling by tools.discover, and without the VAE's encoder, which sees images of discovered labels anew."""

PLATEAU = """\
Mean loss of the last twentieth of a run, as a share of that of the first: a task that stays at 1 was not learned, and
no method should be judged on it."""

CLAIMED = """\
Differences of Delta_m, paired by seed; of claims about some tasks over these. Claims about trunks alone are against the
STL trunk, all others against the single-task UNets; one may be about the difference of two differences. Reproduced: the
95% confidence interval of their mean (Student's t) lies above 0; not reproduced: below 0; else undecided, with an
estimate of how many seeds it would take if mean and spread stayed as they are. Students of a trunk see images in other
light; of the rows that they are compared with, those of twice the steps do so, too. The papers' numbers are of other
data, and where they are no Delta_m they are given as they are."""


def tables(args, result, found):
    """systems.md as lines; found: `curves`."""
    settings, suite = result["settings"], args.suite
    lines = [f"{len(result['tasks'])} tasks, {settings['batch']} images of {settings['size']} per step. "
             f"{result['steps']} steps of every row that starts from nothing and of every student, {result['steps2']} "
             f"more of StableMTL, {result['single_steps']} of each single-task UNet. {result['limit']} test scenes per "
             f"world; rows that diffuse predict in {DDIM_STEPS} steps of DDIM. Mean ± standard deviation over seeds. "
             + made(result), "", ABOUT]
    for where in WORLDS:
        lines += ["", f"## {KINDS[where]}", "", *world_table(result, suite, where)]
    lines += ["", "## What each has seen, and costs", "", COST, "", *cost_table(result, suite)]
    lines += ["", "## Have the losses left their plateau?", "", PLATEAU, "", *plateau_table(args, found)]
    return [*lines, "", "## Claims", "", CLAIMED, "", *claim_table(result)]


# ---- pictures ----

def draw_losses(args, found):
    """Training losses of one system each, relative to their beginning, a panel per task. found: `curves`."""
    if not found:
        return None
    panels = []
    for t in args.tasks:
        shown = {args.suite.variants[name].title: [seed[t] for seed in seeds if t in seed]
                 for name, seeds in found.items()}
        panels.append((t, "step", "loss, 1 at the beginning", shown))
    return draw_curves(panels)


@torch.no_grad()
def draw_scene(args, result):
    """The first scene of the unseen world through every system: a row each, below the image and its labels; a Pillow
    image."""
    *_, world = test_readers(size=parse_size(args.settings["size"]))
    tasks = tasks_with_labels(world, args.tasks)
    item, blank = prepare(world, 0, tasks, TASKS), Image.new("RGB", (1, 1), "white")
    labels = {t: TASKS[t].decode(item["labels"][t][None])[0] for t in tasks}
    cells = [(f"{world.name}, first scene", cell(picture(item["frames"][0])))]
    for t in tasks:
        cells.append(compare(TASKS[t], labels[t], item["valid"][t][0], labels[t], native=False)[0])
    for name, row in result["variants"].items():
        maps = {}
        for job in first_of(args, name):
            maps |= baselines.load(job.out).predict(*(f[None] for f in item["frames"]))
        cells.append((row["title"], blank))
        for t in tasks:
            if t not in maps:
                cells.append(None)
                continue
            valid = item["valid"][t][0]
            fitted = aligned(TASKS[t], maps[t][0].float(), labels[t], valid)
            cells.append(compare(TASKS[t], labels[t], valid, fitted, native=False)[1])
    return draw_panel(cells, 1 + len(tasks), [TASKS[t] for t in tasks], COMPARED)


def report(args):
    """Write results.json, systems.md and the pictures of what is finished, and return systems.md's lines."""
    result, found = add_costs(args, summary(args)), curves(args)
    pictures = {zero.picture: draw_gains(result, zero, args.suite) for zero in args.suite.zeros}
    pictures |= {"losses.png": draw_losses(args, found), "scene.png": draw_scene(args, result)}
    return publish(args, result, tables(args, result, found), pictures)
