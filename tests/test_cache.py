"""training/cache.py: what is read back equals what would be computed anew, and a cache of something else is refused."""
import json
import math
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import SIZE, Made, mixture
from raw import own_folder
from runs import TINY

import checkpoint
import cli
from data import loader, prepare, train_readers, whole_cells
from model import StableMTL, from_base
from readers.folder import Folder
from tasks import CLASSES, PALETTES, TASKS
from training import cache
from training.cache import LatentCache, fingerprint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def model(tiny_base):
    """Shared: do not change it."""
    return from_base(str(tiny_base), tuple(TASKS))


@pytest.fixture(scope="module")
def toys():
    return train_readers(size=SIZE, scenes=3)


def opened(folder, readers, model, palette="cityscapes"):
    return LatentCache(folder, readers, fingerprint(model.vae.state_dict()), palette)


def cached(folder, readers, model, palette="cityscapes", **options):
    """(the cache, built as far as it was not, names of skipped samples)"""
    store = opened(folder, readers, model, palette)
    store.create(readers, model)
    return store, store.build(readers, model, TASKS, 0, batch=2, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toys, model):
    """Folder of a whole cache of the toy worlds. Do not write there."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert cached(folder, toys, model)[1] == []
    return folder


@pytest.fixture
def place(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "cache")


def contents(folder, pattern="*"):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob(pattern) if p.is_file()}


# ---- latents of images and labels ----

def test_cache_equals_encoding_on_the_fly(place, toys, model):
    """Frames, labels and masks of all samples, tasks and flips, up to float16; a task with its own crop has frames of
    its own."""
    readers = [*toys, Made(n=2, train_crop={"optical_flow": (8, 16)})]
    store, skipped = cached(place, readers, model)
    assert skipped == []
    cases = [(reader, t, index, flip) for reader in readers for t in reader.tasks
             for index in list(reader.indices(t))[:2] for flip in (False, True)]
    for reader, t, index, flip in cases:
        got, item = store.get(reader, index, (t,), flip), prepare(reader, index, (t,), TASKS, (flip, False))
        with torch.no_grad():
            z = model.encode(torch.stack([*item["frames"], item["labels"][t]]))
        kept = torch.stack([*got["frames"], got["labels"][t]])
        assert torch.allclose(kept, z, rtol=2e-3, atol=1e-4), (reader.name, t)
        assert torch.equal(got["valid"][t], whole_cells(item["valid"][t][None], model.factor)[0])


def test_cache_gives_the_same_plan(whole, toys, model):
    """With and without a cache a step holds the same samples and flips, and the cached batches are the encoded ones."""
    store = opened(whole, toys, model)
    for s in range(3):
        plain, latent = mixture(toys)[s]["batches"], mixture(toys, cache=store)[s]["batches"]
        for a, b in zip(plain, latent, strict=True):
            assert a["keys"] == b["keys"]
            with torch.no_grad():
                assert torch.allclose(model.encode(a["frames"][1]), b["frames"][1], rtol=2e-3, atol=1e-4)


def test_training_from_the_cache_reads_no_image_and_runs_no_vae(place, toys, model, monkeypatch):
    """Once built, training calls neither reader nor encoder; a second build compares one label per task."""
    loaded, load = [], type(toys[0]).load

    def spy(self, i, tasks, **how):
        loaded.append(tasks)
        return load(self, i, tasks, **how)
    monkeypatch.setattr(type(toys[0]), "load", spy)
    store, skipped = cached(place, toys, model)
    assert skipped == [] and loaded == [(t,) for reader in toys for t in reader.tasks]

    def never(*_, **__):
        raise AssertionError("called although everything is cached")
    monkeypatch.setattr(type(toys[0]), "load", never)
    monkeypatch.setattr(StableMTL, "encode", never)
    assert len(list(loader(mixture(toys, cache=store), 0, 8, 0))) == 8


def test_a_changed_code_or_reader_is_noticed(place, toys, model, monkeypatch):
    """Trained on the old codes until somebody deleted the cache. What cannot be read any more is not compared."""
    before, shading, load = contents(place), TASKS["shading"], type(toys[0]).load
    with monkeypatch.context() as m:
        m.setitem(TASKS, "shading", replace(shading, encode=lambda label, valid: -shading.encode(label, valid)))
        with pytest.raises(ValueError, match="made for something else .another code of shading.: delete it, then"):
            cached(place, toys, model)
        m.setattr(cache, "codes", lambda tasks, palette: {})
        with pytest.raises(ValueError, match="another label of shading for rooms sample 0 .*: delete .*rooms, it is"):
            cached(place, toys, model)

    def masked(self, i, tasks, **how):
        sample = load(self, i, tasks, **how)
        sample["valid"] = {t: valid & (valid.cumsum(0) > 8) for t, valid in sample["valid"].items()}
        return sample

    def gone(*_, **__):
        raise FileNotFoundError("no such file")

    def negative(self, i, tasks, **how):
        sample = load(self, i, tasks, **how)
        return sample | {key: 255 - sample[key] for key in ("image", "next") if key in sample}
    with monkeypatch.context() as m:
        for changed, what in ((masked, "label of"), (negative, "image for rooms sample 0")):
            m.setattr(type(toys[0]), "load", changed)
            with pytest.raises(ValueError, match=f"another {what}"):
                cached(place, toys, model)
        m.setattr(type(toys[0]), "load", gone)
        assert cached(place, toys, model)[1] == []
    assert contents(place) == before


def test_a_colour_that_the_first_sample_lacks_is_noticed(place, toys, model, monkeypatch):
    """One class alone: a cache was trained from, with the old colour, if the first sample does not show it."""
    before, sign = contents(place), CLASSES.index("sign")
    colours = [(9, 9, 9) if k == sign else c for k, c in enumerate(PALETTES["cityscapes"])]
    monkeypatch.setitem(PALETTES, "cityscapes", colours)
    with pytest.raises(ValueError, match="another code of semantic.: delete it"):
        cached(place, toys, model)
    assert contents(place) == before


def test_cache_of_something_else_is_refused(place, toys, model, tiny_base):
    """Another palette, image size, number of samples or VAE: a sentence that says which, and the folder stays as it
    was."""
    before = contents(place)
    other = from_base(str(tiny_base), ("depth",))
    other.vae.quant_conv.bias.data += 0.1
    larger, more = train_readers(size=(32, 24), scenes=3), train_readers(size=SIZE, scenes=4)
    for what, readers, m, palette in (("palette cityscapes, now corners", toys, model, "corners"),
                                      (r"size of rooms \[16, 24\], now \[32, 24\]", larger, model, "cityscapes"),
                                      ("samples of things 3, now 4", more, model, "cityscapes"),
                                      ("vae ", toys, other, "cityscapes")):
        with pytest.raises(ValueError, match=f"made for something else .*{what}.*: delete it, then it is built"):
            cached(place, readers, m, palette)
    assert contents(place) == before


def test_a_cache_of_other_files_is_refused(tmp_path, go):
    """A folder of one's own with as many images of the same size: training went on from latents of the old files, and
    after a change of train.txt from those of held-out images."""
    root, other, cache = tmp_path / "my", tmp_path / "other", tmp_path / "cache"
    for folder in (root, other):
        own_folder(folder, 3, *SIZE)
        (folder / "train.txt").write_text("p0\np1\n")

    def run(data):
        code, _, said = go(f"--data {data} --cache {cache} --overwrite --tasks depth", TINY.replace("--scenes 2", ""))
        return code, said
    assert run(root)[0] == run(root)[0] == 0
    before = contents(cache)

    def refused(data):
        code, said = run(data)
        return code == 2 and "made for something else (files of folder " in said and contents(cache) == before
    assert refused(other)
    (root / "train.txt").write_text("p0\np2\n")
    assert refused(root)
    (root / "train.txt").write_text("p0\np1\n")
    np.save(root / "depth/p1.npy", np.full(SIZE, 7, np.float32))
    assert refused(root)


def test_a_cache_that_does_not_say_of_which_files_it_is(tmp_path, toys, model):
    """Made by an earlier version: good for the toy worlds, whose scenes follow from their numbers, and refused for
    files."""
    own_folder(tmp_path / "my", 2, *SIZE)
    readers = [*toys, Folder(tmp_path / "my", "train")]
    cached(tmp_path / "c", readers, model)
    about = json.loads((tmp_path / "c/cache.json").read_text())
    for facts in about["datasets"].values():
        del facts["files"]
    (tmp_path / "c/cache.json").write_text(json.dumps(about))
    opened(tmp_path / "c", toys, model)
    with pytest.raises(ValueError, match="files of folder None, now [0-9a-f]{8}"):
        opened(tmp_path / "c", readers, model)


def test_cache_is_shared_by_runs_of_different_tasks(tmp_path, toys, model):
    """A run that needs one dataset, then one that needs all, then the first again use one folder, and nothing is
    encoded twice."""
    cached(tmp_path, toys[:1], model)
    before = contents(tmp_path / toys[0].name)
    cached(tmp_path, toys, model)
    again, _ = cached(tmp_path, toys[:1], model)
    assert set(again.about["datasets"]) == {r.name for r in toys}
    assert contents(tmp_path / toys[0].name) == before
    with pytest.raises(ValueError, match="samples of rooms 3, now 4"):
        cached(tmp_path, train_readers(size=SIZE, scenes=4)[:1], model)


def test_interrupted_build_continues(tmp_path, model, monkeypatch):
    """After Ctrl-C in the middle, finished samples are not read again and the result equals an uninterrupted build."""
    reader, load = Made(n=8), Made.load
    cached(tmp_path / "whole", [reader], model)

    def interrupted(self, i, *args, **options):
        if i == 5:
            raise KeyboardInterrupt
        return load(self, i, *args, **options)
    with monkeypatch.context() as m:
        m.setattr(Made, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / "twice", [reader], model)
    reader.loads.clear()
    cached(tmp_path / "twice", [reader], model)
    assert reader.loads == [0] * len(reader.tasks) + [4, 5, 6, 7]       # compared; each of the rest for both flips
    assert contents(tmp_path / "twice", "*.npy") == contents(tmp_path / "whole", "*.npy")


def test_unreadable_samples_of_the_cache(tmp_path, model):
    """A bad file stops the build with its dataset, number and the reader's sentence; with --skip-bad it is counted by
    every build, has no valid cell, and is cached once it can be read."""
    bad = Made("set", ("depth",), broken=1)
    with pytest.raises(ValueError, match=r"^set sample 1: set/1.png is truncated: copy it again \(--skip-bad") as error:
        cached(tmp_path / "strict", [bad], model, skip_bad=False)
    assert "\n" not in str(error.value)

    def anything_valid(store):
        return store.get(bad, 1, ("depth",), False)["valid"]["depth"].any()
    for _ in range(2):
        store, skipped = cached(tmp_path / "lenient", [bad], model, skip_bad=True)
        assert skipped == ["set:1"] and not anything_valid(store)
    bad.broken = None
    bad.loads.clear()
    store, skipped = cached(tmp_path / "lenient", [bad], model)
    assert skipped == [] and anything_valid(store)
    assert set(bad.loads) == {0, 1}     # 0: compared


def test_cache_that_does_not_fit_on_the_disk(tmp_path, toys, model, monkeypatch):
    """Too little room is said before anything is encoded; what is announced is what is written."""
    with monkeypatch.context() as m:
        m.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(OSError, match="needs 0.0 GiB.*--cache none"):
            cached(tmp_path, toys, model)
        assert [path.name for path in tmp_path.iterdir()] == ["cache.lock"]
    asked = []

    def spy(shape):
        asked.append(math.prod(shape))
        return asked[-1]
    monkeypatch.setattr(cache.np, "prod", spy)
    opened(tmp_path, toys, model).create(toys, model)
    assert sorted(asked) == sorted(np.load(path, mmap_mode="r").size for path in tmp_path.rglob("*.npy"))


def test_an_interrupted_build_asks_for_the_rest_of_its_room(tmp_path, model, monkeypatch):
    """Arrays that nobody has written to take no room yet: on a disk that was full by then the process ended without a
    word."""
    reader = [Made(n=24)]
    opened(tmp_path, reader, model).create(reader, model)
    full = cache.shutil._ntuple_diskusage(100, 100, 0)
    with monkeypatch.context() as m:
        m.setattr(cache.shutil, "disk_usage", lambda _: full)
        with pytest.raises(OSError, match="needs 0.0 GiB.*--cache none"):
            opened(tmp_path, reader, model).create(reader, model)
    cached(tmp_path, reader, model)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: full)
    opened(tmp_path, reader, model).create(reader, model)


def test_a_folder_of_data_is_no_cache(tmp_path, model):
    """An own folder's root got a folder/, which hid its images; whoever deleted a damaged cache deleted Hypersim."""
    own_folder(tmp_path / "my", 2, *SIZE)
    reader = Folder(tmp_path / "my", "train")
    for place in (tmp_path / "my", tmp_path / "my/images"):
        with pytest.raises(ValueError, match=f"{place} holds other files than a latent cache: name another folder"):
            opened(place, [reader], model)
    (tmp_path / "root/made").mkdir(parents=True)
    (tmp_path / "root/made/scene").touch()
    with pytest.raises(ValueError, match="root/made holds other files than a latent cache"):
        opened(tmp_path / "root", [Made()], model)
    for _ in range(2):
        cached(tmp_path / "my/cache", [reader], model)      # beside the images nothing is in the way
    (tmp_path / "my/folder").mkdir()        # of a cache that was made there once
    assert len(Folder(tmp_path / "my", "train")) == 2


