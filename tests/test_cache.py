"""training/cache.py: what is read back equals what would be computed anew, and a cache of something else is refused."""
import json
import math
import os
import shutil
import time
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from made import SIZE, Made, mixture
from raw import own_folder
from runs import TINY

import checkpoint
import cli
from data import loader, prepare, train_readers, whole_cells
from model import StableMTL, from_base, load_base
from readers.folder import Folder
from tasks import TASKS
from training import cache
from training.cache import LatentCache, StreamCache, fingerprint

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
    """Once built, neither reader nor encoder is called again, nor by a second build."""
    def never(*_, **__):
        raise AssertionError("called although everything is cached")
    monkeypatch.setattr(type(toys[0]), "load", never)
    monkeypatch.setattr(StableMTL, "encode", never)
    store, skipped = cached(place, toys, model)
    assert skipped == []
    assert len(list(loader(mixture(toys, cache=store), 0, 8, 0))) == 8


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
        with pytest.raises(ValueError, match=f"made for something else .*{what}.*: name another folder or delete"):
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
    assert reader.loads == [4, 5, 6, 7]         # each of them once, for both flips
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
    assert set(bad.loads) == {1}


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


# ---- the cache of auxiliary streams ----

@pytest.fixture
def multi(tiny_base):
    """A small stage 2 whose task attention is not zero."""
    torch.manual_seed(0)
    m = from_base(str(tiny_base), tuple(TASKS))
    m.add_main_stream(load_base(str(tiny_base))[1])
    for layer in m.attention.values():
        torch.nn.init.normal_(layer.to_out_task.weight, std=0.3)
    return m.eval()


def same(a, b):
    """Equal streams, {block: {task: features}}, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[block][t], b[block][t]) for block in a for t in TASKS)


def test_streams_are_computed_once(tmp_path, toys, multi, monkeypatch):
    """What is read back equals what was computed, in float16, for both flips; another stage 1 has a folder of its own,
    a damaged record is computed again, and samples beyond the limit are not kept."""
    keys = [("rooms", 0, False), ("rooms", 0, True), ("streets", 2, False)]
    z_i, z_j = tiny.latents(3, tuple(s // multi.factor for s in SIZE))

    def fetch(store):
        return store.fetch(keys, ("depth",), z_i, z_j)
    first, expected = fetch(StreamCache(tmp_path, toys, multi, 1e9)), multi.streams(z_i, z_j, multi.tasks)
    assert first.keys() == expected.keys() and len(first) == len(multi.attention)
    for block, features in expected.items():
        for t in TASKS:
            assert torch.allclose(first[block][t], features[t], rtol=2e-3, atol=2e-3)

    computed, streams = [], StableMTL.streams

    def spy(self, z_i, *rest):
        computed.append(len(z_i))
        return streams(self, z_i, *rest)
    monkeypatch.setattr(StableMTL, "streams", spy)
    again = StreamCache(tmp_path, toys, multi, 1e9)
    computed.clear()        # it looks once at the shapes
    assert same(fetch(again), first)
    assert computed == []

    (path,) = tmp_path.glob("streams-*/streets.f16")
    content = bytearray(path.read_bytes())
    content[-100] ^= 255
    path.write_bytes(content)
    assert same(fetch(again), first)
    assert computed == [1]

    nothing = StreamCache(tmp_path / "none", toys, multi, 0)
    computed.clear()
    assert fetch(nothing) is None and computed == []        # the model computes them, and those it needs alone
    assert not list((tmp_path / "none").rglob("*.f16"))
    with torch.no_grad():
        multi.unet.conv_in.bias += 1
    fetch(StreamCache(tmp_path, toys, multi, 1e9))
    assert len(list(tmp_path.glob("streams-*"))) == 2


def test_streams_of_earlier_stage_1s_are_deleted(tmp_path, toys, multi):
    """Of a run's own cache, gigabytes each; not while they are being read, and never from a shared folder."""
    keys, z = [("rooms", 0, False)], tiny.latents(1, (8, 12))

    def streams(**how):
        with torch.no_grad():
            multi.unet.conv_in.bias += 1
        store = StreamCache(tmp_path, toys, multi, 1e9, **how)
        store.fetch(keys, ("depth",), *z)
        return store, {path.parent.name for path in tmp_path.glob("streams-*/rooms.f16")}
    (first, one), (second, two) = streams(), streams()
    assert one < two and len(two) == 2
    second.held.close()
    third, three = streams(own=True)
    assert len(three) == 2 and one < three and not three & (two - one)
    assert first.records["rooms"].read(0) is not None
    first.held.close()
    third.held.close()
    assert len(streams(own=True)[1]) == 1


