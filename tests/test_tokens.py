"""tools/tokens.py: errors, shares and maps against naive loops; the command, also with mistakes."""
import json
import math
import shutil
from statistics import fmean

import pytest
import torch
from PIL import Image
from runs import TINY

import train
from baselines.hitts import HiTTs
from baselines.trunk import MTL
from cli import run
from data import tensor_image
from evaluate import PAPER_TASKS
from readers.toyworld import ToyWorld
from tasks import CLASSES
from tools import tokens

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
DISCOVERED = {"normal": ["things"], "depth": ["streets", "things"], "shading": ["streets", "things"],
              "albedo": ["streets", "things"]}      # with depth of streets dropped


@pytest.fixture(scope="module")
def folder(quick, tmp_path_factory):
    """A finished tiny run without depth of streets. Do not write there."""
    out = tmp_path_factory.mktemp("hitts") / "out"
    flags = f"--stage 1 --system hitts --drop streets:depth {TINY} --scenes 3 --processes 1 --out {out}"
    argv = f"{flags} --tasks {','.join(PAPER_TASKS)}".split()
    assert train.main(argv) == 0
    return out


@pytest.fixture(scope="module")
def found(folder):
    """(model, discovery, what `measure` finds on two images per world)"""
    model, discovery = tokens.teacher(folder, CPU)
    return model, discovery, tokens.measure(model, discovery, 2)


def command(text, capsys):
    code = run(lambda: tokens.main(text.split()))
    return (code, *capsys.readouterr())


# ---- numbers ----

def test_which_images_lack_a_label(found):
    """Every task of every world is measured once, beside labels or without; motion not in rooms, which train without a
    second frame, and classes only where there are any."""
    model, discovery, parts = found
    assert {t: list(parts[t, True]["worlds"]) for t in PAPER_TASKS if (t, True) in parts} == DISCOVERED
    assert discovery.least.keys() == DISCOVERED.keys()
    assert {t: list(parts[t, False]["worlds"]) for t in PAPER_TASKS} == {
        "semantic": ["streets"], "normal": ["rooms", "streets"], "depth": ["rooms"],
        "optical_flow": ["streets", "things"], "scene_flow": ["streets", "things"], "shading": ["rooms"],
        "albedo": ["rooms"]}


def test_shares_and_errors_by_a_naive_loop(found):
    """Pixel by pixel, image by image: which exceed tau, and the angle of all and of those between label and both
    predictions."""
    model, discovery, parts = found
    tau, part, passed = discovery.least["normal"], parts["normal", True], 0
    angles = {who: [] for who in tokens.WHO}
    for i in range(2):
        sample = ToyWorld("things", "train", 3, (16, 24), all_labels=True).load(i, ("normal",), with_next=True)
        label, valid = sample["labels"]["normal"], sample["valid"]["normal"]
        pair = [tensor_image(sample[key])[None] for key in ("image", "next")]
        with torch.no_grad():
            logits = model.maps(*pair, ["normal"])["normal"][0]
        centres, own = model.bins["normal"].centres, {who: [] for who in tokens.WHO}
        for y in range(16):
            for x in range(24):
                weights = logits[:, y, x].softmax(0)
                sure = weights.max() > tau
                passed += int(sure)
                maps = {"prediction": weights @ centres, "likeliest bin": centres[weights.argmax()]}
                maps |= {"sure": maps["likeliest bin"]} if sure else {}
                for who in maps if valid[y, x] else ():
                    cosine = torch.cosine_similarity(maps[who], torch.from_numpy(label[y, x]), dim=0)
                    own[who].append(math.degrees(math.acos(cosine.clamp(-1, 1))))
        for who, values in own.items():
            angles[who] += [fmean(values)] if values else []
    assert 0 < passed < 2 * 16 * 24 and fmean(part["shares"]) == pytest.approx(passed / (2 * 16 * 24))
    for who, values in angles.items():
        assert part[who].result()["mAE"] == pytest.approx(fmean(values), abs=0.02)
        assert part[who].images == len(values)


def test_what_discovery_settles_passes(found):
    """Over all images that tau was found on, a half of the pixels exceeds it."""
    model, discovery, _ = found
    parts = tokens.measure(model, discovery, 3)
    for t in DISCOVERED:
        assert fmean(parts[t, True]["shares"]) == pytest.approx(0.5, abs=0.01)


def test_worlds_without_a_task_of_it_take_no_part(quick, tmp_path):
    """As in train.py: all that is left here has its labels, so that nothing is to be discovered."""
    argv = f"--stage 1 --system hitts {TINY} --tasks normal,depth --scenes 2 --processes 1 --out {tmp_path}".split()
    assert train.main([*argv, "--overwrite"]) == 0
    model, discovery = tokens.teacher(tmp_path, CPU)
    assert discovery.least == {}
    parts = tokens.measure(model, discovery, 1)
    assert {key: list(part["worlds"]) for key, part in parts.items()} == {
        ("normal", False): ["rooms", "streets"], ("depth", False): ["rooms", "streets"]}


