"""What a study has found: tables, verdicts on the paper's claims, pictures, from the models that are finished."""
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from PIL import Image

from checkpoint import read_json, read_lines, write_json
from cli import markdown, parse_device, parse_size
from data import tensor_image, test_readers
from draw import attention_table, draw_attention, draw_curves, draw_intervals, draw_scatter
from evaluate import METRIC_VALUES, by_task, known
from metrics import METRICS, delta_m
from model import StableMTL
from tasks import TASKS, parse_tasks
from tools import study_cost
from tools.bench import hardware
from tools.study_cost import step as operations
from tools.study_variants import WORLDS, runs, tasks_of
from training.about import commit

LOWER = {t: METRICS[TASKS[t].metric].lower for t in TASKS}
PAPER = {"unseen": "paper Tables 2 and 4", "in-domain": "paper Table 10"}
KINDS = {"unseen": "The unseen world", "in-domain": "Held-out scenes of the training worlds"}
ATTENDED = {"attention_entropy": "entropy", "attention_largest": "largest weight", "attention_term": "size"}
MADE = {"commit": (None, str), "versions": (None, {"torch": str})}      # of config.json; again of each resumption
# Student's t for 95% confidence, two-sided, of 2, 3, ... seeds; more than ten count as ten
T95 = 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622


# ---- from files to numbers ----

def results(folder):
    """{task: {world: headline}} of a finished model. ValueError if its results.json is damaged."""
    remedy = f"delete {folder}, and the same command trains this model again"
    return by_task(read_json(folder / "results.json", "", {"results": METRIC_VALUES}, remedy)["results"])


def log(folder):
    """The entries of a model's log.jsonl, one per step; where fp16 skipped it, "loss" and "grad_norm" are None."""
    number = (None, float)
    return read_lines(folder / "log.jsonl", {"task": [str], "loss": number, "grad_norm": number, "img_per_s": float})


