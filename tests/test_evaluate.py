"""The evaluation command, and a folder of one's own from images to numbers."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from checkpoint import run
from tasks import TASKS
from toyworld import ToyWorld


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


def test_toy_results_are_complete_and_repeat(tiny_ckpt, tmp_path, capsys):
    """Every labelled cell of the four worlds is there, twice the same; against itself Delta_m is 0."""
    reports = []
    for name in "ab":
        assert evaluate.main(["--ckpt", str(tiny_ckpt), "--limit", "2", "--trivial", "2", "--workers", "0", "--json", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name).read_text()))
    assert reports[0] == reports[1]
    results = reports[0]["results"]
    assert {w: set(r) for w, r in results.items()} == {"rooms": {"normal", "depth", "shading", "albedo"}, "things": {"optical_flow", "scene_flow"},
                                                       "streets": {"semantic", "normal", "depth", "optical_flow", "scene_flow"}, "real": set(TASKS)}
    assert set(reports[0]["trivial"]["real"]["constant"]) == set(TASKS)
    evaluate.main(["--ckpt", str(tiny_ckpt), "--limit", "2", "--trivial", "0", "--workers", "0", "--json", str(tmp_path / "c"), "--baseline", str(tmp_path / "a")])
    assert json.loads((tmp_path / "c").read_text())["delta_m"] == 0
    assert "Delta_m" in capsys.readouterr().out


def test_batches_and_rows_change_nothing(tiny_ckpt, tmp_path):
    """The numbers do not depend on how many images or tasks pass the network at once."""
    common = ["--ckpt", str(tiny_ckpt), "--limit", "3", "--trivial", "0", "--workers", "0"]
    evaluate.main([*common, "--json", str(tmp_path / "a"), "--batch", "3"])
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
    common = ["--data", str(own_data), "--base", str(tiny_base), "--out", str(out), "--steps", "3", "--batch", "2", "--micro", "2",
              "--workers", "0", "--picture-every", "0", *tasks]
    assert train.main(["--stage", "1", *common]) == 0
    assert train.main(["--stage", "2", *common, "--cache", str(tmp_path / "cache")]) == 0
    assert evaluate.main(["--ckpt", str(out), "--data", str(own_data), "--workers", "0"]) == 0
    results = json.loads((out / "results.json").read_text())["results"]["folder"]
    assert set(results) == set(TASKS) - {"normal"} and all(r["images"] == 3 for r in results.values())


@pytest.mark.parametrize("argv, says", [
    ([], "--ckpt is missing"), (["--ckpt", "nowhere"], "no checkpoint in nowhere"), (["--ckpt", "CKPT", "--baseline", "none.json"], "no results in none.json"),
    (["--ckpt", "CKPT", "--palette", "corners"], "--oracle only"), (["--ckpt", "CKPT", "--data", "nowhere"], "no test dataset in nowhere"),
    (["--ckpt", "STAGE1", "--stage", "2"], "holds no stage 2")])
def test_bad_input(argv, says, tiny_ckpt, tiny_ckpt_1, capsys):
    """A user's mistake: exit code 2 and one sentence."""
    argv = [{"CKPT": str(tiny_ckpt), "STAGE1": str(tiny_ckpt_1)}.get(a, a) for a in argv]
    assert run(lambda: evaluate.main([*argv, "--limit", "1", "--trivial", "0", "--workers", "0", "--json", "/dev/null"] if argv else argv)) == 2
    err = capsys.readouterr().err.strip()
    assert says in err and "Traceback" not in err
