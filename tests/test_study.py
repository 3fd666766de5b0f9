"""The study: a row per variant, numbers that follow from the runs' own, continuing, models side by side, mistakes."""
import json
import multiprocessing
import random
import re
import shutil
import signal
from pathlib import Path
from statistics import mean, stdev

import pytest
import tiny
from PIL import Image

import evaluate
import train
from checkpoint import write_json
from cli import run
from readers.toyworld import ALL
from tasks import TASKS
from tools import oracle, study, study_report
from tools.study_report import LOWER, draw_gains, draw_isolation, draw_losses, verdict
from tools.study_variants import CLAIMS, EXTRA, STABLEMTL, VARIANTS, WORLDS

FLAGS = "--scenes 2 --size 16x24 --batch 2 --micro 2 --picture-every 0 --workers 0 --warmup 2 --threads 1 --processes 1"


def recorded(calls, main):
    """main, with its command lines appended to calls."""
    return lambda argv: calls.append(argv) or main(argv)


def named(argv, out):
    """The model that a command line of train.py is about, as <seed>/<folder>."""
    return argv[argv.index("--out") + 1].removeprefix(f"{out}/")


def read(path):
    return json.loads(path.read_text())


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the real thing, as small as it gets ----

def tiny_study(base, out, only, more=""):
    """Command line of a study of two tasks, as small as it gets."""
    return (f"--out {out} --tasks shading,albedo --seeds 1 --steps 4 --steps2 2 --limit 1 --only {only} {more} "
            f"-- --base {base} {FLAGS}").split()


def stopped_and_continued(argv, out, model, at):
    """Run a study, stop it by Ctrl-C at a step of the model whose folder ends so, and continue it. -> (train.py's
    command lines of the two calls, when what was finished at the stop had been written)"""
    rate, calls = train.learning_rate, ([], [])

    def interrupt(cfg, step):
        if cfg.out.endswith(model) and step == at:
            signal.raise_signal(signal.SIGINT)
        return rate(cfg, step)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "main", recorded(calls[0], train.main))
        m.setattr(train, "learning_rate", interrupt)
        assert study.main(argv) == 130
        stamps = {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "main", recorded(calls[1], train.main))
        assert study.main(argv) == 0
    return calls, stamps


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """A study that was stopped by Ctrl-C within its third of five models and then continued. -> (its folder, train.py's
    command lines of the two calls, when what was finished at the stop had been written)"""
    out = tmp_path_factory.mktemp("study") / "out"
    argv = tiny_study(tiny_base, out, "single-task,single,multi,streams-off")
    return out, *stopped_and_continued(argv, out, "single", 1)


def test_it_continues_where_it_was_stopped(finished):
    """What was finished at Ctrl-C is not touched again, the model at hand resumes, the rest follows; neither optimizer
    states nor streams are kept."""
    out, (first, second), stamps = finished
    assert [named(a, out) for a in first] == ["seed0/single-task-shading", "seed0/single-task-albedo", "seed0/single"]
    assert [named(a, out) for a in second] == ["seed0/single", "seed0/multi"]
    assert "--resume" in second[0] and "--resume" not in second[1]
    assert len(stamps) == 2 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    assert [e["step"] for e in study_report.read_lines(out / "seed0/single/log.jsonl")] == [0, 1, 2, 3]
    assert not list(out.rglob("state*")) and not list(out.glob("cache/streams*"))


def test_what_it_trains(finished):
    """A single-task model gets its share of the steps and of the warm-up; the multi stream starts from the single
    stream of its seed; all share one latent cache."""
    seed = finished[0] / "seed0"
    settings = [read(seed / name / "config.json")["train"] for name in ("single-task-albedo", "single", "multi")]
    assert [(c["steps"], c["warmup"], c["tasks"], c["stage"]) for c in settings] == [
        (2, 1, "albedo", 1), (4, 2, "shading,albedo", 1), (2, 2, "shading,albedo", 2)]
    assert {c["cache"] for c in settings} == {str(finished[0] / "cache")}
    multi, single = (seed / name / "unet/diffusion_pytorch_model.safetensors" for name in ("multi", "single"))
    assert multi.read_bytes() == single.read_bytes()


