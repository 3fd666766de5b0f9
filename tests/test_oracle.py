"""The oracle: streams that hold the truth, which never reaches the task that it is the truth of."""
import json
import shutil

import pytest
import tiny
import torch
from kill import log_lines
from runs import TINY

import data
import evaluate
import train
from checkpoint import read_json
from cli import run
from data import Mixture, prepare, train_readers
from inference.report import REPORT
from model import StableMTL
from readers.toyworld import ALL, ToyWorld
from tasks import registry
from tools import oracle
from training import losses
from training.cache import LatentCache, fingerprint

pytestmark = pytest.mark.usefixtures("quick")


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 2])
def test_the_truth_of_others_alone_reaches_a_task(tiny_model, monkeypatch, rows):
    """Another truth of its own changes no prediction of a task, alone or among all; that of any other does."""
    z, truth = tiny.latents(), {t: torch.randn(2, 4, 8, 8) for t in tiny_model.tasks}
    monkeypatch.setattr(tiny_model, "truth", truth)
    before = tiny_model(*z, ["depth"], rows)["depth"]
    among = tiny_model(*z, tiny_model.tasks, rows)["depth"]
    for t in ("optical_flow", "depth", "shading"):
        monkeypatch.setitem(truth, t, truth[t] + 1)
        changed = [tiny_model(*z, ["depth"], rows)["depth"], tiny_model(*z, tiny_model.tasks, rows)["depth"]]
        assert [torch.equal(a, b) for a, b in zip(changed, (before, among), strict=True)] == [t == "depth"] * 2
        before, among = changed


@torch.no_grad()
def test_without_truth_it_measures_what_evaluate_does(tiny_model, monkeypatch):
    """Zeros for the truth and stage 1's own auxiliary UNet: evaluate.py's numbers, also indoors, where classes and
    second frames are missing."""
    monkeypatch.setattr(tiny_model, "truth", None)
    monkeypatch.setattr(oracle, "known", lambda z, cells: torch.zeros_like(z))
    for reader in data.test_readers(size=(16, 24), scenes=3):
        expected, *_ = evaluate.evaluate(tiny_model, reader, workers=0)
        found = oracle.measure(tiny_model, reader, None)
        assert found.keys() == expected.keys()
        for t in expected:
            assert found[t] == pytest.approx(expected[t], rel=1e-3, abs=1e-4)
    assert all(not z.any() for z in tiny_model.truth.values())


@torch.no_grad()
def test_what_the_streams_are_told(tmp_path):
    """In training and in evaluation the latents of the labels' codes, flipped as the image; zeros where there is no
    label, as for classes in rooms."""
    m = tiny.model(tasks=ALL)
    readers = [r.complete() for r in train_readers(size=(16, 24), scenes=1)]
    cache = LatentCache(tmp_path, readers, fingerprint(m.vae.state_dict()), "cityscapes")
    cache.create(readers, m)
    cache.build(readers, m, registry("cityscapes"))
    rooms, z = readers[0], torch.zeros(2, 4, 4, 6)
    assert oracle.Truth(m, cache, readers).fetch([("rooms", 0, 0), ("rooms", 0, 1)], ALL, z, z) is None
    told, flips = m.truth, [prepare(rooms, 0, ALL[1:], m.codecs, (flip, False)) for flip in (False, True)]
    assert not told["semantic"].any()
    for t in ALL[1:]:
        expected = m.encode(torch.stack([item["labels"][t] for item in flips]))
        assert (told[t] - expected).abs().max() < 2e-3 * expected.abs().max()       # float16
    _, maps, *_ = next(data.test_batches(rooms, ALL, 1, 0))[0]
    again = oracle.encoded(m, [maps])
    assert not again["semantic"].any()
    assert all((again[t] - told[t][:1]).abs().max() < 2e-3 * told[t].abs().max() for t in ALL[1:])
    assert torch.equal(flips[0]["frames"][0], flips[0]["frames"][1])        # training's rooms have no second frame


