"""The other systems of the papers through the three commands: trained, resumed, evaluated, sampled, refused."""
import json
import re
import shutil

import numpy as np
import pytest
import raw
import torch
from kill import compare, log_lines
from PIL import Image
from runs import stop_at, unfinished

import baselines
import evaluate
import sample
import train
from cli import run
from model import StableMTL
from readers.hypersim import Hypersim
from readers.toyworld import ALL
from readers.virtual_kitti_2 import VirtualKitti2
from tasks import TASKS

pytestmark = pytest.mark.usefixtures("quick")
SYSTEMS = tuple(baselines.SYSTEMS)
TINY = ("--stage 1 --steps 2 --scenes 2 --size 16x24 --batch 3 --micro 2 --save-every 2 --val-samples 1 "
        "--picture-every 0 --workers 0 --warmup 2 --threads 1 --processes 1")
FEWER = {"stl": "--tasks normal,optical_flow,albedo"}      # a network each


@pytest.fixture
def go(tmp_path, capsys):
    """go("--system mtl ...") -> (exit code, stdout, stderr) of a tiny training in tmp_path/out."""
    def call(text, tiny=TINY):
        code = run(lambda: train.main(f"{tiny} --out {tmp_path / 'out'} {text}".split()))
        return (code, *capsys.readouterr())
    return call


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory):
    """trained(system) -> folder of a finished tiny run, made once. Do not write there."""
    made = {}

    def call(system):
        if system not in made:
            made[system] = tmp_path_factory.mktemp(system) / "out"
            argv = f"{TINY} --steps 4 --system {system} {FEWER.get(system, '')} --out {made[system]}".split()
            assert train.main(argv) == 0
        return made[system]
    return call


@pytest.fixture
def photos(tmp_path):
    """Two images of one size, no multiple of anything."""
    rng, names = np.random.default_rng(0), ("photo", "next")
    for name in names:
        Image.fromarray(rng.integers(0, 256, (37, 51, 3), np.uint8)).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in names]


# ---- the three commands ----

@pytest.mark.parametrize("system", SYSTEMS)
def test_three_commands(trained, photos, tmp_path, system, capsys):
    """Trained on the toy worlds; evaluated by the same metrics beside the same trivial rows, with Delta_m; sampled."""
    out = trained(system)
    assert json.loads((out / "model.json").read_text())["kind"] == system
    assert (out / "best" / "model.json").is_file()
    argv = f"--ckpt {out} --limit 2 --trivial 2 --workers 0 --json {tmp_path / 'a.json'}".split()
    assert evaluate.main(argv) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    tasks = baselines.load(out).tasks
    assert report["results"]["real"].keys() == set(tasks) == report["trivial"]["real"]["constant"].keys()
    assert set(tasks) == set(ALL) or system in FEWER
    assert f"system {system}" in capsys.readouterr().out
    assert evaluate.main([*argv, "--baseline", str(tmp_path / "a.json")]) == 0      # all is computed already
    assert json.loads((tmp_path / "a.json").read_text()) == report | {"delta_m": 0}
    assert sample.main([*photos, "--ckpt", str(out), "--output", str(tmp_path / "maps")]) == 0
    for t in tasks:
        shape = (37, 51) if TASKS[t].channels == 1 else (37, 51, TASKS[t].channels)
        assert np.load(tmp_path / "maps/photo" / f"{t}.npy").shape == shape
    maps = baselines.load(out).infer(photos[0], photos[1], confidence=True, pixels=True, camera=(50, 25, 18, 0.5, 80))
    scales = {f"scale_{t}" for t in tasks if TASKS[t].frames == 2}
    assert set(tasks) | {f"confidence_{t}" for t in tasks} <= maps.keys() and maps.keys() & scales


@pytest.mark.parametrize("system", SYSTEMS)
def test_resume_equals_uninterrupted(trained, go, tmp_path, monkeypatch, system):
    """Ctrl-C within a step, then --resume: weights, Adam and log are those of four steps."""
    stop_at(monkeypatch, "within", 2)
    code, _, error = go(f"--steps 4 --system {system} {FEWER.get(system, '')}")
    assert code == 130 and "--resume" in error
    assert train.main(["--resume", "--out", str(tmp_path / "out")]) == 0
    assert compare(trained(system), tmp_path / "out") == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_real_formats(go, tmp_path, monkeypatch, system):
    """On datasets as downloaded, made small: two that label different tasks, the second one also motion; evaluated on
    a third."""
    raw.hypersim(tmp_path / "data", frames=[("ai_001_001", "cam_00", k, "train") for k in (0, 1)])
    raw.virtual_kitti(tmp_path / "data")
    for reader in (Hypersim, VirtualKitti2):
        monkeypatch.setattr(reader, "size", (16, 24))
    assert go(f"--system {system} --data {tmp_path / 'data'} --val-samples 0",
              "--stage 1 --steps 1 --batch 2 --micro 2 --threads 1 --picture-every 1")[0] == 0
    assert baselines.load(tmp_path / "out").kind == system
    assert list((tmp_path / "out/pictures").iterdir())
    labels = raw.own_folder(tmp_path / "test", h=16, w=24)
    argv = f"--ckpt {tmp_path / 'out'} --data {tmp_path / 'test'} --limit 1 --workers 0 --json {tmp_path / 'r.json'}"
    assert evaluate.main(argv.split()) == 0
    assert json.loads((tmp_path / "r.json").read_text())["results"]["folder"].keys() == {"semantic", *labels}