def test_what_a_model_said_is_kept(finished):
    """Training and evaluation, where the study says it is; it was deleted while it was written."""
    for name, steps in (("single-task-albedo", 2), ("single", 4), ("multi", 2)):
        said = (finished[0] / "seed0" / name / "output.txt").read_text()
        assert f" 0/{steps} [" in said and f" {steps} steps in" in said and "| real | albedo |" in said


def test_it_writes_tables_and_pictures(finished):
    """study.md shows every picture it names; all are PNGs with something drawn; a stage 2 step costs more operations
    than one of stage 1."""
    out, _, _ = finished
    pictures = re.findall(r"!\[.*\]\((.*)\)", text := (out / "study.md").read_text())
    assert set(pictures) == {"losses.png", "delta_m.png", "attention_multi.png"}    # isolation.png needs another run
    for name in pictures:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 5
    variants = read(out / "results.json")["variants"]
    assert list(variants) == ["single-task", "single", "multi", "streams-off"]
    alone, single, multi, off = variants.values()
    same = pytest.approx(alone["operations"], rel=0.01 if tiny.OWN else 0, abs=0)      # longer prompts
    assert single["operations"] == 4 * single["operations per step"] == same
    assert multi["operations per step"] > single["operations per step"] > 0
    assert off["operations"] is None and off["seeds"]["0"]["results"] != multi["seeds"]["0"]["results"]
    assert text.count(VARIANTS["streams-off"].title) == 2 and "1.00 if even" in text    # it trained nothing: no cost
    assert {p.name for p in (out / "seed0/streams-off").iterdir()} == {"results.json", "output.txt"}


def fork(_):
    """Processes that inherit what a test has replaced."""
    return multiprocessing.context.ForkContext()


@pytest.mark.parametrize("start, trained", [("fork", ("shading", "albedo")), ("spawn", ("albedo",))])
def test_side_by_side_gives_the_same_numbers(finished, tiny_base, tmp_path, monkeypatch, start, trained):
    """--jobs 2: two processes at once, and one in an interpreter of its own as a user has them, that share the latent
    cache, give the weights and results of one by one."""
    out, weights = tmp_path / "out", "unet/diffusion_pytorch_model.safetensors"
    if start == "fork":
        monkeypatch.setattr(multiprocessing, "get_context", fork)
    else:
        shutil.copytree(finished[0], out)
        for name in trained:
            shutil.rmtree(out / f"seed0/single-task-{name}")
    monkeypatch.setattr(study_report, "operations", lambda folder, batch: 1e9)     # the whole study has counted them
    assert study.main(tiny_study(tiny_base, out, "single-task", "--jobs 2")) == 0
    for name in trained:
        mine, other = (folder / f"seed0/single-task-{name}" for folder in (out, finished[0]))
        assert read(mine / "results.json")["results"] == read(other / "results.json")["results"]
        assert (mine / weights).read_bytes() == (other / weights).read_bytes()
    assert "single-task" in read(out / "results.json")["variants"]


# ---- the whole table, with training and evaluation replaced ----