@torch.no_grad()
def test_what_the_streams_are_told_of_predictions(tmp_path, monkeypatch):
    """--tell predictions: of a training image what stage 1 predicts from its cached frames, everywhere, computed once;
    of a test image what it predicts there."""
    m, stage1 = tiny.model(multi=True, tasks=ALL), tiny.model(tasks=ALL)
    readers = [r.complete() for r in train_readers(size=(16, 24), scenes=1)]
    cache = LatentCache(tmp_path, readers, fingerprint(m.vae.state_dict()), "cityscapes")
    cache.create(readers, m)
    cache.build(readers, m, registry("cityscapes"))
    told, z = oracle.Predicted(cache, stage1), torch.zeros(2, 4, 8, 12)
    for _ in range(2):
        oracle.Truth(m, told, readers).fetch([("streets", 0, 0), ("streets", 0, 1)], ALL, z, z)
    frames = [cache.get(readers[1], 0, ALL, flip)["frames"] for flip in (0, 1)]
    expected = stage1(*(torch.stack(f) for f in zip(*frames, strict=True)), ALL)
    assert len(told.known) == 2
    for t in ALL:
        assert (m.truth[t] - expected[t]).abs().max() < 2e-3 * expected[t].abs().max()      # float16
    assert told.get(readers[0], 0, ("semantic",), 0)["valid"]["semantic"].all()     # no label indoors, but a prediction

    reader, seen = data.test_readers(size=(16, 24), scenes=1)[1], []
    monkeypatch.setattr(oracle, "network_maps", lambda model, *frames, tasks: seen.append(frames) or {})
    with pytest.raises(KeyError):       # nothing to measure: only what was told counts here
        oracle.measure(m, reader, None, stage1)
    expected = stage1(*map(m.encode, seen[0]), ALL)
    assert all(torch.equal(m.truth[t], expected[t]) for t in ALL)


@torch.no_grad()
def test_streams_that_are_not_kept_see_the_truth_too(tmp_path):
    """A cache with room for the first of two scenes gives for the second what the model computes from its truth, as
    without a cache, whatever truth was told before; for both together the streams of both."""
    m = tiny.model(multi=True, tasks=ALL, unet=tiny.thin_unet)
    readers = [r.complete() for r in train_readers(size=(16, 24), scenes=2)]
    cache = LatentCache(tmp_path, readers, fingerprint(m.vae.state_dict()), "cityscapes")
    cache.create(readers, m)
    cache.build(readers, m, registry("cityscapes"))
    truth, z = oracle.Truth(m, cache, readers), tiny.latents(1, (4, 6))
    m.truth = dict.fromkeys(ALL, torch.zeros(1, 4, 4, 6))
    one = sum(x.numel() for features in m.streams(*z, ALL).values() for x in features.values())
    streams = oracle.TrueStreams(truth, tmp_path, readers, m, len(readers) * 4 * one)
    assert set(streams.kept.values()) == {1}
    pair = tiny.latents(2, (4, 6))
    for numbers in ((0,), (1,), (0, 1), (1,)):
        keys = [("streets", n, False) for n in numbers]
        z_i, z_j = (z[list(numbers)] for z in pair)
        found = m(z_i, z_j, ["depth"], streams=streams.fetch(keys, ["depth"], z_i, z_j))["depth"]
        assert truth.fetch(keys, ["depth"], z_i, z_j) is None
        assert torch.allclose(found, m(z_i, z_j, ["depth"])["depth"], atol=1e-3), numbers


@pytest.fixture
def go(second, tmp_path, capsys):
    """go(flags, flags of train.py) -> (exit code, stdout, stderr) of a small oracle on tmp_path/out."""
    def call(flags="", more=""):
        argv = (f"--ckpt {second} --out {tmp_path / 'oracle'} --steps 3 --aux-steps 2 --limit 1 {flags} "
                f"-- --batch 4 --micro 4 --warmup 2 --threads 1 {more}")
        return (run(lambda: oracle.main(argv.split())), *capsys.readouterr())
    return call


