"""A folder of one's own images and labels: every format and convention that people have, told or refused by name."""
import os
import re
import shutil
import sys

import numpy as np
import pytest
from kill import log_lines
from PIL import Image
from raw import own_folder, picture, write
from runs import saved

import cli
import train
from evaluate import PAPER_TASKS
from readers import check, folder, found
from readers.folder import Folder, split_by_name
from tasks import CITYSCAPES, TASKS

IDS = np.arange(48, dtype=np.uint8).reshape(6, 8) % 8
COLOURS = np.uint8([*CITYSCAPES, (0, 0, 0)])
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128]


def labels(root, task, x=None):
    """A folder of one image whose label of the task is x, an array or a Pillow image; without it, only the image."""
    write(root / "images/p0.png", picture(6, 8))
    write(root / "next/p0.png", picture(6, 8, 1))
    if isinstance(x, Image.Image):
        (root / task).mkdir(exist_ok=True)
        x.save(root / task / "p0.png")
    elif x is not None:
        write(root / task / "p0.npy", x)
    return root


def load(root, task):
    """(label, valid) of the only sample."""
    s = Folder(root, "train").load(0, [task])
    return s["labels"][task], s["valid"][task]


# ---- which files ----

def test_identity_of_a_folder(tmp_path):
    """It follows the list of stems and the files of these, wherever the folder lies; neither file contents nor files
    of other splits are looked at."""
    root = tmp_path / "my"
    own_folder(root, 4)
    (root / "train.txt").write_text("p0\np1\n")

    def identity(root=root):
        return Folder(root, "train").identity()
    seen = [identity()]
    assert seen == [identity(shutil.copytree(root, tmp_path / "moved"))]      # with their times
    np.save(root / "depth/p3.npy", np.ones((6, 8), np.float32))
    assert identity() == seen[0]
    changes = [lambda: (root / "train.txt").write_text("p0\np2\n"),
               lambda: os.utime(root / "depth/p0.npy", (1, 1)),
               lambda: (root / "next/p2.png").unlink() or (root / "optical_flow/p2.flo").unlink()
               or (root / "scene_flow/p2.npy").unlink(),
               lambda: (root / "semantic/p0.png.json").write_text("{}"),
               lambda: write(root / "images/p0.png", picture(6, 8, 9))]
    for change in changes:
        change()
        seen.append(identity())
    assert len(set(seen)) == len(seen)


# ---- labels ----

def test_folder_reads_all_tasks(tmp_path):
    """Files one wrote oneself come back as they are, in every accepted array format; size defaults to the images'."""
    values = own_folder(tmp_path)
    values["optical_flow"][0, 0] = np.nan
    write(tmp_path / "optical_flow/p0.flo", values["optical_flow"])
    reader = Folder(tmp_path, "train")
    assert set(reader.tasks) == set(PAPER_TASKS) and reader.size == (6, 8) and len(reader) == 2
    s = reader.load(0, PAPER_TASKS)
    for task, x in values.items():
        assert np.allclose(s["labels"][task], np.nan_to_num(x.reshape(6, 8, -1)), atol=1e-6)
        assert s["labels"][task].dtype == np.float32 and s["labels"][task].shape[2] == TASKS[task].channels
    assert s["labels"]["semantic"][0, :, 0].tolist() == list(range(8)) and s["valid"]["semantic"].sum() == 43
    assert not s["valid"]["optical_flow"][0, 0]
    assert not s["valid"]["depth"][0, 0] and s["valid"]["depth"].sum() == 47
    assert (s["next"] == picture(6, 8, 50)).all()