ATTENDED = {"attention_entropy": 0.9, "attention_largest": 0.25, "attention_term": 0.5}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """go(flags) -> exit code of a study of all variants and tasks whose models cost nothing and score at random, and
    which draws no pictures.

    go.calls: train.py's command lines, all of which it would accept; go.out: the folder; go.diverge: part of the name
    of a model that diverges; go.trains(cfg): called in the middle of a training.
    """
    rng = random.Random(3)

    def train_main(argv):
        cfg = train.parse_args(argv)
        go.calls.append(argv)
        out, tasks = Path(cfg.out), train.parse_tasks(cfg.tasks)
        if go.diverge and go.diverge in cfg.out:
            raise FloatingPointError("step 1: loss nan")
        (out / "state").mkdir()
        (out / "state/state.json").touch()
        if go.trains(cfg):
            return 130
        lines = [{"task": [tasks[s % len(tasks)]] if cfg.isolation else list(tasks), "loss": rng.random(),
                  "grad_norm": rng.random(), "img_per_s": 20.0} | (ATTENDED if cfg.stage == 2 else {})
                 for s in range(cfg.steps)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        multi = {"heads": cfg.heads, "shared": cfg.shared_qkv, "attention": cfg.attention}
        write_json(out / "model.json", {"tasks": list(tasks), "palette": "cityscapes", "second_frame": "concat",
                                        "multi": None if cfg.stage == 1 else multi})
        write_json(out / "config.json", {})
        (out / "tasks.txt").write_text(cfg.tasks)

    def evaluate_main(argv):
        out = Path(argv[argv.index("--ckpt") + 1])
        tasks = train.parse_tasks((out / "tasks.txt").read_text())
        write_json(argv[argv.index("--json") + 1], {"results": scored(tasks)})

    def scored(tasks):
        return {reader.name: {t: {study_report.METRICS[TASKS[t].metric].headline: rng.uniform(1, 2)}
                              for t in reader.tasks if t in tasks} for reader in evaluate.test_readers()}

    def oracle_main(argv):
        args, cfg = oracle.parse(argv)
        go.calls.append([*argv[:argv.index("--")], f"rho {cfg.rho}, batch {cfg.batch}"])
        out = Path(args.out)
        line = {"task": ["depth"], "loss": 1.0, "grad_norm": 1.0, "img_per_s": 20.0}
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, [line, line | ATTENDED])))
        write_json(out / "results.json", {"results": scored(ALL)})

    class Copied:
        def save(self, folder):
            assert folder.is_dir()

    def go(flags="", more=""):
        go.calls.clear()
        return run(lambda: study.main(f"--out {tmp_path / 'out'} --steps 14 --steps2 5 {flags} -- {more}".split()))

    monkeypatch.setattr(train, "main", train_main)
    monkeypatch.setattr(evaluate, "main", evaluate_main)
    monkeypatch.setattr(oracle, "main", oracle_main)
    monkeypatch.setattr(study.StableMTL, "load", lambda folder, stage=None: Copied())
    monkeypatch.setattr(study_report, "operations", lambda folder, batch: 1e9 * batch)
    monkeypatch.setattr(study_report, "draw_attended", lambda args: {})
    for draw in (draw_losses, draw_gains, draw_isolation):
        monkeypatch.setattr(study_report, draw.__name__, lambda *_: None)
    monkeypatch.setattr(study.gc, "collect", int)
    go.calls, go.out, go.diverge, go.trains = [], tmp_path / "out", "", lambda cfg: False
    return go


