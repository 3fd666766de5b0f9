"""Every flag of the paper's ablations changes what it says and nothing else, is stored in the checkpoint, and is shown
by evaluate.py.

What each does in detail is proved where it is built: test_model.py (masks, heads, second frame, N-to-N), test_train.py,
test_data.py."""
import functools
import json
import shutil

import pytest
import torch

import evaluate
import train
from cli import run
from data import train_readers
from model import StableMTL
from network import attention
from network.attention import draw_mask
from tasks import TASKS

pytestmark = pytest.mark.usefixtures("quick")
FOUR = "semantic,normal,depth,optical_flow"
TINY = ("--steps 4 --scenes 2 --size 16x24 --batch 4 --micro 4 --picture-every 0 --workers 0 --warmup 2 --threads 1 "
        f"--cache none --val-samples 0 --tasks {FOUR}")


@pytest.fixture(scope="module")
def stage1(tiny_base, tmp_path_factory):
    """Folder of a stage 1 of four tasks, trained without isolation and without a label. Do not write there."""
    out = tmp_path_factory.mktemp("ablations") / "out"
    flags = "--steps 1 --no-isolation --drop rooms:depth"
    assert train.main(f"--base {tiny_base} --out {out} {TINY} {flags}".split()) == 0
    return out


@pytest.fixture(scope="module")
def begin(tiny_base, stage1, tmp_path_factory):
    """begin(flags) -> what train.py is about to do with them: initial weights, batches, losses, stored settings. No
    step is computed."""
    @functools.cache
    def call(text=""):
        seen, out = {"batches": []}, tmp_path_factory.mktemp("begin") / "out"
        if "--stage 2" in text:
            shutil.copytree(stage1, out)

        def no_step(objective, batches, *_):
            model = objective.model
            if not seen["batches"]:
                seen.update(model=model, kinds=objective.weights, tasks=model.tasks,
                            weights={k: v.clone() for k, v in model.state_dict().items()},
                            acts=(model.rho, model.mask, model.second_frame, model.multi, model.training))
            sums = [[f.sum().item() for f in b["frames"]] for b in batches]
            seen["batches"].append([(tuple(b["tasks"]), b["keys"], s) for b, s in zip(batches, sums, strict=True)])
            return {"latent": 1.0}
        with pytest.MonkeyPatch.context() as m:
            m.setattr(train, "accumulate", no_step)
            m.setattr(train, "save_state", lambda *args: None)
            m.setattr(train, "save_model", lambda *args: None)
            assert train.main(f"--base {tiny_base} --out {out} {TINY} {text}".split()) == 0
        seen["settings"] = json.loads((out / "config.json").read_text())["train"]
        return seen
    return call


def differing(a, b):
    """Names of what differs between two beginnings; weights by the module they belong to."""
    ours, theirs = a["weights"], b["weights"]
    weights = {k.split(".")[0] for k in ours.keys() ^ theirs.keys()}
    weights |= {k.split(".")[0] for k in ours.keys() & theirs.keys() if not torch.equal(ours[k], theirs[k])}
    settings = {f"--{k}" for k in a["settings"] if a["settings"][k] != b["settings"][k] and k != "out"}
    return weights | settings | {k for k in ("tasks", "batches", "kinds", "acts") if a[k] != b[k]}


@pytest.mark.parametrize("flags, differs", {
    "--no-isolation": {"--isolation", "batches"},
    "--second-frame average": {"--second_frame", "acts"},
    "--second-frame none": {"--second_frame", "acts"},
    "--drop streets:depth": {"--drop", "batches"},
    "--tasks semantic,depth": {"--tasks", "tasks", "batches"},
    "--palette corners": {"--palette"},
    "--loss latent,task:0.5": {"--loss", "kinds"},
    "--stage 2 --rho 1": {"--rho", "acts"},
    "--stage 2 --mask score-k": {"--mask", "acts"},
    "--stage 2 --heads 2": {"--heads", "acts"},
    "--stage 2 --shared-qkv": {"--shared_qkv", "attention", "acts"},
    "--stage 2 --main-init base": {"--main_init", "main"},
    "--stage 2 --attention n-to-n": {"--attention", "batches", "acts"},
    "--stage 2 --loss latent,pixel": {"--loss", "kinds"},
    "--stage 2 --no-isolation": {"--isolation", "batches"},
    "--stage 2 --drop streets:normal": {"--drop", "batches"},
}.items())
def test_a_flag_changes_what_it_says_and_nothing_else(begin, flags, differs):
    """Against the run without it, with the same seed: which initial weights, which batches, which settings differ."""
    plain, with_flag = begin("--stage 2" if "--stage 2" in flags else ""), begin(flags)
    assert differing(plain, with_flag) == differs


