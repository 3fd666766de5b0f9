"""train.py --resume equals an uninterrupted run, wherever it was stopped; the best checkpoint outlives it."""
import json
import math
import os
import resource
import shutil
from functools import partial

import kill
import pytest
import tiny
import torch
from kill import compare, log_lines
from runs import THREE, TINY, same, saved, stop_at, unfinished

import checkpoint
import evaluate
import train
from model import StableMTL
from readers.toyworld import ToyWorld

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="session")
def undisturbed(tiny_base, stage1, tmp_path_factory):
    """{stage: folder of a run of four steps that nobody disturbed}; stage 2 draws masks in every layer of every step.
    Do not write there."""
    outs = {}
    for stage, own in ((1, f"--stage 1 --tasks {THREE}"), (2, "--stage 2 --rho 1")):
        outs[stage] = tmp_path_factory.mktemp("undisturbed") / "out"
        if stage == 2:
            shutil.copytree(stage1, outs[2])
        assert train.main(f"--base {tiny_base} --out {outs[stage]} {TINY} {own} --steps 4".split()) == 0
    return outs


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("place", ["between", "within", "saving"])
def test_resume_equals_uninterrupted(go, stage1, undisturbed, tmp_path, monkeypatch, stage, place):
    """Ctrl-C between two steps, within a step or while saving, then --resume: weights, Adam, and log are
    those of four steps."""
    if stage == 2:
        shutil.copytree(stage1, tmp_path / "out")
    stop_at(monkeypatch, place, 2)
    masks = "--rho 1" if stage == 2 else ""
    code, _, error = go(f"--stage {stage} --tasks {THREE} {masks} --steps 4")
    assert code == 130 and "--resume" in error
    assert len(log_lines(tmp_path / "out")) < len(log_lines(undisturbed[stage]))
    assert go("--resume")[0] == 0
    assert compare(undisturbed[stage], tmp_path / "out") == []


@pytest.mark.parametrize("stage", [1, 2])
def test_others_may_read_what_the_umask_lets_them(undisturbed, stage):
    """Weights were for their owner alone, whatever the umask."""
    folder, mask = undisturbed[stage], os.umask(0)
    os.umask(mask)
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = {path for path in files if path.suffix == ".safetensors"}
    assert len(weights) > 3 and {path.stat().st_mode & 0o777 for path in weights} == {0o666 & ~mask}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_too_large_goes_on_with_smaller_parts(go, stage1, undisturbed, tmp_path, monkeypatch, stage):
    """--resume --micro 1, what one does when memory is short: the losses of the undisturbed run, masks and all, and the
    config says it."""
    if stage == 2:
        shutil.copytree(stage1, tmp_path / "out")
    stop_at(monkeypatch, "within", 2)
    own = "--rho 1" if stage == 2 else ""
    assert go(f"--stage {stage} --tasks {THREE} {own} --steps 4")[0] == 130
    assert go("--resume --micro 1")[0] == 0
    ours, theirs = ([e["loss"] for e in log_lines(out)] for out in (tmp_path / "out", undisturbed[stage]))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) > 3
    assert json.loads((tmp_path / "out/config.json").read_text())["train"]["micro"] == 1


def interrupted(go, tmp_path, monkeypatch, flags):
    """Run it, in tmp_path/whole as it is, in tmp_path/out with a Ctrl-C and --resume: both end alike."""
    assert go(f"{flags} --out {tmp_path / 'whole'}")[0] == 0
    stop_at(monkeypatch, "within", 2)
    assert go(flags)[0] == 130
    assert go("--resume")[0] == 0
    assert compare(tmp_path / "whole", tmp_path / "out") == []


def test_resume_in_another_memory_format(go, tmp_path, monkeypatch):
    """--channels-last: Adam's moments meet the weights that they are of, in whatever order both lie in memory."""
    interrupted(go, tmp_path, monkeypatch, f"--channels-last --tasks {THREE} --steps 4")


