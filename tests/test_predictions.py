"""Predictions as files: what sample.py writes for test sets gives evaluate.py's own numbers, and so may anyone's."""
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import raw
import torch
from PIL import Image

import evaluate
import sample
from cli import run
from data import test_batches as samples
from inference import predictions
from inference.infer import restore
from inference.predictions import Predictions
from readers.diode import Diode
from readers.exports import FORMATS, decode, fits
from readers.kitti import Kitti2015
from readers.toyworld import ALL, ToyWorld
from tasks import TASKS

FEW = "--limit 2 --trivial 2 --workers 0"


@pytest.fixture(scope="module")
def predicted(tiny_ckpt, tmp_path_factory):
    """Two samples of each toy world predicted by a stage 2, in every format. Do not write there."""
    folder = tmp_path_factory.mktemp("predicted") / "p"
    argv = f"--ckpt {tiny_ckpt} --testset toy --limit 2 --format {','.join(FORMATS)} --output {folder}".split()
    assert sample.main(argv) == 0
    return folder


@pytest.fixture
def some(predicted, tmp_path):
    """A copy with the arrays of `real` alone, of nobody in particular."""
    for task in ALL:
        (tmp_path / "p/real" / task).mkdir(parents=True)
        for path in (predicted / "real" / task).glob("*.npy"):
            shutil.copy(path, tmp_path / "p/real" / task)
    return tmp_path / "p"


@pytest.fixture
def go(capsys):
    """go(flags) -> (exit code, stdout, stderr) of evaluate.py"""
    def call(flags):
        return (run(lambda: evaluate.main(flags.split())), *capsys.readouterr())
    return call


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Three street scenes as a folder of one's own, of an odd size, all in every split; depth and flow."""
    root, world = tmp_path_factory.mktemp("own") / "my", ToyWorld("streets", "test", 3, (36, 50))
    for i in range(3):
        s = world.load(i, ("depth", "optical_flow"))
        for folder, image in (("images", s["image"]), ("next", s["next"])):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / f"s.{i}.png")
        for task, x in s["labels"].items():
            (root / task).mkdir(exist_ok=True)
            np.save(root / task / f"s.{i}.npy", x)
    (root / "train.txt").write_text("s.0\ns.1\ns.2\n")
    return root


def report(folder):
    return json.loads((folder / "results.json").read_text())


# ---- the round trip ----

def test_predictions_of_toy_worlds_score_as_the_model_does(predicted, tiny_ckpt, tmp_path, go, capsys):
    """sample.py --testset and then evaluate.py --predictions give each number of evaluate.py --ckpt, bit for bit, and
    the trivial rows beside; no --data is needed, as the files say what they are of."""
    assert evaluate.main(f"--ckpt {tiny_ckpt} {FEW} --json {tmp_path / 'a.json'}".split()) == 0
    folder = shutil.copytree(predicted, tmp_path / "p")
    code, said, _ = go(f"--predictions {folder} {FEW}")
    ours, theirs = report(folder), json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and ours["results"] == theirs["results"] and ours["trivial"] == theirs["trivial"]
    assert ours["missing"] == [] and ours["unfinished"] == [] and ours["stage"] == 2
    assert ours["checkpoint"] == str(tiny_ckpt) and f"predictions in {folder}, test split of the toy worlds" in said
    assert go(f"--predictions {folder} {FEW} --baseline {tmp_path / 'a.json'}")[0] == 0
    assert report(folder)["delta_m"] == 0