def test_a_dropped_label_leaves_other_steps_alone(begin):
    """--drop: the tasks come in the same order, the others with the same samples, and the dropped label never."""
    plain, dropped = begin()["batches"], begin("--drop streets:depth")["batches"]
    for a, b in zip(plain, dropped, strict=True):
        ((task,), *_), ((other,), *_) = a[0], b[0]
        assert task == other
        assert (a == b) == (task != "depth")
        assert task != "depth" or not any(name == "streets" for _, keys, _ in b for name, *_ in keys)
    assert ("depth",) in [step[0][0] for step in dropped]


def test_n_to_n_supervises_every_label_an_image_has(begin):
    """One image, all tasks its world labels; the others keep one task."""
    labels = {r.name: {*r.tasks} & {*FOUR.split(",")} for r in train_readers(size=(16, 24), scenes=2)}
    labels["rooms"].remove("depth")     # stage 1 left it out, and stage 2 takes that over
    for step in begin("--stage 2 --attention n-to-n")["batches"]:
        for tasks, keys, _ in step:
            assert list(tasks) == [t for t in TASKS if t in labels[keys[0][0]]]
    assert all(len(tasks) == 1 for step in begin("--stage 2")["batches"] for tasks, *_ in step)


def test_masks_follow_the_attention_of_the_trained_layer(begin, monkeypatch):
    """--mask score: what is left out in a layer is drawn from that layer's own attention to the image, --rho says how
    often, per layer and image."""
    m, drawn = begin("--stage 2 --rho 0.5")["model"], []
    for layer in m.attention.values():      # attention that is not even
        for i, t in enumerate(m.tasks):
            layer.task_to_q[t].net[-1].bias.data += 1
            layer.task_to_k[t].fc2.bias.data += 0.3 * i

    def spy(scores, numbers, rho, how):
        drawn.append((scores, draw_mask(scores, numbers, rho, how), rho, how))
        return drawn[-1][1]
    monkeypatch.setattr(attention, "draw_mask", spy)
    z, n, layers = torch.randn(2, 4, 8, 12), 60, len(m.attention)
    with torch.no_grad():
        streams = m.streams(z, z, m.tasks)
        for step in range(n):
            torch.manual_seed(step)
            m(z, z, ["depth"], streams=streams, keys=[("rooms", 0, False), ("rooms", 1, False)])
    assert len(drawn) == n * layers
    assert {d[2:] for d in drawn} == {(0.5, "score")}
    images = [(scores[:, k], left_out[:, k]) for scores, left_out, *_ in drawn for k in range(2)]
    masked = [(scores, left_out) for scores, left_out in images if left_out.any()]
    assert len(masked) / len(images) == pytest.approx(0.5, abs=0.11)
    left_out = sum(mask for _, mask in masked).float()      # three other tasks; expected: the sum of the scores
    expected = sum(scores for scores, _ in masked)
    assert expected.max() > 1.3 * expected.min(), "even attention would show nothing"
    assert ((left_out - expected) ** 2 / expected).sum() < 13.8     # chi-square, 2 degrees of freedom, p > 0.001


def test_settings_of_both_stages_are_kept_and_shown(tiny_base, stage1, tmp_path, capsys):
    """Stage 2 keeps stage 1's settings beside its own, also over --resume, --overwrite and --init; evaluate.py prints
    and writes both."""
    out, longer = shutil.copytree(stage1, tmp_path / "out"), tmp_path / "longer"

    def go(text):
        return run(lambda: train.main(text.split()))

    def config(folder):
        return json.loads((folder / "config.json").read_text())
    start = f"--base {tiny_base} {TINY} --steps 1"
    for flags in ("--rho 0.7 --mask argmax --heads 2", "--rho 0.2 --mask uniform --heads 1 --overwrite"):
        assert go(f"{start} --out {out} --stage 2 {flags}") == 0
    assert go(f"--resume --out {out}") == 0
    saved = config(out)
    assert saved["stage1"] == config(stage1)["train"]
    assert config(stage1)["stage1"] is None
    assert [saved["train"][k] for k in ("rho", "mask", "heads")] == [0.2, "uniform", 1]
    assert StableMTL.load(out).multi["heads"] == 1
    assert go(f"{start} --out {longer} --init {out}") == 0
    assert config(longer)["stage1"] == saved["stage1"]
    capsys.readouterr()
    assert evaluate.main(["--ckpt", str(out), "--limit", "1", "--trivial", "0", "--workers", "0"]) == 0
    shown, report = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    for setting in ("isolation False", "drop rooms:depth", "rho 0.2", "mask uniform", "heads 1"):
        assert setting in shown
    assert report["settings"] == saved["train"]
    assert report["stage1"] == saved["stage1"]
