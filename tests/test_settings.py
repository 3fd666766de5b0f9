"""Settings: what stage 2 takes over from stage 1, flags that would do nothing, what is written beside the weights."""
import dataclasses
import json
import os
import re
import shutil
import sys

import pytest
import torch
from kill import compare, log_lines
from raw import own_folder
from runs import THREE, TINY, saved, stop_at

import baselines
import settings
import train
from cli import run
from model import StableMTL
from tools import oracle
from training import about, losses


def test_stage_two_keeps_what_stage_one_settled(go, tmp_path):
    """Stage 2 takes tasks, palette and second frame from stage 1, for the labels as for the record."""
    assert go("--tasks semantic,depth --palette corners --second-frame average")[0] == 0
    assert go(f"--stage 2 --cache {tmp_path / 'cache'}")[0] == 0
    config, model = saved(tmp_path / "out"), StableMTL.load(tmp_path / "out")
    assert config["palette"] == config["train"]["palette"] == model.palette == "corners"
    assert config["train"]["second_frame"] == model.second_frame == "average"
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["palette"] == "corners"


def test_stage_two_of_an_unfinished_stage_one(go, tmp_path, monkeypatch):
    """Its state would be lost: refused, and nothing changes, until the stage 1 is finished, or ended where it is."""
    out = tmp_path / "out"
    stop_at(monkeypatch, "within", 2)
    assert go(f"--tasks {THREE} --steps 4")[0] == 130
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    code, _, error = go("--stage 2")
    assert code == 2 and error.count("\n") == 1 and f"--resume --out {out} (--steps 3 ends it there)" in error
    assert "has done 3 of 4 steps" in error and before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run(lambda: oracle.main(f"--ckpt {out} --out {tmp_path / 'oracle'}".split())) == 2
    assert go("--resume --steps 3")[0] == 0 and go("--stage 2")[0] == 0


def test_stage_two_over_one_task(go):
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
    assert code == 2 and f"step {entry['step'] + 1}, task " in error
    assert any(f"samples {world}:" in error for world in ("rooms", "streets", "things"))
    assert "Traceback" not in error and "last good checkpoint" in error
    assert json.loads((tmp_path / "out" / "state" / "state.json").read_text())["step"] == 0
    assert all(p.isfinite().all() for p in StableMTL.load(tmp_path / "out").parameters())


def test_settings_are_written_beside_the_weights(go, tmp_path, monkeypatch):
    """config.json holds every setting with its value, the tasks and the versions, and the commit where there is git,
    without which training ended when the cache was built; --help lists every flag."""
    assert go("--steps 1 --tasks depth,normal --lr 0.003")[0] == 0
    config, fields = saved(tmp_path / "out"), [f.name for f in dataclasses.fields(settings.Config)]
    assert set(config["train"]) == set(fields)
    assert config["train"]["lr"] == 0.003 and config["tasks"] == ["normal", "depth"] and config["size"] == [16, 24]
    assert {"python", "torch", "diffusers"} <= config["versions"].keys()
    assert config["seed"] == 0 and config["commit"] == about.commit()
    with monkeypatch.context() as m:
        m.setenv("PATH", str(tmp_path))
        assert go("--steps 1 --tasks depth,normal --overwrite")[0] == 0 and saved(tmp_path / "out")["commit"] is None
    code, out, _ = go("--help")
    assert code == 0 and all(settings.flag_name(name) in out for name in fields)


# ---- the defaults ----

@pytest.mark.parametrize("stage, steps", [(1, 20_000), (2, 10_000)])
def test_real_data_and_a_real_base_get_the_papers_settings(tmp_path, stage, steps):
    """Section 4 and appendix B of the paper: Adam, learning rate 1e-4, batches of 32, 20,000 and 10,000 steps, masking
    with rho 0.4, four heads. Of the released code, where it is silent: 100 steps of warm-up, then exponential decay,
    gradients clipped at 5, one rate for all parts. Adam's betas are its defaults."""
    cfg = settings.parse_args(f"--stage {stage} --base sd2 --data {tmp_path} --out {tmp_path / 'out'}".split())
    paper = dict(preset="paper", lr=1e-4, batch=32, steps=steps, clip=5.0, warmup=100, schedule="exponential", rho=0.4,
                 heads=4, mask="score", attention_lr=1.0, main_lr=1.0, loss="latent", isolation=True, optimizer="adam")
    assert {name: getattr(cfg, name) for name in paper} == paper
    optimizer = train.make_optimizer(cfg, {"unet": {"w": torch.nn.Parameter(torch.zeros(1))}})
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["lr"] == 1e-4


@pytest.mark.parametrize("system", baselines.SYSTEMS)
def test_learning_rate_of_networks_from_scratch(system):
    """1e-3, ten times that of StableMTL's, unless a flag says otherwise."""
    assert settings.parse_args(["--system", system]).lr == 1e-3
    assert settings.parse_args(["--system", system, "--lr", "0.5"]).lr == 0.5


