"""study.py: a row per variant, numbers that follow from the runs' own results, and a study that continues where it was stopped."""
import json
import random
import re
import shutil
import signal
from pathlib import Path
from statistics import mean, stdev

import pytest
from PIL import Image

import evaluate
import train
from checkpoint import write_json
from cli import run
from draw import ticks
from tasks import TASKS
from tools import study
from tools.study import CLAIMS, VARIANTS, verdict

FLAGS = "--scenes 2 --size 16x24 --batch 2 --micro 2 --picture-every 0 --workers 0 --warmup 2 --threads 1"


def recorded(calls, main):
    """main, with its command lines appended to calls."""
    return lambda argv: calls.append(argv) or main(argv)


def named(argv, out):
    """The model that a command line of train.py is about, as <seed>/<folder>."""
    return argv[argv.index("--out") + 1].removeprefix(f"{out}/")


# ---- the real thing, as small as it gets ----

@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """A study of two tasks that was stopped by Ctrl-C within its third of four models and then continued. -> (its folder, train.py's command
    lines of the two calls, when what was finished at the stop had been written)"""
    out, rate, calls = tmp_path_factory.mktemp("study") / "out", train.learning_rate, ([], [])
    flags = "--tasks shading,albedo --seeds 1 --steps 4 --steps2 2 --limit 1 --only single-task,single,multi"
    argv = f"--out {out} {flags} -- --base {tiny_base} {FLAGS}".split()

    def interrupt(cfg, step):
        if cfg.out.endswith("single") and step == 1:
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
    return out, calls, stamps


def test_it_continues_where_it_was_stopped(finished):
    """What was finished at Ctrl-C is not touched again, the model at hand resumes, the rest follows; no optimizer state is kept."""
    out, (first, second), stamps = finished
    assert [named(a, out) for a in first] == ["seed0/single-task-shading", "seed0/single-task-albedo", "seed0/single"]
    assert [named(a, out) for a in second] == ["seed0/single", "seed0/multi"]
    assert "--resume" in second[0] and "--resume" not in second[1]
    assert len(stamps) == 2 and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    assert [e["step"] for e in study.log(out / "seed0/single")] == [0, 1, 2, 3] and not list(out.rglob("state*"))


def test_what_it_trains(finished):
    """A single-task model gets its share of the steps and of the warm-up; the multi stream starts from the single stream of its seed; all
    share one latent cache."""
    settings = {n: json.loads((finished[0] / "seed0" / n / "config.json").read_text())["train"] for n in ("single-task-albedo", "single", "multi")}
    assert [(c["steps"], c["warmup"], c["tasks"], c["stage"]) for c in settings.values()] == [
        (2, 1, "albedo", 1), (4, 2, "shading,albedo", 1), (2, 2, "shading,albedo", 2)]
    assert {c["cache"] for c in settings.values()} == {str(finished[0] / "cache")}
    stream = "unet/diffusion_pytorch_model.safetensors"
    assert (finished[0] / "seed0/multi" / stream).read_bytes() == (finished[0] / "seed0/single" / stream).read_bytes()


def test_it_writes_tables_and_pictures(finished):
    """study.md shows every picture it names; all are PNGs with something drawn; a stage 2 step costs more operations than one of stage 1."""
    out, _, _ = finished
    pictures = re.findall(r"!\[.*\]\((.*)\)", (out / "study.md").read_text())
    assert set(pictures) == {"losses.png", "delta_m.png", "attention_multi.png"}        # isolation.png needs a run without isolation
    for name in pictures:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 5
    variants = json.loads((out / "results.json").read_text())["variants"]
    assert list(variants) == ["single-task", "single", "multi"]
    assert variants["single"]["operations"] == variants["single-task"]["operations"] == 4 * variants["single"]["operations per step"]
    assert variants["multi"]["operations per step"] > variants["single"]["operations per step"] > 0