@pytest.mark.parametrize("system", SYSTEMS)
def test_predictions_depend_on_nothing_else(trained, system):
    """Of an image: not on the others of its batch, nor on `rows`, nor on the other tasks asked for; any size works."""
    model = baselines.load(trained(system))
    pair = torch.rand(2, 3, 3, 13, 18) * 2 - 1
    whole = model.predict(*pair)
    assert {t: x.shape for t, x in whole.items()} == {t: (3, TASKS[t].channels, 13, 18) for t in model.tasks}
    for other, part in ((model.predict(*pair, rows=1), slice(None)), (model.predict(*pair[:, 1:2]), slice(1, 2))):
        assert all(torch.allclose(whole[t][part], x, atol=1e-5) for t, x in other.items())
    assert model.predict(pair[0]).keys() == {t for t in model.tasks if TASKS[t].frames == 1}
    one = model.predict(*pair, tasks=["albedo"])
    assert one.keys() == {"albedo"} and torch.allclose(one["albedo"], whole["albedo"], atol=1e-5)


@pytest.mark.parametrize("system", ["mtl", "jtr", "diffusionmtl"])
def test_processes_change_no_loss(trained, go, tmp_path, system):
    """Two processes, each with a part of every batch, end where one does, whatever is drawn."""
    argv = TINY.replace("--processes 1", "--processes 2")
    assert go(f"--steps 4 --system {system}", argv)[0] == 0
    one, two = (log_lines(folder) for folder in (trained(system), tmp_path / "out"))
    assert [e["loss"] for e in one] == pytest.approx([e["loss"] for e in two], rel=1e-3)


@pytest.mark.parametrize("system, options", [("jtr", "distance=0,reconstruction=0"), ("hitts", "inter=no,oe=no"),
                                             ("diffusionmtl", "steps=1,condition=own,diffuse=predictions,noise=no")])
def test_options_are_kept(go, tmp_path, system, options):
    """In the checkpoint, which loads without them."""
    assert go(f"--system {system} --options {options} --steps 1 --tasks semantic,normal,depth --val-samples 0")[0] == 0
    model, spec = baselines.load(tmp_path / "out"), json.loads((tmp_path / "out/model.json").read_text())
    assert vars(model.options) == spec["options"] == vars(model.Options(**baselines.parse_options(system, options)))
    assert vars(model.Options()) != spec["options"]


# ---- teachers ----

@pytest.mark.parametrize("system, wanted", [("stl", "labels"), ("mtl", "labels"), ("mtl", "true"), ("mtl", "light"),
                                            ("hitts", "light"), ("hitts", "labels"),
                                            ("hitts", "features"), ("hitts", "both"), ("hitts", "true")])
def test_discovery(trained, go, tmp_path, capsys, system, wanted):
    """A new network from scratch learns what there is to discover; evaluate.py says so."""
    teacher = "" if wanted == "light" or (system, wanted) == ("mtl", "true") else f"--teacher {trained(system)}"
    discover = "" if wanted == "labels" and system != "hitts" else f"--discover {wanted}"
    flags = f"--system {system} {FEWER.get(system, '')} {teacher} {discover}"
    assert go(f"{flags} --batch 6 --steps 1 --val-samples 0")[0] == 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["train"]
    assert settings["discover"] == wanted
    entry = log_lines(tmp_path / "out")[0]
    terms = {k.removeprefix("loss/").split()[0] for k in entry if k.startswith("loss/")} - set(TASKS)
    features = {"feature"} if system == "hitts" and wanted in ("features", "both", "true") else set()
    assert terms == features | ({"pseudo"} if wanted not in ("features", "light") else set())
    assert evaluate.main(f"--ckpt {tmp_path / 'out'} --limit 1 --trivial 0 --workers 0".split()) == 0
    assert f"discover {wanted}" in capsys.readouterr().out


