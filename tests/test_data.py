"""data.py: what a step trains on is fixed by (seed, step) alone, and transforms do what they say."""
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import SIZE, Made, mixture

import data
from data import jitter, loader, mirror, parse_drop, prepare, train_readers, whole_cells
from evaluate import PAPER_TASKS
from readers.toyworld import ALL, ToyWorld
from tasks import TASKS
from toy import make as toybase

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def toys():
    return train_readers(size=SIZE, scenes=3)


def same(a, b):
    """Whether two nested structures of tensors are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def key(plan):
    return [(tasks, reader.name, index, flips, seed) for tasks, reader, index, flips, seed in plan]


# ---- the mixture ----

def test_plan_depends_on_seed_and_step_alone(toys):
    """The same (seed, step) gives the same samples whatever came before and whatever `micro` is; another seed gives
    others."""
    a, b, c = mixture(toys), mixture(toys, micro=1), mixture(toys, seed=1)
    forwards = [key(a.plan(s)) for s in range(20)]
    backwards = [key(b.plan(s)) for s in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [key(c.plan(s)) for s in range(20)]


def test_micro_batches_partition_the_step(toys):
    """Micro-batches are consecutive pieces of the step: at most `micro` samples of one task and one size, together the
    same tensors."""
    whole, parts = (mixture(toys, batch=7, micro=micro)[3]["batches"] for micro in (7, 2))
    (b,) = whole        # the toy worlds have one size
    assert all(len(p["keys"]) <= 2 for p in parts)
    assert len(b["keys"]) == 7
    assert sum((p["keys"] for p in parts), ()) == b["keys"]
    assert torch.equal(torch.cat([p["frames"][1] for p in parts]), b["frames"][1])
    assert all(torch.equal(torch.cat([p["labels"][t] for p in parts]), b["labels"][t]) for t in b["tasks"])


def test_one_size_per_forward_pass():
    """Datasets share a micro-batch where their sizes agree, and only there."""
    readers, together = [Made(name, ("depth",)) for name in "abc"], []
    readers[2].size = (24, 16)
    for step in range(8):
        batches = mixture(readers, ("depth",), batch=8, micro=8)[step]["batches"]
        seen = {tuple(b["frames"][0].shape[-2:]): {name for name, *_ in b["keys"]} for b in batches}
        assert len(seen) == len(batches)
        assert seen.get((24, 16), {"c"}) == {"c"}
        assert seen.get(SIZE, set()) <= {"a", "b"}
        together.append(seen.get(SIZE))
    assert {"a", "b"} in together


def test_workers_change_nothing():
    """Two loader processes deliver, in order, the bits that none delivers, and draw nothing from the global random
    state."""
    m, state = mixture(train_readers(size=(16, 26), scenes=2)), torch.get_rng_state()   # of no other test: not rendered
    delivered = list(loader(m, 2, 6, 2))
    assert same(list(loader(m, 2, 6, 0)), delivered)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_partition_the_batch(toys):
    """Two ranks together see exactly the samples of one, and never the same one twice."""
    one, two = mixture(toys, batch=6), [mixture(toys, batch=6, rank=r, world_size=2) for r in (0, 1)]
    for s in range(10):
        first, second = (key(m.plan(s)) for m in two)
        assert len(first) == len(second) == 3
        assert sorted(first + second) == sorted(key(one.plan(s)))


def test_each_task_once_per_cycle_and_alone_in_its_step(toys):
    """Isolation: a step holds one task, every cycle of as many steps as tasks holds each once, and cycles differ in
    order."""
    m, n = mixture(toys), len(ALL)
    drawn = [{tasks for tasks, *_ in m.plan(s)} for s in range(10 * n)]
    assert all(len(d) == 1 for d in drawn)
    cycles = [tuple(next(iter(d))[0] for d in drawn[c:c + n]) for c in range(0, 10 * n, n)]
    assert all(sorted(c) == sorted(ALL) for c in cycles)
    assert len(set(cycles)) > 5


def test_without_isolation_a_step_mixes_tasks(toys):
    """--no-isolation: tasks are drawn per sample, evenly, and the micro-batches hold one task each."""
    m = mixture(toys, isolation=False, batch=2 * len(ALL))
    counts = Counter(tasks[0] for s in range(50) for tasks, *_ in m.plan(s))
    assert counts.keys() == set(ALL)
    assert all(abs(n - 100) < 40 for n in counts.values())
    batches = m[0]["batches"]
    assert len({b["tasks"] for b in batches}) > 1
    assert all(len(b["tasks"]) == 1 for b in batches)


def test_mixture_weights_survive_filtering():
    """Depth is drawn 0.9 / 0.1 with any set of tasks; dropping one dataset's labels leaves the others' proportions
    (0.9 : 0.3 = 0.75 : 0.25)."""
    readers = [Made("a", mix={"depth": 0.9}), Made("b", mix={"depth": 0.1}), Made("c", mix={"depth": 0.3})]

    def shares(names, tasks=("depth",), drop=None):
        m = mixture([r for r in readers if r.name in names], tasks, batch=100, drop=drop)
        drawn = Counter(reader.name for s in range(30) for tasks, reader, *_ in m.plan(s) if tasks == ("depth",))
        return [drawn[n] / sum(drawn.values()) for n in names]
    assert shares("ab") == pytest.approx([0.9, 0.1], abs=0.02)
    assert shares("ab", ("normal", "depth", "optical_flow")) == pytest.approx([0.9, 0.1], abs=0.03)
    assert shares("abc", drop={"b": {"depth"}}) == pytest.approx([0.75, 0, 0.25], abs=0.02)


def test_joint_steps_take_the_labels_an_image_has():
    """N-to-N: every label of the drawn sample that was neither dropped nor is missing, and never one that belongs to
    another crop."""
    full = Made("full", ("normal", "depth", "optical_flow"), train_crop={"optical_flow": (8, 16)})
    part = Made("part", ("normal", "depth"), labelled={"depth": [0, 1]})
    m = mixture([full, part], ("normal", "depth", "optical_flow"), joint=True, drop={"full": {"depth"}})
    seen = {(reader.name, index in (0, 1), tasks) for s in range(60) for tasks, reader, index, *_ in m.plan(s)}
    assert seen == {("full", True, ("normal",)), ("full", False, ("normal",)),
                    ("full", True, ("optical_flow",)), ("full", False, ("optical_flow",)),
                    ("part", True, ("normal", "depth")), ("part", False, ("normal",))}
    for s in range(6):
        m[s]        # loads without asking for a label that is not there


def test_no_labels_left_is_refused(toys):
    """A task whose labels are all dropped is named."""
    with pytest.raises(ValueError, match="no training labels for shading"):
        mixture(toys, drop={"rooms": {"shading"}})


@pytest.mark.parametrize("text", ["streets", "streets:deph", "town:depth", ":", "streets:depth,rooms"])
def test_drop_names_what_it_cannot_read(text):
    """--drop with an unknown dataset or task is refused by its name."""
    with pytest.raises(ValueError, match="--drop"):
        parse_drop(text, ["rooms", "streets"])


def test_drop_is_grouped_by_dataset():
    """--drop may name several tasks of a dataset, and several datasets."""
    dropped = parse_drop("streets:depth,streets:normal,rooms:albedo", ["rooms", "streets"])
    assert dropped == {"streets": {"depth", "normal"}, "rooms": {"albedo"}}


def test_unreadable_samples():
    """A bad file stops with its dataset, number and the reader's sentence, from a worker process too; --skip-bad counts
    it and trains on. That flag is named where a command has it alone."""
    bad, told = Made("set", ("depth",), broken=1), "set sample 1: set/1.png is truncated: copy it again"
    for workers, skip_bad, remedy in ((0, False, r" \(--skip-bad"), (1, False, r" \(--skip-bad"), (0, None, "$")):
        with pytest.raises(ValueError, match=told + remedy) as error:
            list(loader(mixture([bad], ("depth",), skip_bad=skip_bad), 0, 4, workers))
        assert "\n" not in str(error.value)
    steps = list(loader(mixture([bad], ("depth",), skip_bad=True), 0, 4, 0))
    assert {name for s in steps for name in s["skipped"]} == {"set:1"}
    assert all(index != 1 for s in steps for b in s["batches"] for _, index, _ in b["keys"])


# ---- transforms ----

def mirrored(label, task, axis):
    """A native label (H,W,C) as seen in the mirrored scene: x (axis 1) or y (axis 0) of directions and motions changes
    its sign."""
    label = np.flip(label, axis).astype(np.float32)
    if task in ("normal", "optical_flow", "scene_flow"):
        label[..., 1 - axis] *= -1
    elif task not in PAPER_TASKS:
        label *= (TASKS[task].vflip, TASKS[task].hflip)[axis][:label.shape[-1]]
    return label


@pytest.mark.parametrize("axis", [1, 0], ids=["horizontal", "vertical"])
def test_flips_are_those_of_the_mirrored_scene(toys, axis):
    """Flipping the code equals encoding the mirrored native label, for every label of the toy worlds; frames and masks
    are mirrored with it; flipping twice changes nothing."""
    dim = axis - 2      # of (C,H,W)
    for reader in toys:
        sample, plain = reader.load(1, reader.tasks, with_next=True), prepare(reader, 1, reader.tasks, TASKS)
        got = prepare(reader, 1, reader.tasks, TASKS, flips=(axis == 1, axis == 0))
        twice = mirror(mirror(plain, TASKS, dim), TASKS, dim)
        for t in reader.tasks:
            label = torch.from_numpy(mirrored(sample["labels"][t], t, axis)).permute(2, 0, 1)
            valid = torch.from_numpy(np.flip(sample["valid"][t], axis).copy())[None]
            assert torch.equal(got["valid"][t], valid)
            expected = TASKS[t].encode(label[None], valid[None])[0]
            assert torch.equal(got["labels"][t] * valid, expected * valid), (reader.name, t)
            assert torch.equal(twice["labels"][t], plain["labels"][t])
        assert all(torch.equal(f.flip(dim), p) for f, p in zip(got["frames"], plain["frames"], strict=True))


def test_vertical_flips_only_where_the_dataset_allows():
    """The plan flips horizontally half of the time, vertically only readers with `vflip`."""
    def frequencies(vflip):
        m = mixture([Made(vflip=vflip)], ("depth",))
        return np.array([flips for s in range(100) for _, _, _, flips, _ in m.plan(s)]).mean(0)
    assert frequencies(True) == pytest.approx([0.5, 0.5], abs=0.1)
    horizontal, vertical = frequencies(False)
    assert horizontal == pytest.approx(0.5, abs=0.1)
    assert vertical == 0


def test_jitter_is_the_same_for_both_frames():
    """A frame comes out as it would alone with the same draws; strength 0 changes nothing but rounding; strength 0.3
    changes the picture."""
    a, b = (np.random.default_rng(s).integers(0, 256, (8, 12, 3), np.uint8) for s in (0, 1))

    def jittered(images, *strength):
        return jitter(images, strength, np.random.default_rng(5))
    both, alone = jittered([a, b], 0.3, 0.3, 0.3, 0.159), jittered([b], 0.3, 0.3, 0.3, 0.159)
    assert np.array_equal(both[1], alone[0])
    assert np.abs(both[0].astype(int) - a).mean() > 5
    assert np.abs(jittered([a], 0, 0, 0, 0)[0].astype(int) - a).max() <= 8      # 8-bit HSV and back


@pytest.mark.parametrize("strength, draw, before, after", [
    ((0.5, 0, 0, 0), min, [(100, 60, 20)], [(50, 30, 10)]),
    ((0, 0.5, 0, 0), min, [(100,) * 3, (200,) * 3], [(125,) * 3, (175,) * 3]),      # about their mean, 150
    ((0, 0, 1, 0), min, [(200, 100, 100)], [(130,) * 3]),       # brightness 0.3 R + 0.59 G + 0.11 B
    ((0, 0, 0, 0.25), max, [(255, 0, 0)], [(128, 255, 0)]),     # a quarter of the colour circle on
    ((0, 0, 0, 0.25), min, [(255, 0, 0)], [(128, 0, 255)]),     # and back
    ((0.5, 0.5, 0, 0), max, [(100,) * 3, (200,) * 3], [(124,) * 3, (255,) * 3]),    # 150 and 255, about 203
    ((0.5, 0, 0.5, 0), max, [(200, 100, 100)], [(255, 134, 134)]),      # (255, 150, 150), away from a grey of 181
])
def test_jitter_by_hand(strength, draw, before, after):
    """Brightness first, then contrast and saturation, each cut to 0..255, then hue; where the least (min) or the most
    (max) of what may be drawn is drawn."""
    found = jitter([np.uint8([before])], strength, SimpleNamespace(uniform=draw))[0]
    assert np.abs(found[0].astype(int) - after).max() <= 5      # a step of 8-bit hue


def test_jitter_and_crop_belong_to_one_task():
    """A task's own crop and jitter act when it is trained alone and drawn with a generator; otherwise the whole,
    unchanged image is resized."""
    reader = Made(n=1, native=(32, 48), train_crop={"optical_flow": (16, 24)},
                  jitter={"optical_flow": (0.4, 0.4, 0.2, 0.127)})
    image = data.tensor_image(reader.load(0, ())["image"])
    plain = torch.nn.functional.interpolate(image[None], size=SIZE, mode="nearest-exact")[0]

    def frame(*tasks, seed=None):
        rng = None if seed is None else np.random.default_rng(seed)
        return prepare(reader, 0, tasks, TASKS, rng=rng)["frames"][0]
    assert torch.equal(frame("depth", seed=0), plain)
    assert torch.equal(frame("depth", "optical_flow", seed=0), plain)
    assert torch.equal(frame("optical_flow"), image[:, 8:24, 12:36])       # the centre: what the latent cache holds
    assert not torch.equal(frame("optical_flow", seed=0), frame("optical_flow", seed=1))
    reader.jitter = {}
    windows = image.unfold(1, 16, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    cropped = frame("optical_flow", seed=3)     # somewhere in the image, without jitter
    assert (windows == cropped).flatten(1).all(1).any()


@pytest.mark.parametrize(("independent", "chosen"), [(False, [0, 3, 6]), (True, [0, 1, 2])])
def test_a_few_samples_are_of_a_whole_dataset(independent, chosen):
    """The first are one clip where neighbours are frames of one video: trivial predictors and thresholds knew that
    alone. Of the toy worlds' scenes the first are as good as any."""
    reader = Made(n=10)
    reader.independent = independent
    for few in {"each": 3}, {"limit": 3}:
        found = data.test_batches(reader, ("depth",), 2, 0, **few)
        assert [number for group in found for *_, number, _ in group] == chosen
    assert ToyWorld("real", "test").independent