def attended(entries):
    """What the attention over tasks does in the last twentieth of its steps, {key of ATTENDED: mean}; or {}."""
    seen = [e for e in entries if e.get("attention_entropy") is not None]
    end = seen[-max(1, len(seen) // 20):]
    return {key: fmean(e[key] for e in end) for key in ATTENDED if end}


def collect(args):
    """{variant: {seed: {"results": {task: {world: headline}}, "steps", "minutes" of training, "attention"}}} of what is
    complete."""
    out = {}
    for job in runs(args):
        if job.finished:
            row = out.setdefault(job.variant, {}).setdefault(
                job.seed, {"results": {}, "steps": 0, "minutes": 0.0, "attention": {}})
            row["results"] |= (found := results(job.out))
            if undefined := [t for t in job.tasks if t not in found]:
                print(f"notice: {job.name} is left out: {', '.join(undefined)} is undefined there", file=sys.stderr)
            row["steps"] += job.steps
            if job.steps:
                entries = log(job.out)
                row["minutes"] += job.steps * job.batch(args) / entries[-1]["img_per_s"] / 60
                row["attention"] |= attended(entries)
    for name, seeds in out.items():
        tasks = set(tasks_of(args.suite.variants[name], args))
        out[name] = {s: row for s, row in seeds.items() if row["results"].keys() == tasks}
    return {name: seeds for name, seeds in out.items() if seeds}


def versions(args):
    """{"commits", "torch": [those that the finished models were trained under, as far as their config.json tells],
    "scorings": [report.scoring of their results]}; a study goes on whatever code it finds."""
    paths = [job.out / "config.json" for job in runs(args) if job.finished]
    told = [read_json(path, "", MADE | {"resumed": (None, [MADE])}) for path in paths if path.is_file()]
    parts = [part for about in told for part in (about, *(about.get("resumed") or ()))]
    found = {"commits": {part.get("commit") for part in parts},
             "torch": {(part.get("versions") or {}).get("torch") for part in parts}}
    results = [read_json(job.out / "results.json", "", {"scoring": (None, str)}) for job in runs(args) if job.finished]
    found["scorings"] = {report.get("scoring") for report in results}
    return {what: sorted(names - {None}) for what, names in found.items()}


def gain(mine, baseline, worlds):
    """Delta_m in percent of {task: {world: headline}}, on some of the worlds, over the tasks of `mine`; None, with a
    notice, where a metric of the baseline is zero or one is undefined."""
    tables = [{t: {w: x for w, x in table[t].items() if w in worlds} for t in mine} for table in (mine, baseline)]
    try:
        return delta_m(*tables, LOWER)
    except ValueError as error:
        print(f"notice: a Delta_m is left out: {error}", file=sys.stderr)
        return None


def half_width(deviation, seeds):
    """Of the 95% confidence interval of a mean over so many seeds, of that standard deviation."""
    return T95[min(seeds, 10) - 2] * deviation / seeds ** 0.5


def interval(differences):
    """(low, high): the 95% confidence interval of the mean of paired differences, one per seed, of two or more. (Two
    standard errors would be wrong for 3 seeds in 18% of cases without any effect.)"""
    mean, half = fmean(differences), half_width(stdev(differences), len(differences))
    return mean - half, mean + half


def verdict(differences):
    """Of paired differences, one per seed: "reproduced" if their 95% interval lies above 0, "not reproduced" if it lies
    below, else "undecided", as with a single seed."""
    if len(differences) < 2:
        return "undecided"
    low, high = interval(differences)
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"


def seeds_needed(differences):
    """An estimate of how many seeds it takes to decide: the fewest whose 95% interval would exclude 0 if the mean and
    the spread of these differences stayed. None: more than 1000, or a single seed, which tells no spread."""
    if len(differences) < 2:
        return None
    mean, deviation = abs(fmean(differences)), stdev(differences)
    return next((n for n in range(2, 1001) if mean > half_width(deviation, n)), None)


def advances(rows, zero, tasks, variant, where):
    """{seed: Delta_m of a variant against a zero line}, over its tasks or over some of them."""
    seeds = rows[variant]["seeds"]
    if not tasks:
        return known({seed: row[zero.key].get(where) for seed, row in seeds.items()})
    zeros = rows.get(zero.variant, {"seeds": {}})["seeds"]
    return known({seed: gain({t: row["results"][t] for t in tasks}, zeros[seed]["results"], WORLDS[where])
                  for seed, row in seeds.items() if seed in zeros})


def judge(rows, suite, tasks):
    """The suite's claims with their differences and verdicts, of {variant: {"seeds": {seed: row}}}, as far as there are
    any; claims about tasks that were left out are left out."""
    claims = []
    for c in suite.claims:
        (better, worse), over = c.sides(), parse_tasks(c.tasks) if c.tasks else ()
        if not {*better, *worse} <= rows.keys() or not set(over) <= set(tasks):
            continue
        for where in WORLDS:
            a, b = ([advances(rows, suite.zeros[c.zero], over, name, where) for name in names]
                    for names in (better, worse))
            seeds = [s for s in a[0] if all(s in side for side in a + b)]
            if differences := [sum(x[s] for x in a) - sum(x[s] for x in b) for s in seeds]:
                claims.append({"claim": c.claim, "where": where, "better": c.better, "worse": c.worse,
                               "differences": differences, "verdict": verdict(differences),
                               "seeds needed": seeds_needed(differences),
                               "paper": c.paper if where == "unseen" else None})
    return claims


def summary(args):
    """All numbers of the study so far, as written to results.json."""
    seen, rows, counted, cost, suite = collect(args), {}, {}, {}, args.suite
    for name, seeds in seen.items():
        variant, step, total = suite.variants[name], None, None     # of what is no plain training
        if variant.program == "train.py":
            job = next(job for job in runs(args) if job.variant == name and job.finished)
            kind = study_cost.alike(job.out), job.batch(args)
            step = counted[kind] = counted.get(kind) or operations(job.out, job.batch(args))
            cost[name] = step * next(iter(seeds.values()))["steps"]
            total = sum(cost.get(n, 0) for n in (name, *suite.ancestors(name)))
        for seed, row in seeds.items():
            for zero in suite.against(name):
                baseline = seen.get(zero.variant, {}).get(seed)
                row[zero.key] = {}
                if baseline:
                    row[zero.key] = known({where: gain(row["results"], baseline["results"], worlds)
                                           for where, worlds in WORLDS.items()})
        about = dict(zip(("title", "flags", "parent", "program"), variant, strict=False))
        rows[name] = {**about, "operations per step": step, "operations": total, "seeds": seeds}
    about = {k: getattr(args, k) for k in ("tasks", "steps", "steps2", "single_steps", "limit", "settings")}
    device = hardware(parse_device(args.settings["device"]))
    return {**about, "hardware": device, "torch": torch.__version__, "commit": commit(),
            "trained under": versions(args), "variants": rows, "claims": judge(rows, suite, args.tasks)}


# ---- tables ----

def spread(values, form=".4g"):
    """Mean and, of several, standard deviation, as text; a mean that rounds to zero has no sign."""
    values = list(values)
    if not values:
        return ""
    mean = f"{fmean(values):{form}}"
    if float(mean) == 0:
        mean = mean.lstrip("+-")
    return mean + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def made(result):
    """Where this page was made and, where that is more than one, under what the models were trained, in a sentence."""
    under = result["trained under"]
    several = [f"{what} {', '.join(name[:10] for name in under[what])}" for what in ("commits", "torch")
               if len(under[what]) > 1]
    mixed = f" Models were trained under {' and '.join(several)}: rows may differ by that." if several else ""
    if len(under["scorings"]) > 1:
        mixed += " Metrics, tasks or readers were changed between evaluations: rows may differ by that, too."
    return f"{result['hardware']}, torch {', '.join(under['torch']) or result['torch']}.{mixed}"


def world_table(result, suite, where):
    """A row per variant: Delta_m and every headline on one kind of worlds."""
    rows, headlines, worlds = [], {}, WORLDS[where]
    for t in result["tasks"]:
        for w in worlds:
            headlines[f"{w} {t} {METRICS[TASKS[t].metric].titled}"] = t, w
    for name, v in result["variants"].items():
        seeds, own = v["seeds"].values(), suite.against(name)
        row = {"variant": v["title"], "seeds": str(len(seeds))}
        for zero in suite.zeros:
            gains = [s[zero.key][where] for s in seeds if zero in own and where in s[zero.key]]
            fewer = f", {len(gains)} of the seeds" if 0 < len(gains) < len(seeds) else ""
            row[zero.column] = spread(gains, "+.2f") + fewer
        for column, (t, w) in headlines.items():
            row[column] = spread(s["results"][t][w] for s in seeds if w in s["results"].get(t, ()))
        rows.append(row)
    return markdown(rows, ["variant", *(zero.column for zero in suite.zeros), *headlines, "seeds"])


def cost_table(result):
    """A row per variant that train.py trains: flags, operations, minutes."""
    base = result["variants"].get("single", {}).get("operations")
    rows = [{"variant": v["title"], "flags of train.py": f"`{v['flags']}`",
             "G per step": f"{v['operations per step'] / 1e9:.3g}",
             "in all": f"{v['operations'] / base:.2f}x" if base else "",
             "minutes of training": spread((s["minutes"] for s in v["seeds"].values()), ".3g")}
            for v in result["variants"].values() if v["operations"]]
    return markdown(rows, ("variant", "flags of train.py", "G per step", "in all", "minutes of training"))


def attended_table(result):
    """A row per variant with an attention over tasks: what that does at the end of its training."""
    rows = []
    for v in result["variants"].values():
        seeds = [s["attention"] for s in v["seeds"].values() if s["attention"]]
        if seeds:
            rows.append({"variant": v["title"],
                         **{column: spread((s[key] for s in seeds), ".3f") for key, column in ATTENDED.items()}})
    return markdown(rows, ["variant", *ATTENDED.values()]) if rows else ["no model with one is finished yet"]


def claim_table(result):
    """A row per claim and kind of test scenes."""
    def told(c):
        if c["verdict"] != "undecided" or len(c["differences"]) < 2:
            return c["verdict"]
        return f"undecided, would take {'about ' + str(n) if (n := c['seeds needed']) else 'over 1000'} seeds"

    def between(differences):
        return "{:.3g} to {:.3g}".format(*interval(differences)) if len(differences) > 1 else ""

    rows = [{"claim": c["claim"], "on": c["where"], "difference": spread(c["differences"], "+.2f"),
             "95% interval": between(c["differences"]),
             "in the paper": f"{c['paper']:+.2f}" if isinstance(c["paper"], float) else c["paper"] or "",
             "verdict": told(c)}
            for c in result["claims"]]
    if not rows:
        return ["none can be judged yet"]
    return markdown(rows, ("claim", "on", "difference", "95% interval", "in the paper", "verdict"))


ATTENTION = """\
Means over the last twentieth of training, over layers, pixels and heads: its entropy, 1 = even over the other tasks;
its largest weight, {even:.2f} if even; and the size of what it adds, relative to what that is added to. Even weights
still pass every stream on: whether streams have a say is told by the row that is evaluated without them."""


def tables(result, suite):
    """study.md as lines."""
    settings = result["settings"]
    lines = [f"{len(result['tasks'])} tasks, {settings['batch']} images of {settings['size']} per step. "
             f"Steps: {result['steps']} of a single stream, {result['steps2']} more of a multi stream or a continued "
             f"single stream, {result['single_steps']} of each single-task model. {result['limit']} test scenes per "
             f"world. Mean ± standard deviation over seeds. {made(result)}"]
    for where in WORLDS:
        lines += ["", f"## {KINDS[where]} ({PAPER[where]})", "", *world_table(result, suite, where)]
    lines += ["", "## Cost", "", "Operations are counted, from cached latents, 1 multiply-add = 2. In all: relative to "
              "the single stream, with the single stream that a variant starts from; the single-task models together.",
              "", *cost_table(result)]
    even = 1 / max(1, len(result["tasks"]) - 1)
    lines += ["", "## What the attention over tasks does", "", ATTENTION.format(even=even), "", *attended_table(result)]
    lines += ["", "## The paper's claims", "", "Differences of Delta_m, paired by seed. Reproduced: the 95% confidence "
              "interval of their mean (Student's t) lies above 0; not reproduced: below 0; else undecided, with an "
              "estimate of how many seeds it would take if mean and spread stayed as they are.", ""]
    return lines + claim_table(result)


# ---- pictures: each a matplotlib figure, or None ----

def smooth(values):
    """[(step, running mean over a twentieth of all steps)]"""
    n = max(1, len(values) // 20)
    return [(i, fmean(values[i - n:i])) for i in range(n, len(values) + 1)]


def draw_losses(args):
    """Training loss, a curve per seed: for each task single-task model against single stream, over the steps of that
    task; for all tasks together with and without isolation (a mixed step has no loss of one task)."""
    logs = {}
    for job in runs(args):
        if job.finished and job.variant in ("single-task", "single", "no-isolation"):
            logs.setdefault((job.variant, job.task), []).append(log(job.out))
    if not logs:
        return None

    def curves(variant, task="", of=None):
        several = logs.get((variant, task), ())
        known = ([e for e in entries if e.get("loss") is not None] for entries in several)
        losses = [[e["loss"] for e in entries if of is None or e["task"] == [of]] for entries in known]
        return [smooth(values) for values in losses if values]

    panels = []
    for t in args.tasks:
        panels.append((t, "steps of this task", "training loss",
                       {"single-task model": curves("single-task", t), "single stream": curves("single", of=t)}))
    panels.append(("all tasks", "steps", "training loss",
                   {"single stream w/o isolation": curves("no-isolation"), "single stream": curves("single")}))
    return draw_curves(panels)


def draw_gains(result, zero, suite):
    """Delta_m against a zero line of the rows that have one, on both kinds of test scenes."""
    rows = [v for name, v in result["variants"].items() if zero in suite.against(name)]
    if not any(s[zero.key] for v in rows for s in v["seeds"].values()):
        return None
    panels = {where: [[s[zero.key][world] for s in v["seeds"].values() if s[zero.key]] for v in rows]
              for world, where in KINDS.items()}
    return draw_intervals([v["title"] for v in rows], panels, zero.column.replace(" ↑", ""))


def draw_isolation(args, result):
    """The paper's Fig. 5b: a task's mean gradient norm in the single stream against what it gains from isolation."""
    with_, without = (result["variants"].get(name, {"seeds": {}})["seeds"] for name in ("single", "no-isolation"))
    both = [s for s in with_ if s in without]
    if not both:
        return None
    norms = {t: [] for t in args.tasks}
    for job in runs(args):
        for e in log(job.out) if job.finished and job.variant == "single" else ():
            if e.get("grad_norm") is not None:
                norms[e["task"][0]].append(e["grad_norm"])
    points = {}
    for t in (t for t in args.tasks if norms[t]):
        gains = known({s: gain({t: with_[s]["results"][t]}, {t: without[s]["results"][t]}, WORLDS["unseen"])
                       for s in both})
        if gains:
            points[t] = fmean(norms[t]), fmean(gains.values())
    return draw_scatter("what task-gradient isolation gives, unseen world", points, "mean gradient norm of the task",
                        "gain from isolation, %")


def draw_attended(args):
    """{variant: figure} of the multi streams, the paper's Fig. 9: which stream each task attends to, per block, mean
    over 16 scenes of the unseen world and over seeds."""
    *_, world = test_readers(size=parse_size(args.settings["size"]))
    samples, weights = [world.load(i, (), with_next=True) for i in range(min(16, args.limit))], {}
    frames = [torch.stack([tensor_image(s[key]) for s in samples]) for key in ("image", "next")]
    for job in runs(args):
        if job.finished and "--stage 2" in job.row.flags:      # not of streams that hold the truth
            model = StableMTL.load(job.out)
            model.attention_log = []
            model.predict(*frames)
            rows = weights.setdefault(job.variant, {})
            for block, main, row in model.attention_log:
                rows.setdefault((block, main), []).append(row)
    figures = {}
    for name, seeds in weights.items():
        mean = [(*key, {t: fmean(row[t] for row in rows) for t in rows[0]}) for key, rows in seeds.items()]
        figures[name] = draw_attention(attention_table(mean, args.tasks))
    return figures


def report(args):
    """Write results.json, study.md and the pictures of what is finished, and return study.md's lines."""
    result = summary(args)
    pictures = {"losses.png": draw_losses(args), "isolation.png": draw_isolation(args, result)}
    pictures |= {zero.picture: draw_gains(result, zero, args.suite) for zero in args.suite.zeros}
    pictures |= {f"attention_{name}.png": figure for name, figure in draw_attended(args).items()}
    return publish(args, result, tables(result, args.suite), pictures)


def publish(args, result, lines, pictures):
    """Write results.json, the pictures there are, {name: matplotlib figure, Pillow image or None}, and a page of these
    lines. -> the lines"""
    out = Path(args.out)
    shown = [name for name, figure in pictures.items() if figure]
    for name in shown:
        drawn = pictures[name]
        (drawn.save if isinstance(drawn, Image.Image) else drawn.savefig)(out / name)
    write_json(out / "results.json", result)
    (out / args.suite.page).write_text("\n".join([*lines, "", *(f"![{name}]({name})\n" for name in shown)]))
    return lines