def test_a_student_is_not_its_teacher_again(trained, tmp_path):
    """It starts from weights of its own: with the teacher's, its features would agree from the first step on."""
    flags = f"{TINY} --system mtl --seed 3 --out {tmp_path / 'out'}".split()
    cfg = [train.parse_args([*flags, *more]) for more in ([], ["--teacher", str(trained("mtl"))])]
    tasks = baselines.load(trained("mtl")).tasks
    teacher, again, student = (baselines.build(c, tasks, 0).state_dict() for c in (cfg[0], *cfg))
    assert all(torch.equal(x, again[name]) for name, x in teacher.items())
    assert not any(torch.equal(x, student[name]) for name, x in teacher.items() if x.ndim > 1)


def test_a_control_sees_the_light_of_students(go, tmp_path, monkeypatch):
    """--discover light: the frames of a student, its labels, and nothing else."""
    assert go("--system mtl --steps 1 --val-samples 0")[0] == 0
    plain = log_lines(tmp_path / "out")[0]
    assert go("--system mtl --steps 1 --val-samples 0 --discover light --overwrite")[0] == 0
    light = log_lines(tmp_path / "out")[0]
    assert plain["task"] == light["task"] and plain.keys() == light.keys() and plain["loss"] != light["loss"]
    monkeypatch.setattr(baselines.teacher, "relit", lambda frames, keys: frames)
    assert go("--system mtl --steps 1 --val-samples 0 --discover light --overwrite")[0] == 0
    assert log_lines(tmp_path / "out")[0]["loss"] == plain["loss"]


def test_discovery_resumes(trained, go, tmp_path, monkeypatch):
    """Interrupted and continued, it ends as undisturbed: the same thresholds, the same light."""
    flags = f"--system hitts --teacher {trained('hitts')} --steps 4"
    assert go(f"{flags} --out {tmp_path / 'whole'}")[0] == 0
    stop_at(monkeypatch, "within", 2)
    assert go(flags)[0] == 130
    assert train.main(["--resume", "--out", str(tmp_path / "out")]) == 0
    assert compare(tmp_path / "whole", tmp_path / "out") == []