def test_every_variant_has_a_row_that_follows_from_its_runs(made_up):
    """Delta_m, means, deviations and paired differences of all variants, recomputed by hand from the results.json of
    the runs."""
    assert made_up("--seeds 3 --only all") == 0
    assert len(made_up.calls) == 3 * (len(ALL) + len(VARIANTS) - 5)       # four rows are other evaluations
    result, text = read(made_up.out / "results.json"), (made_up.out / "study.md").read_text()
    sections = text.split("\n## ")
    assert list(result["variants"]) == list(VARIANTS)
    assert [result["variants"][name]["operations per step"] for name in ("batch-4", "multi")] == [4e9, 8e9]
    for v in VARIANTS.values():     # in two tables of results; in those of cost and attention if it has these
        tables = 2 + (v.program == "train.py") + ("--stage 2" in v.flags or v.program == "tools.oracle")
        assert sum(f"| {v.title} |" in section for section in sections) == tables

    def scores(seed, name, world):
        row = read(made_up.out / f"seed{seed}" / name / "results.json")["results"][world]
        return {t: x for t, metrics in row.items() for x in metrics.values()}
    zeros = STABLEMTL.zeros
    delta = {(zero.key, name): {where: [] for where in WORLDS} for zero in zeros for name in VARIANTS}
    for seed in range(3):
        for where, worlds in (("unseen", ["real"]), ("in-domain", ["rooms", "streets", "things"])):
            single = {w: {} for w in worlds}
            for w in worlds:
                for t in ALL:
                    single[w] |= scores(seed, f"single-task-{t}", w)
            bases = {"single-task": single, "continued": {w: scores(seed, "continued", w) for w in worlds}}
            for name in VARIANTS:
                mine = single if name == "single-task" else {w: scores(seed, name, w) for w in worlds}
                for zero in STABLEMTL.against(name):
                    gains = {t: mean(100 * (mine[w][t] / bases[zero.variant][w][t] - 1) for w in worlds if t in mine[w])
                             for t in ALL}
                    delta[zero.key, name][where].append(mean(-g if LOWER[t] else g for t, g in gains.items()))
                    found = result["variants"][name]["seeds"][str(seed)][zero.key][where]
                    assert found == pytest.approx(delta[zero.key, name][where][-1])
    further = {name for name in VARIANTS if delta[zeros[1].key, name]["unseen"]}
    assert further == {"single"} | {name for name, v in VARIANTS.items() if v.parent}     # all that went on from it
    for name, v in VARIANTS.items():
        own = (delta[zero.key, name]["unseen"] for zero in zeros)
        cells = " | ".join(f"{mean(x):+.2f} ± {stdev(x):.2g}" if x else "" for x in own)
        assert name in ("single-task", "continued") or f"| {v.title} | {cells} |" in sections[1]
    assert len(result["claims"]) == 2 * len(CLAIMS)
    lines = {claim.claim: zeros[claim.zero].key for claim in CLAIMS}
    for claim in result["claims"]:
        own = {name: x[claim["where"]] for (key, name), x in delta.items() if key == lines[claim["claim"]]}
        sides = (zip(*(own[n] for n in claim[side].split(" + ")), strict=True) for side in ("better", "worse"))
        assert claim["differences"] == pytest.approx([sum(a) - sum(b) for a, b in zip(*sides, strict=True)])
        assert claim["verdict"] == verdict(claim["differences"])
        needed = claim["seeds needed"]
        assert (needed is None or needed > 3) == (claim["verdict"] == "undecided")
        told = f"would take about {needed} seeds" if needed else "would take over 1000 seeds"
        assert claim["verdict"] != "undecided" or told in text


def test_pictures_show_the_numbers(made_up):
    """Delta_m of every seed; a loss curve per model; a point per task: its mean gradient norm, its gain."""
    assert made_up("--seeds 2") == 0
    args = study.parse(f"--out {made_up.out} --seeds 2 --steps 14 --steps2 5".split())
    result = study_report.summary(args)
    for zero in STABLEMTL.zeros:
        panels = [a for a in draw_gains(result, zero, STABLEMTL).axes if a.get_title(loc="left")]
        rows = [v for name, v in result["variants"].items() if zero in STABLEMTL.against(name)]
        for axes, where in zip(panels, WORLDS, strict=True):
            seen = [list(line.get_xdata()) for line in axes.lines if line.get_label() == "one seed"]
            assert seen == [[s[zero.key][where] for s in v["seeds"].values()] for v in rows]
    *of_tasks, together = draw_losses(args).axes
    assert [a.get_title() for a in of_tasks] == list(ALL) and {len(a.lines) for a in (*of_tasks, together)} == {4}
    single = [study_report.log(made_up.out / f"seed{seed}/single") for seed in (0, 1)]
    points = {line.get_label(): line.get_xydata()[0] for line in draw_isolation(args, result).axes[0].lines}
    for t in ALL:
        norm = mean(e["grad_norm"] for entries in single for e in entries if e["task"] == [t])
        assert points[t][0] == pytest.approx(norm)
        gains = []
        for seed in (0, 1):
            with_, without = (result["variants"][n]["seeds"][seed]["results"][t]["real"] for n in
                              ("single", "no-isolation"))
            gains.append((-100 if LOWER[t] else 100) * (with_ / without - 1))
        assert points[t][1] == pytest.approx(mean(gains))


def oracle_call(argv):
    """({flag: value}, what follows) of a command line of tools.oracle, else None."""
    return (dict(zip(argv[:-1:2], argv[1:-1:2], strict=True)), argv[-1]) if argv[0] == "--ckpt" else None