# ---- what stage 2 takes over ----

def test_stage_two_takes_over_the_data_of_stage_one(go, tmp_path):
    """Scenes, size, dropped labels and cache of stage 1 hold in stage 2, which says so; a flag of its own wins."""
    few = TINY.replace("--scenes 2 --size 16x24", "").replace("--cache none", f"--cache {tmp_path / 'cache'}")
    assert go(f"--tasks {THREE} --scenes 3 --size 24x16 --drop streets:depth", few)[0] == 0
    code, _, error = go("--stage 2", few.replace(f"--cache {tmp_path / 'cache'}", ""))
    told = f"as the stage 1 in {tmp_path / 'out'}: "
    assert code == 0 and told in error and "--scenes 3, --size 24x16, --drop streets:depth" in error
    train = saved(tmp_path / "out")["train"]
    assert (train["scenes"], train["size"], train["drop"]) == (3, "24x16", "streets:depth")
    assert train["cache"] == str(tmp_path / "cache") and list((tmp_path / "cache").glob("streams-*/*.f16"))
    assert go("--stage 2 --overwrite --scenes 2 --cache none", few.replace(f"--cache {tmp_path / 'cache'}", ""))[0] == 0
    train = saved(tmp_path / "out")["train"]
    assert (train["scenes"], train["size"], train["cache"]) == (2, "24x16", "none")


