"""Which datasets are there, what is wrong with them, and how one adds another."""
import numpy as np
import pytest
from PIL import Image
from raw import kitti_2015, own_folder, picture, virtual_kitti, write

import data
from evaluate import PAPER_TASKS
from readers import READERS, check, formats, found, sized
from readers.flyingthings3d import FlyingThings3D
from readers.hypersim import Hypersim
from readers.reader import Frame, Reader
from readers.toyworld import ToyWorld
from readers.virtual_kitti_2 import VirtualKitti2
from tasks import TASKS


@pytest.mark.parametrize("name", [n for n in READERS if n != "folder"])
def test_missing_and_empty_folders_say_what_was_expected(tmp_path, name):
    """One sentence: which files, in which folder, what is there instead, where to get them."""
    reader = READERS[name]
    for there in ("is empty or does not exist", "holds 1 entries"):
        with pytest.raises(FileNotFoundError) as e:
            reader(tmp_path, reader.splits[0])
        assert all(part in str(e.value) for part in (there, str(tmp_path / name), reader.page, "docs/data.md"))
        (tmp_path / name / "stray").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match="no split 'nope'"):
        reader(tmp_path, "nope")


def test_wrong_use_is_refused(tmp_path, monkeypatch):
    """A task without labels, a label of another size, a mask of another shape and a file missing from a half-extracted
    archive are named."""
    virtual_kitti(tmp_path)
    reader = VirtualKitti2(tmp_path, "train")
    with pytest.raises(ValueError, match="no labels for albedo"):
        reader.load(0, ["albedo"])
    with monkeypatch.context() as m:
        m.setattr(VirtualKitti2.Frame, "depth", lambda frame: (np.ones((11, 16, 1)), np.ones((11, 16, 1), bool)))
        with pytest.raises(ValueError, match=r"the mask of depth has the shape \(11, 16, 1\), expected"):
            reader.load(0, ["depth"])
    depth = tmp_path / "virtual_kitti_2/Scene02/clone/frames/depth/Camera_0/depth_00000.png"
    write(depth, np.ones((16, 12), np.uint16))
    with pytest.raises(ValueError, match="Camera_0/00000 .*depth label is 16x12, but the image 16x11"):
        reader.load(0, ["depth"])
    depth.unlink()
    with pytest.raises(FileNotFoundError, match="depth_00000.png is missing"):
        reader.load(0, ["depth"])


def test_found_and_check(tmp_path):
    """found() returns the readers that are there, in their role; check() reports every dataset and the first label that
    is wrong."""
    virtual_kitti(tmp_path)
    own_folder(tmp_path / "folder")
    kitti_2015(tmp_path)
    assert [sized(tmp_path, *role) for role in ((), ("train",), ("test",))] == [False] * 3
    assert [r.name for r in found(tmp_path, "train")] == ["virtual_kitti_2", "folder"]
    assert [(r.name, r.split) for r in found(tmp_path, "test")] == [("kitti_2015", "training"), ("folder", "test")]
    depth = tmp_path / "virtual_kitti_2/Scene02/clone/frames/depth/Camera_1/depth_00001.png"
    write(depth, np.ones((16, 11), np.uint8))
    quick, full = "\n".join(check(tmp_path)[0]), "\n".join(check(tmp_path, full=True)[0])
    for text in (quick, full):
        for part in ("virtual_kitti_2 train: 6 samples", "hypersim: not here", "virtual_kitti_2 test: no virtual_kitti",
                     "kitti_2015 training: 1 samples"):
            assert part in text
    assert "optical_flow      4  3 tried, all load, 94% of their pixels valid" in quick and "4 tried" in full
    assert "depth_00001.png" in full and "depth_00001.png" not in quick
    write(depth, np.full((16, 11), 65535, np.uint16))
    blank = "1 without any valid pixel, first the depth label of virtual_kitti_2/train/Scene02/clone/Camera_1/00001"
    assert any(line.endswith(blank) for line in check(tmp_path, full=True)[0])
    with pytest.raises(FileNotFoundError, match="no train dataset"):
        found(tmp_path / "folder" / "images", "train")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        check(tmp_path / "nothing")


def test_the_exit_code_tells_whether_all_is_well(tmp_path, capsys):
    """data.py --check ended with 0 whatever it had found, so that `data.py --check && train.py` went on."""
    argv = ["--check", "--full", "--data", str(tmp_path)]
    assert data.main(argv) == 1     # no dataset at all
    write(tmp_path / "folder/images/p0.png", picture(6, 8))
    assert data.main(argv) == 1     # and no label
    assert "no label: expected some in semantic/, normal/" in capsys.readouterr().out
    own_folder(tmp_path / "folder")
    assert data.main(argv) == 0
    label = sorted((tmp_path / "folder/depth").iterdir())[0]
    content = label.read_bytes()
    label.write_bytes(content[:-9])
    assert data.main(argv) == 1
    label.write_bytes(content)
    assert data.main(argv) == 0


class Another(Reader):
    """What one writes to add a dataset, beside its line in readers.DATASETS."""
    name, page, splits, use = "another", "https://example.org", ("train",), {"train": "train"}
    tree, tasks, size = {"image": "rgb/{}.png", "depth": "z/{}.npy"}, ("depth",), (16, 24)

    class Frame(Frame):
        def depth(self):
            z = formats.read_npy(self.path("depth"), 1)[..., 0]
            return z, z > 0


def test_a_toy_sample_is_shown_at_the_size_asked_for(tmp_path, capsys):
    """data.py --size was ignored without --data."""
    path = tmp_path / "shown.png"
    assert data.main(["--show", "streets:3", "--size", "16x24", "--output", str(path)]) == 0
    asked = data.show(ToyWorld("streets", "train", size=(16, 24), all_labels=True), 3)
    assert np.array_equal(Image.open(path), asked)


def test_a_dataset_of_ones_own_making(tmp_path, monkeypatch):
    """A class with a table of files and a method per task is all a dataset needs. Numbers that only float64 can hold
    are invalid, too. (They became infinite after they had been found finite.)"""
    monkeypatch.setitem(READERS, "another", Another)
    z = np.arange(48.0).reshape(6, 8)
    z[1, 1:4] = 1e300, np.nan, np.inf
    write(tmp_path / "another/rgb/7.png", picture(6, 8))
    write(tmp_path / "another/z/7.npy", z)
    reader, = found(tmp_path, "train", size=(9, 9))     # a size is for one's own images: this dataset has one
    s = reader.load(0, ["depth"])
    assert reader.size == (16, 24) and s["name"] == "another/train/7" and s["labels"]["depth"].dtype == np.float32
    assert s["valid"]["depth"].sum() == 44 and np.isfinite(s["labels"]["depth"]).all()
    assert "    depth             1  1 tried, all load, 92% of their pixels valid" in check(tmp_path)[0]


def test_mixture_facts():
    """The weights of each task add up to one over its datasets, and every fact names a task the dataset labels."""
    training = [Hypersim, VirtualKitti2, FlyingThings3D]
    for task in {*PAPER_TASKS, *(t for r in training for t in r.tasks)}:
        assert sum(r.mix[task] for r in training if task in r.tasks) == pytest.approx(1)
    for r in READERS.values():
        assert {*r.mix, *r.jitter, *r.train_crop} <= set(r.tasks) and set(r.use.values()) <= set(r.splits)
        assert r.page and set(r.tasks) <= set(TASKS) and tuple(t for t in TASKS if t in r.tasks) == r.tasks
