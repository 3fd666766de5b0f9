"""The study's suite of systems: rows that see equally many images, two zero lines that nothing mixes, claims about some
tasks, and what every system costs."""
import json
import random
import re
from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image
from test_study import FLAGS, contents, named, read, stopped_and_continued
from torch import nn

import baselines
import settings
from baselines.trunk import System
from cli import run
from evaluate import PAPER_TASKS
from model import StableMTL
from readers.toyworld import ALL
from tasks import TASKS, parse_tasks
from tools import bench, bench_systems, study, study_cost, study_report, systems_report
from tools.study_systems import CLAIMS, CURVES, EXTRA, SUITE, TRUNKS, VARIANTS
from tools.study_variants import STABLEMTL, WORLDS, runs

ROWS = {name for name, v in VARIANTS.items() if v.program == "train.py"}
STEPS = 2 * len(ALL)    # two of each task


def parsed(out, flags=""):
    return study.parse(["--suite", "systems", "--out", str(out), *f"--steps {STEPS} --steps2 5 {flags}".split()])


# ---- a model that was stopped ----

@pytest.mark.parametrize("there, resumes", [(["state"], True), (["state.tmp", "state.prev"], True),
                                            (["state.prev"], True), ([], False)])
def test_what_a_kill_left_is_resumed(tmp_path, there, resumes):
    """A kill between the renamings of a checkpoint leaves no state/, and one to continue from; a kill in the first
    checkpoint, one without its state.json, and the model is trained anew."""
    args = parsed(tmp_path, "--only mtl --seeds 1")
    job, = runs(args)
    (job.out / "state.tmp").mkdir(parents=True)
    for name in there:
        (job.out / name).mkdir(exist_ok=True)
        (job.out / name / "state.json").touch()
    argv = study.command(job, args)
    assert (argv[0] == "--resume") == resumes == any(job.out.iterdir())


# ---- rows ----

def test_rows_are_what_train_takes(tmp_path):
    """Every row of train.py parses, tasks and systems as told; what a student starts from is trained before it, and is
    of its own system. A space in --out failed, which their flags were split at."""
    args, seen = parsed(tmp_path / "of systems", "--only all --seeds 1"), {}
    for job in runs(args):
        assert job.parent is None or job.parent in {earlier.out for earlier in seen.values()}
        seen[job.variant] = job
        if job.variant not in ROWS or "--stage 2" in job.row.flags:     # which starts from files
            continue
        cfg = settings.parse_args(study.command(job, args))
        assert parse_tasks(cfg.tasks) == job.tasks and cfg.steps == job.steps and cfg.batch == 8
        assert (cfg.system != "stablemtl") == (job.variant in TRUNKS)
        if cfg.teacher:
            assert f"--system {cfg.system}" in VARIANTS[job.row.parent].flags and cfg.teacher == str(job.parent)
        if cfg.pseudo:
            assert cfg.pseudo == f"{job.parent}/labels" and cfg.pseudo in seen[job.row.parent].flags
    assert list(seen) == list(VARIANTS)
    assert {*EXTRA, *CURVES, *(name for c in CLAIMS for side in c.sides() for name in side)} <= VARIANTS.keys()


def test_rows_see_equally_many_images(tmp_path):
    """All that starts from nothing and all students take --steps, the single-task models together as well; only rows
    that say so take twice as many, and only the multi stream takes further ones."""
    images = {}
    for job in runs(parsed(tmp_path, "--only all --seeds 1")):
        images[job.variant] = images.get(job.variant, 0) + job.steps
    twice = {name for name in VARIANTS if name.endswith("-twice")}
    assert {name: n for name, n in images.items() if n != STEPS} == (
        dict.fromkeys(twice, 2 * STEPS) | {"multi": 5, "labels": 0, "truth": 0})
    assert all("twice" in VARIANTS[name].title for name in twice)


def test_rows_that_share_a_cache_encode_alike(tmp_path):
    """The same images in, the same labels, the same codes: else training would refuse the folder, after hours."""
    args, coded = parsed(tmp_path, "--only all --seeds 1"), {}
    for job in runs(args):
        if job.variant in ROWS and "--stage 2" not in job.row.flags:
            cfg = settings.parse_args(study.command(job, args))
            seen = "images" if cfg.system != "stablemtl" else "latents" if cfg.condition == "latent" else "pixels"
            coded.setdefault(cfg.cache, set()).add((seen, cfg.space, cfg.palette, cfg.discover == "true"))
    assert all(len(kinds) == 1 for kinds in coded.values())
    assert len({kind for kinds in coded.values() for kind in kinds}) == len(coded)