def test_resume_with_the_scale_of_fp16(go, tmp_path, monkeypatch):
    """fp16's scaler, which here doubles its scale after every step, goes on from where it was."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0, growth_interval=1))
    interrupted(go, tmp_path, monkeypatch, f"--precision fp16 --tasks {THREE} --steps 4")
    scales = [json.loads((tmp_path / out / "state/state.json").read_text())["scaler"] for out in ("whole", "out")]
    assert scales[0] == scales[1] and scales[0]["scale"] == 64 * 2 ** 4


def test_resume_keeps_processes_and_threads(go, tmp_path):
    """A run begun in one process of one thread goes on so, unless told otherwise."""
    assert go(f"--tasks {THREE} --processes 1")[0] == 0
    assert go("--resume")[0] == 0
    settings = saved(tmp_path / "out")["train"]
    assert (settings["processes"], settings["threads"], settings["workers"], settings["micro"]) == (1, 1, 0, 4)
    assert go("--resume --threads 0 --micro 2")[0] == 0
    settings = saved(tmp_path / "out")["train"]
    assert (settings["processes"], settings["threads"], settings["workers"], settings["micro"]) == (1, 0, 0, 2)


def test_damaged_state_falls_back_to_the_one_before(go, stage1, undisturbed, tmp_path, monkeypatch):
    """A truncated state file is noticed, named, and replaced by the checkpoint before it; the result is still the
    same."""
    out = shutil.copytree(stage1, tmp_path / "out")
    stop_at(monkeypatch, "within", 2)
    assert go("--stage 2 --rho 1 --steps 4")[0] == 130
    path = out / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, error = go("--resume")
    assert code == 0
    assert "notice" in error and "checksum" in error and "state.prev, step 2" in error
    assert compare(undisturbed[2], out) == []
    for name in ("state", "state.prev"):
        (out / name / "state.json").write_text("{")
    code, _, error = go("--resume")
    assert code == 2 and "nothing to resume" in error and "Traceback" not in error


@pytest.mark.parametrize("place", ["save_state", "save_model", "write_json"])
@pytest.mark.parametrize("step", [0, 1])
def test_killed_between_two_files_of_a_checkpoint(go, stage1, another, tmp_path, monkeypatch, place, step):
    """A run of other settings replaces a finished one and is killed during its first or last checkpoint: --resume ends
    as one run or the other would have, never with the settings of one and the state of the other, nor with a model
    older than the state."""
    out, original, calls = shutil.copytree(stage1, tmp_path / "out"), getattr(train, place), []

    def killed(*args):
        calls.append(args)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return original(*args)
    with monkeypatch.context() as m:
        m.setattr(train, place, killed)
        assert go(f"--tasks {THREE} --seed 5 --overwrite --save-every 1")[0] == 130
    assert go("--resume")[0] == 0
    seed = json.loads((out / "config.json").read_text())["train"]["seed"]
    assert compare({0: stage1, 5: another}[seed], out) == []
    assert seed == 5 or step == 0


def test_disk_full_while_saving(go, undisturbed, tmp_path, monkeypatch):
    """When a checkpoint cannot be written, a sentence says how much room it needs, the earlier one is intact, and
    --resume goes on from it."""
    out, save, calls = tmp_path / "out", checkpoint.save_file, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(tensors, path):
        calls.append(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if len(calls) == 2 else soft, hard))
        try:
            save(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, error = go(f"--tasks {THREE} --steps 4")
    assert code == 2
    assert "File too large" in error and "MiB" in error and "--resume" in error
    assert not (out / "state.tmp").exists()
    assert StableMTL.load(out).main is None
    assert go("--resume")[0] == 0
    assert compare(undisturbed[1], out) == []


@pytest.mark.parametrize("place, file", [("write_json", "config.json"), ("save_picture", "stage1_000001.png"),
                                         ("open_log", "log.jsonl")])
def test_disk_full_elsewhere(go, undisturbed, tmp_path, monkeypatch, place, file):
    """What was told of a checkpoint's small files and pictures was the bare error of the system."""
    out, write, calls = tmp_path / "out", getattr(train, place), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        calls.append(args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    flags = f"--tasks {THREE} --steps 4 --picture-every 1"
    with monkeypatch.context() as m:
        if place == "open_log":     # in its place, when it is gone over again
            assert go(f"{flags} --save-every 1")[0] == 0
            flags = "--resume --steps 5"
        m.setattr(train, place, full)
        code, _, error = go(flags)
    assert code == 2 and calls and f"{file} cannot be written (File too large): make room; what is" in error
    assert not list(out.rglob("*.tmp"))
    assert go("--resume")[0] == 0
    assert place == "open_log" or compare(undisturbed[1], out) == []


def test_a_new_stage_1_takes_the_place_of_both_stages(go, undisturbed, tmp_path, monkeypatch, capsys):
    """--stage 1 --overwrite left the parts of stage 2, and evaluate.py therefore wrote beside results that were of
    weights no more."""
    out = shutil.copytree(undisturbed[2], tmp_path / "out")
    test = f"--ckpt {out} --limit 1 --trivial 0 --workers 0".split()
    monkeypatch.setattr(evaluate, "test_readers", lambda *args, **options: [ToyWorld("real", "test", 2, (16, 24))])
    assert evaluate.main(test) == 0
    (out / "decoder").mkdir()       # a user's own, or of tools.distil
    assert go(f"--tasks {THREE} --seed 5 --overwrite")[0] == 0
    assert not [p for p in out.iterdir() if p.name in ("main_unet", "task_attention.safetensors")]
    assert (out / "decoder").is_dir() and StableMTL.load(out).main is None
    assert evaluate.main(test) == 0
    assert [p.name for p in out.glob("results*")] == ["results.json"]
    assert json.loads((out / "results.json").read_text())["stage"] == 1


def test_disk_full_before_anything_is_saved(go, second, tmp_path, monkeypatch):
    """A fresh run, and a stage 2 after its stage 1: --resume, which was advised, had nothing to go on from."""
    def full(tensors, path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    for flags, place in ((f"--tasks {THREE} --out {tmp_path / 'new'}", tmp_path / "new"), ("--stage 2", second)):
        code, _, error = go(flags)
        assert code == 2 and f"could not save to {place}: No space left" in error
        assert "make room, then start it again" in error and "--resume" not in error
    monkeypatch.undo()
    assert go(f"--tasks {THREE} --out {tmp_path / 'new'}")[0] == 0


def test_what_does_not_fit_is_refused_before_a_cache_is_built(go, tiny_base, tmp_path):
    """A cache of other scenes, the state of another base: that the latter does not fit was told only after hours of
    encoding, and a folder made for the former hid the toy model from evaluate.py."""
    base, place = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "cache"
    flags = f"--tasks {THREE} --base {base} --cache {place}"
    assert go(flags)[0] == 0
    code, _, error = go(f"{flags} --scenes 3 --out {tmp_path / 'new'}")
    assert code == 2 and "was made for something else (samples of rooms 2, now 3" in error
    assert not (tmp_path / "new").exists()
    shutil.rmtree(place)
    shutil.rmtree(base)
    tiny.base(base, use_linear_projection=False)
    code, _, error = go("--resume")
    assert code == 2 and "the saved state is of another model" in error and "Traceback" not in error
    assert not place.exists()


def test_a_finished_run_resumes_to_itself(go, undisturbed, tmp_path):
    """--resume of a finished run changes no weight and no log line."""
    shutil.copytree(undisturbed[1], tmp_path / "out")
    assert go("--resume")[0] == 0
    assert compare(undisturbed[1], tmp_path / "out") == []


def test_a_stage_2_stopped_before_it_saved_anything(go, second, monkeypatch):
    """--resume only said how many steps stage 1 had taken, in 0.0 minutes: now that there is no stage 2 to continue,
    and what starts one. Of a finished stage 2 it says no such thing."""
    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train, "save_state", stop)
        assert go("--stage 2")[0] == 130
    code, said, _ = go("--resume")
    assert code == 0 and f"stage 1 in {second} was done already, all 1 steps, and no stage 2 is saved there: " in said
    assert f"python train.py --stage 2 --out {second}, " in said and said.count("\n") == 1
    assert go("--stage 2")[0] == 0
    code, said, _ = go("--resume")
    assert code == 0 and f"stage 2 in {second} was done already" in said and "no stage 2" not in said


def test_lengthened_run_equals_uninterrupted(go, tmp_path):
    """A finished run of two steps and --resume --steps 4 equals four steps at once, for the exponential schedule does
    not read --steps; the record says so, and the last line how many were made now. Fewer steps than are done are
    refused."""
    given = f"--tasks {THREE} --schedule exponential --save-every 2"
    assert go(f"{given} --steps 4 --out {tmp_path / 'whole'}")[0] == 0
    code, said, _ = go(f"{given} --steps 2")
    assert code == 0 and said.startswith("stage 1: 2 steps in ")
    code, said, error = go("--resume --steps 4")
    assert code == 0 and said.startswith("stage 1: the last 2 of 4 steps in ") and "cosine" not in error
    assert compare(tmp_path / "whole", tmp_path / "out") == []
    config = saved(tmp_path / "out")
    assert config["train"]["steps"] == 4 and [(r["step"], r["steps"]) for r in config["resumed"]] == [(2, [2, 4])]
    code, _, error = go("--resume --steps 3")
    assert code == 2 and "--steps 3 is less than the 4 that the run in" in error
    assert compare(tmp_path / "whole", tmp_path / "out") == []


def test_a_lengthened_run_remembers_where_it_ended(go, tmp_path, monkeypatch):
    """The held-out loss of the last step, which is no multiple of --save-every, stays known: what is in best/ is the
    best of all. (It was forgotten, so that best/ could be replaced by worse.)"""
    losses = iter([3, 2, 1, 1, 4, 5])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: (next(losses), []))
    given = f"--tasks {THREE} --save-every 2 --val-samples 1"
    assert go(f"{given} --steps 3")[0] == 0
    best = {p: p.read_bytes() for p in (tmp_path / "out/best").rglob("*.safetensors")}
    code, said, _ = go("--resume --steps 5")
    assert code == 0 and "lowest held-out loss: 1.0000 at step 3" in said
    assert saved(tmp_path / "out")["held_out"] == {"0": 3, "2": 2, "3": 1, "4": 4, "5": 5}
    assert best and best == {p: p.read_bytes() for p in best}


