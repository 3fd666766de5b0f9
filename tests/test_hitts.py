"""baselines/hitts.py and teacher.py: attention by naive loops, bins, who is given pseudo labels and who learns from
what."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from made import SIZE, Made, mixture
from runs import close
from test_trunk import batch, gradients

import baselines
from baselines.hitts import Bins, FineTokens, HiTTs, InterTask, cluster, spread
from baselines.teacher import Discovery, discoverable, relit, surest, with_true_labels
from baselines.trunk import MTL, WIDTH, task_errors
from data import Mixture, prepare, train_readers
from evaluate import PAPER_TASKS
from readers.toyworld import ALL
from tasks import TASKS
from training.losses import accumulate

CPU = torch.device("cpu")
THREE = "semantic", "normal", "depth"


@pytest.fixture(scope="module")
def model():
    """Shared: do not change it."""
    torch.manual_seed(0)
    return HiTTs(THREE)


# ---- tokens ----

def test_inter_task_attention_by_a_naive_loop():
    """Every task's token and feature is the sum of all, weighed by a softmax over scaled products of tokens; the same
    weights at every pixel. With A = identity nothing changes."""
    torch.manual_seed(0)
    layer, theta, features = InterTask(), torch.randn(3, WIDTH), torch.randn(2, 3, WIDTH, 4, 5)
    a = layer.affinity(theta)
    token, mixed = layer.mix(a, theta, features)
    for i in range(3):
        scores = torch.stack([layer.q(theta[i]) @ layer.k(theta[j]) / WIDTH ** 0.5 for j in range(3)])
        w = scores.exp() / scores.exp().sum()
        assert torch.allclose(token[i], sum(w[j] * theta[j] for j in range(3)), atol=1e-5)
        assert torch.allclose(mixed[:, i], sum(w[j] * features[:, j] for j in range(3)), atol=1e-5)
    same_theta, same_features = layer.mix(torch.eye(3), theta, features)
    assert torch.equal(same_theta, theta) and torch.equal(same_features, features)


def test_global_tokens_by_their_definition(model):
    """The query, then both attentions, one task and one image at a time; intra-task attention is a softmax over the
    halved feature's cells and the token."""
    pair = batch(THREE)["frames"]
    found, shared = model.global_tokens(*pair, THREE), model.trunk(*model.pair(*pair))
    a = model.inter.affinity(model.theta)
    for b in range(2):
        seen = model.query(shared)[b]
        queried = [(seen * theta.view(-1, 1, 1)).sum(0).sigmoid() * shared[b] for theta in model.theta]
        for i, t in enumerate(THREE):
            x = model.mixed[t](sum(a[i, j] * queried[j] for j in range(3))[None])
            theta, layer = a[i] @ model.theta, model.intra[t]
            small = layer.reduce(x)
            sequence = torch.cat([small[0].flatten(1).T, theta[None]])
            q, k, v = layer.qkv(sequence).chunk(3, 1)
            y = (q @ k.T * WIDTH ** -0.5).softmax(1) @ v
            cells = layer.feature(y[:-1]).T.view(1, WIDTH, *small.shape[-2:])
            up = F.interpolate(cells, x.shape[-2:], mode="bilinear")
            assert torch.allclose(found[t][0][b:b + 1], layer.after(x + up), atol=1e-4)
            assert torch.allclose(found[t][1][b], theta + layer.token(y[-1]), atol=1e-4)


@pytest.mark.parametrize("oe", [True, False])
def test_fine_tokens(oe):
    """G' = conv(G * softplus(phi F)), token by token. Without the orthogonal embedding all rows of phi are bit-equal,
    so that the scores cannot tell classes apart; with it they differ."""
    torch.manual_seed(0)
    layer, x, theta = FineTokens(5, oe), torch.randn(2, WIDTH, 3, 4), torch.randn(2, WIDTH)
    phi = layer.tokens(theta)
    alike = [torch.equal(phi[:, 0], phi[:, p]) for p in range(1, 5)]
    assert phi.shape == (2, 5, WIDTH) and not any(alike) if oe else all(alike)
    scores = torch.stack([(phi[:, p, :, None, None] * x).sum(1) for p in range(5)], 1)
    assert torch.allclose(layer(x, theta), layer.out(layer.logits(x) * F.softplus(scores)), atol=1e-4)


def test_affinities(model):
    """A row per task that sums to 1: what all its images are mixed by."""
    table = model.affinities()
    assert list(table) == [*THREE] and all(sum(row.values()) == pytest.approx(1) for row in table.values())
    with pytest.raises(ValueError, match="without attention between tasks"):
        HiTTs(THREE, inter=False).affinities()


