"""data.py: what a step trains on is fixed by (seed, step) alone, transforms do what they say, and the latent cache equals encoding anew."""
import math
from collections import Counter

import numpy as np
import pytest
import torch

import cache
import data
import tiny
from cache import LatentCache, StreamCache, fingerprint
from data import Mixture, jitter, loader, parse_drop, prepare, train_readers, whole_cells
from model import StableMTL, from_base
from tasks import TASKS
from toy import make as toybase

SIZE = (16, 24)


class Made:
    """A reader in the manner of datasets.py: random pictures and labels, any facts. `broken`: number of a sample that cannot be read."""

    version, split, depth_range = 1, "train", (0.1, 80.0)

    def __init__(self, name="made", tasks=("normal", "depth", "optical_flow"), n=4, native=(20, 36), labelled=None, broken=None, **facts):
        self.name, self.tasks, self.n, self.native, self.size, self.broken = name, tasks, n, native, SIZE, broken
        self.mix, self.train_crop, self.jitter, self.vflip = ({**dict(mix={}, train_crop={}, jitter={}, vflip=False), **facts}).values()
        self.labelled, self.loads = labelled or {}, []

    def __len__(self):
        return self.n

    def indices(self, task):
        return self.labelled.get(task, range(self.n))

    def load(self, i, tasks, with_next=False):
        self.loads.append(i)
        if i == self.broken:
            raise ValueError(f"{self.name}/{i}.png is truncated: copy it again")
        assert all(i in self.indices(t) for t in tasks), "asked for a label that is not there"
        rng = np.random.default_rng([i, *self.name.encode()])
        image = lambda: np.kron(rng.integers(0, 256, (self.native[0] // 4, self.native[1] // 4, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
        sample = {"name": f"{self.name}/{i}", "image": image(), "next": image(), "labels": {}, "valid": {}}
        for t in tasks:
            rng = np.random.default_rng([i, *t.encode()])
            label = rng.standard_normal((*self.native, TASKS[t].channels)).astype(np.float32)
            sample["labels"][t] = abs(label) if t == "depth" else label
            sample["valid"][t] = rng.random(self.native) < 0.9
        return sample


@pytest.fixture(scope="module")
def model(tiny_base):
    return from_base(str(tiny_base), tuple(TASKS))


@pytest.fixture(scope="module")
def toys():
    return train_readers(size=SIZE, scenes=3)


def mixture(readers, tasks=tuple(TASKS), **options):
    return Mixture(readers, tasks, TASKS, **{"batch": 4, "micro": 4, **options})


def same(a, b):
    """Whether two nested structures of tensors are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def key(plan):
    return [(tasks, reader.name, index, flips, seed) for tasks, reader, index, flips, seed in plan]


# ---- the mixture ----

def test_plan_depends_on_seed_and_step_alone(toys):
    """The same (seed, step) gives the same samples whatever came before and whatever `micro` is; another seed gives others."""
    a, b, c = mixture(toys), mixture(toys, micro=1), mixture(toys, seed=1)
    backwards = [key(b.plan(s)) for s in reversed(range(20))][::-1]
    assert [key(a.plan(s)) for s in range(20)] == backwards != [key(c.plan(s)) for s in range(20)]


def test_micro_batches_partition_the_step(toys):
    """Micro-batches are consecutive pieces of the step: at most `micro` samples of one task and one size, together the same tensors."""
    whole, parts = mixture(toys, batch=7, micro=7)[3]["batches"], mixture(toys, batch=7, micro=2)[3]["batches"]
    assert all(len(b["keys"]) <= 2 for b in parts) and sum(len(b["keys"]) for b in parts) == 7
    (b,) = whole        # the toy worlds have one size
    assert sum((p["keys"] for p in parts), ()) == b["keys"]
    assert torch.equal(torch.cat([p["frames"][1] for p in parts]), b["frames"][1])
    assert all(torch.equal(torch.cat([p["labels"][t] for p in parts]), b["labels"][t]) for t in b["tasks"])


def test_one_size_per_forward_pass():
    """Datasets share a micro-batch where their sizes agree, and only there."""
    readers = [Made("a", ("depth",)), Made("b", ("depth",)), Made("c", ("depth",))]
    readers[2].size = (24, 16)
    for step in range(8):
        batches = mixture(readers, ("depth",), batch=8, micro=8)[step]["batches"]
        seen = {tuple(b["frames"][0].shape[-2:]): {key[0] for key in b["keys"]} for b in batches}
        assert len(seen) == len(batches) and seen.get((24, 16), {"c"}) == {"c"} and seen.get(SIZE, set()) <= {"a", "b"}
    assert {"a", "b"} in [{key[0] for key in b["keys"]} for b in batches]


def test_workers_change_nothing(toys):
    """Two loader processes deliver, in order, the bits that none delivers, and draw nothing from the global random state."""
    m, state = mixture(toys), torch.get_rng_state()
    assert same(list(loader(m, 2, 6, 0)), list(loader(m, 2, 6, 2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_partition_the_batch(toys):
    """Two ranks together see exactly the samples of one, and never the same one twice."""
    one, two = mixture(toys, batch=6), [mixture(toys, batch=6, rank=r, world=2) for r in (0, 1)]
    for s in range(10):
        halves = [key(m.plan(s)) for m in two]
        assert [len(h) for h in halves] == [3, 3] and sorted(sum(halves, [])) == sorted(key(one.plan(s)))


def test_each_task_once_per_cycle_and_alone_in_its_step(toys):
    """Isolation: a step holds one task, every cycle of seven steps holds each task once, and cycles differ in order."""
    m = mixture(toys)
    drawn = [{tasks for tasks, *_ in m.plan(s)} for s in range(70)]
    assert all(len(d) == 1 for d in drawn)
    cycles = [tuple(next(iter(d))[0] for d in drawn[c:c + 7]) for c in range(0, 70, 7)]
    assert all(sorted(c) == sorted(TASKS) for c in cycles) and len(set(cycles)) > 5


def test_without_isolation_a_step_mixes_tasks(toys):
    """--no-isolation: tasks are drawn per sample, evenly, and the micro-batches hold one task each."""
    m = mixture(toys, isolation=False, batch=14)
    counts = Counter(tasks[0] for s in range(50) for tasks, *_ in m.plan(s))
    assert all(abs(n - 100) < 40 for n in counts.values()) and len(counts) == 7
    assert len({b["tasks"] for b in m[0]["batches"]}) > 1 and all(len(b["tasks"]) == 1 for b in m[0]["batches"])


def test_mixture_weights_survive_filtering():
    """Depth is drawn 0.9 / 0.1 with any set of tasks; dropping one dataset's labels leaves the others' proportions (0.9 : 0.3 = 0.75 : 0.25)."""
    readers = [Made("a", mix={"depth": 0.9}), Made("b", mix={"depth": 0.1}), Made("c", mix={"depth": 0.3})]

    def shares(names, tasks=("depth",), drop=None):
        m = mixture([r for r in readers if r.name in names], tasks, batch=100, drop=drop)
        drawn = Counter(reader.name for s in range(30) for tasks, reader, *_ in m.plan(s) if tasks == ("depth",))
        return [drawn[n] / sum(drawn.values()) for n in names]
    assert shares("ab") == pytest.approx([0.9, 0.1], abs=0.02)
    assert shares("ab", ("normal", "depth", "optical_flow")) == pytest.approx([0.9, 0.1], abs=0.03)
    assert shares("abc", drop={"b": {"depth"}}) == pytest.approx([0.75, 0, 0.25], abs=0.02)


def test_joint_steps_take_the_labels_an_image_has():
    """N-to-N: every label of the drawn sample that was neither dropped nor is missing, and never one that belongs to another crop."""
    full = Made("full", ("normal", "depth", "optical_flow"), train_crop={"optical_flow": (8, 16)})
    part = Made("part", ("normal", "depth"), labelled={"depth": [0, 1]})
    m = mixture([full, part], ("normal", "depth", "optical_flow"), joint=True, drop={"full": {"depth"}})
    seen = {(reader.name, index in (0, 1), tasks) for s in range(60) for tasks, reader, index, *_ in m.plan(s)}
    assert seen == {("full", True, ("normal",)), ("full", False, ("normal",)), ("full", True, ("optical_flow",)), ("full", False, ("optical_flow",)),
                    ("part", True, ("normal", "depth")), ("part", False, ("normal",))}
    for s in range(6):
        m[s]        # loads without asking for a label that is not there


def test_no_labels_left_is_refused(toys):
    """A task whose labels are all dropped is named."""
    with pytest.raises(ValueError, match="no training labels for shading"):
        mixture(toys, drop={"rooms": {"shading"}})


@pytest.mark.parametrize("text", ["streets", "streets:deph", "town:depth", ":", "streets:depth,rooms"])
def test_drop_names_what_it_cannot_read(text):
    """--drop with an unknown dataset or task says which part is wrong; a right one is grouped by dataset."""
    with pytest.raises(ValueError, match="--drop"):
        parse_drop(text, ["rooms", "streets"])
    assert parse_drop("streets:depth,streets:normal,rooms:albedo", ["rooms", "streets"]) == {"streets": {"depth", "normal"}, "rooms": {"albedo"}}


# ---- transforms ----

def mirrored(label, task, axis):
    """A native label (H,W,C) as seen in the mirrored scene: x (or y) of directions and motions changes its sign."""
    label = label[:, ::-1] if axis == 1 else label[::-1]
    return label * np.float32([-1 if (c == 0) == (axis == 1) and c < 2 else 1 for c in range(label.shape[2])]) \
        if task in ("normal", "optical_flow", "scene_flow") else label


@pytest.mark.parametrize("axis", [1, 0], ids=["horizontal", "vertical"])
def test_flips_are_those_of_the_mirrored_scene(toys, axis):
    """Flipping the code equals encoding the mirrored native label, for every label of the toy worlds; frames and masks are mirrored with it."""
    for reader in toys:
        sample, plain = reader.load(1, reader.tasks, with_next=True), prepare(reader, 1, reader.tasks, TASKS)
        got = prepare(reader, 1, reader.tasks, TASKS, flips=(axis == 1, axis == 0))
        for t in reader.tasks:
            label = torch.from_numpy(mirrored(sample["labels"][t].astype(np.float32), t, axis).copy()).permute(2, 0, 1)
            valid = torch.from_numpy(np.flip(sample["valid"][t], axis).copy())[None]
            assert torch.equal(got["valid"][t], valid)
            assert torch.equal(got["labels"][t] * valid, TASKS[t].encode(label[None], valid[None])[0] * valid), (reader.name, t)
            flip = lambda x: x.flip(-1 if axis == 1 else -2) * torch.tensor(TASKS[t].hflip if axis == 1 else TASKS[t].vflip).view(3, 1, 1)
            assert torch.equal(flip(flip(plain["labels"][t])), plain["labels"][t])
        assert all(torch.equal(f.flip(-1 if axis == 1 else -2), p) for f, p in zip(got["frames"], plain["frames"]))


def test_vertical_flips_only_where_the_dataset_allows(toys):
    """The plan flips horizontally half of the time, vertically only readers with `vflip`."""
    flips = {v: np.array([f for s in range(100) for _, _, _, f, _ in mixture([Made(vflip=v)], ("depth",)).plan(s)]).mean(0) for v in (False, True)}
    assert flips[False][1] == 0 and abs(np.array([flips[False][0], *flips[True]]) - 0.5).max() < 0.1


def test_jitter_is_the_same_for_both_frames():
    """A frame comes out as it would alone with the same draws; strength 0 changes nothing but rounding; strength 0.3 changes the picture."""
    a, b = (np.random.default_rng(s).integers(0, 256, (8, 12, 3), np.uint8) for s in (0, 1))
    both, alone = jitter([a, b], (0.3, 0.3, 0.3, 0.159), np.random.default_rng(5)), jitter([b], (0.3, 0.3, 0.3, 0.159), np.random.default_rng(5))
    assert np.array_equal(both[1], alone[0]) and np.abs(both[0].astype(int) - a).mean() > 5
    assert np.abs(jitter([a], (0, 0, 0, 0), np.random.default_rng(5))[0].astype(int) - a).max() <= 8     # 8-bit HSV and back


def test_jitter_and_crop_belong_to_one_task():
    """A task's own crop and jitter act when it is trained alone and drawn with a generator; otherwise the whole, unchanged image is resized."""
    reader = Made(n=1, native=(32, 48), train_crop={"optical_flow": (16, 24)}, jitter={"optical_flow": (0.4, 0.4, 0.2, 0.127)})
    rng = lambda s: np.random.default_rng(s)
    image = data.tensor_image(reader.load(0, ())["image"])
    frame = lambda tasks, rng: prepare(reader, 0, tasks, TASKS, rng=rng)["frames"][0]
    plain = torch.nn.functional.interpolate(image[None], size=SIZE, mode="nearest-exact")[0]
    assert torch.equal(frame(("depth",), rng(0)), plain) and torch.equal(frame(("depth", "optical_flow"), rng(0)), plain)
    assert torch.equal(frame(("optical_flow",), None), image[:, 8:24, 12:36])       # the centre: what the latent cache holds
    assert not torch.equal(frame(("optical_flow",), rng(0)), frame(("optical_flow",), rng(1)))
    reader.jitter = {}
    windows = image.unfold(1, 16, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    got = prepare(reader, 0, ("optical_flow",), TASKS, rng=rng(3))      # somewhere in the image, without jitter
    assert (windows == got["frames"][0]).flatten(1).all(1).any()


def test_values_are_never_rescaled_by_resizing():
    """Codes are normalised at native resolution; resizing picks pixels, so that every resized value occurs in the native code."""
    reader = Made(n=1)
    sample, got = reader.load(0, reader.tasks), prepare(reader, 0, reader.tasks, TASKS)
    for t in reader.tasks:
        label, valid = data.label_tensors(sample, t)
        assert got["labels"][t].shape == (3, *SIZE) and torch.isin(got["labels"][t], TASKS[t].encode(label[None], valid[None])).all()


@pytest.mark.parametrize("h,w,f", [(16, 24, 2), (17, 25, 4), (187, 621, 8), (23, 15, 8)])
def test_whole_cells_equals_a_naive_loop(h, w, f):
    """A cell is valid only if all its pixels are; rows and columns that fill no cell are left out (187x621 -> 23x77)."""
    valid = torch.rand(2, 1, h, w, generator=torch.Generator().manual_seed(0)) < 0.98
    naive = torch.tensor([[[[valid[b, 0, y * f:y * f + f, x * f:x * f + f].all() for x in range(w // f)] for y in range(h // f)]] for b in range(2)])
    assert torch.equal(whole_cells(valid, f), naive) and naive.any() and not naive.all()


def test_masks_fit_the_latents_of_odd_sizes():
    """A VAE of factor 8 gives an image of 27x45 as many latent cells as the mask has."""
    vae = toybase.new_vae((8, 8, 8, 8))
    assert vae.encode(torch.zeros(1, 3, 27, 45)).latent_dist.mean.shape[2:] == whole_cells(torch.ones(1, 1, 27, 45, dtype=torch.bool), 8).shape[2:]


# ---- the latent cache ----

def cached(folder, readers, model, palette="cityscapes", **options):
    cache = LatentCache(folder, readers, fingerprint(model.vae.state_dict()), palette)
    cache.create(readers, model)
    return cache, cache.build(readers, model, TASKS, 0, batch=2, **options)


def test_cache_equals_encoding_on_the_fly(tmp_path, toys, model):
    """Frames, labels and masks of all samples, tasks and flips, up to float16; a task with its own crop has frames of its own."""
    readers = [*toys, Made(n=2, train_crop={"optical_flow": (8, 16)})]
    cache, skipped = cached(tmp_path, readers, model)
    assert skipped == []
    for reader in readers:
        for t in reader.tasks:
            for index in list(reader.indices(t))[:2]:
                for flip in (False, True):
                    got, item = cache.get(reader, index, (t,), flip), prepare(reader, index, (t,), TASKS, (flip, False))
                    with torch.no_grad():
                        z = model.encode(torch.stack([*item["frames"], item["labels"][t]]))
                    assert torch.allclose(torch.stack([*got["frames"], got["labels"][t]]), z, rtol=2e-3, atol=1e-4), (reader.name, t)
                    assert torch.equal(got["valid"][t], whole_cells(item["valid"][t][None], model.factor)[0])


def test_cache_gives_the_same_plan(tmp_path, toys, model):
    """With and without a cache a step holds the same samples and flips, and the cached batches are the encoded ones."""
    cache, _ = cached(tmp_path, toys, model)
    for s in range(3):
        plain, latent = mixture(toys)[s]["batches"], mixture(toys, cache=cache)[s]["batches"]
        for a, b in zip(plain, latent, strict=True):
            assert a["keys"] == b["keys"]
            with torch.no_grad():
                assert torch.allclose(model.encode(a["frames"][1]), b["frames"][1], rtol=2e-3, atol=1e-4)


def test_training_from_the_cache_reads_no_image_and_runs_no_vae(tmp_path, toys, model, monkeypatch):
    """Once built, neither reader nor encoder is called again, nor by a second build."""
    cached(tmp_path, toys, model)

    def never(*_, **__):
        raise AssertionError("called although everything is cached")
    monkeypatch.setattr(type(toys[0]), "load", never)
    monkeypatch.setattr(StableMTL, "encode", never)
    cache, skipped = cached(tmp_path, toys, model)
    assert len(list(loader(mixture(toys, cache=cache), 0, 8, 0))) == 8 and skipped == []


def test_cache_of_something_else_is_refused(tmp_path, toys, model, tiny_base):
    """Another palette, image size, number of samples or VAE: a sentence that says which, and the folder stays as it was."""
    cached(tmp_path, toys, model)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = from_base(str(tiny_base), ("depth",))
    other.vae.quant_conv.bias.data += 0.1
    larger, more = train_readers(size=(32, 24), scenes=3), train_readers(size=SIZE, scenes=4)
    for what, readers, m, palette in (("palette cityscapes, now corners", toys, model, "corners"),
                                      (r"size of rooms \[16, 24\], now \[32, 24\]", larger, model, "cityscapes"),
                                      ("samples of things 3, now 4", more, model, "cityscapes"),
                                      ("vae ", toys, other, "cityscapes")):
        with pytest.raises(ValueError, match=f"made for something else .*{what}.*: name another folder or delete"):
            cached(tmp_path, readers, m, palette)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_cache_is_shared_by_runs_of_different_tasks(tmp_path, toys, model):
    """A run that needs one dataset, then one that needs all, then the first again use one folder, and nothing is encoded twice."""
    first, _ = cached(tmp_path, toys[:1], model)
    before = first.array(toys[0], "frame0").copy()
    cached(tmp_path, toys, model)
    again, _ = cached(tmp_path, toys[:1], model)
    assert set(again.about["datasets"]) == {r.name for r in toys} and np.array_equal(before, again.array(toys[0], "frame0"))
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
    monkeypatch.setattr(Made, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "twice", [reader], model)
    monkeypatch.undo()
    reader.loads.clear()
    cached(tmp_path / "twice", [reader], model)
    assert reader.loads == [4, 5, 6, 7]         # each of them once, for both flips
    for path in (tmp_path / "whole").rglob("*.npy"):
        assert path.read_bytes() == (tmp_path / "twice" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_unreadable_samples(tmp_path, model):
    """A bad file stops with its dataset, number and the reader's sentence, from a worker process too; --skip-bad counts it and trains on."""
    bad = Made("set", ("depth",), broken=1)
    for call in (lambda: list(loader(mixture([bad], ("depth",)), 0, 4, 0)), lambda: list(loader(mixture([bad], ("depth",)), 0, 4, 1)),
                 lambda: cached(tmp_path / "a", [bad], model)):
        with pytest.raises(ValueError, match=r"set sample 1: set/1.png is truncated: copy it again \(--skip-bad") as error:
            call()
        assert "\n" not in str(error.value)
    steps = list(loader(mixture([bad], ("depth",), skip_bad=True), 0, 4, 0))
    assert {n for s in steps for n in s["skipped"]} == {"set:1"} and all("set:1" not in b["keys"] for s in steps for b in s["batches"])


def test_skipped_samples_of_the_cache(tmp_path, model):
    """--skip-bad: a bad sample is counted by every build, has no valid cell, and is cached once it can be read."""
    bad = Made("set", ("depth",), broken=1)
    for _ in range(2):
        cache, skipped = cached(tmp_path, [bad], model, skip_bad=True)
        assert skipped == ["set:1"] and not cache.get(bad, 1, ("depth",), False)["valid"]["depth"].any()
    bad.broken = None
    bad.loads.clear()
    cache, skipped = cached(tmp_path, [bad], model)
    assert skipped == [] and set(bad.loads) == {1} and cache.get(bad, 1, ("depth",), False)["valid"]["depth"].any()


def test_cache_that_does_not_fit_on_the_disk(tmp_path, toys, model, monkeypatch):
    """Too little room is said before anything is encoded; what is announced is what is written."""
    with monkeypatch.context() as m:
        m.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(OSError, match="needs 0.0 GiB.*--cache none"):
            cached(tmp_path, toys, model)
        assert not list(tmp_path.iterdir())
    asked = []
    monkeypatch.setattr(cache.np, "prod", lambda shape: asked.append(math.prod(shape)) or asked[-1])
    cached(tmp_path, toys, model)
    arrays = [np.load(path, mmap_mode="r") for path in tmp_path.rglob("*.npy")]
    assert sorted(asked) == sorted(a.size for a in arrays)


def test_ranks_share_the_building(tmp_path, toys, model):
    """Two ranks that each build their share leave what one leaves; the second finds the arrays that the first made."""
    cached(tmp_path / "one", toys, model)
    store = LatentCache(tmp_path / "two", toys, fingerprint(model.vae.state_dict()), "cityscapes")
    store.create(toys, model)
    for rank in (1, 0):
        store.build(toys, model, TASKS, rank=rank, world=2)
        assert np.load(tmp_path / "two" / "rooms" / "done.npy").all() == (rank == 0)
    for path in (tmp_path / "one").rglob("*.npy"):
        a, b = (np.load(folder / path.relative_to(tmp_path / "one")) for folder in (tmp_path / "one", tmp_path / "two"))
        assert np.array_equal(a, b) or np.allclose(a, b, atol=2e-3), path


@pytest.mark.parametrize("harm", ["missing", "cut short"])
def test_a_damaged_array_is_named(tmp_path, toys, model, harm):
    """A cache that lost an array, or a part of one: file and remedy, which is not --skip-bad but to build it again."""
    cached(tmp_path, toys, model)
    path = tmp_path / "streets" / "depth.npy"
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8])
    store = LatentCache(tmp_path, toys, fingerprint(model.vae.state_dict()), "cityscapes")
    with pytest.raises(ValueError, match=r"streets/depth.npy of the latent cache is missing or damaged .*: delete .*streets"):
        store.build(toys, model, TASKS)


# ---- the cache of auxiliary streams ----

def test_streams_are_computed_once(tmp_path, toys, monkeypatch):
    """What is read back equals what was computed, in float16, for both flips; another stage 1 has a folder of its own,
    a damaged record is computed again, and samples beyond the limit are not kept."""
    m = tiny.model(multi=True)
    z_i, z_j = tiny.latents(3, tuple(s // m.factor for s in SIZE))
    keys = [("rooms", 0, False), ("rooms", 0, True), ("streets", 2, False)]
    store = StreamCache(tmp_path, toys, m, 1e9)
    first, expected = store.fetch(keys, z_i, z_j), m.streams(z_i, z_j, m.tasks)
    assert first.keys() == expected.keys()
    for block in expected:
        for t in m.tasks:
            assert torch.allclose(first[block][t], expected[block][t], rtol=2e-3, atol=2e-3)

    calls, streams = [], StableMTL.streams
    monkeypatch.setattr(StableMTL, "streams", lambda *args: calls.append(len(args[1])) or streams(*args))
    again = StreamCache(tmp_path, toys, m, 1e9)
    calls.clear()       # it looks once at the shapes
    second = again.fetch(keys, z_i, z_j)
    assert not calls and all(torch.equal(first[b][t], second[b][t]) for b in first for t in m.tasks)

    (path,) = tmp_path.glob("streams-*/streets.f16")
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)
    third = again.fetch(keys, z_i, z_j)
    assert calls == [1] and all(torch.equal(first[b][t], third[b][t]) for b in first for t in m.tasks)

    none = StreamCache(tmp_path / "none", toys, m, 0)
    none.fetch(keys, z_i, z_j)
    assert not list((tmp_path / "none").rglob("*.f16"))
    with torch.no_grad():
        m.unet.conv_in.bias += 1
    StreamCache(tmp_path, toys, m, 1e9).fetch(keys, z_i, z_j)
    assert len(list(tmp_path.glob("streams-*"))) == 2


def test_known_streams_change_no_loss(toys):
    """The multi stream with streams handed in predicts what it predicts from its own."""
    m = tiny.model(multi=True)
    z_i, z_j = tiny.latents()
    with torch.no_grad():
        own, given = m(z_i, z_j, ["depth"]), m(z_i, z_j, ["depth"], streams=m.streams(z_i, z_j, m.tasks))
    assert torch.allclose(own["depth"], given["depth"], atol=1e-5)