def test_a_lengthened_run_that_is_killed_remembers_where_it_ended(go, tmp_path, monkeypatch):
    """The same if it is killed before its next checkpoint: the second --resume forgot that loss."""
    losses = iter([3, 1, 1, 1, 4, 5])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: (next(losses), []))
    assert go(f"--tasks {THREE} --save-every 4 --val-samples 1 --steps 3")[0] == 0
    best = {p: p.read_bytes() for p in (tmp_path / "out/best").rglob("*.safetensors")}

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train, "optimizer_step", killed)
        assert go("--resume --steps 6")[0] == 130
    code, said, _ = go("--resume")
    assert code == 0 and "lowest held-out loss: 1.0000 at step 3" in said
    assert saved(tmp_path / "out")["held_out"] == {"0": 3, "3": 1, "4": 4, "6": 5}
    assert best and best == {p: p.read_bytes() for p in best}


def test_best_is_never_of_the_run_before(go, tmp_path):
    """--overwrite without held-out samples leaves no best/ of what it replaced."""
    assert go(f"--tasks {THREE} --steps 1 --val-samples 1")[0] == 0 and (tmp_path / "out/best").is_dir()
    assert go(f"--tasks {THREE} --steps 1 --val-samples 0 --overwrite")[0] == 0
    assert not (tmp_path / "out/best").exists()


