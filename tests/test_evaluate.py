"""The evaluation command, and a folder of one's own from images to numbers."""
import json
import shutil
import weakref

import numpy as np
import pytest
from PIL import Image
from test_house import ROOT, modules

import evaluate
import toy
import train
from cli import run
from evaluate import PAPER_TASKS
from inference import report
from model import StableMTL
from readers.folder import Folder
from readers.toyworld import ALL, WORLDS, ToyWorld
from tasks import TASKS
from training import about


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    """Three toy scenes written as files, all of them in every split: images/, next/, and every label of a Folder but
    normals."""
    root = tmp_path_factory.mktemp("own")
    world = ToyWorld("streets", "train", 3, (32, 48), all_labels=True)
    for i in range(3):
        s = world.load(i, world.tasks)
        for folder, key in (("images", "image"), ("next", "next")):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(s[key]).save(root / folder / f"s{i}.png")
        for task in {*world.tasks} & {*Folder.suffixes} - {"normal"}:
            (root / task).mkdir(exist_ok=True)
            label = s["labels"][task]
            if task == "semantic":
                Image.fromarray(label[..., 0]).save(root / task / f"s{i}.png")
            else:
                np.save(root / task / f"s{i}.npy", np.where(s["valid"][task][..., None], label, np.nan))
    (root / "train.txt").write_text("s0\ns1\ns2\n")     # the others have no list
    return root


@pytest.fixture
def go(capsys):
    """go(command line) -> (exit code, stdout, stderr); few samples, no trivial rows."""
    def call(flags, *more):
        argv = [*flags.split(), *map(str, more), "--limit", "1", "--trivial", "0", "--workers", "0"]
        return (run(lambda: evaluate.main(argv)), *capsys.readouterr())
    return call


def test_toy_results_are_complete(tiny_ckpt, tmp_path, capsys):
    """Every labelled cell of the four worlds is there; against itself Delta_m is 0."""
    flags = f"--ckpt {tiny_ckpt} --limit 2 --trivial 2 --workers 0 --json {tmp_path / 'a'}".split()
    assert evaluate.main(flags) == 0
    report = json.loads((tmp_path / "a").read_text())
    results = report["results"]
    assert {w: set(r) for w, r in results.items()} == {w: set(tasks) for w, tasks in WORLDS.items()}
    assert set(report["trivial"]["real"]["constant"]) == set(ALL) and report["unfinished"] == []
    assert evaluate.main([*flags, "--baseline", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a").read_text()) == report | {"delta_m": 0}
    assert "Delta_m" in capsys.readouterr().out


def test_unreadable_samples_are_named_or_counted(own_data, tiny_base, tmp_path, capsys):
    """A truncated file stops training and evaluation by name; --skip-bad counts it in the training's summary and names
    it in results.json."""
    root, out = shutil.copytree(own_data, tmp_path / "own"), tmp_path / "out"
    bad = root / "depth" / "s1.npy"
    bad.write_bytes(bad.read_bytes()[:500])
    flags = (f"--data {root} --base {tiny_base} --out {out} --tasks depth --steps 1 --batch 8 --micro 8 "
             "--val-samples 0 --workers 0 --picture-every 0").split()
    evaluation = ["--ckpt", str(out), "--data", str(root), "--workers", "0"]
    assert train.main([*flags, "--skip-bad"]) == 0
    assert "; 1 samples skipped;" in capsys.readouterr().out
    assert evaluate.main([*evaluation, "--skip-bad"]) == 0
    assert run(lambda: train.main([*flags, "--overwrite"])) == 2
    assert f"folder sample 1: {bad} is not a readable NPY file" in capsys.readouterr().err
    assert run(lambda: evaluate.main([*evaluation, "--overwrite"])) == 2
    assert f"folder:1: {bad} is not" in capsys.readouterr().err
    report = json.loads((out / "results.json").read_text())
    assert report["results"]["folder"]["depth"]["images"] == 2 and len(report["skipped"]) == 2
    label, image = report["skipped"]
    assert label.startswith("folder: training label folder:1: ") and image.startswith(f"folder:1: {bad}")


def test_interrupted_evaluation_goes_on(tiny_ckpt_1, tmp_path, monkeypatch, capsys):
    """After Ctrl-C the same command computes only the missing test sets and ends in the file of an undisturbed run;
    --overwrite computes all."""
    computed, stop, original = [], None, evaluate.evaluate

    def counted(model, reader, *args, **how):
        computed.append(reader.name)
        if reader.name == stop:
            raise KeyboardInterrupt
        return original(model, reader, *args, **how)
    monkeypatch.setattr(evaluate, "evaluate", counted)

    def go(name, *more):
        computed.clear()
        flags = f"--ckpt {tiny_ckpt_1} --limit 1 --trivial 1 --workers 0 --json {tmp_path / name}".split()
        return run(lambda: evaluate.main([*flags, *more])), capsys.readouterr().err
    assert go("whole")[0] == 0 and computed == ["rooms", "streets", "things", "real"]
    stop = "things"
    code, said = go("twice")
    assert code == 130 and "2 of 4 test sets" in said
    assert json.loads((tmp_path / "twice").read_text())["unfinished"] == ["things", "real"]
    code, said = go("other", "--baseline", str(tmp_path / "twice"))
    assert code == 2 and "unfinished" in said
    stop = None
    for expected in (["things", "real"], []):
        assert go("twice")[0] == 0 and computed == expected
        assert (tmp_path / "twice").read_bytes() == (tmp_path / "whole").read_bytes()
    # one of them made anew: what stands after it outlives another Ctrl-C
    report = json.loads((tmp_path / "whole").read_text())
    stop, report["made_from"]["streets"] = "streets", "another"
    (tmp_path / "twice").write_text(json.dumps(report))
    assert go("twice")[0] == 130 and computed == ["streets"]
    now = json.loads((tmp_path / "twice").read_text())
    assert list(now["results"]) == ["rooms", "things", "real"] and now["unfinished"] == ["streets"]
    stop = None
    assert go("twice")[0] == 0 and computed == ["streets"]
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "whole").read_bytes()
    stop = "things"
    assert go("twice", "--overwrite")[0] == 130 and computed == ["rooms", "streets", "things"]
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "whole").read_bytes()
    stop = "rooms"
    for more in (["--overwrite"], ["--limit", "2"], ["--trivial", "2"], ["--split", "val"]):
        assert go("twice", *more)[0] == 130 and computed == ["rooms"]