def test_values_are_never_rescaled_by_resizing():
    """Codes are normalised at native resolution; resizing picks pixels, so that every resized value occurs in the
    native code."""
    reader = Made(n=1)
    sample, got = reader.load(0, reader.tasks), prepare(reader, 0, reader.tasks, TASKS)
    for t in reader.tasks:
        label, valid = data.label_tensors(sample, t)
        assert got["labels"][t].shape == (3, *SIZE)
        assert torch.isin(got["labels"][t], TASKS[t].encode(label[None], valid[None])).all()


@pytest.mark.parametrize("h,w,f", [(16, 24, 2), (17, 25, 4), (187, 621, 8), (23, 15, 8)])
def test_whole_cells_equals_a_naive_loop(h, w, f):
    """A cell is valid only if all its pixels are; rows and columns that fill no cell are left out: 187x621 -> 23x77."""
    valid = torch.rand(2, 1, h, w, generator=torch.Generator().manual_seed(0)) < 0.98
    naive = torch.zeros(2, 1, h // f, w // f, dtype=torch.bool)
    for b, _, y, x in np.ndindex(*naive.shape):
        naive[b, 0, y, x] = valid[b, 0, y * f:y * f + f, x * f:x * f + f].all()
    assert torch.equal(whole_cells(valid, f), naive)
    assert naive.any() and not naive.all()


def test_masks_fit_the_latents_of_odd_sizes():
    """A VAE of factor 8 gives an image of 27x45 as many latent cells as the mask has."""
    latents = toybase.new_vae((8, 8, 8, 8)).encode(torch.zeros(1, 3, 27, 45)).latent_dist.mean
    assert latents.shape[2:] == whole_cells(torch.ones(1, 1, 27, 45, dtype=torch.bool), 8).shape[2:]