def test_folder_pictures_as_labels(tmp_path):
    """16-bit millimetres, 8- and 16-bit linear shading and albedo, flow in KITTI's 16 bits."""
    own_folder(tmp_path, 1)
    for label in ("depth/p0.npy", "shading/p0.npy", "albedo/p0.npy", "optical_flow/p0.flo"):
        (tmp_path / label).unlink()
    write(tmp_path / "depth/p0.png", np.array([[0, 1500]] * 24, np.uint16).reshape(6, 8))
    write(tmp_path / "shading/p0.png", np.full((6, 8), 51, np.uint8))
    write(tmp_path / "albedo/p0.png", np.tile(np.uint16([65535, 13107, 0]), (6, 8, 1)))
    flow = np.tile(np.uint16([32768 + 96, 32768 - 640, 1]), (6, 8, 1))
    flow[2, 3] = 0
    write(tmp_path / "optical_flow/p0.png", flow)
    s = Folder(tmp_path, "train").load(0, ["depth", "optical_flow", "shading", "albedo"])
    assert s["labels"]["depth"][0, 1, 0] == 1.5 and not s["valid"]["depth"][0, 0]
    assert np.allclose(s["labels"]["shading"], 0.2) and np.allclose(s["labels"]["albedo"], (1, 0.2, 0))
    valid = s["valid"]["optical_flow"]
    assert (s["labels"]["optical_flow"][valid] == (1.5, -10)).all() and not valid[2, 3] and valid.sum() == 47
    write(tmp_path / "optical_flow/p0.png", picture(6, 8))
    with pytest.raises(ValueError, match="optical_flow/p0.png has 3 channels of uint8: expected 3 of uint16"):
        load(tmp_path, "optical_flow")


@pytest.mark.parametrize("task", [t for t in Folder.suffixes if t != "semantic"])
@pytest.mark.parametrize("mark", [np.nan, np.inf, -np.inf])
def test_pixels_without_a_number_are_invalid(tmp_path, task, mark):
    """NaN and infinity mark invalid pixels in the arrays of every task, and have no influence on the others."""
    channels = TASKS[task].channels
    x = np.full((6, 8, channels), 0.5) if channels != 3 else np.full((6, 8, 3), 3 ** -0.5)
    x[2, 3], x[4, 5, -1] = mark, mark
    label, valid = load(labels(tmp_path, task, x), task)
    assert valid.sum() == 46 and not valid[2, 3] and not valid[4, 5]
    assert np.isfinite(label).all() and np.allclose(label[valid], x[0, 0])


@pytest.mark.parametrize("name", ["optical_flow/p0.flo", "optical_flow/p0.npy", "scene_flow/p0.npy"])
def test_unknown_flow_is_invalid(tmp_path, name):
    """Middlebury's marks of unknown flow (beyond 1e9) counted as motion, --check found nothing wrong, and the error was
    3e8 pixels. They are invalid, also in arrays made from such files."""
    task = name.split("/")[0]
    labels(tmp_path, task)
    x = np.ones((6, 8, TASKS[task].channels), np.float32)
    x[:3], x[3, 0, 1] = 1666666752, -1e10
    write(tmp_path / name, x)
    label, valid = load(tmp_path, task)
    assert not valid[:3].any() and not valid[3, 0] and valid.sum() == 23 and label.max() == 1
    assert check(tmp_path)[0][-1].endswith("1 tried, all load, 48% of their pixels valid")
    write(tmp_path / name, np.full_like(x, 1e10))
    assert any(line.endswith(f"{tmp_path / name} has no valid pixel") for line in check(tmp_path)[0])


def test_check_looks_beyond_a_blank_label(tmp_path):
    """It stopped at the first one, which may well be blank, and training then at a file that does not load."""
    for k, value in enumerate((255, 0, 0)):
        write(tmp_path / f"images/p{k}.png", picture(6, 8))
        write(tmp_path / f"semantic/p{k}.png", np.full((6, 8), value, np.uint8))
    (tmp_path / "train.txt").write_text("p0\np1\np2\n")
    told = "3 tried, all load, 67% of their pixels valid; 1 without any valid pixel, first "
    assert any(f"{told}{tmp_path}/semantic/p0.png" in line for line in check(tmp_path, full=True)[0])
    (tmp_path / "semantic/p2.png").write_bytes(b"junk")
    assert any(f"{tmp_path}/semantic/p2.png" in line for line in check(tmp_path, full=True)[0])


def test_a_misspelt_folder_of_labels_is_named(tmp_path, capsys):
    """Its task was left out without a word."""
    labels(tmp_path, "semantic", picture(6, 8)[..., 0] * 0)
    (tmp_path / "depths").mkdir()
    (tmp_path / "notes").mkdir()
    Folder(tmp_path, "train")
    assert f"{tmp_path / 'depths'} is not read: labels of depth are expected in depth/" in capsys.readouterr().err