def test_a_checkpoint_of_two_steps_is_refused(go, stage1, tmp_path, monkeypatch):
    """Killed while the files of a multi stream replace the earlier ones: predicting with both would be silent nonsense.
    Its single stream is whole, and --resume mends all."""
    out = shutil.copytree(stage1, tmp_path / "out")
    assert go("--stage 2 --steps 1")[0] == 0
    (out / "model.new").mkdir()
    with pytest.raises(ValueError, match="files of two steps.*try again, or continue its training with --resume"):
        StableMTL.load(out)
    assert StableMTL.load(out, stage=1).multi is None
    assert go("--resume")[0] == 0 and StableMTL.load(out).multi


def test_a_continued_run_in_the_folder_that_it_continues(go, stage1, tmp_path, monkeypatch):
    """--init X --out X --overwrite: X is read before it is replaced, and --resume goes on from the run's own state. An
    unfinished X is refused."""
    shutil.copytree(stage1, tmp_path / "out")
    assert go(f"--init {stage1} --steps 4 --out {tmp_path / 'apart'}")[0] == 0
    stop_at(monkeypatch, "between", 2)
    assert go(f"--init {tmp_path / 'out'} --steps 4 --overwrite")[0] == 130
    assert go("--resume")[0] == 0
    assert compare(tmp_path / "apart", tmp_path / "out") == []
    stopped = unfinished(stage1, tmp_path / "stopped")
    code, _, error = go(f"--init {stopped} --out {tmp_path / 'new'}")
    assert code == 2 and "--init starts from a finished stage 1, and the one in" in error and "1 of 9 steps" in error
    assert "--steps 1 ends it there" in error and not (tmp_path / "new").exists()


