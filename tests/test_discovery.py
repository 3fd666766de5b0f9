"""Label discovery: what a teacher says becomes a label where there is none, and nowhere else."""
import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import raw
import torch
from kill import compare
from made import Made
from runs import saved, stop_at, trained, unfinished

import evaluate
import train
from cli import run
from data import Mixture, label_tensors, prepare, train_readers
from evaluate import PAPER_TASKS
from inference.confidence import agreement, turned
from metrics import METRICS, code_sums
from metrics import trivial as trivial_of
from model import StableMTL
from readers.hypersim import Hypersim
from readers.toyworld import ToyWorld
from readers.virtual_kitti_2 import VirtualKitti2
from tasks import TASKS
from tools import discover
from training import discovery, losses
from training.cache import LatentCache, fingerprint
from training.discovery import PseudoLabels, UnlabelledPair, keep, read_pseudo, unlabelled

pytestmark = pytest.mark.usefixtures("quick")
TASKS_HERE = ("normal", "depth", "shading")
SIZE, SCENES = (16, 24), 2


@pytest.fixture(scope="module")
def teacher(tiny_base, tmp_path_factory):
    """`trained` for TASKS_HERE."""
    return trained(tiny_base, tmp_path_factory, f"--tasks {','.join(TASKS_HERE)}")


@pytest.fixture(scope="module")
def pseudo(teacher, tmp_path_factory):
    """Folder of what it says. Do not write there."""
    to = tmp_path_factory.mktemp("pseudo") / "labels"
    assert discover.main(f"--ckpt {teacher} --to {to} --samples 0".split()) == 0
    return to


def readers():
    return train_readers("", SIZE, SCENES)


def labels(folder, model, mask="half", tasks=TASKS_HERE, drop=None):
    cfg = train.Config(pseudo=str(folder), pseudo_mask=mask)
    return read_pseudo(cfg, readers(), fingerprint(model.vae.state_dict()), tasks, drop or {})


# ---- which pairs of dataset and task ----

def test_pairs_are_what_the_toy_worlds_lack():
    """The six of the toy worlds, as of the real datasets they stand for; dropped labels count as missing; flows and
    classes are never discovered."""
    six = {"streets": ["shading", "albedo"], "things": ["normal", "depth", "shading", "albedo"]}
    assert unlabelled(readers(), PAPER_TASKS, {}) == six
    assert unlabelled(readers(), ("semantic", "optical_flow", "depth"), {}) == {"things": ["depth"]}
    dropped = unlabelled(readers(), PAPER_TASKS, {"rooms": {"depth", "semantic"}})
    assert dropped == {"rooms": ["depth"], **six}
    some = Made("some", tasks=("normal", "depth"), labelled={"depth": [1], "normal": []})
    assert unlabelled([some], ("normal", "depth"), {}) == {"some": ["normal"]}, "one label is enough to be labelled"


# ---- what is stored ----

def test_a_label_is_what_the_teacher_predicts(teacher, pseudo):
    """Decoded, it is predict's map of the image as it is; the second flip that of the mirrored image."""
    model, reader = StableMTL.load(teacher), ToyWorld("things", "train", SCENES, SIZE)
    kept = labels(pseudo, model)
    for t in TASKS_HERE:
        for flip in (0, 1):
            frame = prepare(reader, 1, (), {}, (bool(flip), False))["frames"][0][None]
            z = torch.from_numpy(np.array(kept.array(reader, t)[1, flip]))[None].float()
            found, told = TASKS[t].decode(model.decode_labels({t: z})[t]), model.predict(frame, frame, [t])[t]
            assert (found - told).abs().max() < 0.02 and told.std() > 0.01


def test_doubt_is_the_disagreement_with_the_mirror(teacher, pseudo):
    """One number per latent cell, the mean over its pixels; of the mirrored image it is the mirror image."""
    model, reader = StableMTL.load(teacher), ToyWorld("things", "train", SCENES, SIZE)
    image = prepare(reader, 0, (), {})["frames"][0][None]
    for t in TASKS_HERE:
        doubt = labels(pseudo, model).array(reader, f"{t}_doubt")[0].astype(np.float32)
        upright, mirrored = (model.predict(x, x, [t])[t] for x in (image, image.flip(-1)))
        sure = agreement(TASKS[t], upright[0], turned(TASKS[t], mirrored)[0])
        mean = (1 - sure).unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2))
        assert np.abs(doubt[0, 0] - mean.numpy()).max() < 5e-3 and doubt.max() > 0.01
        assert (doubt[1] == doubt[0, ..., ::-1]).all() and 0 <= doubt.min() <= doubt.max() <= 1