# ---- classes ----

def with_palette(ids, colours):
    image = Image.fromarray(ids, "P")
    image.putpalette(list(np.ravel(colours)))
    return image


def grey_palette(ids):
    return with_palette(ids, [[i, i, i] for i in range(256)])


CLASS_PICTURES = {
    "grey": Image.fromarray(IDS), "16-bit grey": Image.fromarray(IDS.astype(np.uint16)),
    "grey and alpha": Image.fromarray(np.dstack([IDS, np.full_like(IDS, 200)])),
    "colours": Image.fromarray(COLOURS[IDS]),
    "colours and alpha": Image.fromarray(np.dstack([COLOURS[IDS], np.full_like(IDS, 255)])),
    "indices in VOC colours": with_palette(IDS, VOC), "indices in grey": grey_palette(IDS),
    "indices in display colours": with_palette(IDS, COLOURS),
    "display colours at other indices": with_palette((IDS + 3) % 8, np.roll(COLOURS[:8], 3, 0)),
}


@pytest.mark.parametrize("kind", CLASS_PICTURES)
def test_classes_however_they_are_stored(tmp_path, kind):
    """Grey of any depth, with or without alpha, and indices are ids, display colours are classes. (Palette images in
    other colours, and colours with alpha, as in Cityscapes' own files, were refused.)"""
    label, valid = load(labels(tmp_path, "semantic", CLASS_PICTURES[kind]), "semantic")
    assert (label[..., 0] == IDS).all() and valid.all() and label.dtype == np.uint8


def test_one_bit_holds_classes_0_and_1(tmp_path):
    """In a picture of one bit, class 1 was read as 255 and ignored, silently."""
    label, valid = load(labels(tmp_path, "semantic", Image.fromarray(IDS % 2 > 0)), "semantic")
    assert (label[..., 0] == IDS % 2).all() and valid.all()


def test_one_class_alone_in_a_palette(tmp_path):
    """Black is no sign of display colours: a palette that is black at index 0, as VOC's, leaves it class 0."""
    label, valid = load(labels(tmp_path, "semantic", with_palette(IDS * 0, VOC)), "semantic")
    assert not label.any() and valid.all()


def test_what_classes_ignore(tmp_path):
    """255, black among display colours, and what is transparent, whatever its colour, are ignored."""
    ids, alpha = np.where(IDS == 7, 255, IDS).astype(np.uint8), np.full_like(IDS, 255)
    alpha[0, 0] = 0
    rgba = np.dstack([COLOURS[np.where(IDS == 7, 8, IDS)], alpha])
    rgba[0, 0, :3] = 255, 255, 255
    black = np.roll(COLOURS, 1, 0)
    for image, hidden in ((Image.fromarray(ids), False), (grey_palette(ids), False), (Image.fromarray(rgba), True),
                          (Image.fromarray(np.dstack([ids, alpha])), True),
                          (with_palette(np.where(IDS == 7, 0, IDS + 1).astype(np.uint8), black), False)):
        label, valid = load(labels(tmp_path, "semantic", image), "semantic")
        want = (IDS != 7) & ~(hidden & (alpha == 0))
        assert (valid == want).all() and (label[want][:, 0] == IDS[want]).all(), image.mode
        assert (label[~want] == 255).all()


@pytest.mark.parametrize("image, message", [
    (Image.fromarray(np.full((6, 8), 9, np.uint8)), "id 9"),
    (Image.fromarray(np.full((6, 8, 3), 9, np.uint8)), r"\[9, 9, 9\]"),
    (with_palette(IDS + 8, VOC * 2), "id 8"),
    (Image.fromarray(np.full((6, 8), 65535, np.uint16)), "id 65535")])
def test_other_class_numbers_and_colours_are_named(tmp_path, image, message):
    """A number or colour of no class is told with its file and what is expected."""
    with pytest.raises(ValueError, match=f"semantic/p0.png .*{message}.*expected"):
        load(labels(tmp_path, "semantic", image), "semantic")


# ---- labels that cannot be right ----

