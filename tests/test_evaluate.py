"""The evaluation command, and a folder of one's own from images to numbers."""
import json
import shutil
import weakref

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from cli import run
from readers.toyworld import ToyWorld
from tasks import TASKS


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    """Three toy scenes written as files: images/, next/, and every label but normals."""
    root = tmp_path_factory.mktemp("own")
    world = ToyWorld("streets", "train", 3, (32, 48), all_labels=True)
    for i in range(3):
        s = world.load(i, world.tasks)
        for folder, key in (("images", "image"), ("next", "next")):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(s[key]).save(root / folder / f"s{i}.png")
        for task in set(TASKS) - {"normal"}:
            (root / task).mkdir(exist_ok=True)
            label = s["labels"][task]
            if task == "semantic":
                Image.fromarray(label[..., 0]).save(root / task / f"s{i}.png")
            else:
                np.save(root / task / f"s{i}.npy", np.where(s["valid"][task][..., None], label, np.nan))
    return root


def test_toy_results_are_complete(tiny_ckpt, tmp_path, capsys):
    """Every labelled cell of the four worlds is there; against itself Delta_m is 0."""
    flags = ["--ckpt", str(tiny_ckpt), "--limit", "2", "--trivial", "2", "--workers", "0", "--json", str(tmp_path / "a")]
    assert evaluate.main(flags) == 0
    report = json.loads((tmp_path / "a").read_text())
    results = report["results"]
    assert {w: set(r) for w, r in results.items()} == {"rooms": {"normal", "depth", "shading", "albedo"}, "things": {"optical_flow", "scene_flow"},
                                                       "streets": {"semantic", "normal", "depth", "optical_flow", "scene_flow"}, "real": set(TASKS)}
    assert set(report["trivial"]["real"]["constant"]) == set(TASKS) and report["unfinished"] == []
    assert evaluate.main([*flags, "--baseline", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a").read_text()) == report | {"delta_m": 0}
    assert "Delta_m" in capsys.readouterr().out


def test_unreadable_samples_are_named_or_counted(own_data, tiny_base, tmp_path, capsys):
    """A truncated file stops training and evaluation by name; --skip-bad counts it in the training's summary and names it in results.json."""
    root, out = shutil.copytree(own_data, tmp_path / "own"), tmp_path / "out"
    bad = root / "depth" / "s1.npy"
    bad.write_bytes(bad.read_bytes()[:500])
    flags = f"--data {root} --base {tiny_base} --out {out} --tasks depth --steps 1 --batch 8 --micro 8 --val-samples 0 --workers 0 --picture-every 0".split()
    evaluation = ["--ckpt", str(out), "--data", str(root), "--workers", "0"]
    for skip, code in (["--skip-bad"], 0), ([], 2):
        assert run(lambda: train.main([*flags, "--overwrite", *skip])) == code
        said = capsys.readouterr()
        assert "; 1 samples skipped;" in said.out if skip else f"folder sample 1: {bad} is not a readable NPY file" in said.err
        assert run(lambda: evaluate.main([*evaluation, *skip])) == code
        assert skip or f"folder:1: {bad} is not" in capsys.readouterr().err
    report = json.loads((out / "results.json").read_text())
    assert report["results"]["folder"]["depth"]["images"] == 2 and len(report["skipped"]) == 2
    assert report["skipped"][0].startswith("folder: training label folder:1: ") and report["skipped"][1].startswith(f"folder:1: {bad}")


def test_interrupted_evaluation_goes_on(tiny_ckpt_1, tmp_path, monkeypatch, capsys):
    """After Ctrl-C the same command computes only the missing test sets and ends in the file of an undisturbed run; --overwrite computes all."""
    computed, stop, original = [], None, evaluate.evaluate

    def counted(model, reader, *args):
        computed.append(reader.name)
        if reader.name == stop:
            raise KeyboardInterrupt
        return original(model, reader, *args)
    monkeypatch.setattr(evaluate, "evaluate", counted)

    def go(name, *more):
        computed.clear()
        flags = ["--ckpt", str(tiny_ckpt_1), "--limit", "1", "--trivial", "1", "--workers", "0", "--json", str(tmp_path / name), *more]
        return run(lambda: evaluate.main(flags)), capsys.readouterr().err
    assert go("whole")[0] == 0 and computed == ["rooms", "streets", "things", "real"]
    stop = "things"
    code, said = go("twice")
    assert code == 130 and "2 of 4 test sets" in said and json.loads((tmp_path / "twice").read_text())["unfinished"] == ["things", "real"]
    code, said = go("other", "--baseline", str(tmp_path / "twice"))
    assert code == 2 and "unfinished" in said
    stop = None
    for expected in (["things", "real"], []):
        assert go("twice")[0] == 0 and computed == expected
        assert (tmp_path / "twice").read_bytes() == (tmp_path / "whole").read_bytes()
    stop = "rooms"
    for more in (["--overwrite"], ["--limit", "2"], ["--trivial", "2"], ["--split", "val"]):
        assert go("twice", *more)[0] == 130 and computed == ["rooms"]


def test_results_of_other_weights_are_not_reused(tiny_ckpt_1, tmp_path):
    """A test set's fingerprint changes with any weight, the size and the samples, and with nothing else about the folder."""
    copy = shutil.copytree(tiny_ckpt_1, tmp_path / "copy")
    args = type("Args", (), {"ckpt": str(copy), "limit": 1, "json": ""})()
    world = ToyWorld("rooms", "test", 2)
    key = lambda size=(32, 48), reader=world: evaluate.fingerprint(evaluate.settings(args, size), [reader])
    first = key()
    (copy / "results.json").write_text("{}")
    args.json = "elsewhere"
    assert key() == first and len({first, key((16, 24)), key(reader=ToyWorld("rooms", "test", 3)), key(reader=ToyWorld("rooms", "val", 2))}) == 4
    for path in sorted(copy.rglob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        before, first = first, key()
        assert first != before, path


def test_memory_stays_level(tiny_ckpt_1):
    """However many samples a test set has, only a few batches of them are in memory at a time."""
    class Counted(ToyWorld):
        seen, most = [], 0

        def load(self, *args, **options):
            sample = super().load(*args, **options)
            self.seen += [weakref.ref(x) for x in sample["labels"].values()]
            Counted.most = max(self.most, sum(r() is not None for r in self.seen))
            return sample
    evaluate.evaluate(evaluate.StableMTL.load(tiny_ckpt_1), Counted("things", "test", 16, (16, 24)), batch=2, workers=0)
    assert len(Counted.seen) == 32 and Counted.most <= 2 * 3 * 2      # two labels of three batches of two


def test_batches_and_rows_change_nothing(tiny_ckpt, tmp_path):
    """The numbers do not depend on how many images or tasks pass the network at once."""
    common = ["--ckpt", str(tiny_ckpt), "--limit", "2", "--trivial", "0", "--workers", "0"]
    evaluate.main([*common, "--json", str(tmp_path / "a"), "--batch", "2"])
    evaluate.main([*common, "--json", str(tmp_path / "b"), "--batch", "1", "--rows", "1"])
    a, b = (evaluate.by_task(json.loads((tmp_path / n).read_text())["results"]) for n in "ab")
    for task in a:
        assert a[task] == pytest.approx(b[task], rel=1e-3)


def test_oracle_with_a_perfect_codec(tiny_model, monkeypatch):
    """Were the VAE lossless, the oracle would be perfect: 100% of classes kept, no angular or flow error."""
    monkeypatch.setattr(evaluate, "reconstruct", lambda model, code: code)
    results, _, _ = evaluate.evaluate(tiny_model, ToyWorld("streets", "test", 2, (32, 48)), batch=2, workers=0, oracle=True)
    assert results["semantic"]["mIoU"] == 100 and results["semantic"]["accuracy"] == 100
    assert results["normal"]["mAE"] < 0.1 and results["optical_flow"]["EPE"] < 1e-3 and results["depth"]["PSNR"] == pytest.approx(106.02, abs=0.1)


def test_own_folder_trains_and_evaluates(own_data, tiny_base, tmp_path, capsys):
    """Images plus a subset of label folders go through both stages and the evaluation; unlabelled tasks are simply absent."""
    out = tmp_path / "out"
    tasks = ["--tasks", "semantic,depth,optical_flow,scene_flow,shading,albedo"]
    common = ["--data", str(own_data), "--base", str(tiny_base), "--out", str(out), "--steps", "2", "--batch", "2", "--micro", "2",
              "--val-samples", "1", "--workers", "0", "--picture-every", "0", *tasks]
    assert train.main(["--stage", "1", *common]) == 0
    assert train.main(["--stage", "2", *common, "--cache", str(tmp_path / "cache")]) == 0
    assert evaluate.main(["--ckpt", str(out), "--data", str(own_data), "--workers", "0"]) == 0
    results = json.loads((out / "results.json").read_text())["results"]["folder"]
    assert set(results) == set(TASKS) - {"normal"} and all(r["images"] == 3 for r in results.values())