def test_a_teacher_is_finished_and_outlives_its_student(trained, go, tmp_path, capsys):
    """`--teacher X --out X --overwrite` replaced its own teacher, also under another name; one that was stopped taught
    as if it were finished."""
    out, student = shutil.copytree(trained("mtl"), tmp_path / "out"), f"--out {tmp_path / 'student'}"
    (tmp_path / "alias").symlink_to(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for teacher in (out, f"{out}/best/../", tmp_path / "alias", out / "best"):
        code, _, error = go(f"--system mtl --teacher {teacher} --overwrite")
        assert code == 2 and f"--teacher {teacher} is what a run in --out {out} replaces: name another --out" in error
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    out = unfinished(out, tmp_path / "stopped")
    code, _, error = go(f"--system mtl --teacher {out} {student}")
    assert code == 2 and f"the one in {out} has done 4 of 9 steps: finish it first with" in error
    assert not (tmp_path / "student").exists() and f"--resume --out {out} (--steps 4 ends it there)" in error
    assert train.main(f"--resume --out {out} --steps 4".split()) == 0
    assert go(f"--system mtl --teacher {out} {student} --steps 1 --val-samples 0")[0] == 0


def test_the_upper_bound_has_dropped_labels_too(go, tmp_path):
    """--discover true left those of --drop out, which a teacher labels: here rooms' depth is all there is to discover,
    for streets has it and things labels neither task."""
    flags = "--system mtl --discover true --tasks shading,depth --drop rooms:depth,streets:shading"
    assert go(f"{flags} --batch 8 --steps 1 --val-samples 0")[0] == 0
    entry = log_lines(tmp_path / "out")[0]
    assert {"loss/pseudo depth", "loss/depth", "loss/shading"} <= entry.keys()


def test_other_light_alone_needs_no_cache():
    """`--discover light --data x` was told that its teacher looks at images."""
    flags = "--stage 1 --system mtl --discover light --data x --cache"
    assert [train.parse_args([*flags.split(), cache]).discover for cache in ("none", "auto")] == ["light"] * 2


@pytest.mark.parametrize("flags, says", {
    "--system jtr --teacher TEACHER": "jtr discovers nothing; it is for stl, mtl, hitts",
    "--system mtl --discover labels": "--discover labels needs a --teacher: a finished checkpoint of mtl",
    "--system mtl --discover both --teacher TEACHER": "--discover both: mtl can only take labels, true, light",
    "--system mtl --discover true --teacher TEACHER": "--teacher would do nothing here",
    "--system mtl --discover light --teacher TEACHER": "with --discover light mtl learns nothing from it",
    "--system mtl --discover true --data x": "--discover true is for the toy worlds",
    "--system mtl --teacher TEACHER --data x": "give their cache a --cache <folder>",
    "--system mtl --teacher nowhere": "no checkpoint in nowhere",
    "--system hitts --teacher TEACHER": "is a mtl of semantic, normal.* expected a finished hitts",
    "--system mtl --tasks normal,depth --teacher TEACHER": "expected a finished mtl of normal, depth",
    "--system mtl --teacher DAMAGED": "damaged is incomplete: no model.safetensors",
    "--teacher TEACHER": "it belongs to the other systems",
}.items())
def test_teachers_that_cannot_teach_are_refused(trained, go, tmp_path, flags, says):
    """Before anything is written: some were told only when the cache had been built."""
    tiny, damaged = TINY.replace("--scenes 2 --size 16x24", "") if "--data" in flags else TINY, tmp_path / "damaged"
    shutil.copytree(trained("mtl"), damaged, ignore=shutil.ignore_patterns("model.safetensors"))
    code, _, error = go(flags.replace("TEACHER", str(trained("mtl"))).replace("DAMAGED", str(damaged)), tiny)
    assert code == 2 and re.search(says, error) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# ---- what is refused ----

@pytest.mark.parametrize("flags, says", {
    "--system mlt": "--system",
    "--system mtl --stage 2": "--system mtl is trained in one go",
    "--system mtl --base x": "--base would do nothing here: it belongs to StableMTL",
    "--system mtl --no-isolation --loss task": "--isolation, --loss would do nothing here",
    "--system mtl --rho 0.1": "it belongs to --stage 2",
    "--system mtl --options steps=2": "not an option of mtl (it has none)",
    "--system jtr --options w=2": "not an option of jtr (distance, reconstruction)",
    "--system jtr --options distance=x": "--options distance=x: expected a number from 0",
    "--system diffusionmtl --options steps=-1": "--options steps=-1: expected a whole number from 0",
    "--system diffusionmtl --options condition=some": "condition=some: expected one of all, own, none",
    "--system diffusionmtl --options steps=0,noise=no": "noise would do nothing here, with steps=0",
    "--system diffusionmtl --options condition=own,steps=0": "condition would do nothing here, with steps=0",
    "--system hitts --options oe=maybe": "oe=maybe: expected one of yes, no",
    "--options steps=2": "it belongs to the other systems",
    "--system mtl --drop rooms:shading": "no training labels for shading",
}.items())
def test_flags_that_would_do_nothing_are_refused(go, tmp_path, flags, says):
    code, _, error = go(flags)
    assert code == 2 and says in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_system(trained, tiny_ckpt_1, capsys):
    """Another system does not replace it, stage 2 does not start from it, StableMTL's loader says what it is."""
    out = trained("mtl")
    for flags, says in {f"--system stl --overwrite --out {out}": "holds a model of the system mtl, not stl",
                        f"--stage 2 --out {out}": "holds a model of the system mtl, not stablemtl",
                        f"--system mtl --out {out}": "already holds stage 1",
                        f"--init {out} --out {out}2": "and this is about StableMTL",
                        f"--system mtl --overwrite --out {tiny_ckpt_1}": "of the system stablemtl, not mtl"}.items():
        argv = f"{TINY} {flags}".replace("--stage 1 ", "" if "--stage 2" in flags else "--stage 1 ").split()
        assert run(lambda argv=argv: train.main(argv)) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="of the system mtl"):
        StableMTL.load(out)
    for command in (evaluate, sample):
        argv = ["--ckpt", str(out), "--stage", "2", *["--toy", "real:1"] * (command is sample)]
        assert run(lambda command=command, argv=argv: command.main(argv)) == 2
        assert "has no stage 2" in capsys.readouterr().err
    assert run(lambda: sample.main(["--ckpt", str(out), "--toy", "real:1", "--vae-slicing"])) == 2
    assert "has no VAE" in capsys.readouterr().err
    assert run(lambda: sample.main(["--ckpt", str(out), "--toy", "real:1", "--attention"])) == 2
    assert "gave the system mtl, which has none: leave it out" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    """Cut short, of other options, or incomplete: one sentence each."""
    baselines.load(trained("mtl")).save(tmp_path)
    spec = json.loads((tmp_path / "model.json").read_text())
    for wrong, says in (({"kind": "xtc"}, "the system xtc, which is none of stablemtl, stl"),
                        ({"options": {"depth": 3}}, "damaged.*model.json does not describe a mtl"),
                        ({"tasks": ["normal"]}, "damaged.*unexpected")):
        (tmp_path / "model.json").write_text(json.dumps(spec | wrong))
        with pytest.raises(ValueError, match=says):
            baselines.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(spec))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged.*model.safetensors cannot be read"):
        baselines.load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="incomplete: no model.safetensors"):
        baselines.load(tmp_path)