@pytest.mark.parametrize("task, x, message", [
    ("albedo", np.full((6, 8, 3), 200.0), "p0.npy ranges from 200 to 200"),
    ("shading", np.array([[np.nan, -1.0]] * 24).reshape(6, 8), "p0.npy ranges from -1 to -1"),
    ("depth", np.ones((5, 8)), "p0 .*depth label is 5x8"),
    ("normal", np.ones((6, 8)), "normal/p0.npy holds"),
    ("normal", picture(6, 8), "normal/p0.npy holds vectors of length .*expected unit"),
    ("normal", np.tile([0, 60.0, 80.0], (6, 8, 1)), "normal/p0.npy holds vectors of length 100 "),
    ("normal", np.tile([0.5, 0.5, 1.0], (6, 8, 1)), "normal/p0.npy holds vectors of length 1.22 "),
    ("normal", np.tile([0, 0.6, -0.8], (6, 8, 1)), "normal/p0.npy points at the camera .z < 0 at 100%"),
    ("depth", np.full((6, 8), np.nan), "depth/p0.npy has no valid pixel"),
    ("depth", np.full((6, 8), -2.0), "depth/p0.npy has no valid pixel"),
    ("normal", np.zeros((6, 8, 3)), "normal/p0.npy has no valid pixel"),
    ("semantic", Image.fromarray(np.full((6, 8), 255, np.uint8)), "semantic/p0.png has no valid pixel")])
def test_labels_that_cannot_be_right(tmp_path, task, x, message):
    """Such labels passed --check and trained with loss 0 until the end. --check names the file and what is wrong; so
    does the first use of the task, before anything is trained."""
    labels(tmp_path, task, x)
    assert re.search(message, check(tmp_path)[0][-1])
    reader = Folder(tmp_path, "train")
    if "no valid pixel" in message:
        with pytest.raises(ValueError, match=f"none of the 1 {task} labels .*{task}/p0.*docs/data.md"):
            reader.indices(task)
    else:
        assert list(reader.indices(task)) == [0]    # told where it is loaded, or skipped and counted there
        with pytest.raises(ValueError, match=message):
            reader.load(0, [task])


def test_one_blank_label_among_others_is_legal(tmp_path):
    """Real datasets have samples without a valid pixel: only if all are, something is wrong with how they were made."""
    own_folder(tmp_path, 3)
    (tmp_path / "train.txt").write_text("p0\np1\np2")
    for i in (0, 1):
        write(tmp_path / f"depth/p{i}.npy", np.full((6, 8), np.nan))
    assert list(Folder(tmp_path, "train").indices("depth")) == [0, 1, 2]
    (tmp_path / "depth/p2.npy").unlink()
    with pytest.raises(ValueError, match="none of the 2 depth labels"):
        Folder(tmp_path, "train").indices("depth")
    assert list(Folder(tmp_path, "train").indices("normal")) == [0, 1, 2]


# ---- samples and splits ----