# ---- numbers, with runs that are made up ----

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """made_up(only, seeds) -> the args of a study whose models are finished: results at random, a loss that halves.
    Costs are the number of characters of a folder's name."""
    rng = random.Random(5)

    def call(only="all", seeds=2):
        args = parsed(tmp_path / "out", f"--only {only} --seeds {seeds}")
        for job in runs(args):
            job.out.mkdir(parents=True)
            tasks = (job.task,) if job.task else job.tasks
            scores = {w: {t: {study_report.METRICS[TASKS[t].metric].headline: rng.uniform(1, 2)} for t in tasks}
                      for w in ("real", "rooms", "streets", "things")}
            (job.out / "results.json").write_text(json.dumps({"results": scores if job.variant in ROWS else {}}))
            lines = [{"step": s, "task": [tasks[s % len(tasks)]], "loss": 2.0 ** -s, "grad_norm": 1.0, "img_per_s": 2.0}
                     for s in range(job.steps)]
            (job.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return args

    monkeypatch.setattr(study_cost, "alike", str)
    monkeypatch.setattr(study_report, "operations", lambda folder, batch: batch * len(folder.name))
    monkeypatch.setattr(study_cost, "labels_per_image", lambda folder: 2.5 if folder.name in TRUNKS else 1.0)
    monkeypatch.setattr(study_cost, "prediction", lambda folder: {"weights": 10, "prediction": len(folder.name)})
    return call


def scores(args, seed, name, where):
    """{task: {world: headline}} of a row, read from its files."""
    out = {}
    for job in runs(args):
        if (job.seed, job.variant) == (seed, name):
            for world in WORLDS[where]:
                for t, row in read(job.out / "results.json")["results"][world].items():
                    out.setdefault(t, {})[world] = next(iter(row.values()))
    return out


def by_hand(args, seed, name, zero, where, tasks):
    """Delta_m in percent, spelt out."""
    mine, zeros = (scores(args, seed, n, where) for n in (name, zero))
    gains = {t: mean(100 * (mine[t][w] / zeros[t][w] - 1) for w in mine[t]) for t in tasks}
    return mean(-g if study_report.LOWER[t] else g for t, g in gains.items())


def test_two_zero_lines_are_never_mixed(made_up):
    """Every row has its Delta_m against the single-task UNets, only trunks have one against the STL trunk; each over
    the row's own tasks; the tables have a column for each."""
    args = made_up("stl,mtl,jtr-3,single-task,single")
    variants = study_report.summary(args)["variants"]
    for name, v in variants.items():
        assert {"delta_m", "delta_m of trunks"} & v["seeds"][0].keys() == (
            {"delta_m", "delta_m of trunks"} if name in ("stl", "mtl", "jtr-3") else {"delta_m"})
        tasks = ("semantic", "normal", "depth") if name == "jtr-3" else ALL
        for seed, row in v["seeds"].items():
            for where in WORLDS:
                assert row["delta_m"][where] == pytest.approx(by_hand(args, seed, name, "single-task", where, tasks))
                if name in TRUNKS:
                    own = row["delta_m of trunks"][where]
                    assert own == pytest.approx(by_hand(args, seed, name, "stl", where, tasks))
    lines = study_report.world_table({"tasks": args.tasks, "variants": variants}, SUITE, "unseen")
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:4]] for line in lines[2:]}
    assert cells["STL trunk"][1].startswith("0.00") and cells["single-task UNets"] == ["0.00 ± 0", ""]
    assert cells["StableMTL-S"][1] == "" and all(cells["JTR, 3 tasks"])


