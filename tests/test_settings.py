"""Settings: what stage 2 takes over from stage 1, flags that would do nothing, and what is written beside the weights."""
import dataclasses
import json

from kill import compare, log_lines

import settings
import train
from model import StableMTL


def test_stage_two_keeps_what_stage_one_settled(go, tmp_path):
    """Stage 2 takes tasks, palette and second frame from stage 1, for the labels as for the record; other --tasks are refused."""
    assert go("--tasks semantic,depth --palette corners --second-frame average")[0] == 0
    code, _, error = go("--stage 2 --tasks normal")
    assert code == 2 and "semantic,depth" in error
    assert go(f"--stage 2 --cache {tmp_path / 'cache'}")[0] == 0
    saved, model = json.loads((tmp_path / "out" / "config.json").read_text()), StableMTL.load(tmp_path / "out")
    assert saved["palette"] == saved["train"]["palette"] == model.palette == "corners" and saved["train"]["second_frame"] == "average"
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["palette"] == "corners"


def test_stage_two_over_one_task(go, tmp_path):
    """Stage 2 of a single-task checkpoint has nothing to attend to, and says so."""
    assert go("--tasks depth --steps 1")[0] == 0
    code, _, error = go("--stage 2 --steps 1")
    assert code == 2 and "at least two tasks" in error


def test_overwrite_starts_anew(go, tmp_path):
    """--overwrite replaces a checkpoint by what a fresh folder would hold."""
    assert go("--steps 2 --seed 1")[0] == 0
    assert go("--steps 2 --seed 0 --overwrite")[0] == 0
    fresh = tmp_path / "fresh"
    assert go(f"--steps 2 --out {fresh}")[0] == 0
    assert compare(fresh, tmp_path / "out") == []


def test_non_finite_loss_stops(go, tmp_path):
    """A diverged run stops with step, task and samples named; the checkpoint before stays and loads."""
    code, _, error = go("--steps 4 --lr 1e30 --warmup 0")
    entry = log_lines(tmp_path / "out")[-1]
    assert code == 2 and f"step {entry['step'] + 1}, task " in error and "streets:" in error or "rooms:" in error or "things:" in error
    assert "Traceback" not in error and "last good checkpoint" in error
    assert json.loads((tmp_path / "out" / "state" / "state.json").read_text())["step"] == 0
    assert all(p.isfinite().all() for p in StableMTL.load(tmp_path / "out").parameters())


def test_settings_are_written_beside_the_weights(go, tmp_path):
    """config.json holds every setting with its value, the tasks and the versions; --help lists every flag."""
    assert go("--steps 1 --tasks depth,normal --lr 0.003")[0] == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(saved["train"]) == {f.name for f in dataclasses.fields(settings.Config)}
    assert saved["train"]["lr"] == 0.003 and saved["tasks"] == ["normal", "depth"] and saved["size"] == [16, 24]
    assert {"python", "torch", "diffusers"} <= saved["versions"].keys() and saved["seed"] == 0 and saved["commit"] == train.commit()
    code, out, _ = go("--help")
    assert code == 0 and all("--" + f.name.replace("_", "-") in out for f in dataclasses.fields(settings.Config))