def test_lengthened_cosine(go, tmp_path):
    """The rate of each further step is that of a cosine over the new --steps; the notice and the log agree."""
    cosine = f"--tasks {THREE} --schedule cosine --warmup 0 --lr 0.01"
    assert go(f"{cosine} --steps 2")[0] == 0
    code, _, error = go("--resume --steps 8")
    assert code == 0 and "the cosine is now over 8 steps, not 2: at step 2 the learning rate is 0.00854, not 0" in error
    rates = [entry["lr"] for entry in log_lines(tmp_path / "out")]
    over_two, over_eight = ([0.005 * (1 + math.cos(math.pi * s / n)) for s in range(n)] for n in (2, 8))
    assert rates == pytest.approx(over_two + over_eight[2:])


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_twice(stage):
    """SIGKILL at random moments, twice, then to the end: bit-identical (python tests/kill.py --kills 20 for a thorough
    run)."""
    assert kill.main(["--kills", "2", "--stage", str(stage), "--seed", "1", "--steps", "4"]) == 0


# ---- the best checkpoint ----

def test_held_out_samples_change_nothing(go, tmp_path):
    """A run that keeps a best checkpoint leaves the weights, the state and the log of one that does not."""
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    for out, samples in ((plain, 0), (whole, 1)):
        assert go(f"--tasks depth,normal --lr 0.01 --out {out} --val-samples {samples}")[0] == 0
    for name in ("state/state.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (plain / name).read_bytes() == (whole / name).read_bytes()
    assert log_lines(plain) == log_lines(whole)
    assert (whole / "best").exists() and not (plain / "best").exists()


def test_the_best_checkpoint_is_kept(go, tmp_path, monkeypatch):
    """best/ is a whole checkpoint of the step with the lowest held-out loss, and outlives a resumed run."""
    out, scripted, weights = tmp_path / "out", {0: 5.0, 1: 3.0, 2: 4.0, 3: 6.0, 4: 3.5}, {}

    def loss(model, *_):
        step = len(log_lines(out)) if (out / "log.jsonl").exists() else 0
        weights[step] = {k: v.clone() for k, v in model.unet.state_dict().items()}
        return scripted[step], []
    monkeypatch.setattr(train, "held_out_loss", loss)
    stop_at(monkeypatch, "within", 2)
    assert go("--tasks depth,normal --steps 4 --save-every 1 --lr 0.01 --val-samples 2")[0] == 130
    code, said, _ = go("--resume")
    assert code == 0 and "lowest held-out loss: 3.0000 at step 1" in said
    assert same(StableMTL.load(out / "best").unet.state_dict(), weights[1])
    assert not same(weights[1], weights[4])
    held_out, of_best = (json.loads((f / "config.json").read_text())["held_out"] for f in (out, out / "best"))
    assert held_out == {str(s): v for s, v in scripted.items()}
    assert of_best == {"0": 5.0, "1": 3.0}


def test_the_best_of_stage_1_is_kept(go, tmp_path):
    """Stage 2 replaced it. That of an earlier stage 2 is replaced, as asked by --overwrite."""
    out = tmp_path / "out"
    assert go(f"--tasks {THREE} --val-samples 1")[0] == 0
    best = {p.relative_to(out / "best"): p.read_bytes() for p in (out / "best").rglob("*") if p.is_file()}
    for flags in ("--stage 2 --val-samples 1", "--stage 2 --val-samples 0 --overwrite"):
        assert go(flags)[0] == 0
        assert best == {p: (out / "best_stage1" / p).read_bytes() for p in best}
        assert (out / "best").exists() == ("overwrite" not in flags)
    assert StableMTL.load(out / "best_stage1").multi is None


@pytest.mark.parametrize("flags", ["--init {stage1}", "--stage 2"])
def test_what_goes_on_with_fewer_labels_trains_the_others(go, stage1, tmp_path, flags):
    """Data that lacks a task of the model was a dead end: the tasks are the model's, and --tasks contradicted them."""
    if "stage 2" in flags:
        shutil.copytree(stage1, tmp_path / "out")
    code, said, error = go(f"{flags.format(stage1=stage1)} --steps 4 --drop rooms:depth,streets:depth --val-samples 0")
    assert code == 0 and "no labels for depth: the others are trained, and these may suffer" in error
    assert {t for e in log_lines(tmp_path / "out")[-4:] for t in e["task"]} == set(THREE.split(",")) - {"depth"}
    assert StableMTL.load(tmp_path / "out").tasks == StableMTL.load(stage1).tasks