def test_seeds_differ_and_variants_share_batches(made_up):
    """Each seed has its own draws; the continued single stream gets stage 2's batches (seed + 1000 x stage)."""
    assert made_up("--seeds 2") == 0
    (first_oracle, stage2), (first_told, alike), (second_oracle, _), _ = filter(None, map(oracle_call, made_up.calls))
    assert stage2 == alike == "rho 0.4, batch 8" and first_told["--tell"] == "predictions"
    assert first_oracle == {"--ckpt": str(made_up.out / "seed0/single"), "--out": str(made_up.out / "seed0/oracle"),
                            "--steps": "5", "--aux-steps": "5", "--seed": "0", "--limit": "64"}
    assert second_oracle["--seed"] == "1"
    cfg = {named(a, made_up.out): train.parse_args(a) for a in made_up.calls if not oracle_call(a)}
    drawn = {name: c.seed + 1000 * c.stage for name, c in cfg.items()}
    for seed in (0, 1):
        first = "single", "no-isolation", "single-task-depth"
        second = [n for n, v in VARIANTS.items() if v.parent and v.program == "train.py" and n not in EXTRA]
        assert {drawn[f"seed{seed}/{n}"] for n in first} == {1000 + seed}
        assert len(second) == 5 and {drawn[f"seed{seed}/{n}"] for n in second} == {2000 + seed}
        assert cfg[f"seed{seed}/continued"].init == str(made_up.out / f"seed{seed}/single")
    assert [cfg[f"seed0/{n}"].steps for n in ("single", "single-task-depth", "continued", "multi")] == [14, 2, 5, 5]


def test_more_seeds_and_variants_are_added(made_up):
    """A larger --seeds or --only trains what is new and nothing else; of smaller ones the page keeps all there is."""
    assert made_up("--seeds 1 --only single") == 0
    assert [named(a, made_up.out) for a in made_up.calls] == ["seed0/single"]
    assert made_up("--seeds 2 --only single,multi") == 0
    assert [named(a, made_up.out) for a in made_up.calls] == ["seed0/multi", "seed1/single", "seed1/multi"]
    assert made_up("--seeds 1 --only single") == 0 and made_up.calls == []
    rows = {name: list(row["seeds"]) for name, row in read(made_up.out / "results.json")["variants"].items()}
    assert rows == {"single": ["0", "1"], "multi": ["0", "1"]}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_diverged_model_costs_no_other(made_up, capsys, monkeypatch, jobs):
    """A model that diverges is named and left out with what starts from it; all others are trained, and the next call
    tries it again."""
    monkeypatch.setattr(multiprocessing, "get_context", fork)
    flags = f"--seeds 2 --only single-task,single,no-isolation,multi --jobs {jobs}"
    made_up.diverge = "seed1/single"
    assert made_up(flags) == 2
    assert "step 1: loss nan" in capsys.readouterr().err and not (made_up.out / "seed1/multi/results.json").exists()
    variants = read(made_up.out / "results.json")["variants"]
    assert {n: list(v["seeds"]) for n, v in variants.items()} == {
        "single-task": ["0"], "single": ["0"], "no-isolation": ["0", "1"], "multi": ["0"]}
    made_up.diverge = ""
    done = set(made_up.out.rglob("results.json"))
    assert made_up(flags) == 0
    new = {p.parent.name for p in set(made_up.out.rglob("results.json")) - done}
    assert new == {"single", "multi", *(f"single-task-{t}" for t in ALL)}


def test_an_incomplete_variant_has_no_row(made_up):
    """A study of which only some single-task models exist has empty tables, where it ended in a traceback."""
    made_up.diverge = "single-task-depth"
    assert made_up("--seeds 1 --only single-task") == 2
    assert read(made_up.out / "results.json")["variants"] == {}


# ---- side by side ----