def test_claims_about_tasks_by_hand(made_up):
    """Over a claim's own tasks and against its own zero line; the difference of two differences; all of them are judged
    once all rows are there."""
    args = made_up()
    claims = {(c["claim"], c["where"]): c for c in study_report.summary(args)["claims"]}
    assert len(claims) == 2 * len(CLAIMS)
    for c in CLAIMS:
        zero, tasks = SUITE.zeros[c.zero].variant, parse_tasks(c.tasks or ",".join(ALL))
        better, worse = c.sides()
        for where in WORLDS:
            expected = [sum(by_hand(args, seed, n, zero, where, tasks) for n in better)
                        - sum(by_hand(args, seed, n, zero, where, tasks) for n in worse) for seed in (0, 1)]
            assert claims[c.claim, where]["differences"] == pytest.approx(expected)
    hurt = next(c for c in CLAIMS if " + " in c.better)
    assert hurt.sides() == (["jtr-3", "single"], ["jtr", "single-3"]) and hurt.tasks == "normal,depth"
    still = "semantic,normal,depth,shading,albedo"
    about = {",".join(t for t in c.tasks.split(",") if t in PAPER_TASKS) for c in CLAIMS}
    assert about == {"", "semantic", "depth", "normal,depth", "shading,albedo", still}


def test_claims_compare_rows_of_the_same_tasks():
    """A Delta_m over three tasks and one over seven are no pair."""
    for c in CLAIMS:
        for name in [name for side in c.sides() for name in side]:
            assert not VARIANTS[name].tasks or set(c.tasks.split(",")) < set(VARIANTS[name].tasks.split(","))
            assert c.zero == 0 or name in TRUNKS


def test_what_a_row_has_seen_and_costs(made_up):
    """Images, labels and operations with those of a teacher or a single stream; single-task models together."""
    args = made_up("mtl,mtl-pseudo,single-task,single,labels,pseudo-half,multi", 1)
    result = systems_report.add_costs(args, study_report.summary(args))
    rows = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:8]]
            for line in systems_report.cost_table(result, SUITE)[2:]}
    v, images, labels = result["variants"], str(8 * STEPS), str(20 * STEPS)
    assert rows["MTL"][:2] == [images, labels]
    assert rows["MTL + naive pseudo labels"][:2] == [f"{images} + {images}", f"{labels} + {labels}"]
    assert rows["single-task UNets"][:2] == [images, images] and v["single-task"]["weights"] == 10 * len(ALL)
    assert rows["StableMTL"][0] == f"40 + {images}"
    assert rows["StableMTL-S + labels, surest half"][0] == f"{images} + {images}"
    assert v["pseudo-half"]["operations"] == 8 * STEPS * (len("pseudo-half") + len("single"))
    assert v["multi"]["operations"] == 8 * (5 * len("multi") + STEPS * len("single"))


def test_losses_are_relative_to_their_beginning(made_up):
    """Of a step of one task its loss, of a step of several each; running means of a twentieth of the values."""
    args = made_up("mtl", 1)
    job, = runs(args)
    assert systems_report.losses(job)["normal"] == [(1, 1.0), (1 + len(ALL), 2.0 ** -len(ALL))]
    lines = [{"step": s, "task": ["normal", "depth"], "loss": 9.0, "loss/depth": float(40 - s), "grad_norm": 1.0,
              "img_per_s": 1.0} for s in range(40)]
    (job.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = systems_report.losses(job)
    assert found.keys() == {"depth"} and len(found["depth"]) == 39
    assert found["depth"][-1] == (39, pytest.approx(1.5 / 39.5))
    table = systems_report.plateau_table(args, systems_report.curves(args))
    assert "| MTL |" in table[2] and "0.04" in table[2]
    skipped = [{"step": s, "task": ["depth"], "loss": None, "grad_norm": None, "img_per_s": 1.0} for s in range(40, 60)]
    (job.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + skipped))
    assert systems_report.losses(job) == found      # steps that fp16 skipped


@pytest.mark.parametrize("suite", ["stablemtl", "systems"])
def test_models_of_several_versions_are_told(tmp_path, suite):
    """A study that went on with other code showed all rows under the commit and the torch of its last report."""
    only = {"stablemtl": "single,multi", "systems": "stl,mtl"}[suite]
    args = study.parse(f"--suite {suite} --out {tmp_path / 'out'} --seeds 2 --only {only}".split())

    def page(commit, torch, resumed):
        """The page when the last model's config.json says so; the others are of commit aaa and torch 2.11."""
        for job in runs(args):
            job.out.mkdir(parents=True, exist_ok=True)
            (job.out / "results.json").write_text('{"results": {}}')
            (job.out / "log.jsonl").write_text('{"task": ["depth"], "loss": 1, "grad_norm": 1, "img_per_s": 1}')
            (job.out / "config.json").write_text('{"commit": "aaa", "versions": {"torch": "2.11"}}')
        told = {"commit": commit, "versions": {"torch": torch}, "resumed": resumed}
        (job.out / "config.json").write_text(json.dumps(told))
        result = study_report.summary(args)
        if suite == "systems":
            return systems_report.tables(args, result, {})[0]
        return study_report.tables(result, args.suite)[0]

    assert page("aaa", "2.11", []).endswith(", torch 2.11.")
    says = "Models were trained under commits aaa, bbb"
    assert f", torch 2.11. {says}: rows may differ" in page("aaa", "2.11", [{"commit": "bbb"}])
    assert f", torch 2.11, 2.13. {says} and torch 2.11, 2.13: rows may differ" in page("bbb", "2.13", [])