def test_a_whole_oracle(go, second, tiny_base, tmp_path, monkeypatch):
    """It leaves the checkpoint as it is, trains stage 2 on the samples of train.py --stage 2 of that seed, and writes
    numbers that evaluate.py's readers take. A second one in the same folder is refused."""
    before, drawn, draw = {p: p.read_bytes() for p in second.rglob("*") if p.is_file()}, [], Mixture.draw

    def spy(self, step):
        drawn.append((self.seed, step, [(tasks, r.name, i, f[0]) for tasks, r, i, f, _ in draw(self, step)]))
        return draw(self, step)
    monkeypatch.setattr(Mixture, "draw", spy)
    code, said, error = go("--seed 3", "--attention-lr 2")
    assert code == 0, error
    assert before == {p: p.read_bytes() for p in second.rglob("*") if p.is_file()}
    mine = [entry for entry in drawn if entry[0] == 2003]
    drawn.clear()
    argv = f"--stage 2 --base {tiny_base} --out {second} {TINY} --steps 3 --seed 3".split()
    assert train.main(argv) == 0
    assert len(mine) == 3 and [entry for entry in drawn if entry[0] == 2003] == mine
    out = tmp_path / "oracle"
    report = read_json(out / "results.json", "", REPORT)
    assert {t: set(row) for t, row in evaluate.by_task(report["results"]).items()} == {
        "semantic": {"streets", "real"}, "depth": {"rooms", "streets", "real"},
        "optical_flow": {"streets", "things", "real"}}
    assert report["settings"]["attention_lr"] == 2 and 0 < report["attention"]["real"]["attention_entropy"] <= 1.001
    assert [(e["stage"], e["step"]) for e in log_lines(out)] == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert {p.name for p in out.iterdir()} == {"results.json", "log.jsonl", "lock"}
    assert "AbsRel" in said and "largest weight" in said
    code, _, error = go()
    assert code == 2 and "already holds a result" in error and json.loads((out / "results.json").read_text()) == report


def test_what_is_not_of_an_oracle_is_refused(go, second, tmp_path):
    """--out that is a checkpoint lost its log.jsonl, and whatever was in cache/; also --ckpt itself."""
    (second / "cache").mkdir()
    (second / "cache/mine").touch()
    shutil.copytree(second, tmp_path / "oracle")
    (tmp_path / "oracle/model.json").unlink()       # of a training that has saved nothing yet, say
    for folder, name in ((second, "model.json"), (tmp_path / "oracle", "log.jsonl")):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        code, _, error = go(f"--out {folder}")
        assert code == 2 and f"{folder} holds {name}" in error and "name another --out" in error
        assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (tmp_path / "oracle/log.jsonl").unlink()
    assert go()[0] == 0 and (tmp_path / "oracle/cache/mine").is_file()


def test_a_whole_oracle_of_predictions(go, tmp_path, monkeypatch):
    """--tell predictions: the auxiliary UNet's labels and the streams of stage 2 are predictions, stage 2's own labels
    and every truth otherwise are true ones."""
    seen, fit = [], oracle.fit

    def spy(model, mixture, streams, *args):
        seen.append((type(mixture.cache), type(getattr(streams, "truth", streams).cache)))
        fit(model, mixture, streams, *args)
    monkeypatch.setattr(oracle, "fit", spy)
    for flags in ("--tell predictions", "--tell predictions", ""):
        assert go(flags, "--stream-gb 0" if len(seen) == 2 else "")[0] == 0
        report = json.loads((tmp_path / "oracle/results.json").read_text())
        shutil.rmtree(tmp_path / "oracle")
        assert report["tell"] == ("truth" if len(seen) == 6 else "predictions")
    told = [(oracle.Predicted, oracle.Predicted), (LatentCache, oracle.Predicted)]
    assert seen == [*told, *told, (LatentCache, LatentCache), (LatentCache, LatentCache)]