def test_ranks_share_the_building(whole, tmp_path, toys, model):
    """Two ranks that each build their share leave what one leaves, bit for bit; the second finds the arrays that the
    first made."""
    store = opened(tmp_path, toys, model)
    store.create(toys, model)
    for rank in (1, 0):
        store.build(toys, model, TASKS, batch=2, rank=rank, world_size=2)
        assert np.load(tmp_path / "rooms" / "done.npy").all() == (rank == 0)
    for path in whole.rglob("*.npy"):
        a, b = np.load(path), np.load(tmp_path / path.relative_to(whole))
        assert np.array_equal(a, b), path


def test_images_are_encoded_in_the_same_company(tmp_path, toys, model, monkeypatch):
    """The batches of two ranks are those of one: another size may round the last bit otherwise."""
    seen, encode = {1: [], 2: []}, cache.encode

    def spy(model, images):
        seen[world_size].append([(name, x.sum().item()) for name, x in images])
        return encode(model, images)
    monkeypatch.setattr(cache, "encode", spy)
    for world_size in seen:
        store = opened(tmp_path / str(world_size), toys, model)
        store.create(toys, model)
        for rank in range(world_size):
            store.build(toys, model, TASKS, batch=2, rank=rank, world_size=world_size)
    assert sorted(seen[1]) == sorted(seen[2]) and len(seen[1]) == 2 * len(toys)