def test_folder_subsets_and_lists(tmp_path, capsys):
    """Samples may lack labels, <split>.txt picks stems, a split without a list beside others is everything, and says
    so; a label without its picture or a flow without its second frame is refused."""
    own_folder(tmp_path, 3)
    (tmp_path / "albedo/p1.npy").unlink()
    (tmp_path / "val.txt").write_text("\ufeffp2\np1\n", encoding="utf-8")     # as Windows' editor saves it
    assert list(Folder(tmp_path, "train").indices("albedo")) == [0, 2] and len(Folder(tmp_path, "test")) == 3
    assert "there is val.txt but no train.txt, so train is all 3 images" in capsys.readouterr().err
    val = Folder(tmp_path, "val")
    assert val.samples == [("p2",), ("p1",)]
    assert list(val.indices("albedo")) == [0] and list(val.indices("depth")) == [0, 1]
    with pytest.raises(ValueError, match="p1 .*no albedo label"):
        val.load(1, ["albedo"])
    for text, message in (("p9", "val.txt names 'p9'"), (" \n", "val.txt is empty"),
                          ("p1\np2\np1 \n", "val.txt lists 'p1' more than once")):
        (tmp_path / "val.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            Folder(tmp_path, "val")
    (tmp_path / "next/p0.png").unlink()
    with pytest.raises(ValueError, match="next/p0"):
        Folder(tmp_path, "train")


def test_without_lists_names_split_the_samples(tmp_path, capsys):
    """Without lists, all splits were the same images, so that training was validated on what it had learnt. The split
    hangs on the names alone, and says what it is, once."""
    for i in range(20):
        write(tmp_path / f"images/{i}.png", picture(6, 8))
        write(tmp_path / f"depth/{i}.npy", np.ones((6, 8)))
    parts = {split: Folder(tmp_path, split).samples for split in ("train", "val", "test", "train")}
    assert sorted(sum(parts.values(), [])) == sorted((str(i),) for i in range(20))
    assert len(parts["train"]) > 12 and parts["val"] and parts["test"]
    told = capsys.readouterr().err
    counts = ", ".join(f"{len(s)} {split}" for split, s in parts.items())
    assert told.count("no train.txt, val.txt or test.txt") == 1 and f"names decide: {counts}" in told


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 1000])
def test_split_by_name(n):
    """Disjoint, complete, never empty, about 80/10/10; too few are not split; other images move hardly any."""
    stems = [f"image {i}" for i in range(n)]
    parts = split_by_name(stems)
    if n < 3:
        assert all(part == stems for part in parts.values())
        return
    assert sorted(sum(parts.values(), [])) == sorted(stems) and all(parts.values())
    assert parts == split_by_name(stems[::-1])
    if n == 1000:
        assert 750 < len(parts["train"]) < 850 and 70 < len(parts["val"]) < 130
        fewer = split_by_name(stems[:900])
        assert all(set(fewer[split]) <= set(parts[split]) for split in parts)


def test_what_lies_about_in_folders(tmp_path, capsys):
    """Hidden files of systems stopped training as unreadable samples. They are none; other files that are not read are
    named."""
    own_folder(tmp_path)
    for name in ("images/._p0.png", "images/.DS_Store", "images/Thumbs.db", "depth/._p0.npy", "next/desktop.ini",
                 "semantic/._p1.png"):
        (tmp_path / name).write_bytes(b"x")
    reader = Folder(tmp_path, "train")
    assert reader.samples == [("p0",), ("p1",)] and list(reader.indices("depth")) == [0, 1]
    assert "are not read" not in capsys.readouterr().err
    (tmp_path / "depth/p0.tiff").write_bytes(b"x")
    Folder(tmp_path, "train")
    assert "depth: 1 files are not read, first p0.tiff: expected .npy or .png" in capsys.readouterr().err
    write(tmp_path / "images/p0.jpg", picture(6, 8))
    with pytest.raises(ValueError, match="same sample twice"):
        Folder(tmp_path, "train")


# ---- sizes ----

def images(root, *sizes):
    for i, (h, w) in enumerate(sizes):
        write(root / f"images/{i}.png", np.zeros((h, w, 3), np.uint8))
        write(root / f"depth/{i}.npy", np.ones((h, w)))
    return root


@pytest.mark.parametrize("sizes, size, said", [
    ([(20, 30), (20, 30)], (20, 30), ""),
    ([(20, 30), (40, 60), (41, 60)], (20, 30), "2 of 3 images are resized to 20x30; the first is 1.png of 40x60"),
    ([(1500, 2000), (30, 40)], (384, 512), "2 of 2 images are resized to 384x512; the first is 0.png of 1500x2000"),
    ([(400, 1000)], (384, 960), "1 of 1 images are resized to 384x960")])
def test_size_of_the_images(tmp_path, capsys, sizes, size, said):
    """All samples get the size of the first image, at most 384 pixels on its shorter side, and it is said. (One large
    image first made every step take minutes.) Every split has the same."""
    images(tmp_path, *sizes)
    assert {Folder(tmp_path, split).size for split in ("train", "val", "test")} == {size}
    told = capsys.readouterr().err
    assert (said in told) if said else ("resized" not in told)
    assert told.count("resized") <= 1