def test_a_stop_reaches_every_process_once(made_up, monkeypatch, capsys):
    """Ctrl-C while three models train: each saves and ends, none is left running, and the same command continues."""
    def trains(cfg):
        Path(cfg.out, "begun").touch()
        with pytest.raises(KeyboardInterrupt):
            signal.pause()
        with Path(cfg.out, "saved").open("a") as f:
            f.write("once\n")
        return True
    wait = multiprocessing.connection.wait
    def stopped(pipes, timeout):
        if len(list(made_up.out.rglob("begun"))) == 3:
            raise KeyboardInterrupt
        return wait(pipes, timeout)

    monkeypatch.setattr(multiprocessing, "get_context", fork)
    monkeypatch.setattr(multiprocessing.connection, "wait", stopped)
    made_up.trains = trains
    assert made_up("--seeds 1 --only single-task --jobs 3") == 130
    assert f"0 of {len(ALL)} models finished" in capsys.readouterr().err and not multiprocessing.active_children()
    assert [p.read_text() for p in made_up.out.rglob("saved")] == ["once\n"] * 3


@pytest.mark.parametrize("ends, says", [
    (lambda cfg: signal.raise_signal(signal.SIGKILL), r"seed 0, [\w-]+ ended .* for lack of memory"),
    (lambda cfg: {}["x"], r"seed 0, [\w-]+ ended before it was done, with the error above"),
    (lambda cfg: (_ for _ in ()).throw(OSError("disk full")), r"seed 0, [\w-]+: disk full")])
def test_a_process_that_fails_ends_the_study_in_a_sentence(made_up, monkeypatch, capsys, ends, says):
    """Killed for memory, or a mistake that would meet every model: named, exit code 2, no traceback of its own."""
    monkeypatch.setattr(multiprocessing, "get_context", fork)
    made_up.trains = ends
    assert made_up("--seeds 1 --only single,no-isolation --jobs 2") == 2
    assert re.search(says, error := capsys.readouterr().err) and "Traceback" not in error
    assert not multiprocessing.active_children()


# ---- mistakes ----

@pytest.mark.parametrize("flags, more, says", [
    ("--steps 15", "", "steps 14, now 15"), ("--limit 5", "", "limit 64, now 5"),
    ("", "--clip 0.5", "clip 1.0, now 0.5"), ("--tasks depth,normal", "", "tasks .*, now normal,depth")])
def test_other_settings_are_refused(made_up, capsys, flags, more, says):
    """The same --out with another setting: one sentence that names it, exit code 2, and nothing changes."""
    assert made_up("--seeds 1 --only single") == 0
    before = contents(made_up.out)
    capsys.readouterr()
    assert made_up(f"--seeds 1 --only single {flags}", more) == 2
    assert re.search(f"other settings .*{says}.*: name another --out", capsys.readouterr().err)
    assert made_up.calls == [] and before == contents(made_up.out)


@pytest.mark.parametrize("flags, more, says", [
    ("--seed 3", "", "--seed"), ("", "--seed 3", "--seed after --"), ("", "--lerning 1", "--lerning"),
    ("--tasks depth", "", "at least two tasks"), ("--steps 0", "", "--steps"), ("--jobs 0", "", "--jobs"),
    ("--only multi", "", "starts from single"), ("--only x", "", "no variant x"),
    ("", "--widths 8,8,8,8", "for the variant continued: --widths would do nothing"),
    ("--out /proc/x", "", "/proc/x cannot be written")])
def test_mistakes_end_in_a_sentence(made_up, capsys, flags, more, says):
    """Each names the flag; nothing is written. A flag that only some variants can take was refused hours later."""
    assert made_up(flags, more) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and error.count("\n") == 1 and not made_up.out.exists()


@pytest.mark.parametrize("name, text, says", [
    ("study.json", "[1]", "study.json is damaged"), ("study.json", "{", "study.json is damaged"),
    ("seed0/single/results.json", '{"results": null}', "results is missing or null.*: delete .*seed0/single"),
    ("seed0/single/results.json", '{"results": {"real": {"depth": {"AbsRel": "x"}}}}', "results.real.depth.AbsRel is"),
    ("seed0/single/log.jsonl", '{"task": "depth"}\n{}\n', "log.jsonl, line 1.*task is")])
def test_foreign_json_is_named(made_up, capsys, name, text, says):
    """A file of another shape ended in a traceback: now the file, the key and the remedy."""
    assert made_up("--seeds 1 --only single") == 0
    (made_up.out / name).write_text(text)
    capsys.readouterr()
    assert made_up("--seeds 1 --only single") == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and "Traceback" not in error