@pytest.mark.parametrize("testset", ["own", "home"])
def test_predictions_of_ones_own_data_score_as_the_model_does(own, tiny_ckpt, tmp_path, capsys, testset):
    """The same at the size of one's own images, and at that of the training where it was on them; --pixels, too, which
    takes the scale of flow from the frames."""
    ckpt, folder = shutil.copytree(tiny_ckpt, tmp_path / "ckpt"), tmp_path / "p"
    if testset == "home":
        train = {"data": str(own), "stage": 2, "steps": 1, "batch": 1, "seed": 0}
        (ckpt / "config.json").write_text(json.dumps({"size": [24, 32], "train": train}))
    argv = f"--ckpt {ckpt} --data {own} --pixels --trivial 0 --workers 0 --json {tmp_path / 'a.json'}".split()
    assert evaluate.main(argv) == 0
    assert sample.main(f"--ckpt {ckpt} --testset {own} --output {folder}".split()) == 0
    assert np.load(folder / "folder/depth/s.1.npy").shape == ((24, 32) if testset == "home" else (36, 50))
    assert evaluate.main(f"--predictions {folder} --pixels --trivial 0 --workers 0".split()) == 0
    assert report(folder)["results"] == json.loads((tmp_path / "a.json").read_text())["results"]
    assert report(folder)["results"]["folder"]["depth"]["images"] == 3


@pytest.mark.parametrize("form", ["png16", "flo", "exr"])
def test_every_format_scores_alike(predicted, tmp_path, go, form):
    """The same predictions in another format, where it fits, give the same numbers within its quantisation."""
    folder = tmp_path / "p"
    for name, ending in ((t, FORMATS[form] if fits(TASKS[t], form) else ".npy") for t in ALL):
        (folder / "real" / name).mkdir(parents=True)
        for path in (predicted / "real" / name).glob(f"*{ending}*"):
            shutil.copy(path, folder / "real" / name)
    other = shutil.copytree(predicted / "real", tmp_path / "q/real")
    for flags in (f"--predictions {folder}", f"--predictions {other.parent}"):      # npy comes first where all are
        assert go(f"{flags} --data toy --limit 2 --trivial 0 --workers 0")[0] == 0
    a, b = (report(f)["results"]["real"] for f in (folder, other.parent))
    assert a.keys() == b.keys() == set(ALL)
    for task in a:
        assert a[task] == pytest.approx(b[task], rel=2e-3, abs=1e-4)
        assert (a[task] == b[task]) or form == "png16"


# ---- anybody's ----

def test_missing_predictions_are_counted_and_named(some, go):
    """What is not there is told and left out, of the trivial rows too; datasets without any are not asked for."""
    (some / "real/depth/1.npy").unlink()
    shutil.rmtree(some / "real/albedo")
    code, said, _ = go(f"--predictions {some} --data toy {FEW}")
    assert code == 0 and "\n1 predictions are missing, and their samples not scored: real/depth/1\n" in said
    r = report(some)
    assert r["missing"] == ["real/depth/1"] and set(r["results"]) == {"real"}
    assert set(r["results"]["real"]) == set(ALL) - {"albedo"}
    assert r["results"]["real"]["depth"]["images"] == r["trivial"]["real"]["constant"]["depth"]["images"] == 1
    assert r["results"]["real"]["normal"]["images"] == 2
    code, said, _ = go(f"--predictions {some} --data toy --trivial 0 --workers 0 --limit 6")
    assert code == 0 and "predictions are missing, and their samples not scored: real/semantic/2, real/" in said
    assert len(report(some)["missing"]) == 4 * (len(ALL) - 1) - 1 + 1     # 2 to 5; 3 is a room, without classes


def test_a_limit_asks_for_what_is_written(some):
    """Of a dataset that is no toy world, too: samples from all of it."""
    reader = ToyWorld("real", "test", 6)
    reader.independent = False
    written = [number for group in samples(reader, TASKS, 4, 0, 2) for *_, number, _ in group]
    asked = Predictions(some).wanted(reader, 2)
    assert written == [0, 3] and asked == {t: ["0", "3"] if t != "semantic" else ["0"] for t in ALL}


def test_finished_predictions_are_not_scored_again(some, go):
    """The same files are kept; one that changed is read again."""
    flags = f"--predictions {some} --data toy --limit 2 --trivial 0 --workers 0"
    assert "kept" not in go(flags)[2]
    before = report(some)
    assert "real: kept from" in go(flags)[2] and report(some) == before
    np.save(some / "real/depth/0.npy", np.load(some / "real/depth/0.npy") ** 2)
    assert "kept" not in go(flags)[2]
    assert report(some)["results"]["real"]["depth"] != before["results"]["real"]["depth"]
    assert report(some)["results"]["real"]["normal"] == before["results"]["real"]["normal"]