@pytest.mark.parametrize("oe", [True, False])
def test_cosines(oe):
    """Each pair by itself. Without the orthogonal embedding all are 1, so that tokens cannot tell classes apart."""
    torch.manual_seed(0)
    model, pair = HiTTs(("semantic", "depth"), oe=oe).eval(), torch.rand(2, 1, 3, 16, 24) * 2 - 1
    phi = tokens.scene(model, *pair)[1]
    assert {t: len(x) for t, x in phi.items()} == {"semantic": len(CLASSES), "depth": 30}
    for x in phi.values():
        matrix, mean = tokens.cosines(x)
        naive = [[float(a @ b / (a.norm() * b.norm())) for b in x] for a in x]
        assert torch.allclose(matrix, torch.tensor(naive), atol=1e-5)
        different = [c for i, row in enumerate(naive) for j, c in enumerate(row) if i != j]
        assert mean == pytest.approx(fmean(different), abs=1e-5)
        assert mean < 0.999 if oe else matrix.min() > 1 - 1e-5


def test_maps_by_their_definition(found):
    """sigmoid(theta F) and softplus(phi F), cell by cell; the latter are what the logits are weighed by."""
    model, pair = found[0], torch.rand(2, 1, 3, 16, 24) * 2 - 1
    (_, unit, thetas), (_, ends, classes) = tokens.scene(model, *pair)[0]
    with torch.no_grad():
        features = model.global_tokens(*pair, model.tasks)
        assert [t for t, _ in thetas[1:]] == list(model.tasks) and unit == (0, 1)
        for t, drawn in thetas[1:]:
            x, theta = (y[0] for y in features[t])
            naive = torch.stack([torch.stack([(theta @ x[:, i, j]).sigmoid() for j in range(12)]) for i in range(8)])
            assert torch.allclose(drawn, naive, atol=1e-5)
        x, theta = features["semantic"]
        fine = model.fine["semantic"]
        scores = [(p[:, None, None] * x[0]).sum(0) for p in fine.tokens(theta)[0]]
        for (name, drawn), score, k in zip(classes[1:], scores, CLASSES, strict=True):
            assert name == k and torch.allclose(drawn, score.exp().log1p(), atol=1e-4)
        weights = torch.stack([x for _, x in classes[1:]])
        assert ends == (weights.min(), weights.max())
        assert torch.allclose(fine(x, theta), fine.out(fine.logits(x) * weights), atol=1e-5)


# ---- the command ----

def test_the_command(folder, tmp_path, capsys):
    """A row per task with labels and another without; pictures; all numbers in a file, the printed ones among them."""
    code, said, _ = command(f"--ckpt {folder} --limit 1 --out {tmp_path / 'a/b'} --toy streets:1", capsys)
    lines = said.splitlines()
    assert code == 0 and len([line for line in lines if line.startswith("|")]) == 2 + len(PAPER_TASKS) + len(DISCOVERED)
    about = json.loads((tmp_path / "a/b/tokens.json").read_text())
    for row, line in zip(about["rows"], lines[2:], strict=False):
        assert f"| {row['task']} | {row['label']} | {row['worlds']} |" in line
        assert all(result["images"] for result in row["results"].values())
        assert ("share sure" in row) == (row["task"] in DISCOVERED)
        assert (f"| {row.get('tau', 9):.3f} |" in line) == (row["task"] in DISCOVERED)
    assert f"semantic {about['mean cosine']['semantic']:.3f}, normal" in said
    assert len(about["cosines"]["semantic"]) == len(CLASSES)
    for name, width in {"maps.png": 1100, "cosines.png": 500}.items():
        with Image.open(tmp_path / "a/b" / name) as picture:
            assert picture.width >= width


def test_without_classes_and_orthogonal_embedding(folder, tmp_path, capsys):
    """No row and no matrix of classes; a cosine of 1 is said."""
    shutil.copytree(folder, tmp_path / "out")
    HiTTs(("depth",), oe=False).save(tmp_path / "out")
    code, said, _ = command(f"--ckpt {tmp_path / 'out'} --limit 1 --out {tmp_path / 'told'}", capsys)
    assert code == 0 and "fine tokens: depth 1.000\n" in said and "cosines.png" not in said
    assert sorted(path.name for path in (tmp_path / "told").iterdir()) == ["maps.png", "tokens.json"]


@pytest.mark.parametrize("mistake, told", [
    ("--ckpt none", "no checkpoint in none"), ("--ckpt stable", "stable holds a stablemtl, which has no task tokens"),
    ("--ckpt plain", "plain holds a mtl, which has no task tokens: name a folder of python train.py --stage 1 --system "
     "hitts"), ("--ckpt real", "real was trained on /data: name one of the toy worlds"),
    ("--ckpt bare", "bare does not say what it was trained on"), ("--ckpt out --toy real:999", "--toy real:999"),
    ("--ckpt out --toy moon:1", "moon"), ("--ckpt out --limit 0", "--limit"), ("", "--ckpt"),
    ("--ckpt out --out out/config.json", "config.json cannot be written")])
def test_mistakes(folder, tiny_ckpt_1, tmp_path, monkeypatch, capsys, mistake, told):
    """One sentence, nothing written."""
    monkeypatch.chdir(tmp_path)
    for name, source in {"out": folder, "stable": tiny_ckpt_1, "plain": folder, "real": folder, "bare": folder}.items():
        shutil.copytree(source, name)
    MTL(("depth",)).save("plain")
    config = json.loads((tmp_path / "real/config.json").read_text())
    config["train"]["data"] = "/data"
    (tmp_path / "real/config.json").write_text(json.dumps(config))
    (tmp_path / "bare/config.json").unlink()
    before = sorted(tmp_path.iterdir())
    code, said, error = command(mistake, capsys)
    assert code == 2 and not said and told in error and len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