def test_stage_two_keeps_the_streams_of_one_stage_one(go, second):
    """Each stage 2 after another stage 1 left its streams in out/cache, for good."""
    earlier = second / "cache/streams-0123456789abcdef/rooms.f16"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"1")
    flags = "--stage 2 --rho 0 --overwrite --cache"
    assert go(f"{flags} {second / 'cache'}")[0] == 0 and earlier.exists()       # named: perhaps other runs use it
    assert go(f"{flags} auto")[0] == 0 and not earlier.parent.exists()
    assert len(list(second.glob("cache/streams-*"))) == 1


def test_streams_of_a_precision(tmp_path, toys, multi):
    """What was computed under autocast is never read by a run in float32, nor the other way round."""
    autocast, keys, z = partial(torch.autocast, "cpu", torch.bfloat16), [("rooms", 0, False)], tiny.latents(1, (8, 12))
    exact = StreamCache(tmp_path, toys, multi, 1e9).fetch(keys, ("depth",), *z)
    with autocast():
        rough = StreamCache(tmp_path, toys, multi, 1e9, autocast).fetch(keys, ("depth",), *z)
    assert not same(rough, exact)
    assert same(StreamCache(tmp_path, toys, multi, 1e9).fetch(keys, ("depth",), *z), exact)
    assert same(StreamCache(tmp_path, toys, multi, 1e9, autocast).fetch(keys, ("depth",), *z), rough)


def test_no_streams_are_kept_of_a_skipped_sample(tmp_path, toys, multi):
    """With --skip-bad its latents are zeros until its file is mended; then its streams are those of the image."""
    keys, z, empty = [("rooms", 0, False)], tiny.latents(1, (8, 12)), torch.zeros(1, 4, 8, 12)
    expected = StreamCache(tmp_path / "whole", toys, multi, 1e9).fetch(keys, ("depth",), *z)
    StreamCache(tmp_path, toys, multi, 1e9).fetch(keys, ("depth",), empty, empty)
    assert same(StreamCache(tmp_path, toys, multi, 1e9).fetch(keys, ("depth",), *z), expected)


def test_known_streams_change_no_loss(multi):
    """The multi stream with streams handed in predicts what it predicts from its own."""
    z_i, z_j = tiny.latents()
    with torch.no_grad():
        streams = multi.streams(z_i, z_j, multi.tasks)
        own, given = multi(z_i, z_j, ["depth"]), multi(z_i, z_j, ["depth"], streams=streams)
        other = multi(z_i, z_j, ["depth"], streams=multi.streams(z_j, z_i, multi.tasks))
    assert torch.allclose(own["depth"], given["depth"], atol=1e-5)
    assert not torch.allclose(own["depth"], other["depth"], atol=1e-3)      # they do matter


def test_a_task_with_a_crop_of_its_own_has_no_kept_streams(tmp_path, multi):
    """Its frames are others than those of the other tasks of that image, whose streams it got."""
    reader = Made(n=1, train_crop={"optical_flow": (8, 16)})
    cache, _ = cached(tmp_path, [reader], multi)
    key, store = [(reader.name, 0, False)], StreamCache(tmp_path, [reader], multi, 1e9)
    for task in ("depth", "optical_flow"):
        frames = [f[None] for f in cache.get(reader, 0, (task,), False)["frames"]]
        given = store.fetch(key, (task,), *frames)
        with torch.no_grad():
            exact = multi(*frames, (task,))[task]
            assert torch.allclose(multi(*frames, (task,), streams=given)[task], exact, atol=2e-2)
        assert (given is None) == (task == "optical_flow")