def test_predictions_of_another_size(some, go):
    """Labels keep their size: predictions are brought to it as sample.py brings maps to a photo's, the nearest class,
    numbers bilinear, unit vectors again."""
    flags = f"--predictions {some} --data toy --limit 2 --trivial 0 --workers 0"
    go(flags)
    before = report(some)["results"]["real"]
    for path in (some / "real").rglob("*.npy"):
        np.save(path, np.load(path).repeat(2, 0).repeat(2, 1))
    assert go(flags)[0] == 0
    after = report(some)["results"]["real"]
    assert after["semantic"] == before["semantic"] and after["normal"] != before["normal"]
    files, reader, valid = Predictions(some), ToyWorld("real", "test"), torch.ones(32, 48, dtype=torch.bool)
    for t in ALL:
        large = torch.from_numpy(decode(some / f"real/{t}/0.npy", TASKS[t])).permute(2, 0, 1)
        x = files.read(some / f"real/{t}/0.npy", TASKS[t], reader, valid)
        assert large.shape[1:] == (64, 96) and torch.equal(x, restore(large[None], TASKS[t], (32, 48))[0])
    assert torch.allclose(files.read(some / "real/normal/0.npy", TASKS["normal"], reader, valid).norm(dim=0),
                          torch.ones(()), atol=1e-5)


def test_predictions_before_and_after_the_crop(tmp_path):
    """KITTI is scored on a crop: predictions of whole images are cut as the labels are, those of the crop, at any of
    its sizes, are not; others are refused."""
    class Reader(Kitti2015):
        crop = (20, 60)

        def __init__(self):
            self.folder = tmp_path

    (tmp_path / "kitti_2015/depth").mkdir(parents=True)
    reader, files, valid = Reader(), Predictions(tmp_path), torch.ones(10, 30, dtype=torch.bool)
    whole = np.random.default_rng(0).random((25, 70)).astype(np.float32)

    def read(x):
        np.save(tmp_path / "x.npy", x)
        return files.read(tmp_path / "x.npy", TASKS["depth"], reader, valid)
    cut = read(whole)
    assert cut.shape == (1, 10, 30) and torch.equal(cut, read(whole[5:, 5:65]))     # the bottom rows, middle columns
    small = np.float32(cut[0].numpy())
    assert torch.equal(read(small), cut)
    for shape in ((15, 50), (10, 32)):
        with pytest.raises(ValueError, match=f"x.npy is {shape[0]}x{shape[1]}, its label 10x30: .*or the whole image"):
            read(np.ones(shape, np.float32))


def test_predictions_of_other_systems_in_their_formats(some, go):
    """KITTI's own PNG of flow, Cityscapes' colours, 8-bit normals: as one's own labels may be."""
    flow = np.full((32, 48, 3), 32768 + 64, np.uint16)
    normal = np.full((32, 48, 3), (128, 128, 255), np.uint8)
    classes = np.full((32, 48, 3), (128, 64, 128), np.uint8)
    for task, x in (("optical_flow", flow), ("normal", normal), ("semantic", classes)):
        for i in range(2):
            (some / f"real/{task}/{i}.npy").unlink()
            cv2.imwrite(str(some / f"real/{task}/{i}.png"), x[..., ::-1])
    assert (decode(some / "real/semantic/0.png", TASKS["semantic"]) == 0).all()
    assert go(f"--predictions {some} --data toy --limit 2 --trivial 0 --workers 0")[0] == 0
    assert report(some)["results"]["real"]["normal"]["images"] == 2