def test_options_take_parts_away():
    """Without inter, intra or OE their parameters are gone, and predictions differ from the whole; all train."""
    whole = {n for n, _ in HiTTs(THREE).named_parameters()}
    for option, part in {"inter": "inter.", "intra": "intra.", "oe": "embedding"}.items():
        less = HiTTs(THREE, **{option: False})
        gone = whole - {n for n, _ in less.named_parameters()}
        assert gone and all(part in n for n in gone)
        assert gradients(less, [batch(THREE)])[1].keys() == whole - gone


# ---- bins ----

@pytest.mark.parametrize("task", TASKS)
def test_a_value_is_within_half_a_bin_of_its_centre(task):
    """Through the nearest centre and back: at most half a bin off; classes and zero motion are exact; of directions
    the nearest centre it is."""
    bins, codec = Bins(TASKS[task]), TASKS[task]
    code = batch((task,))["labels"][task]
    back = bins.quantised(code)
    if codec.categorical:
        assert torch.equal(codec.decode(back), codec.decode(code))
    elif bins.vectors:
        cos = torch.einsum("bchw,kc->bkhw", code, bins.centres).amax(1)
        assert torch.allclose((back * code).sum(1), cos, atol=1e-5)
    else:
        width = 2 / (len(bins.centres) - 1)
        assert (back - code).abs().max() <= width / 2 + 1e-6
        assert codec.frames == 1 or bins.quantised(torch.zeros(1, 3, 2, 2)).abs().max() == 0