def test_two_runs_begin_to_share_a_folder_at_once(tmp_path, toys, model, monkeypatch):
    """Each wrote cache.json.tmp and one of them found it gone: FileNotFoundError. Now they take turns, and the folder
    knows the datasets of both."""
    replace = os.replace

    def slow(*paths):
        time.sleep(0.2)
        replace(*paths)
    monkeypatch.setattr(os, "replace", slow)

    def begin(rank):
        opened(tmp_path / "c", toys[rank:rank + 1], model).create(toys[rank:rank + 1], model)
    cli.spread(begin, 2)
    known = json.loads((tmp_path / "c" / "cache.json").read_text())["datasets"]
    assert set(known) == {toys[0].name, toys[1].name}


def test_a_cache_in_the_folder_of_the_run(tmp_path, toys, model):
    """--cache that equals --out: taking turns in it let go of the run's own lock."""
    with checkpoint.locked(tmp_path):
        opened(tmp_path, toys, model).create(toys, model)

        def begin(rank):
            if rank:        # another process; a lock does not hold within the own one
                with pytest.raises(BlockingIOError, match="another training"), checkpoint.locked(tmp_path):
                    pass
            return rank
        assert [*cli.spread(begin, 2)] == [0, 1]


@pytest.mark.parametrize("harm", ["missing", "cut short"])
def test_a_damaged_array_is_named(place, toys, model, harm):
    """A cache that lost an array, or a part of one: file and remedy, which is not --skip-bad but to build it again."""
    path = place / "streets" / "depth.npy"
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8])
    told = "streets/depth.npy of the latent cache is missing or damaged .*: delete .*streets"
    with pytest.raises(ValueError, match=told):
        opened(place, toys, model).build(toys, model, TASKS)