@pytest.mark.parametrize("name, x, said", [
    ("depth/1.npy", np.ones((32, 48, 3)), "real/depth/1.npy holds float64 of shape .32, 48, 3.: expected numbers"),
    ("depth/1.npy", np.ones((32, 96)), "real/depth/1.npy is 32x96, its label 32x48: predict that at any size of"),
    ("depth/1.npy", np.full((32, 48), np.nan), r"real/depth/1.npy says nothing at \d+ of the \d+ pixels where its"),
    ("semantic/1.npy", np.full((32, 48), 255), r"real/semantic/1.npy says nothing at \d+ of the "),
    ("semantic/1.npy", np.full((32, 48), 8), "real/semantic/1.npy holds the id 8: expected class ids 0..7"),
    ("normal/1.npy", b"nonsense", "real/normal/1.npy is not a readable NPY file")])
def test_predictions_that_cannot_be_scored(some, go, name, x, said):
    """They end in one sentence, or are skipped, counted and named."""
    if isinstance(x, bytes):
        (some / "real" / name).write_bytes(x)
    else:
        np.save(some / "real" / name, x)
    flags = f"--predictions {some} --data toy --limit 2 --trivial 0 --workers 0"
    code, _, error = go(flags)
    assert code == 2 and re.search(said, error.splitlines()[-1]) and "--skip-bad skips and counts such files" in error
    code, out, _ = go(f"{flags} --skip-bad")
    assert code == 0 and "1 samples skipped" in out
    r = report(some)
    assert r["results"]["real"][name.split("/")[0]]["images"] == 1 and re.search(said, r["skipped"][0])


def test_mistakes_end_in_a_sentence(some, predicted, tiny_ckpt, tmp_path, go):
    """What is named wrongly, or does nothing, is refused."""
    (tmp_path / "empty").mkdir()
    for flags, sentence in [
            (f"--predictions {tmp_path / 'gone'}", "no folder .*gone: --predictions names one that holds"),
            (f"--predictions {tmp_path / 'empty'}", "no predictions in .*empty: expected .*/<dataset>/<task>/"),
            (f"--predictions {some}", "nothing says what the predictions in .* are of: .*--data toy"),
            (f"--predictions {predicted} --split val", "are of the split test: add --split test"),
            (f"--predictions {some} --ckpt {tiny_ckpt} --stage 1", "--ckpt and --stage would do nothing here")]:
        code, _, error = go(flags)
        assert code == 2 and len(error.splitlines()) == 1 and re.search(sentence, error), error
    (some / "real").rename(some / "reel")
    code, _, error = go(f"--predictions {some} --data toy")
    assert code == 2 and "of rooms, streets, things, real: expected" in error
    for task in ALL:
        shutil.rmtree(some / "reel" / task) if task != "depth" else None
    (some / "reel").rename(some / "real")
    for path in (some / "real/depth").iterdir():
        path.rename(path.with_name(f"frame{path.name}"))
    code, _, error = go(f"--predictions {some} --data toy")
    assert code == 2 and "is named as a sample of real: the first is" in error and "names like 0.npy" in error


# ---- what a dataset says of its evaluation ----

def test_aligned_depth_is_clipped_to_the_range_of_its_dataset(tmp_path, go, monkeypatch):
    """DIODE's is 0.6 to 350 m. Aligned, 0 and 1 become the means of their halves, 0.2 and 400 m, which are cut to 0.6
    and 350: of 0.1, 0.3, 300 and 500 m these are wrong by 5, 1, 1/6 and 0.3 of the depth."""
    monkeypatch.setattr(Diode, "size", (6, 8))
    stem, z = tmp_path / "diode/val/outdoor/scene/scan/one", np.tile(np.float32([0.1, 0.3, 300, 500]).repeat(2), (6, 1))
    raw.write(stem.with_suffix(".png"), raw.picture(6, 8))
    raw.write(stem.with_name("one_depth.npy"), z[..., None])
    raw.write(stem.with_name("one_depth_mask.npy"), np.ones((6, 8)))
    raw.write(tmp_path / "p/diode/depth/outdoor/scene/scan/one.npy", np.float32(z > 1))
    assert go(f"--predictions {tmp_path / 'p'} --data {tmp_path} --trivial 0 --workers 0")[0] == 0
    found = report(tmp_path / "p")["results"]["diode"]["depth"]["AbsRel"]
    assert found == pytest.approx(100 * (5 + 1 + 1 / 6 + 0.3) / 4, rel=1e-4)