# ---- what is refused ----

@pytest.mark.parametrize("flags, says", {
    "--suite systems --only multi": "multi starts from single, which is missing",
    "--suite systems --only oracle": "the suite systems has no variant oracle",
    "--only mtl": "the suite stablemtl has no variant mtl",
    "--suite systems --only jtr-3 --tasks shading,albedo": "jtr-3 is about depth, normal, semantic, which --tasks",
    "--suite system": "--suite",
    "--suite systems --only mtl -- --base x": "for the variant mtl: --base would do nothing here",
}.items())
def test_mistakes_end_in_a_sentence(tmp_path, capsys, flags, says):
    assert run(lambda: study.main(f"--out {tmp_path / 'out'} {flags}".split())) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_suites_do_not_share_a_folder(tmp_path, capsys):
    """Rows of the same name differ: refused, also where study.json is of a time that knew one suite only."""
    def kept(suite):
        args = study.parse(f"--suite {suite} --only single --out {tmp_path / 'out'}".split())
        return run(lambda: study.keep(args) or 0)
    assert kept("stablemtl") == 0
    path = tmp_path / "out/study.json"
    for text in (path.read_text(), json.dumps({k: v for k, v in read(path).items() if k != "suite"})):
        path.write_text(text)
        before = contents(tmp_path)
        assert kept("systems") == 2 and "suite stablemtl, now systems" in capsys.readouterr().err
        assert contents(tmp_path) == before and kept("stablemtl") == 0


def test_rows_without_their_tasks_are_left_out(tmp_path):
    """By default, where --tasks has not what the row is about."""
    usual = parsed(tmp_path, "--tasks shading,albedo").only
    assert "jtr" in usual and not {"jtr-3", "single-3", *EXTRA} & set(usual)
    assert set(parsed(tmp_path).only) == VARIANTS.keys() - set(EXTRA)
    assert study.parse(["--out", str(tmp_path)]).only == [n for n in STABLEMTL.variants if n not in STABLEMTL.extra]


# ---- costs are counted, whichever system ----

class OneConvolution(System):
    """A 3x3 convolution of both frames to a task's channels."""
    kind = "one"

    def __init__(self, tasks, palette="cityscapes"):
        super().__init__(tasks, palette)
        self.conv = nn.Conv2d(6, 3, 3, padding=1)

    def maps(self, image, next_image, tasks):
        return {t: self.conv(torch.cat([image, next_image], 1)) for t in tasks}


def test_a_convolution_by_hand(monkeypatch):
    """2 x 9 x inputs x outputs per pixel forwards, the same again for its weights' gradient (images need none); per
    task."""
    monkeypatch.setattr(baselines, "SYSTEMS", {"one": OneConvolution})
    row, = bench_systems.count(bench.operations, (8, 12), ("normal", "albedo")).values()
    forward = 2 * 9 * 6 * 3 * 8 * 12
    assert row == {"weights": 9 * 6 * 3 + 3, "prediction": 2 * forward, "training": 4 * forward}
    assert "one" in bench_systems.lines({"one": row})[1]


# ---- the real thing, as small as it gets ----

@pytest.fixture(scope="module")
def finished(quick, tmp_path_factory):
    """A study of two tasks that was stopped by Ctrl-C within its second model and then continued. -> (its folder,
    train.py's command lines of the two calls, its args)"""
    out = tmp_path_factory.mktemp("systems") / "out"
    only = "mtl,mtl-pseudo,stl,single,labels,pseudo-half,pixel-diffuse"
    argv = (f"--suite systems --out {out} --tasks shading,albedo --seeds 1 --steps 2 --limit 1 --only {only} "
            f"-- {FLAGS}").split()
    calls, _ = stopped_and_continued(argv, out, "/mtl", 0)
    return out, calls, study.parse(argv)