class Equivariant(torch.nn.Module):
    """A teacher of factor 8 to whom albedo is the image, mirrored or not, but for its columns in `wrong`. Cells count
    from the left, and what is no whole one is left out, as by a VAE."""

    factor, out_channels, codecs = 8, 3 * 64, TASKS

    def __init__(self, wrong=slice(0)):
        super().__init__()
        self.weight, self.wrong = torch.nn.Parameter(torch.zeros(1)), wrong

    def encode_frames(self, first, second, tasks):
        seen = first.clone()
        seen[..., self.wrong] *= -1
        return seen, seen

    def forward(self, first, second, tasks):
        height, width = (side // 8 * 8 for side in first.shape[-2:])
        return {t: torch.nn.functional.pixel_unshuffle(first[..., :height, :width], 8) for t in tasks}

    def decode_labels(self, latents):
        return {t: torch.nn.functional.pixel_shuffle(z, 8) for t, z in latents.items()}


@pytest.mark.parametrize("size", [(24, 56), (27, 56), (24, 63), (27, 63)])
def test_doubt_at_sizes_of_no_whole_cells(tmp_path, size):
    """Both passes count cells from the left: their maps were compared shifted by what is no whole cell, which doubted
    every edge, and the mirrored image got the doubts of cells that are not its own."""
    reader, doubts = Made(native=(28, 64)), {}
    reader.size = size
    for name, wrong in (("never", slice(0)), ("at the left", slice(11, 13))):
        kept = PseudoLabels(tmp_path / name, [reader], "", {"made": ["albedo"]}, "")
        kept.discover(Equivariant(wrong), 2)
        doubts[name] = kept.array(reader, "albedo_doubt").astype(np.float32)[:, :, 0]
    assert doubts["never"].max() < 1e-3
    there = {x // 8 for x in (*range(9, 15), *range(size[1] - 15, size[1] - 9))}    # 2 pixels around, on both sides
    for row in doubts["at the left"].max((0, 2)):
        assert set(np.flatnonzero(row > row.max() / 2)) == there


def test_labels_are_judged_all_over_a_dataset(tmp_path):
    """The first samples of a dataset of videos are one clip."""
    reader, true, model = Made("a", ("normal",), n=6), Made("a", ("albedo",), n=6), Equivariant()
    kept = PseudoLabels(tmp_path / "labels", [reader], "", {"a": ["albedo"]}, "")
    kept.discover(model, 6)
    guesses = {"albedo": evaluate.TrainingLabels([], 1, 0)}
    (row,) = discover.errors(kept, model, {"a": true}, 2, guesses)
    assert true.loads == [0, 3] and float(row["all"]) > 0


def chance(task):
    """The better trivial predictor of `things`, of all labels that other worlds have, by hand."""
    there = [r for r in readers() if task in r.tasks]
    pairs = [[x[0] if k else x for k, x in enumerate(label_tensors(r.load(i, (task,)), task))]
             for r in there for i in range(SCENES)]
    metric = METRICS[TASKS[task].metric]
    true, scores = ToyWorld("things", "train", SCENES, SIZE, all_labels=True), []
    for guess in trivial_of(TASKS[task], [code_sums(TASKS[task], pairs)]):
        score = metric.accumulator(clip=true.depth_range)
        for i in range(SCENES):
            label, valid = label_tensors(true.load(i, (task,)), task)
            score.add(guess, label, valid[0])
        scores.append(score.result()[metric.headline])
    return min(scores)


def test_truth_is_the_latent_of_the_true_label(teacher, tmp_path, capsys):
    """--truth: the latents that a cache of the labels would hold; where a cell is not all valid there is no label."""
    assert discover.main(f"--ckpt {teacher} --to {tmp_path / 'truth'} --truth --samples 2".split()) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| things")]
    assert {row[1].strip() for row in table} == set(TASKS_HERE)
    ours, trivial = ({row[1].strip(): float(row[k]) for row in table} for k in (3, 5))
    assert trivial == pytest.approx({t: chance(t) for t in TASKS_HERE}, rel=1e-3)
    assert all(ours[t] != trivial[t] for t in TASKS_HERE)
    model = StableMTL.load(teacher)
    kept, world = labels(tmp_path / "truth", model, "none"), ToyWorld("things", "train", SCENES, SIZE, all_labels=True)
    pair = next(p for p in kept.pairs if (p.reader.name, p.tasks) == ("things", ("depth",)))
    cache = LatentCache(tmp_path / "cache", [world], "", "cityscapes")
    cache.create([world], model)
    cache.build([world], model, TASKS)
    kept.beside(cache, model)
    for flip in (False, True):
        want, got = cache.get(world, 1, ("depth",), flip), kept.get(pair, 1, ("depth",), flip, 0)
        assert torch.equal(want["labels"]["depth"], got["labels"]["depth"])
        assert torch.equal(want["valid"]["depth"], got["valid"]["depth"]) and got["valid"]["depth"].any()


def test_a_diffusing_teacher_says_the_same_of_an_image_in_any_batch(go, tmp_path):
    """Its noise followed from the place in the batch, so that labels depended on --batch and on what was there already;
    now it is predict's, of the image."""
    assert go(f"--tasks shading,depth --objective diffuse --ddim-steps 2 --out {tmp_path / 'teacher'}")[0] == 0
    for batch in (1, 2):
        flags = f"--ckpt {tmp_path / 'teacher'} --to {tmp_path / str(batch)} --samples 0 --batch {batch}"
        assert discover.main(flags.split()) == 0
    model = StableMTL.load(tmp_path / "teacher")
    one, two = (labels(tmp_path / str(batch), model, tasks=("shading", "depth")) for batch in (1, 2))
    for pair in one.pairs:
        (t,) = pair.tasks
        found = [np.array(kept.array(pair.reader, t)).astype(np.float32) for kept in (one, two)]
        assert np.abs(found[0] - found[1]).max() < 0.02 < np.abs(found[0][0] - found[0][1]).max()
        frame = prepare(pair.reader, 1, (), {})["frames"][0][None]
        decoded = TASKS[t].decode(model.decode_labels({t: torch.from_numpy(found[1][1, :1])})[t])
        assert (decoded - model.predict(frame, frame, [t])[t]).abs().max() < 0.05


# ---- what training sees ----

def test_masks():
    """half: up to the median; none: all; weighted: in the mean over draws exp(-d / median)."""
    doubt, rng = torch.tensor([[0.0, 0.1], [0.2, 0.4]]), np.random.default_rng(0)
    assert keep("half", doubt, 0.15, rng).tolist() == [[True, True], [False, False]]
    assert keep("none", doubt, 0.15, rng).all()
    share = torch.stack([keep("weighted", doubt, 0.2, rng) for _ in range(4000)]).float().mean(0)
    assert torch.allclose(share, torch.exp(-doubt / 0.2), atol=0.03)


def test_half_of_the_cells_of_a_task_are_kept(teacher, pseudo):
    """The threshold is the task's, over all datasets together."""
    kept = labels(pseudo, StableMTL.load(teacher))
    kept.beside(None, StableMTL.load(teacher))
    for t in TASKS_HERE:
        masks = [kept.get(p, i, (t,), False, 0)["valid"][t] for p in kept.pairs if p.tasks == (t,) for i in range(2)]
        share = torch.stack(masks).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.05)


def test_the_mixture_draws_them_with_their_weight(teacher, pseudo):
    """shading: rooms has labels, streets and things have none: 1 to 0.5 to 0.5. depth: 1, 1, 0.5."""
    kept = labels(pseudo, StableMTL.load(teacher))
    assert {(p.name, p.tasks[0]) for p in kept.pairs} == {
        ("streets (pseudo)", "shading"), *(("things (pseudo)", t) for t in TASKS_HERE)}
    mixture = Mixture(readers()[:2] + kept.pairs, TASKS_HERE, TASKS, batch=50)
    drawn = {t: Counter() for t in TASKS_HERE}
    for step in range(120):
        for (t,), reader, *_ in mixture.plan(step):
            drawn[t][reader.name] += 1
    for t, weights in (("shading", {"rooms": 2, "streets (pseudo)": 1, "things (pseudo)": 1}),
                       ("depth", {"rooms": 2, "streets": 2, "things (pseudo)": 1})):
        total, parts = sum(drawn[t].values()), sum(weights.values())
        assert drawn[t].keys() == weights.keys()
        for name, weight in weights.items():
            assert drawn[t][name] / total == pytest.approx(weight / parts, abs=0.05)


def test_samples_of_a_pair(teacher, pseudo):
    """The label of that flip; the colours of the image drawn from the seed; a labelled dataset's are the cache's."""
    model = StableMTL.load(teacher)

    class Cache:
        def get(self, *args):
            return args
    kept = labels(pseudo, model, "none").beside(Cache(), model)
    pair, plain = kept.pairs[-1], readers()[0]
    t = pair.tasks[0]
    assert kept.get(plain, 1, (t,), True, 7) == (plain, 1, (t,), True, 7)
    one, again, other = (kept.get(pair, 1, (t,), True, seed) for seed in (7, 7, 8))
    assert torch.equal(one["frames"][0], again["frames"][0]) and not torch.equal(one["frames"][0], other["frames"][0])
    assert torch.equal(one["labels"][t], other["labels"][t])
    assert torch.equal(one["labels"][t], torch.from_numpy(np.array(kept.array(pair.reader, t)[1, 1])).float())
    clean = model.encode_frame(prepare(pair.reader, 1, (), {}, (True, False))["frames"][0][None])[0]
    assert 0 < (one["frames"][0] - clean).abs().mean() < 0.5 * clean.abs().mean()


def test_colours_of_a_students_images(monkeypatch):
    """Brightness, contrast and saturation change by up to 0.2, hue never: the labels of albedo follow it."""
    seen = []
    monkeypatch.setattr("data.jitter", lambda images, strength, rng: seen.append(strength) or images)
    pair = UnlabelledPair(Made("made"), "albedo", 0.5)
    prepare(pair, 0, (), {}, rng=np.random.default_rng(0), with_next=False)
    assert seen == [(0.2, 0.2, 0.2, 0)]


def test_masked_cells_have_no_influence(teacher, pseudo, tmp_path):
    """Labels where the mask is off, NaN too, change neither loss nor gradient."""
    model, found = StableMTL.load(teacher), []
    for damage in (0.0, math.nan):
        kept = labels(shutil.copytree(pseudo, tmp_path / str(damage)), model).beside(None, model)
        pair = next(p for p in kept.pairs if p.tasks == ("depth",))
        kept.arrays.clear()     # they are open to be read
        array, off = kept.array(pair.reader, "depth", "r+"), kept.doubt(pair) > kept.middle["depth"]
        array[np.broadcast_to(off, array.shape)] += damage
        array.flush()
        mixture = Mixture([pair], ("depth",), TASKS, batch=4, cache=kept)
        batches = mixture[0]["batches"]
        plain = train.precision(train.Config(precision="fp32"), torch.device("cpu"))
        objective = losses.LatentObjective(model, {"latent": 1.0}, False)
        loss = losses.accumulate(objective, batches, torch.device("cpu"), *plain)
        grads = [p.grad.clone() for p in model.unet.parameters() if p.grad is not None]
        model.zero_grad()
        found.append((loss["latent"], grads))
    assert found[0][0] == found[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_labelled_pair_never_gets_a_pseudo_label(go, pseudo, tmp_path):
    """Pairs are those without labels; labels made while some were dropped are refused where these are back."""
    stored = json.loads((pseudo / "cache.json").read_text())["cells"]
    assert all(t not in r.tasks for r in readers() for t in stored.get(r.name, ()))
    out, few = tmp_path / "few", f"--tasks {','.join(TASKS_HERE)}"
    assert go(f"{few} --drop rooms:depth --out {out}")[0] == 0
    assert discover.main(f"--ckpt {out} --to {tmp_path / 'labels'} --samples 0".split()) == 0
    code, _, error = go(f"{few} --pseudo {tmp_path / 'labels'} --cache auto")
    assert code == 2 and "was made without the depth labels of rooms" in error and "--drop rooms:depth" in error
    assert go(f"{few} --pseudo {tmp_path / 'labels'} --drop rooms:depth --cache auto")[0] == 0


# ---- commands ----

def student(folder, flags=""):
    return f"--tasks {','.join(TASKS_HERE)} --steps 4 --cache auto --pseudo {folder} {flags}"


def test_resume_equals_uninterrupted(go, pseudo, tmp_path, monkeypatch, capsys):
    """Also where colours and masks are drawn; evaluate.py says what the labels were."""
    flags = student(pseudo, "--pseudo-mask weighted --pseudo-weight 4")
    assert go(f"{flags} --out {tmp_path / 'whole'}")[0] == 0
    stop_at(monkeypatch, "between", 2)
    assert go(flags)[0] == 130
    assert go("--resume")[0] == 0
    assert compare(tmp_path / "whole", tmp_path / "out") == []
    assert saved(tmp_path / "out")["train"]["pseudo_weight"] == 4
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert any("(pseudo)" in name for line in lines for name in line["dataset"])
    assert evaluate.main(f"--ckpt {tmp_path / 'out'} --limit 1 --trivial 0 --workers 0".split()) == 0
    assert f"pseudo {pseudo}" in capsys.readouterr().out


def test_two_processes_and_one(go, pseudo, tmp_path):
    """Every process takes its part of the same draws."""
    runs = []
    for n in (1, 2):
        assert go(f"{student(pseudo)} --processes {n} --out {tmp_path / str(n)}")[0] == 0
        lines = (tmp_path / str(n) / "log.jsonl").read_text().splitlines()
        runs.append([json.loads(line)["loss"] for line in lines])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_an_interrupted_discovery_goes_on(teacher, pseudo, tmp_path, monkeypatch, capsys):
    """Unfinished labels are refused; the same command does the rest, and what was there stays."""
    calls, told = [], discovery._told

    def stopped(model, items, tasks):
        calls.append(items)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return told(model, items, tasks)
    monkeypatch.setattr(discovery, "_told", stopped)
    flags = f"--ckpt {teacher} --to {tmp_path / 'labels'} --samples 0 --batch 1".split()
    assert discover.main(flags) == 130 and "does the rest" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unfinished"):
        labels(tmp_path / "labels", StableMTL.load(teacher))
    assert discover.main(flags) == 0 and len(calls) == 2 + 3
    for path in pseudo.rglob("*.npy"):
        other = np.load(tmp_path / "labels" / path.relative_to(pseudo))
        assert np.allclose(np.load(path).astype(np.float32), other.astype(np.float32), atol=2e-3)


def test_real_formats_with_a_file_that_cannot_be_read(go, tmp_path, monkeypatch, capsys):
    """Of a teacher that was trained with --skip-bad the labels could never be finished: its image is named, and with
    --skip-bad counted and left without labels. Of dropped labels the error is told, beside trivial predictors."""
    data = tmp_path / "data"
    raw.hypersim(data, frames=[("ai_001_001", "cam_00", k, "train") for k in (0, 1)])
    raw.virtual_kitti(data, variations=("clone",))
    monkeypatch.setattr(Hypersim, "size", SIZE)
    monkeypatch.setattr(VirtualKitti2, "size", (SIZE[0] + 1, SIZE[1] + 1))      # of no whole latent cells, as it is
    bad = sorted(data.glob("virtual_kitti_2/**/rgb_00000.jpg"))[0]
    bad.write_bytes(bad.read_bytes()[:100])
    few = "--batch 4 --micro 4 --val-samples 0 --picture-every 0 --workers 0 --threads 1 --tasks depth,shading"
    like = f"--data {data} --cache {tmp_path / 'cache'} --skip-bad --drop virtual_kitti_2:depth"
    assert go(f"--steps 1 --out {tmp_path / 'teacher'}", f"{few} {like}")[0] == 0
    flags = f"--ckpt {tmp_path / 'teacher'} --to {tmp_path / 'labels'} --samples 4"
    assert run(lambda: discover.main(flags.split())) == 2
    assert f"virtual_kitti_2 sample 0: {bad}" in (error := capsys.readouterr().err) and "--skip-bad skips" in error
    assert run(lambda: discover.main(f"{flags} --skip-bad".split())) == 0
    out, error = capsys.readouterr()
    assert f"skipped: virtual_kitti_2:0: {bad}" in error and "; 1 images skipped" in out
    row = next(line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| virtual_kitti_2"))
    assert row[1].strip() == "depth" and all(float(x) > 0 for x in row[3:6])
    doubt = np.load(tmp_path / "labels/virtual_kitti_2/shading_doubt.npy")
    assert [bool(np.isfinite(d).all()) for d in doubt] == [i != 0 for i in range(6)]
    printed = re.search("next: python train.py (.*) --out", out)[1]     # with all that it has to share with its teacher
    assert set(like.split()) < set(printed.split())
    code, told, error = go(f"{printed} --steps 6 --pseudo-weight 9", few)
    assert code == 0 and re.search("; [1-9] samples skipped", told), error


@pytest.mark.parametrize(("flags", "says"), [
    ("--stage 2 --pseudo x", "belongs to --stage 1"),
    ("--pseudo-mask none", "it is about --pseudo"),
    ("--pseudo-weight 2", "it is about --pseudo"),
    ("--pseudo {pseudo} --pseudo-weight 0 --cache auto", "--pseudo-weight"),
    ("--pseudo {pseudo} --pseudo-mask some --cache auto", "invalid choice"),
    ("--pseudo {tmp} --cache auto", "make them from a trained model by python -m tools.discover"),
    ("--pseudo {pseudo}", "go with a latent cache"),
    ("--pseudo {pseudo} --cache auto --tasks semantic", "has no label of semantic"),
    ("--pseudo {pseudo} --cache auto --scenes 1", "pseudo labels {pseudo} was made for something else (samples of"),
    ("--pseudo {pseudo} --cache auto --space pixel", "was made for something else (vae"),
])
def test_bad_flags(go, pseudo, tmp_path, flags, says):
    code, _, error = go(flags.format(pseudo=pseudo, tmp=tmp_path))
    assert code == 2 and says.format(pseudo=pseudo) in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["done", "shading", "shading_doubt"])
def test_an_array_that_is_missing(go, pseudo, tmp_path, name):
    """It is named before anything is written: that of labels was missed only in the first step."""
    shutil.copytree(pseudo, tmp_path / "labels", ignore=shutil.ignore_patterns(f"{name}.npy"))
    code, _, error = go(student(tmp_path / "labels"))
    assert code == 2 and f"{name}.npy" in error and "missing or damaged" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_bad_commands(teacher, pseudo, another, go, tmp_path, capsys):
    """A folder of another teacher, a teacher that has nothing to say, or none."""
    def told(text):
        return run(lambda: discover.main(text.split())), capsys.readouterr().err
    code, error = told(f"--ckpt {another} --to {pseudo}")
    assert code == 2 and "pseudo labels of other pairs" in error
    assert go("--tasks semantic --out " + str(tmp_path / "classes"))[0] == 0
    code, error = told(f"--ckpt {tmp_path / 'classes'} --to {tmp_path / 'x'}")
    assert code == 2 and "lack no label of semantic" in error
    assert go("--tasks depth --space pixel --out " + str(tmp_path / "pixel"))[0] == 0
    code, error = told(f"--ckpt {tmp_path / 'pixel'} --to {tmp_path / 'x'}")
    assert code == 2 and "cannot teach" in error
    for to in (teacher, f"{teacher}/best/../state"):
        code, error = told(f"--ckpt {teacher} --to {to}")
        assert code == 2 and "is in the teacher's folder" in error and not (teacher / "cache.json").exists()
    code, error = told(f"--ckpt {unfinished(teacher, tmp_path / 'stopped')} --to {tmp_path / 'x'}")
    assert code == 2 and "--ckpt is a finished teacher, and the one in" in error and "has done 1 of 9 steps" in error
    code, error = told(f"--ckpt {tmp_path / 'none'} --to {tmp_path / 'x'}")
    assert code == 2 and "no checkpoint in" in error and not (tmp_path / "x").exists()
    (tmp_path / "afile").touch()
    code, error = told(f"--ckpt {teacher} --to {tmp_path / 'afile'}")
    assert code == 2 and "afile cannot be written" in error
    about = json.loads((shutil.copytree(pseudo, tmp_path / "labels") / "cache.json").read_text())
    (tmp_path / "labels/cache.json").write_text(json.dumps(about | {"vae": "another"}))
    code, error = told(f"--ckpt {teacher} --to {tmp_path / 'labels'}")      # it has no flag --pseudo
    assert code == 2 and f"the folder of pseudo labels {tmp_path / 'labels'} was made for something else (vae" in error
    assert "--" not in error


def test_a_pair_looks_like_a_reader():
    pair = UnlabelledPair(Made("made"), "shading", 0.5)
    assert len(pair) == 4 and list(pair.indices("shading")) == [0, 1, 2, 3] and pair.mix == {"shading": 0.5}