# ---- the whole table, with training and evaluation replaced ----

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """go(flags) -> exit code of a study of all variants and tasks whose models cost nothing and score at random.

    go.calls: train.py's command lines, all of which it would accept; go.out: the folder; go.diverge: part of the name of a model that diverges."""
    rng = random.Random(3)

    def train_main(argv):
        cfg = train.parse_args(argv)
        go.calls.append(argv)
        if go.diverge and go.diverge in cfg.out:
            raise FloatingPointError("step 1: loss nan")
        out = Path(cfg.out)
        tasks = train.parse_tasks(cfg.tasks)
        entries = [{"task": [tasks[s % len(tasks)]] if cfg.isolation else list(tasks), "loss": rng.random(), "grad_norm": rng.random(),
                    "img_per_s": 20.0} for s in range(cfg.steps)]
        (out / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
        (out / "model.json").write_text(json.dumps({"multi": None if cfg.stage == 1 else {"shared": cfg.shared_qkv}}))
        (out / "tasks.txt").write_text(cfg.tasks)
        (out / "config.json").write_text("{}")

    def evaluate_main(argv):
        out = Path(argv[argv.index("--ckpt") + 1])
        score = lambda t: {evaluate.METRICS[TASKS[t].metric][1]: rng.uniform(1, 2)}
        tasks = train.parse_tasks((out / "tasks.txt").read_text())
        results = {r.name: {t: score(t) for t in r.tasks if t in tasks} for r in evaluate.test_readers()}
        write_json(argv[argv.index("--json") + 1], {"results": results})

    class Copied:
        def save(self, folder):
            assert folder.is_dir()
    monkeypatch.setattr(train, "main", train_main)
    monkeypatch.setattr(evaluate, "main", evaluate_main)
    monkeypatch.setattr(study.StableMTL, "load", lambda folder, stage=None: Copied())
    monkeypatch.setattr(study, "operations", lambda folder, batch: 1e9)
    monkeypatch.setattr(study, "draw_attended", lambda args: {})
    monkeypatch.setattr(study.gc, "collect", lambda: None)

    def go(flags="", more=""):
        go.calls.clear()
        return run(lambda: study.main(f"--out {tmp_path / 'out'} --steps 14 --steps2 5 {flags} -- {more}".split()))
    go.calls, go.out, go.diverge = [], tmp_path / "out", ""
    return go


def test_every_variant_has_a_row_that_follows_from_its_runs(made_up):
    """Delta_m, means, deviations and paired differences of all variants, recomputed by hand from the results.json of the runs."""
    assert made_up("--seeds 3") == 0
    assert len(made_up.calls) == 3 * (len(TASKS) + len(VARIANTS) - 1)
    result, text = json.loads((made_up.out / "results.json").read_text()), (made_up.out / "study.md").read_text()
    tables = text.split("\n## ")
    assert list(result["variants"]) == list(VARIANTS) and all(sum(f"| {v.title} |" in t for t in tables) == 3 for v in VARIANTS.values())
    results = lambda seed, name: json.loads((made_up.out / f"seed{seed}" / name / "results.json").read_text())["results"]
    scores = lambda seed, name, world: {t: x for t, r in results(seed, name)[world].items() for x in r.values()}
    delta = {name: {where: [] for where in study.WORLDS} for name in VARIANTS}
    for seed in range(3):
        for where, worlds in (("unseen", ["real"]), ("in-domain", ["rooms", "streets", "things"])):
            single = {w: {t: x for t in TASKS for t, x in scores(seed, f"single-task-{t}", w).items()} for w in worlds}
            for name in VARIANTS:
                mine = single if name == "single-task" else {w: scores(seed, name, w) for w in worlds}
                gains = {t: mean(100 * (mine[w][t] / single[w][t] - 1) for w in worlds if t in mine[w]) for t in TASKS}
                delta[name][where].append(mean(g if t == "semantic" else -g for t, g in gains.items()))
                assert result["variants"][name]["seeds"][str(seed)]["delta_m"][where] == pytest.approx(delta[name][where][-1])
    for name, v in VARIANTS.items():
        x = delta[name]["unseen"]
        assert f"| {v.title} | {mean(x):+.2f} ± {stdev(x):.2g} |" in tables[1] or name == "single-task"
    assert len(result["claims"]) == 2 * len(CLAIMS)
    for claim in result["claims"]:
        pairs = zip(delta[claim["better"]][claim["where"]], delta[claim["worse"]][claim["where"]])
        assert claim["differences"] == pytest.approx([a - b for a, b in pairs]) and claim["verdict"] == verdict(claim["differences"])
    assert {p.name for p in made_up.out.glob("*.png")} == {"losses.png", "delta_m.png", "isolation.png"}
    assert all(Image.open(p).size[0] > 500 for p in made_up.out.glob("*.png"))


def test_seeds_differ_and_variants_share_batches(made_up):
    """Each seed trains with its own draws; the continued single stream gets the batches of stage 2 (train.py: seed + 1000 x stage)."""
    assert made_up("--seeds 2") == 0
    cfg = {named(a, made_up.out): train.parse_args(a) for a in made_up.calls}
    drawn = {name: c.seed + 1000 * c.stage for name, c in cfg.items()}
    for seed in (0, 1):
        assert {drawn[f"seed{seed}/{n}"] for n in ("single", "no-isolation", "single-task-depth")} == {1000 + seed}
        assert {drawn[f"seed{seed}/{n}"] for n in ("continued", "multi", "rho-0", "shared-qkv", "base-init")} == {2000 + seed}
        assert cfg[f"seed{seed}/continued"].init == str(made_up.out / f"seed{seed}/single")
    assert [cfg[f"seed0/{n}"].steps for n in ("single", "single-task-depth", "continued", "multi")] == [14, 2, 5, 5]


def test_more_seeds_and_variants_are_added(made_up):
    """A larger --seeds or --only trains what is new and nothing else."""
    assert made_up("--seeds 1 --only single") == 0 and [named(a, made_up.out) for a in made_up.calls] == ["seed0/single"]
    assert made_up("--seeds 2 --only single,multi") == 0
    assert [named(a, made_up.out) for a in made_up.calls] == ["seed0/multi", "seed1/single", "seed1/multi"]
    assert made_up("--seeds 2 --only single,multi") == 0 and made_up.calls == []


def test_a_diverged_model_costs_no_other(made_up, capsys):
    """A model that diverges is named and left out with what starts from it; all others are trained, and the next call tries it again."""
    made_up.diverge = "seed1/single"
    shutil.rmtree(made_up.out, ignore_errors=True)
    assert made_up("--seeds 2 --only single-task,single,no-isolation,multi") == 2
    assert "step 1: loss nan" in capsys.readouterr().err and not (made_up.out / "seed1/multi/results.json").exists()
    variants = json.loads((made_up.out / "results.json").read_text())["variants"]
    assert {n: list(v["seeds"]) for n, v in variants.items()} == {"single-task": ["0"], "single": ["0"], "no-isolation": ["0", "1"], "multi": ["0"]}
    made_up.diverge = ""
    assert made_up("--seeds 2 --only single-task,single,no-isolation,multi") == 0
    assert {named(a, made_up.out) for a in made_up.calls} == {"seed1/single", "seed1/multi", *(f"seed1/single-task-{t}" for t in TASKS)}


@pytest.mark.parametrize("flags, more, says", [("--steps 15", "", "steps 14, now 15"), ("--limit 5", "", "limit 64, now 5"),
                                               ("", "--clip 0.5", "clip 1.0, now 0.5"), ("--tasks depth,normal", "", "tasks .*, now normal,depth")])
def test_other_settings_are_refused(made_up, capsys, flags, more, says):
    """The same --out with another setting: one sentence that names it, exit code 2, and nothing changes."""
    assert made_up("--seeds 1 --only single") == 0
    before = {p: p.read_bytes() for p in made_up.out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert made_up(f"--seeds 1 --only single {flags}", more) == 2
    assert re.search(f"other settings .*{says}.*: name another --out", capsys.readouterr().err)
    assert made_up.calls == [] and before == {p: p.read_bytes() for p in made_up.out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("flags, more, says", [("--seed 3", "", "--seed"), ("", "--seed 3", "--seed after --"), ("", "--lerning 1", "--lerning"),
                                               ("--tasks depth", "", "at least two tasks"), ("--steps 0", "", "--steps"),
                                               ("--only multi", "", "starts from single"), ("--only x", "", "no variant x")])
def test_mistakes_end_in_a_sentence(made_up, capsys, flags, more, says):
    """Each names the flag; nothing is written."""
    assert made_up(flags, more) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and error.count("\n") == 1 and not made_up.out.exists()


def test_ticks():
    """Axes are marked at round numbers within their limits."""
    assert list(ticks(-20.6, 22).values()) == ["-20", "0", "20"] and list(ticks(0, 171).values()) == ["0", "50", "100", "150"]
    assert list(ticks(0, 99999).values()) == ["0", "50000"] and list(ticks(0, 0.0075).values()) == ["0", "0.002", "0.004", "0.006"]
    assert list(ticks(3, 3).values()) == ["3"]


def test_verdict():
    """The 95% interval of the mean decides, as a trusted t test does; one seed never does, and more seeds need a smaller difference."""
    assert [verdict(d) for d in ([5.0], [1.0, 1.2, 0.9], [-1.0, -1.2, -0.9], [1.0, -0.5, 0.3], [0.0, 0.0])] == [
        "undecided", "reproduced", "not reproduced", "undecided", "undecided"]
    stats, rng = pytest.importorskip("scipy.stats"), random.Random(0)
    for n in [k for k in range(2, 11) for _ in range(20)]:
        d = [rng.gauss(0.7, 0.5) for _ in range(n)]
        assert (verdict(d) != "undecided") == (stats.ttest_1samp(d, 0).pvalue < 0.05)