def test_it_continues_where_it_was_stopped(finished):
    """A trunk, a student of it, single streams with and without discovered labels, one that diffuses: all have results,
    each in the report; labels are no row."""
    out, (first, second), _ = finished
    assert [named(a, out) for a in first] == ["seed0/stl", "seed0/mtl"]
    assert [named(a, out) for a in second] == [f"seed0/{n}" for n in (
        "mtl", "mtl-pseudo", "single", "pseudo-half", "pixel-diffuse")]
    assert "--resume" in second[0] and "--resume" not in second[1]
    variants = read(out / "results.json")["variants"]
    assert list(variants) == ["stl", "mtl", "mtl-pseudo", "single", "pseudo-half", "pixel-diffuse"]
    text = (out / "systems.md").read_text()
    assert all(text.count(f"| {v['title']} |") >= 3 for v in variants.values())
    kinds = {name: read(out / "seed0" / name / "config.json")["train"] for name in variants}
    assert kinds["mtl-pseudo"]["teacher"] == str(out / "seed0/mtl") and kinds["mtl-pseudo"]["discover"] == "labels"
    assert kinds["pseudo-half"]["pseudo"] == str(out / "seed0/labels/labels")
    assert {c["steps"] for c in kinds.values()} == {2} and kinds["pixel-diffuse"]["ddim_steps"] == 10
    assert variants["mtl"]["images"] == 4 and variants["mtl"]["labels"] == 8      # rooms have both
    assert variants["single"]["labels"] == 4


def test_its_pictures(finished):
    """The trunks' Delta_m, losses, and a scene through all systems, with something drawn in each."""
    out, _, _ = finished
    pictures = re.findall(r"!\[.*\]\((.*)\)", (out / "systems.md").read_text())
    assert pictures == ["delta_m_trunks.png", "losses.png", "scene.png"]    # no single-task UNets: no other zero line
    for name in pictures:
        with Image.open(out / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 5


def test_operations_are_those_of_the_bench(finished, monkeypatch):
    """Of trained checkpoints: a trunk's equal tools.bench's count of a fresh one; a student's have its teacher's two
    forward passes (upright and mirrored) beside them; a single stream's predictions equal its count without numbers,
    attention included, which the CPU's own kernel hides from the counter."""
    out, _, args = finished
    size, tasks, seed = (16, 24), args.tasks, out / "seed0"
    monkeypatch.setattr(baselines, "SYSTEMS", {name: baselines.SYSTEMS[name] for name in ("stl", "mtl")})
    bare = bench_systems.count(bench.operations, size, tasks)
    for name in ("stl", "mtl"):
        assert study_cost.step(seed / name, 3) == 3 * bare[name]["training"]
        assert study_cost.prediction(seed / name) == {k: bare[name][k] for k in ("weights", "prediction")}
    taught = study_cost.step(seed / "mtl-pseudo", 3)
    assert taught == 3 * (bare["mtl"]["training"] + 2 * bare["mtl"]["prediction"])
    model, image = StableMTL.load(seed / "single").to("meta"), torch.empty(1, 3, *size, device="meta")
    assert study_cost.prediction(seed / "single")["prediction"] == bench.operations(model.predict, image, image)
    z = torch.empty(1, 4, 8, 12, device="meta")
    forward = bench.operations(model, z, z, tasks[-1:])
    assert 2 * 2 * forward < study_cost.step(seed / "single", 2) <= 3 * 2 * forward
    assert study_cost.step(seed / "pixel-diffuse", 2) == pytest.approx(study_cost.step(seed / "single", 2), rel=0.05)
    diffuse = study_cost.prediction(seed / "pixel-diffuse")["prediction"]
    assert diffuse > 9 * bench.operations(model, z, z, tasks)       # ten passes


def test_labels_of_an_image(finished):
    """Counted from the draws of a run: rooms, which have shading, have albedo as well; a single stream takes one."""
    out, _, args = finished
    assert [study_cost.labels_per_image(out / "seed0" / name) for name in ("stl", "single")] == [2, 1]
    assert Path(args.out) == out and args.suite is SUITE