@pytest.mark.parametrize("task", TASKS)
def test_confident_logits_are_the_class(task):
    """Logits that are sure of the right class have no loss but what the bins cost, and become its centre's code, hard
    or soft."""
    bins, b = Bins(TASKS[task]), batch((task,))
    code, valid = b["labels"][task], b["valid"][task]
    x = 50.0 * F.one_hot(bins.nearest(code), len(bins.centres)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    for hard in (True, False):
        assert torch.allclose(bins.code(x, hard) * valid, bins.quantised(code) * valid, atol=1e-5)
    assert bins.errors(x, bins.quantised(code))[valid].max() < 1e-4


@pytest.mark.parametrize("task, channels, count", [
    ("semantic", 1, 8), ("normal", 1, 20), ("depth", 1, 30), ("optical_flow", 2, 21), ("scene_flow", 3, 21),
    ("shading", 1, 20), ("albedo", 3, 20)])
def test_a_tenth_of_the_regression_loss(task, channels, count):
    """HiTTs, appendix A.3: 20 directions, 30 bins of depth; cross-entropy, and 0.1 of the usual loss of regressions.
    Logits that know nothing cost log K, and 0.1 of the distance from the middle to a label at the end of its range;
    those of directions here the other way than the label, an angle of cosine -1."""
    bins, codec = Bins(TASKS[task]), TASKS[task]
    assert bins.size == channels * count
    x, code = torch.zeros(1, bins.size, 1, 1), torch.ones(1, 3, 1, 1)
    wanted = math.log(count) + (0 if codec.categorical else 0.1)
    if bins.vectors:
        x[0, 3], code = 40, -bins.centres[3].view(1, 3, 1, 1)
        wanted = 40 + 0.1 * 2       # the label's class has the logit 0
    assert bins.errors(x, code).item() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_directions_are_of_unit_length(scale):
    """What the centres come to, with weights near uniform nearly nothing, has unit length as a code, within the last
    bit what it was when it was brought to it twice; the loss leaves its length out."""
    torch.manual_seed(0)
    bins, codec = Bins(TASKS["normal"]), TASKS["normal"]
    x, label = scale * torch.randn(2, bins.size, 5, 7), F.normalize(torch.randn(2, 3, 5, 7), dim=1)
    mean = bins.value(bins.split(x).softmax(2))
    unit = F.normalize(mean, dim=1, eps=1e-6)
    assert (mean.norm(dim=1) - 1).abs().max() > 1e-3
    assert (bins.code(x).norm(dim=1) - 1).abs().max() < 1e-6
    assert (bins.code(x) - F.normalize(unit, dim=1, eps=1e-6)).abs().max() <= 2 ** -23
    assert torch.allclose(task_errors(codec, mean, label), task_errors(codec, unit, label), atol=1e-6)


def test_a_guess_is_as_sure_as_its_least_sure_channel():
    """The likeliest class's centre, with its softmax probability; of three channels the lowest."""
    torch.manual_seed(0)
    model, pair = HiTTs(["albedo"]).eval(), batch(THREE)["frames"]
    code, sure = model.guess(*pair, ["albedo"])["albedo"]
    logits = model.maps(*pair, ["albedo"])["albedo"].view(2, 3, 20, 8, 12)
    assert torch.equal(code, model.bins["albedo"].centres[logits.argmax(2)])
    assert torch.allclose(sure, torch.stack([logits[:, c].softmax(1).amax(1) for c in range(3)], 1).amin(1)[:, None])


def test_centres_of_directions():
    """Evenly spread at first; k-means finds the clusters there are, as unit vectors."""
    assert torch.allclose(spread(20).norm(dim=1), torch.ones(20)) and spread(20).mean(0).norm() < 0.05
    torch.manual_seed(0)
    true = F.normalize(torch.randn(6, 3), dim=1)
    cloud = F.normalize(true.repeat_interleave(50, 0) + 0.01 * torch.randn(300, 3), dim=1)
    found = cluster(cloud, 6)
    assert torch.allclose(found.norm(dim=1), torch.ones(6), atol=1e-5)
    assert (true @ found.T).amax(1).min() > 0.999


def test_centres_come_from_training_labels():
    """`fit` looks at labels of its mixture alone, whatever is drawn, and keeps the spread ones where there are none."""
    readers = [Made("a", ("normal",), n=3), Made("b", ("depth",))]
    first, again = HiTTs(("normal", "depth")), HiTTs(("normal", "depth"))
    for model, seed in ((first, 0), (again, 7)):
        model.fit(mixture(readers, ("normal", "depth"), seed=seed))
    assert torch.equal(first.bins["normal"].centres, again.bins["normal"].centres)
    many = Made("a", ("normal",), n=40)
    HiTTs(("normal",)).fit(mixture([many], ("normal",)))
    assert many.loads == [k * 40 // 32 for k in range(32)], "of all the dataset, not its first video"
    labels = [prepare(readers[0], i, ("normal",), TASKS) for i in range(3)]
    vectors = torch.cat([x["labels"]["normal"][:, x["valid"]["normal"][0]].T for x in labels])
    centres, vectors = first.bins["normal"].centres, F.normalize(vectors, dim=1)
    assert (vectors @ centres.T).amax(1).mean() > (vectors @ spread(20).T).amax(1).mean()


def test_centres_without_a_readable_label(monkeypatch):
    """--skip-bad and not one image that can be read: the spread ones stay."""
    def broken(*args, **options):
        raise OSError("cut short")
    monkeypatch.setattr("baselines.trunk.prepare", broken)
    model = HiTTs(("normal",))
    model.fit(mixture([Made("a", ("normal",))], ("normal",), skip_bad=True))
    assert torch.equal(model.bins["normal"].centres, HiTTs(("normal",)).bins["normal"].centres)


# ---- discovery ----

READERS = Made("a", ("normal", "semantic")), Made("b", ("depth", "normal"), labelled={"normal": [1, 2]})


def discovery(teacher, **options):
    return Discovery(mixture(READERS, THREE, isolation=False, joint=True), THREE, teacher, **options)


def taught(teacher, **options):
    """A new HiTTs that learns from it."""
    torch.manual_seed(1)
    student = HiTTs(THREE).train()
    student.learn_from(discovery(teacher, **options))
    return student


def micro_batch(d, step=0):
    """The first of a step that lacks a discoverable label."""
    return next(b for s in range(step, 9) for b in d.mixture[s]["batches"] if set(b["tasks"]) != set(THREE[1:]))


def test_what_can_be_discovered():
    """Tasks of one frame that are no classes."""
    assert set(discoverable(PAPER_TASKS)) == {"normal", "depth", "shading", "albedo"}


@pytest.mark.parametrize("system", [HiTTs, MTL])
def test_only_images_without_a_label_get_a_pseudo_label(system):
    """Where the teacher is sure enough, in about half of such pixels; a labelled task's never, sample by sample."""
    torch.manual_seed(0)
    d, pixels, sure = discovery(system(THREE).eval()), 0, 0
    assert d.least.keys() == {"normal", "depth"}
    for step in range(6):
        for b in d.mixture[step]["batches"]:
            for t, (code, mask) in d.ready(b)["pseudo"].items():
                for key, m in zip(b["keys"], mask, strict=True):
                    labelled = key[1] in d.mixture.usable.get((key[0], t), ())
                    assert not (labelled and m.any())
                    pixels, sure = pixels + (not labelled) * m.numel(), sure + m.sum().item()
                assert code.shape == (len(b["keys"]), 3, *SIZE) and code.abs().max() <= 1
    assert 0.3 < sure / pixels < 0.7


def test_the_surest_half_of_16_images():
    """The threshold is the median of how sure the teacher is of pixels without a label, in 16 images of each dataset,
    from its first to its last video."""
    torch.manual_seed(0)
    readers = Made("a", ("semantic",), n=18), Made("b", ("depth",), n=20)
    mixed, teacher = mixture(readers, ("semantic", "depth"), isolation=False, joint=True), MTL(("semantic", "depth"))
    d = Discovery(mixed, teacher.tasks, teacher.eval())
    seen = [sorted(reader.loads) for reader in readers]
    assert seen == [[k * reader.n // 16 for k in range(16)] for reader in readers]
    frames = [torch.stack([prepare(readers[0], i, (), {})["frames"][k] for i in seen[0]]) for k in (0, 1)]
    sure = teacher.guess(*frames, ["depth"])["depth"][1]
    assert (sure > d.least["depth"]).float().mean().item() == pytest.approx(0.5, abs=0.002)


def test_saturated_outputs_keep_the_surest():
    """Nothing was kept where half of the pixels or more are as sure as can be: now these are, and without ties all is
    as before."""
    torch.manual_seed(0)
    for n in (1, 2, 7, 100):
        x = torch.rand(n)
        assert surest(x, 0.5) == x.sort().values[int(0.5 * n)].item()
    saturated = torch.cat([torch.rand(30), torch.ones(70)])
    for x, kept in ((saturated, 70), (torch.ones(9), 9), (-F.relu(torch.linspace(-1, 0.9, 20)), 11)):
        assert (x > surest(x, 0.5)).sum() == kept

    class Certain(MTL):
        def guess(self, *args):
            return {t: (code, torch.zeros_like(sure)) for t, (code, sure) in super().guess(*args).items()}
    d = discovery(Certain(THREE).eval())
    assert all(mask.any() for _, mask in d.ready(micro_batch(d))["pseudo"].values())


def test_what_is_discovered_does_not_depend_on_what_is_drawn(model):
    """The teacher sees frames as they are; the student sees them relit, another way in each step, alike for a pair, and
    whatever they are batched with."""
    d = discovery(model.eval(), features=True)
    b = micro_batch(d)
    ready = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ready.append(d.ready(b))
    for t, (code, mask) in ready[0]["pseudo"].items():
        assert torch.equal(code, ready[1]["pseudo"][t][0]) and torch.equal(mask, ready[1]["pseudo"][t][1])
    assert all(torch.equal(x, ready[1]["features"][t]) for t, x in ready[0]["features"].items())
    assert not torch.equal(ready[0]["frames"][0], ready[1]["frames"][0])
    torch.manual_seed(1)
    frames = [torch.rand(2, 3, 4, 5) * 2 - 1] * 2
    light = relit(frames, ["x", "y"])
    assert torch.equal(*light) and light[0].abs().max() <= 1
    assert torch.equal(relit([f[1:] for f in frames], ["y"])[0], light[0][1:])


@pytest.mark.parametrize("drawn, bright", [(9.0, [0.351, 0.689]), (-9.0, [0.231, 0.329])])
def test_other_light_by_hand(monkeypatch, drawn, bright):
    """Contrast about the image's mean and then brightness change by up to 0.3, with what is drawn cut to [-1,1]: 0.3
    and 0.5 are at most 0.27 and 0.53, times 1.3."""
    monkeypatch.setattr("baselines.teacher.noise", lambda facts, what, shape, device: torch.full((1, *shape), drawn))
    frame = (torch.tensor([0.3, 0.5]) * 2 - 1).expand(1, 3, 1, 2)
    (light,) = relit([frame], ["x"])
    torch.testing.assert_close((light + 1) / 2, torch.tensor(bright).expand(1, 3, 1, 2))


def test_both_losses_by_their_definition(model):
    """L_p: the usual loss on the teacher's labels, over the pixels it is sure of. L_f: squared distance of features; of
    a task the image lacks, weighed by sigmoid(theta F), which gets no gradient."""
    student = taught(model.eval(), features=True)
    b = micro_batch(student.discovery)
    found, grads = gradients(student, [b])
    torch.manual_seed(5)
    ready = student.ready(b)
    every = student.global_tokens(*ready["frames"], THREE)
    maps = student.logits(every, SIZE)
    expected, total = {}, 0.0
    for t in b["labels"]:
        expected[t] = student.error(t, maps[t], b["labels"][t])[b["valid"][t]].mean()
    for t, (code, mask) in ready["pseudo"].items():
        expected[f"pseudo {t}"] = student.error(t, maps[t], code)[mask].mean()
    for t, (x, theta) in every.items():
        square = (x - ready["features"][t]).square().mean(1)
        weight = torch.stack([(theta[k, :, None, None] * x[k]).sum(0).sigmoid().detach() if lack else
                              torch.ones_like(square[k]) for k, lack in enumerate(ready["lacks"][t])])
        expected[f"feature {t}"] = (weight * square).mean()
    assert found.keys() == expected.keys()
    assert found == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-4)
    student.zero_grad()
    total = sum(expected.values()) / 3
    total.backward()
    assert close({n: p.grad for n, p in student.named_parameters() if p.grad is not None}, grads, 1e-4)


def test_an_unsure_mask_stops_the_gradient_of_features(model):
    """sigmoid(theta F) = 0 everywhere: features of a task that the image lacks get none from L_f; labelled ones do."""
    student = taught(model.eval(), labels=None, features=True)
    b = student.ready(micro_batch(student.discovery))
    every = {t: (torch.ones(len(b["keys"]), WIDTH, 4, 6, requires_grad=True), torch.full((len(b["keys"]), WIDTH), -9.0))
             for t in THREE}
    b["features"] = {t: torch.zeros_like(x) for t, (x, _) in every.items()}
    maps = {t: torch.zeros(len(b["keys"]), student.bins[t].size, *SIZE) for t in b["labels"]}
    errors = student.errors(b, (maps, every))
    sum(errors[f"feature {t}"] for t in THREE).backward()
    for t, (x, _) in every.items():
        for k, lack in enumerate(b["lacks"][t]):
            assert (x.grad[k].abs().max() < 1e-20) == bool(lack)


def test_held_out_samples_are_judged_by_their_labels_alone(model):
    """In eval mode nothing is discovered, and frames stay as they are."""
    student = taught(model, features=True).eval()
    b = micro_batch(student.discovery)
    ready = student.ready(b)
    assert ready["pseudo"] == {} and ready["frames"] is b["frames"]
    assert accumulate(student, [b], CPU, nullcontext).keys() == set(b["labels"])


def test_true_labels_in_the_place_of_discovered_ones():
    """--discover true: the toy worlds' own labels of what could be discovered there, as a term beside the labels';
    images are drawn as without them."""
    plain = train_readers(size=SIZE, scenes=2)
    readers, beside = with_true_labels(plain, {})
    dropped = with_true_labels(train_readers(size=SIZE, scenes=2), {"rooms": {"depth", "semantic"}})[1]
    assert dropped == beside | {"rooms": {"depth"}}
    assert {world: tasks & {*PAPER_TASKS} for world, tasks in beside.items()} == {
        "rooms": set(), "streets": {"shading", "albedo"}, "things": {"normal", "depth", "shading", "albedo"}}
    every, joint = ALL, {"isolation": False, "joint": True}
    full = Mixture(readers, every, TASKS, 4, 4, 3, beside=beside, **joint)
    labels = Mixture(plain, every, TASKS, 4, 4, 3, **joint)
    model = MTL(every).train()
    model.learn_from(Discovery(full, every, labels="true"))
    for step in range(3):
        keys = [sorted(k for b in m[step]["batches"] for k in b["keys"]) for m in (full, labels)]
        assert keys[0] == keys[1]
        for b in full[step]["batches"]:
            world, ready = b["keys"][0][0], model.ready(b)
            assert set(ready["pseudo"]) == beside[world]
            assert all(not ready["valid"][t].any() for t in beside[world])
            assert all(torch.equal(code, b["labels"][t]) for t, (code, _) in ready["pseudo"].items())


def test_another_systems_teacher_is_refused(tmp_path):
    """So is one of other tasks."""
    MTL(THREE).save(tmp_path)
    cfg = type("Settings", (), {"teacher": str(tmp_path), "discover": "labels"})
    for student in (HiTTs(THREE), MTL(THREE[:2])):
        with pytest.raises(ValueError, match="is a mtl of semantic, normal, depth: expected a finished"):
            baselines.discovery(student, cfg, None)