def test_both_masks_of_kitti_2015_are_evaluated(tmp_path, go):
    """Beside the pixels with flow and both disparities, those with flow. Two rows without disparities move by 91.5
    pixels and the 173 others by 4: scaled to the mean, 5, a prediction of 1 is wrong by 86.5 and 1."""
    raw.kitti_2015(tmp_path)        # flow is invalid in row 100, disparities in rows 150 and 160
    code = np.full((375, 1242, 3), (32768 + 4 * 64, 32768, 1), np.uint16)
    code[[150, 160], :, 0], code[100, :, 2] = 32768 + 91.5 * 64, 0
    raw.write(tmp_path / "kitti_2015/training/flow_occ/000010_10.png", code)
    raw.write(tmp_path / "p/kitti_2015/optical_flow/000010/10.npy", np.tile(np.float32([1, 0]), (352, 1216, 1)))
    code, said, _ = go(f"--predictions {tmp_path / 'p'} --data {tmp_path} --trivial 0 --workers 0")
    rows = report(tmp_path / "p")["results"]["kitti_2015"]
    assert code == 0 and rows.keys() == {"optical_flow", "optical_flow:flow_occ"} and "optical_flow:flow_occ" in said
    epe = {name: row["EPE"] for name, row in rows.items()}
    assert epe == pytest.approx({"optical_flow": 0, "optical_flow:flow_occ": (173 + 2 * 86.5) / 175}, abs=1e-3)


# ---- sample.py --testset ----

def test_a_test_set_is_finished_where_it_stopped(tiny_ckpt, tmp_path, capsys):
    """What is there of the same checkpoint is kept, what is missing made; files of another are not mixed with it."""
    folder, flags = tmp_path / "p", f"--ckpt {tiny_ckpt} --testset toy --tasks depth --output {tmp_path / 'p'}"

    def go(more):
        return (run(lambda: sample.main(f"{flags} {more}".split())), *capsys.readouterr())
    assert go("--limit 1")[0] == 0
    first = (folder / "real/depth/0.npy").read_bytes()
    (folder / "rooms/depth/0.npy").unlink()
    code, said, _ = go("--limit 1")
    assert code == 0 and "1 samples of rooms, streets, real predicted, 2 kept, 0 skipped" in said
    assert f"python evaluate.py --predictions {folder}\n" in said
    code, _, error = go("--limit 1 --stage 1")
    assert code == 2 and "made with other weights, data or settings" in error and "--overwrite" in error
    assert (folder / "real/depth/0.npy").read_bytes() == first
    assert go("--limit 1 --stage 1 --overwrite")[0] == 0
    assert (folder / "real/depth/0.npy").read_bytes() != first
    assert json.loads((folder / "made_from.json").read_text())["stage"] == 1
    (tmp_path / "q").mkdir()
    (tmp_path / "q/thesis.txt").write_text("x")
    code, _, error = go(f"--output {tmp_path / 'q'}")
    assert code == 2 and "holds other things than predictions" in error


def test_predictions_of_files_that_changed_are_not_kept(own, tiny_ckpt, tmp_path, capsys):
    """They were, and scored against the new data. Further tasks of the same images are added, and --overwrite makes all
    anew."""
    root, folder = shutil.copytree(own, tmp_path / "my"), tmp_path / "p"

    def go(more):
        flags = f"--ckpt {tiny_ckpt} --testset {root} --output {folder} {more}"
        return (run(lambda: sample.main(flags.split())), *capsys.readouterr())
    assert go("--tasks depth")[0] == go("--tasks optical_flow")[0] == 0
    path = folder / "folder/depth/s.1.npy"
    before = path.read_bytes()
    shutil.copy(root / "images/s.2.png", root / "images/s.1.png")
    code, _, error = go("--tasks depth")
    assert code == 2 and "made with other weights, data or settings" in error and path.read_bytes() == before
    code, said, _ = go("--tasks depth --overwrite")
    assert code == 0 and "3 samples of folder predicted, 0 kept" in said and path.read_bytes() != before
    assert go("--tasks depth")[1].startswith("0 samples of folder predicted, 3 kept")