def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch):
    """Paths were kept as typed: stage 2, --resume and evaluate.py looked for --data my below wherever they began."""
    for name in ("my", "base"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = settings.parse_args("--data my --base base --cache new --size 16x24".split())
    assert [cfg.data, cfg.base, cfg.cache] == [str(tmp_path / name) for name in ("my", "base", "new")]
    cfg = settings.parse_args("--base org/name --cache none".split())
    assert [cfg.data, cfg.base, cfg.cache] == ["", "org/name", "none"]


@pytest.mark.parametrize("flags, told", [
    ("--stage 2 --tasks normal", "--tasks normal contradicts"),
    ("--stage 2 --palette corners", "--palette corners contradicts"),
    ("--stage 2 --second-frame none", "--second-frame none contradicts"),
    ("--stage 2 --base elsewhere", "--base elsewhere contradicts"),
    ("--stage 2 --init other", "--init would do nothing here: stage 2 starts from the stage 1 in --out"),
    ("--stage 2 --widths 8,8,8,8", "--widths would do nothing here"),
    ("--stage 2 --rho 0 --mask argmax", "--mask would do nothing here: with --rho 0 nothing is left out"),
    ("--stage 2 --rho 0 --rho-after 1", "--rho-after would do nothing here: with --rho 0 nothing is left out"),
    ("--stage 2 --rho-after 1 --rho 1", "--rho, --rho-after would do nothing here: --rho-after lasts to the last step"),
    ("--stage 2 --freeze-main 1 --main-lr 2", "--main-lr would do nothing here: --freeze-main lasts to the last step"),
    ("--main-lr 2 --clip-apart", "--main-lr, --clip-apart would do nothing here: it belongs to --stage 2"),
    ("--stage 2 --attention n-to-n --stream-gb 1", "--stream-gb would do nothing here"),
    ("--stage 2 --cache none --stream-gb 1", "--stream-gb would do nothing here: streams are kept beside the latents"),
    ("--stage 2 --cache auto --loss pixel --stream-gb 1", "--stream-gb would do nothing here: streams are kept beside"),
    ("--init {out} --tasks normal", "--tasks normal contradicts"),
    ("--init {out} --palette corners", "--palette corners contradicts"),
    ("--init {out} --widths 8,8,8,8", "--widths would do nothing here"),
    ("--stage 1 --rho 0.4 --heads 2", "--rho, --heads would do nothing here: it belongs to --stage 2"),
    ("--stage 1 --lora 4 --frozen bf16", "--lora, --frozen would do nothing here: it belongs to --stage 2"),
    ("--stage 2 --lora 4 --main-init base", "--lora would do nothing here: a low rank starts from stage 1"),
    ("--tasks depth --palette corners", "--palette would do nothing here: it colours classes"),
    ("--stage 0 --steps 10", "would do nothing here: --stage 0 has its settings in toy/make.py"),
    ("--stage 0 --workers 1", "--size, --workers, --steps"),
    ("--data somewhere", "--scenes would do nothing here: it counts scenes of the toy worlds"),
    ("--lr inf", "--lr: 'inf' is not a finite number"),
    ("--lr nan", "--lr: 'nan' is not a finite number"),
    ("--beta2 1.5", "--beta2: '1.5' is not a finite number"),
    ("--rho 2 --stage 2", "--rho: '2' is not a finite number from 0 to 1"),
    ("--threads 100000", "--threads: '100000' is not a whole number"),
    ("--seed 18446744073709551616", "--seed: '18446744073709551616' is not a whole number"),
    ("--loss latent:inf", "--loss latent:inf: expected"),
    ("--steps -3", "--steps"),
    ("--batch 1e3", "--batch: '1e3' is not a whole number"),
])
def test_a_flag_acts_or_is_refused(go, second, tmp_path, flags, told):
    """Whatever would have no effect, contradicts stage 1 or is no possible value: a sentence that names the flag as
    typed, and the checkpoint stays as it is."""
    before = {p: p.read_bytes() for p in second.rglob("*") if p.is_file()}
    code, _, error = go(flags.format(out=second))
    assert code == 2 and told in error and error.count("\n") == 1
    assert before == {p: p.read_bytes() for p in second.rglob("*") if p.is_file()}


def test_torchrun_starts_the_processes(go, second, monkeypatch):
    """Beside its number of processes, --processes has nothing to say."""
    monkeypatch.setenv("RANK", "0")
    code, _, error = go("--stage 2 --processes 2")
    assert code == 2 and "--processes would do nothing here: torchrun" in error


@pytest.mark.parametrize("flag", ["--palette corners", "--second-frame none", "--tasks depth"])
def test_a_checkpoint_that_does_not_say_cannot_be_changed_either(go, second, flag):
    """Without config.json, as some copies are: what its model settles is refused all the same, and stage 2 trains."""
    (second / "config.json").unlink()
    code, _, error = go(f"--stage 2 {flag}")
    assert code == 2 and f"{flag} contradicts the stage 1 in" in error
    assert go(f"--stage 2 --tasks {THREE}")[0] == 0


def test_a_base_keeps_its_widths():
    """The preset that makes a wider UNet makes none in place of a base's own; --widths still does."""
    for flags, widths in ("", "64,128,192,256"), ("--base base", ""), ("--base base --widths 8,8,8,8", "8,8,8,8"):
        assert settings.parse_args(f"--preset toy-gpu {flags}".split()).widths == widths


def test_main_init_base_with_widths(go, tiny_base, tmp_path):
    """A fresh main UNet of the widths of stage 1's fresh UNet, however a config writes them; others are refused."""
    assert go(f"--tasks {THREE} --widths 8,8,16,16")[0] == 0
    assert go("--stage 2 --main-init base --widths 8,8,16,16")[0] == 0
    code, _, error = go("--stage 2 --overwrite --main-init base --widths 8,8,16,8")
    assert code == 2 and "other widths" in error


def test_the_task_attention_learns_at_its_own_rate(go, stage1, tmp_path):
    """--attention-lr 8: Adam's first step moves the output layers of the attention 8 times as far, the UNet as far."""
    moved = {}
    for rate in ("1", "8"):
        out = shutil.copytree(stage1, tmp_path / rate)
        assert go(f"--stage 2 --rho 0 --steps 1 --lr 1e-3 --warmup 0 --attention-lr {rate} --out {out}")[0] == 0
        moved[rate] = StableMTL.load(out)
    layers = [{name: layer.to_out_task.bias for name, layer in moved[rate].attention.items()} for rate in ("1", "8")]
    for name in layers[0]:
        assert torch.allclose(8 * layers[0][name], layers[1][name], rtol=1e-3, atol=1e-7) and layers[0][name].any()
    mains = zip(moved["1"].main.parameters(), moved["8"].main.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in mains)


# ---- numbers that are none ----

def test_fp16_that_never_learns_stops(go, tmp_path, monkeypatch):
    """fp16 whose every gradient is NaN: stopped as fp32 is, after PATIENCE steps that the scaler skipped; the log is
    valid json without bare NaN, and no best/ is claimed."""
    monkeypatch.setattr(train, "PATIENCE", 3)
    terms = losses.loss_terms

    def broken(*args):
        return {kind: error * float("nan") for kind, error in terms(*args).items()}
    monkeypatch.setattr(losses, "loss_terms", broken)
    code, out, error = go(f"--tasks {THREE} --steps 30 --precision fp16 --val-samples 1")
    assert code == 2 and "for the 3th step in a row" in error and "--precision fp32" in error and "lowest" not in out
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert len(entries) == 2 and entries[0]["loss"] is None and entries[0]["grad_norm"] is None
    assert not (tmp_path / "out" / "best").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["held_out"] == {"0": None, "2": None}


def test_nan_never_is_the_best():
    assert train.best_step({"held_out": {"0": None, "500": 2.0, "1000": 1.0, "1500": None}}) == "1000"
    assert train.best_step({"held_out": {"0": None}}) is None


def test_resuming_under_another_commit(go, tmp_path, monkeypatch):
    """A notice; config.json keeps the commit that the run began with, and the one it went on with, and from where."""
    monkeypatch.setattr(about, "commit", lambda: "before")
    assert go(f"--tasks {THREE} --steps 2")[0] == 0
    monkeypatch.setattr(about, "commit", lambda: "after")
    code, _, error = go("--resume")
    assert code == 0 and "trained under commit before so far, and goes on under after" in error
    config = saved(tmp_path / "out")
    assert config["commit"] == "before" and [(r["step"], r["commit"]) for r in config["resumed"]] == [(2, "after")]


def test_a_tracker_that_cannot_start_stops_the_run_before_the_work(go, tmp_path, monkeypatch):
    """It has exceptions of its own, and was started after the cache was built: a traceback, late."""
    (tmp_path / "offline.py").write_text("class Refused(Exception): pass\nlog = finish = None\n"
                                         "def init(**told): raise Refused('no key')\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, error = go(f"--tasks {THREE} --track offline --cache {tmp_path / 'cache'}")
    assert code == 2 and "--track offline failed (Refused: no key)" in error and "Traceback" not in error
    assert not (tmp_path / "cache").exists() and [p.name for p in (tmp_path / "out").iterdir()] == ["lock"]


def test_a_tracker_that_fails_later_is_told_as_well(go, tmp_path, monkeypatch):
    """In mid-run: one sentence, and --resume goes on."""
    (tmp_path / "flaky.py").write_text("def init(**told): pass\ndef finish(): pass\n"
                                       "def log(told, step): 1 / (1 - step)\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, error = go(f"--tasks {THREE} --steps 3 --save-every 1 --track flaky")
    assert code == 2 and "--track flaky failed (ZeroDivisionError: division by zero)" in error
    monkeypatch.setattr(sys.modules["flaky"], "log", lambda told, step: None)
    assert go("--resume")[0] == 0


def test_help_and_the_list_agree():
    """Every setting's help says something, and a preset sets only settings."""
    fields = {f.name: f for f in dataclasses.fields(settings.Config)}
    assert all(len(f.metadata["help"]) > 10 for f in fields.values())
    assert all(preset.keys() <= fields.keys() for preset in settings.PRESETS.values())


def test_data_that_has_moved(go, tmp_path, monkeypatch):
    """--resume goes on where it is now, as if it had never moved; tells of other files, refuses other datasets."""
    data, moved, out = tmp_path / "my", tmp_path / "moved", tmp_path / "out"
    own_folder(data, 4, 16, 24)
    own, whole = TINY.replace("--scenes 2 ", ""), f"--stage 1 --data {data} --tasks depth,normal --steps 4"
    assert go(f"{whole} --out {tmp_path / 'whole'}", own)[0] == 0
    with monkeypatch.context() as m:
        stop_at(m, "between", 2)
        assert go(whole, own)[0] == 130
    data.rename(moved)
    code, _, error = go("--resume")
    assert code == 2 and "my, which is no folder any more" in error and "--resume --data <folder>" in error
    code, _, error = go(f"--resume --data {moved}")
    assert code == 0 and "notice: the files" not in error and saved(out)["train"]["data"] == str(moved)
    assert compare(tmp_path / "whole", out) == []
    os.utime(moved / "depth/p0.npy", (1, 1))
    code, _, error = go("--resume --steps 5")
    assert code == 0 and "notice: the files of folder are not those" in error


def test_other_data_is_no_continuation(go, stage1, tmp_path):
    """Datasets of other names are refused before anything is written; so is --data for the toy worlds of a run of an
    earlier version, which did not note its datasets."""
    out = shutil.copytree(stage1, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    own_folder(tmp_path / "my", 4, 32, 48)
    code, _, error = go(f"--resume --steps 9 --data {tmp_path / 'my'}")
    assert code == 2 and re.search("learns from rooms, streets, things, and .*my has folder: name the folder", error)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    about = json.loads((out / "state/state.json").read_text())
    del about["files"]
    (out / "state/state.json").write_text(json.dumps(about))
    assert go(f"--resume --steps 9 --data {tmp_path / 'my'}")[0] == 2
    assert go("--resume --steps 2")[0] == 0


def test_no_held_out_label_is_told_as_such(go, tmp_path):
    """It was said that there are no training labels."""
    own_folder(tmp_path / "my", 4, 16, 24)
    for split, names in ("train", "p0 p1"), ("val", "p2"), ("test", "p3"):
        (tmp_path / f"my/{split}.txt").write_text(names.replace(" ", "\n"))
    (tmp_path / "my/depth/p2.npy").unlink()
    own = TINY.replace("--scenes 2 ", "").replace("--val-samples 0", "--val-samples 1")
    code, _, error = go(f"--data {tmp_path / 'my'} --tasks depth", own)
    assert code == 2 and "--val-samples 0" in error
    assert "held-out samples: none has a label of depth (val.txt may" in error