def test_images_of_other_shapes_need_a_size(tmp_path, capsys):
    """Mixed shapes were squeezed into that of the first image, silently. They are refused, two of them named, unless a
    size is given: then they are stretched, and it says so."""
    images(tmp_path, (20, 30), (20, 31), (30, 20))
    with pytest.raises(ValueError, match=r"images/0.png is 20x30, .*images/2.png 30x20: .*--size HEIGHTxWIDTH"):
        found(tmp_path, "train")
    assert any("--size HEIGHTxWIDTH" in line for line in check(tmp_path)[0])
    reader, = found(tmp_path, "train", size=[16, 24])
    assert reader.size == (16, 24)
    assert "3 of 3 images are resized to 16x24, 1 of them stretched" in capsys.readouterr().err
    assert any(line.startswith("folder train: ") and "samples in" in line for line in check(tmp_path, size=(16, 24))[0])


def test_damaged_images_do_not_count_for_the_size(tmp_path):
    """An image without a readable header is told, or skipped, where it is loaded; if all are so, at once."""
    images(tmp_path, (20, 30), (20, 30))
    (tmp_path / "images/0.png").write_bytes(b"")
    (tmp_path / "train.txt").write_text("0\n1")
    reader = Folder(tmp_path, "train")
    assert reader.size == (20, 30) and reader.load(1, ["depth"])["valid"]["depth"].all()
    with pytest.raises(ValueError, match="images/0.png is empty"):
        reader.load(0, ["depth"])
    (tmp_path / "images/1.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="images/.*is not a readable image"):
        Folder(tmp_path, "train")


def test_sizes_are_read_from_headers(tmp_path, monkeypatch):
    """Making a reader decodes no image, however many there are."""
    images(tmp_path, (20, 30), (20, 30))
    for i in range(2):
        path = tmp_path / f"images/{i}.png"
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setattr(folder, "read_image", lambda *_: sys.exit("an image was decoded"))
    assert Folder(tmp_path, "train").size == (20, 30)


def test_a_label_that_no_held_out_image_has(tmp_path, tiny_base):
    """Where the split leaves a rare label to training alone, the held-out loss is that of the other tasks. (Training
    was refused, until one guessed --tasks or --val-samples 0.)"""
    root, out = tmp_path / "data", tmp_path / "out"
    for i in range(6):
        write(root / f"images/{i}.png", picture(16, 24, i))
        write(root / f"depth/{i}.npy", np.random.default_rng(i).uniform(1, 9, (16, 24)))
    (rare,), *_ = Folder(root, "train").samples
    write(root / f"shading/{rare}.npy", np.full((16, 24), 0.5))
    assert train.main(f"--stage 1 --data {root} --base {tiny_base} --out {out} --steps 2 --batch 1 --save-every 2 "
                      "--workers 0 --threads 1 --warmup 1 --val-samples 1".split()) == 0
    assert (out / "best/model.json").exists()
    assert {line["task"][0] for line in log_lines(out)} == {"depth", "shading"}


def test_labels_too_sparse_to_learn_from(tmp_path, tiny_base, monkeypatch, capsys):
    """One valid pixel in twenty, as of a LiDAR, leaves no latent cell whole: training ended with all losses 0 and
    called it the lowest. It says what is wrong, the check does beforehand, and the pixel loss learns from them."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for i in range(3):
        write(root / f"images/{i}.png", picture(64, 96, i))
        write(root / f"depth/{i}.npy", rng.uniform(1, 9, (64, 96)) * (rng.random((64, 96)) < 0.05))
    for split in "train", "val", "test":
        write(root / f"{split}.txt", b"0\n1\n2\n")
    told = [line for line in check(root)[0] if "5% of their pixels valid" in line]
    assert [line.endswith("hardly any block of 8x8 in full: too sparse to train Stable Diffusion on") for line in told
            ] == [True, True, False]     # test labels may be sparse
    monkeypatch.setattr(train, "PATIENCE", 3)
    flags = f"--stage 1 --data {root} --base {tiny_base} --steps 4 --batch 1 --workers 0 --threads 1 --save-every 2"
    assert cli.run(lambda: train.main([*flags.split(), "--out", str(tmp_path / "out")])) == 2
    assert "3 steps for depth found nothing to learn from: in none of their labels is a whole latent cell" in (
        capsys.readouterr().err)
    assert set(saved(tmp_path / "out")["held_out"].values()) == {None} and not (tmp_path / "out/best").exists()
    assert train.main([*flags.split(), "--loss", "pixel", "--out", str(tmp_path / "pixel")]) == 0