def test_a_note_is_about_all_test_sets_in_its_folder(tmp_path):
    """Also about those that the last command did not ask for."""
    def begin(overwrite=False, **sets):
        note = {"data": "d", "split": "test", "size": None, "checkpoint": "c", "stage": 1, "key": "k"}
        predictions.begin(tmp_path, note | {"test_sets": sets}, overwrite)
        return predictions.read_note(tmp_path)["test_sets"]
    assert begin(a="1") == {"a": "1"}
    assert begin(b="1") == begin(a="1") == {"a": "1", "b": "1"}
    with pytest.raises(FileExistsError, match="made with other weights, data or settings"):
        begin(a="2")
    assert begin(True, a="2") == {"a": "2"}


def test_what_no_format_fits_is_not_counted(tiny_ckpt, tmp_path, capsys):
    """Test sets, and samples of one, without a label that an asked format fits count as nothing: they were "kept"."""
    raw.own_folder(tmp_path / "own", n=3, h=16, w=24)
    (tmp_path / "own/test.txt").write_text("p0\np1\np2\n")
    (tmp_path / "own/optical_flow/p1.flo").unlink()
    flags = f"--ckpt {tiny_ckpt} --stage 1 --format flo --tasks depth,optical_flow --output {tmp_path / 'p'}"
    for times in ("2 samples of folder predicted, 0 kept", "0 samples of folder predicted, 2 kept"):
        assert sample.main(f"{flags} --testset {tmp_path / 'own'}".split()) == 0
        assert times in capsys.readouterr().out
    assert sample.main(f"{flags} --testset toy --limit 1 --overwrite".split()) == 0
    assert "3 samples of streets, things, real predicted, 0 kept" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", [
    ("--testset toy --single --size 64", "--single and --size would do nothing here: --testset takes images, order"),
    ("--testset toy photo.jpg", "nothing to predict, or too much"),
    ("--toy real:0 --split val", "--split would do nothing here: it goes with --testset"),
    ("--testset gone", "gone is no folder"),
    ("--testset toy --tasks depth --format flo", "format flo fits no task asked for")])
def test_flags_that_do_not_go_together(tiny_ckpt, tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert run(lambda: sample.main(f"--ckpt {tiny_ckpt} {flags}".split())) == 2
    assert re.search(sentence, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_arrays_of_photos_in_other_formats(tiny_ckpt, tmp_path):
    """--format for single inputs: each where it fits, beside the picture; what is there of another run stays, and what
    is missing is made."""
    flags, folder = f"--ckpt {tiny_ckpt} --toy real:1 --output {tmp_path}", tmp_path / "real-1"
    assert sample.main(flags.split()) == 0
    before = {p.name for p in folder.iterdir()}
    assert sample.main([*flags.split(), "--format", "exr,png16,flo"]) == 0
    arrays = {f"{t}{e}" for t in TASKS for f, e in (("exr", ".exr"), ("png16", ".values.png"), ("flo", ".flo"))
              if fits(TASKS[t], f)}
    assert {p.name for p in folder.iterdir()} - before == arrays | {f"{name}.json" for name in arrays}
    for name in arrays:
        task = name.split(".")[0]
        x = np.load(folder / f"{task}.npy").astype(float)
        back = decode(folder / name, TASKS[task]).reshape(x.shape).astype(float)
        assert np.abs(back - x).max() <= (np.abs(x).max() / 32000 if name.endswith("png") else 0)
        assert json.loads((folder / f"{name}.json").read_text())["unit"] == TASKS[task].unit