def test_results_of_other_files_are_not_reused(own_data, tmp_path):
    """A corrected label, or as many other stems in test.txt, changes the fingerprint, also where it lies in a training
    set behind the trivial predictors: the results of the old ones were kept."""
    root = shutil.copytree(own_data, tmp_path / "own")
    lists = {split: root / f"{split}.txt" for split in ("test", "train")}
    for split, path in lists.items():
        path.write_text("s0\n" if split == "test" else "s1\n")

    def key():
        test, train = (Folder(root, split) for split in lists)
        return report.fingerprints([], [test], [train])["folder"]
    seen = [key()]
    assert key() == seen[0]
    for name in ("s0", "s1"):
        np.save(root / f"depth/{name}.npy", np.load(root / f"depth/{name}.npy") * 2)
        seen.append(key())
    for path in lists.values():
        path.write_text("s2\n")
        seen.append(key())
    assert len(set(seen)) == 5


@pytest.mark.parametrize("stage", [1, 2])
def test_results_of_other_weights_are_not_reused(tiny_ckpt, tmp_path, stage):
    """A test set's fingerprint changes with any weight of its stage, the size and the samples, and with nothing else
    there. (Stage 1's changed with stage 2's weights, and with best/; --rows threw finished test sets away.)"""
    copy = shutil.copytree(tiny_ckpt, tmp_path / "copy")
    args = evaluate.parse(["--ckpt", str(copy), "--limit", "1", "--stage", str(stage)])
    args.device = "cpu"
    world = ToyWorld("rooms", "test", 2)

    def key(size=(32, 48), reader=world):
        common = report.result_dependencies(args, copy, size, report.weights_of(copy, stage))
        return report.fingerprints(common, [reader], [])[reader.name]
    first = key()
    (copy / "results.json").write_text("{}")
    for name in ("best", "decoder"):
        (copy / name).mkdir()
        (copy / name / "config.json").write_text("{}")
    args.json, args.rows, args.batch = "elsewhere", 1, 3
    others = key((16, 24)), key(reader=ToyWorld("rooms", "test", 3)), key(reader=ToyWorld("rooms", "val", 2))
    assert key() == first and len({first, *others}) == 4
    for path in sorted(copy.rglob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        before, first = first, key()
        of_stage_2 = path.parent.name == "main_unet" or path.name == "task_attention.safetensors"
        assert (first == before) == (stage == 1 and of_stage_2), path


def test_memory_stays_level(tiny_ckpt_1):
    """However many samples a test set has, only a few batches of them are in memory at a time."""
    class Counted(ToyWorld):
        seen, most = [], 0

        def load(self, *args, **options):
            sample = super().load(*args, **options)
            self.seen += [weakref.ref(x) for x in sample["labels"].values()]
            Counted.most = max(self.most, sum(r() is not None for r in self.seen))
            return sample
    evaluate.evaluate(StableMTL.load(tiny_ckpt_1), Counted("things", "test", 16, (16, 24)), batch=2, workers=0)
    labels = len(WORLDS["things"])
    assert len(Counted.seen) == 16 * labels and Counted.most <= labels * 3 * 2      # of three batches of two


def test_batches_and_rows_change_nothing(tiny_ckpt, tmp_path):
    """The numbers do not depend on how many images or tasks pass the network at once."""
    common = ["--ckpt", str(tiny_ckpt), "--limit", "2", "--trivial", "0", "--workers", "0"]
    evaluate.main([*common, "--json", str(tmp_path / "a"), "--batch", "2"])
    evaluate.main([*common, "--json", str(tmp_path / "b"), "--batch", "1", "--rows", "1"])
    a, b = (evaluate.by_task(json.loads((tmp_path / n).read_text())["results"]) for n in "ab")
    for task in a:
        assert a[task] == pytest.approx(b[task], rel=1e-3)


def test_the_round_trip_with_a_perfect_codec(tiny_model, monkeypatch):
    """Were the VAE lossless, the round trip would be perfect: 100% of classes kept, no angular or flow error."""
    for part in ("encode", "decode"):
        monkeypatch.setattr(StableMTL, part, lambda self, x: x)
    streets = ToyWorld("streets", "test", 2, (32, 48))
    results, _, _ = evaluate.evaluate(tiny_model, streets, batch=2, workers=0, codec=True)
    assert results["semantic"]["mIoU"] == 100 and results["semantic"]["accuracy"] == 100
    assert results["normal"]["mAE"] < 0.1 and results["optical_flow"]["EPE"] < 1e-3
    assert results["depth"]["PSNR"] == pytest.approx(106.02, abs=0.1)


def test_own_folder_trains_and_evaluates(own_data, tiny_base, tmp_path, capsys):
    """Images plus a subset of label folders go through both stages and the evaluation; unlabelled tasks are absent."""
    out, labelled = tmp_path / "out", [t for t in PAPER_TASKS if t != "normal"]
    common = (f"--data {own_data} --base {tiny_base} --out {out} --steps 2 --batch 2 --micro 2 --val-samples 1 "
              f"--workers 0 --picture-every 0 --tasks {','.join(labelled)}").split()
    assert train.main(["--stage", "1", *common]) == 0
    assert train.main(["--stage", "2", *common, "--cache", str(tmp_path / "cache")]) == 0
    assert evaluate.main(["--ckpt", str(out), "--data", str(own_data), "--workers", "0"]) == 0
    results = json.loads((out / "results.json").read_text())["results"]["folder"]
    assert set(results) == set(labelled) and all(r["images"] == 3 for r in results.values())


# ---- which data, and where results go ----

def trained_on(data, checkpoint, folder, size=(32, 48), told=None):
    """A copy of a checkpoint, that says it was trained on this data, at this size, as --size told or not."""
    shutil.copytree(checkpoint, folder)
    stage = 2 if (folder / "main_unet").is_dir() else 1
    settings = {"stage": stage, "steps": 1, "batch": 1, "seed": 0, "data": str(data), "size": told}
    (folder / "config.json").write_text(json.dumps({"train": settings, "stage1": None, "size": size}))
    return folder


def test_the_checkpoints_own_data_is_the_default(own_data, tiny_ckpt_1, tmp_path, go, monkeypatch):
    """A model trained on one's own folder was evaluated on the toy worlds unless told otherwise."""
    monkeypatch.chdir(own_data.parent)
    out = trained_on(own_data.name, tiny_ckpt_1, tmp_path / "out")
    code, said, _ = go(f"--ckpt {out}")
    assert code == 0 and f"test split of {own_data.resolve()}" in said and "| folder | depth |" in said
    without = ", ".join(t for t in TASKS if not (own_data / t).is_dir())
    assert f"not scored, for lack of test labels: {without}\n" in said and "not under" not in said
    code, said, _ = go(f"--ckpt {out} --data toy")
    assert code == 0 and "test split of the toy worlds" in said and "| real | depth |" in said
    assert {p.name for p in out.glob("*.json")} == {"config.json", "model.json", "results.json", "results_toy.json"}
    monkeypatch.chdir(tmp_path)
    code, _, error = go(f"--ckpt {out}")
    assert code == 2 and f"was trained on {tmp_path / own_data.name}, which is not here" in error
    code, said, error = go(f"--ckpt {out} --data {own_data}")
    assert code == 0 and (out / f"results_{own_data.name}.json").is_file()


def test_the_size_of_training_goes_with_the_data(own_data, tiny_ckpt_1, tmp_path, go):
    """A model that was told --size was evaluated at the images' own size where its data had moved."""
    out = trained_on(own_data, tiny_ckpt_1, tmp_path / "out", (16, 24), "16x24")
    moved = shutil.copytree(own_data, tmp_path / "moved")
    assert go(f"--ckpt {out} --trivial 0")[0] == go(f"--ckpt {out} --data {moved} --trivial 0")[0] == 0
    here, there = (json.loads((out / f"results{name}.json").read_text())["results"] for name in ("", "_moved"))
    assert here == there
    out = trained_on(own_data, tiny_ckpt_1, tmp_path / "untold", (16, 24))
    assert go(f"--ckpt {out} --data {moved} --trivial 0")[0] == 0       # at the size of the images: not as above
    assert json.loads((out / "results_moved.json").read_text())["results"] != here


def test_results_lie_side_by_side(own_data, tiny_ckpt, tiny_ckpt_1, tmp_path, go):
    """--split val, --stage 1 and --data replaced each other's results, two roots of one name too."""
    out, expected = trained_on("", tiny_ckpt, tmp_path / "out"), {}
    for folder in ("a", "b"):
        shutil.copytree(own_data, tmp_path / folder / "own")
    for flags, name in (("", "results"), ("--split val", "results_val"), ("--stage 1", "results_stage1"),
                        ("--stage 1 --split val", "results_stage1_val"), ("--codec", "codec"),
                        (f"--data {tmp_path}/a/own", "results_own"), (f"--data {tmp_path}/b/own", "results_own_2"),
                        (f"--data {tmp_path}/b/../a/own --overwrite", "results_own")):
        assert go(f"--ckpt {out} {flags}")[0] == 0
        files = {p.name: p.read_bytes() for p in out.glob("*.json")}
        changed = {n for n in files if files[n] != expected.get(n)} - {"config.json", "model.json"}
        assert changed <= {f"{name}.json"} and f"{name}.json" in files
        expected = files
    for name, stage, split in (("results", 2, "test"), ("results_stage1_val", 1, "val")):
        report = json.loads((out / f"{name}.json").read_text())
        assert (report["stage"], report["split"], report["data"]) == (stage, split, "toy")
    assert json.loads((out / "results_own_2.json").read_text())["data"] == str(tmp_path / "b" / "own")


def test_a_baseline_is_checked_before_the_work(tiny_ckpt_1, tmp_path, go, monkeypatch):
    """--baseline paper on the toy worlds, or a foreign file, failed when everything was computed, without the table. Of
    a fitting one that lacks test sets, the others count."""
    a = tmp_path / "a.json"
    assert go(f"--ckpt {tiny_ckpt_1} --json {a}")[0] == 0
    report = json.loads(a.read_text())
    rooms, real = report["results"]["rooms"], report["results"]["real"]
    report["results"] = {"rooms": {"depth": rooms["depth"]}, "elsewhere": real}
    (tmp_path / "few.json").write_text(json.dumps(report))
    code, said, _ = go(f"--ckpt {tiny_ckpt_1} --json {a} --baseline {tmp_path / 'few.json'}")
    assert code == 0 and f"Delta_m against {tmp_path / 'few.json'} over 1 tasks: +0.00 %" in said
    report["results"]["rooms"]["depth"]["AbsRel"] = 0
    (tmp_path / "zero.json").write_text(json.dumps(report))
    code, said, error = go(f"--ckpt {tiny_ckpt_1} --json {a} --baseline {tmp_path / 'zero.json'}")
    assert code == 2 and "| rooms | depth |" in said and "baseline above zero" in error
    report["results"]["rooms"]["depth"]["images"] = 99
    (tmp_path / "more.json").write_text(json.dumps(report))
    code, said, error = go(f"--ckpt {tiny_ckpt_1} --json {a} --baseline {tmp_path / 'more.json'}")
    assert code == 2 and "Delta_m against" not in said and "more.json has 99 images of rooms, depth, and this" in error
    monkeypatch.setattr(evaluate, "evaluate", lambda *a: pytest.fail("computed before the baseline was looked at"))
    for baseline in ("paper", a.parent):
        code, _, error = go(f"--ckpt {tiny_ckpt_1} --json {tmp_path / 'b.json'} --baseline {baseline}")
        assert code == 2 and str(baseline) in error


def test_a_test_set_without_readable_samples_is_named(own_data, tiny_ckpt_1, tmp_path, go):
    """With --skip-bad and nothing left, a KeyError."""
    root = shutil.copytree(own_data, tmp_path / "own")
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    code, _, error = go(f"--ckpt {tiny_ckpt_1} --data {root} --skip-bad")
    assert code == 2 and "images/s0.png" in error


def test_processes_change_no_number(tiny_ckpt, tmp_path, capsys):
    """The test sets shared by two processes: every number equal to the last bit, labels and predictions in order."""
    reports = []
    for n in (1, 2):
        flags = f"--ckpt {tiny_ckpt} --limit 5 --batch 2 --trivial 3 --workers 0 --processes {n}"
        assert run(lambda f=flags, n=n: evaluate.main([*f.split(), "--json", str(tmp_path / f"{n}.json")])) == 0
        reports.append(json.loads((tmp_path / f"{n}.json").read_text()))
    assert reports[0] == reports[1]


def test_confidence_and_pixels_come_beside_the_metrics(tiny_ckpt_1, tmp_path, capsys):
    """--confidence and --pixels add numbers and tables and change no metric, whatever the number of processes; labels
    sent through the codec are no predictions."""
    flags = f"--ckpt {tiny_ckpt_1} --limit 2 --batch 1 --trivial 0 --workers 0".split()
    assert evaluate.main([*flags, "--json", str(tmp_path / "a")]) == 0
    assert "oracle 25%" not in capsys.readouterr().out
    more = ["--confidence", "--pixels", "--processes"]
    assert evaluate.main([*flags, *more, "1", "--json", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert evaluate.main([*flags, *more, "2", "--json", str(tmp_path / "c")]) == 0
    plain, both, shared = (json.loads((tmp_path / name).read_text())["results"] for name in "abc")
    assert both == shared
    for world, tasks in plain.items():
        for task, metrics in tasks.items():
            assert both[world][task] == both[world][task] | metrics
            extra = both[world][task].keys() - metrics.keys()
            assert {f"{who} {n}%" for who in ("surest", "oracle") for n in (25, 50, 75, 100)} <= extra
            assert ("pairs" in extra) == (task == "optical_flow")
            assert f"| {world} | {task} | " in said
    assert "| oracle 25% |" in said and "| streets | optical_flow | " in said.split("| pairs |")[1]
    assert run(lambda: evaluate.main([*flags, "--codec", "--confidence"])) == 2


def test_a_limit_makes_as_many_scenes(monkeypatch):
    """--limit 70 asks each toy world for 70 scenes; below 64 they are as many as ever, for `real` has classes outdoors
    only, and a limit counts those that have them."""
    def numbers(limit):
        return {r.name: len(r) for r in evaluate.test_sets("toy", (16, 24), "test", tuple(TASKS), "it", limit=limit)}
    worlds = "rooms", "streets", "things", "real"
    assert numbers(70) == dict.fromkeys(worlds, 70) and numbers(5) == numbers(None) == dict.fromkeys(worlds, 64)
    seen = []
    monkeypatch.setattr(evaluate, "test_readers", lambda *_, limit, **__: seen.append(limit) or [])
    code = run(lambda: evaluate.main(["--data", "toy", "--ckpt", str(toy.MODEL), "--limit", "70"]))
    assert code == 2 and seen == [70]


def test_results_are_of_the_code_that_made_them():
    """What a result is kept for holds every file that evaluate.py imports, and that these import: network/ and
    inference/ were left out."""
    seen, todo = set(), [ROOT / "evaluate.py"]
    while todo:
        path = todo.pop()
        seen.add(path)
        names = {name.replace(".", "/") for name in modules(path)}
        names |= {name.rpartition("/")[0] for name in names}
        found = {ROOT / f"{name}{end}" for name in names if name for end in (".py", "/__init__.py")}
        todo += [p for p in found - seen if p.is_file()]
    assert {ROOT / "network/generalist.py", ROOT / "inference/infer.py"} < seen <= set(report.source_files())


def test_a_script_beside_the_code_changes_no_key(tmp_path, monkeypatch):
    """Whoever put one there had everything computed anew."""
    for name in ("mine.py", "readers/one_more.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "inference/report.py"))
    assert {*report.source_files()} == {tmp_path / "readers/one_more.py", tmp_path / "inference/report.py"}


def test_how_a_stage_1_was_trained_says_nothing_of_stage_2():
    of_2 = {"heads": 4, "rho": 0.4, "mask": "score"}
    settings = {"steps": 5, "batch": 8, "seed": 0, "tasks": "depth", "isolation": True, **of_2}
    assert about.trained(settings | {"stage": 1}).endswith("tasks depth, isolation True")
    assert about.trained(settings | {"stage": 2}).endswith("isolation True, heads 4, rho 0.4, mask score")


def test_a_baseline_of_other_samples_costs_no_results(go, tiny_ckpt_1, tmp_path):
    """After the whole evaluation it ended in an error, before it said where the results are."""
    out, other = trained_on("", tiny_ckpt_1, tmp_path / "out"), tmp_path / "other.json"
    assert go(f"--ckpt {out} --data toy")[0] == 0
    report = json.loads((out / "results.json").read_text())
    report["results"]["real"]["depth"]["images"] = 9
    other.write_text(json.dumps(report))
    code, said, error = go(f"--ckpt {out} --data toy --baseline {other}")
    assert code == 2 and "no Delta_m" in error and "Delta_m" not in said
    assert f"written to {out / 'results.json'}" in said


def test_a_checkpoint_in_mid_run_says_its_step(go, tiny_ckpt_1, tmp_path):
    """It was reported as trained for all the steps that were planned."""
    out = trained_on("", tiny_ckpt_1, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for step, told in (None, "stage 1, 9 steps of 1"), (9, "stage 1, 9 steps of 1"), (4, "stage 1, 4 of 9 steps of 1"):
        config["train"]["steps"], config["step"] = 9, step
        (out / "config.json").write_text(json.dumps(config))
        code, said, _ = go(f"--ckpt {out} --data toy")
        assert code == 0 and told in said


def test_other_code_is_evaluated_again(tiny_ckpt_1, tmp_path, monkeypatch, capsys):
    """Another byte in a file of report.source_files."""
    file, flags = tmp_path / "ddim.py", f"--ckpt {tiny_ckpt_1} --limit 1 --trivial 0 --workers 0 --json"
    monkeypatch.setattr(report, "source_files", lambda: [file])
    for text, kept in (("a", False), ("a", True), ("b", False)):
        file.write_text(text)
        assert evaluate.main([*flags.split(), str(tmp_path / "r.json")]) == 0
        assert ("real: kept from" in capsys.readouterr().err) == kept
