"""training/cache.py: the auxiliary streams of stage 2 that are kept equal those that the model computes."""
import os
import shutil
from functools import partial

import pytest
import tiny
import torch
from made import SIZE, Made
from test_cache import cached

from data import train_readers
from model import StableMTL, from_base, load_base
from tasks import TASKS
from training.cache import LatentCache, StreamCache

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def toys():
    return train_readers(size=SIZE, scenes=3)


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
    assert computed == [1, 1]       # of each dataset the first, to see whether the code has changed
    computed.clear()
    assert same(fetch(again), first) and computed == []

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


def test_streams_of_other_code_are_refused(tmp_path, toys, multi, monkeypatch):
    """Stage 2 was trained on the old ones, and evaluated with the new. What was just computed does not count as
    compared."""
    z, streams = tiny.latents(1, (8, 12)), multi.streams

    def fetch(store, index):
        return store.fetch([("rooms", index, False)], ("depth",), *z)
    fetch(StreamCache(tmp_path, toys, multi, 1e9), 0)
    monkeypatch.setattr(multi, "streams", lambda *args: {block: {t: 0.9 * x for t, x in f.items()}
                                                         for block, f in streams(*args).items()})
    changed = StreamCache(tmp_path, toys, multi, 1e9)
    assert fetch(changed, 1) and fetch(changed, 1)
    with pytest.raises(ValueError, match=r"rooms.f16 has other streams of sample 0 than the code makes now: delete "):
        fetch(changed, 0)


def test_a_full_disk_leaves_the_streams_that_are_kept(tmp_path, toys, multi, monkeypatch, capsys):
    """With the first that found no room all those before were computed anew, too. What has no room is told once, and
    computed each time."""
    store, z, computed, streams = StreamCache(tmp_path, toys, multi, 1e9), tiny.latents(1, (8, 12)), [], multi.streams

    def fetch(index, flip):
        return store.fetch([("rooms", index, flip)], ("depth",), *z)
    first = fetch(0, False)

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(multi, "streams", lambda *args: computed.append(1) or streams(*args))
    for _ in range(2):
        assert same(fetch(0, False), first) and fetch(0, True) and fetch(1, False)
    assert len(computed) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rooms.f16 keeps no more (No space left on device); what is missing is" in said


def test_streams_of_latents_that_are_made_anew_are_deleted(tmp_path, toys, multi):
    """Where images were changed, the sentence says to delete a dataset's latents: its old streams stayed."""
    def latents():
        LatentCache(tmp_path, toys, "vae", "cityscapes").create(toys, multi)
    latents()
    store, z = StreamCache(tmp_path, toys, multi, 1e9), tiny.latents(1, (8, 12))
    for name in ("rooms", "streets"):
        store.fetch([(name, 0, False)], ("depth",), *z)
    assert len(list(tmp_path.glob("streams-*/*.f16"))) == 2
    latents()
    assert len(list(tmp_path.glob("streams-*/*.f16"))) == 2
    shutil.rmtree(tmp_path / "rooms")
    latents()
    assert [path.name for path in tmp_path.glob("streams-*/*.f16")] == ["streets.f16"]


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
    earlier = second / "cache/streams-0123456789abcdef/elsewhere.f16"
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