def test_the_auxiliary_unet_learns_to_repeat(go, tmp_path, monkeypatch):
    """Its error falls, which without the third place it could not for labels it cannot see; stage 2's main UNet and
    its own start are stage 1's."""
    ends, fit = [], oracle.fit

    def spy(model, *args):
        ends.append({k: v.clone() for k, v in (model.main or model.unet).state_dict().items()})
        fit(model, *args)
        ends.append({k: v.clone() for k, v in model.unet.state_dict().items()})
    monkeypatch.setattr(oracle, "fit", spy)
    assert go("--aux-steps 40", "--lr 0.01 --stream-gb 0")[0] == 0
    losses = [e["loss"] for e in log_lines(tmp_path / "oracle") if e["stage"] == 1]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    stage1 = StableMTL.load(tmp_path / "out", stage=1).unet.state_dict()
    start, taught, main, frozen = ends
    assert all(torch.equal(start[k], stage1[k]) and torch.equal(main[k], stage1[k]) for k in stage1)
    assert all(torch.equal(taught[k], frozen[k]) for k in stage1)
    assert not torch.equal(taught["conv_in.weight"][:, 8:], stage1["conv_in.weight"][:, 8:])


def test_fp16_that_never_learns_stops(go, tmp_path, monkeypatch):
    """After as many skipped steps in a row as in train.py, not at the first, and not never."""
    monkeypatch.setattr(train, "PATIENCE", 2)
    terms = losses.loss_terms

    def broken(*args):
        return {kind: error * float("nan") for kind, error in terms(*args).items()}
    monkeypatch.setattr(losses, "loss_terms", broken)
    code, _, error = go("--aux-steps 4", "--precision fp16")
    assert code == 2 and "step 1 of stage 1: loss" in error


@pytest.mark.parametrize("split, says", [("train", "rooms sample 0: not to be read"), ("test", "rooms:0: not to be")])
def test_a_sample_that_cannot_be_read(go, monkeypatch, split, says):
    """It is named; a flag --skip-bad, which was advised, the tool has not."""
    load = ToyWorld.load

    def broken(world, *args, **options):
        if world.split == split:
            raise ValueError("not to be read")
        return load(world, *args, **options)
    monkeypatch.setattr(ToyWorld, "load", broken)
    code, _, error = go("--aux-steps 1 --steps 1")
    assert code == 2 and says in error and "--" not in error.splitlines()[-1]


def test_a_stopped_oracle_starts_anew(go, tmp_path, monkeypatch):
    """No result is left behind; the same command gives what it would have given."""
    nothing = dict.fromkeys(["attention_entropy", "attention_largest", "attention_term"])
    monkeypatch.setattr(oracle, "watched", lambda totals: nothing)      # as of what is not finite
    whole = go()
    assert "real: entropy none, largest weight none, term none" in whole[1]
    report = json.loads((tmp_path / "oracle/results.json").read_text())
    shutil.rmtree(tmp_path / "oracle")
    assert whole[0] == 0

    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(oracle, "measure", stop)
        assert go()[0] == 130
    assert not (tmp_path / "oracle/results.json").exists()
    assert go()[0] == 0
    assert json.loads((tmp_path / "oracle/results.json").read_text()) == report


@pytest.mark.parametrize("flags, more, says", [
    ("", "--seed 3", "--seed after --"), ("", "--rho 2", "--rho"), ("", "--attention n-to-n", "leave out --attention"),
    ("", "--loss pixel", "--loss"), ("", "--drop rooms:deph", "--drop rooms:deph"),
    ("", "--drop streets:semantic", "no training labels for semantic"), ("--steps 0", "", "--steps"),
    ("", "--size 17x24", "multiple of 2"),
    ("--ckpt nowhere", "", "there is none in nowhere")])
def test_mistakes_end_in_a_sentence(go, tmp_path, flags, more, says):
    """Each names the flag; nothing is written: labels to drop were looked at only when the truth had been learnt."""
    code, _, error = go(flags, more)
    assert code == 2 and says in error and "Traceback" not in error and not (tmp_path / "oracle").exists()
