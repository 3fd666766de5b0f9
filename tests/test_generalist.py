"""The Diffusion Generalist's axes: diffusion against diffusers and by hand, pixels as a codec, commands as for any
other stage 1."""
import json

import pytest
import raw
import tiny
import torch
from diffusers import DDIMScheduler
from kill import compare
from made import Made
from runs import THREE, TINY, saved, stop_at

import evaluate
import sample
import train
from cli import run
from model import StableMTL
from network import generalist
from network.generalist import Generalist, add_noise, ddim
from network.loading import read_model_json
from readers.hypersim import Hypersim
from tasks import TASKS
from tools import distil, hub

pytestmark = pytest.mark.usefixtures("quick")
FEW = ("semantic", "depth", "optical_flow")
KEYS = [("rooms", 3, False), ("rooms", 4, True)]
PIXEL = "--space pixel --objective diffuse --condition features --ddim-steps 2"


def model(space="pixel", objective="diffuse", condition="features", tasks=FEW, **options):
    torch.manual_seed(0)
    plain = StableMTL(tiny.vae(), tiny.unet(), tiny.tokens(tasks))
    axes = {"space": space, "objective": objective, "condition": condition, "input_scale": 0.3, "ddim_steps": 3}
    return Generalist.fit(plain, **axes | options).eval()


def frames(batch=2, size=(32, 40), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, *size, generator=g) * 2 - 1 for _ in range(2)]


# ---- diffusion ----

@pytest.mark.parametrize("scale", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_the_exact_noise_returns_the_target(scale, steps):
    """Whoever knows x_0 and tells the noise in x_t gets x_0 back, at any input scale, in any number of steps."""
    g = torch.Generator().manual_seed(0)
    x0, start, seen = torch.rand(2, 3, 4, 5, generator=g) * 2 - 1, torch.randn(2, 3, 4, 5, generator=g), []

    def exact(x, t):
        seen.append(t)
        signal = generalist.schedule()[t]
        return (x - signal.sqrt() * scale * x0) / (1 - signal).sqrt()
    assert torch.allclose(ddim(exact, start, steps, scale, 1.0), x0, atol=1e-3)
    assert len(seen) == steps and seen[0] == 999 and seen == sorted(set(seen), reverse=True)


def stock():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
                         clip_sample=True, clip_sample_range=0.8, set_alpha_to_one=True)


def test_ddim_is_diffusers_own():
    """b = 1 equals DDIMScheduler on the same betas, clipping included; so does the noised target of training."""
    scheduler, g = stock(), torch.Generator().manual_seed(0)
    start, weight = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g)

    def some_noise(x, t):
        return torch.tanh(x * weight + t / 1000)
    scheduler.set_timesteps(50)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(some_noise(x, int(t)), t, x).prev_sample
    assert torch.allclose(ddim(some_noise, start, 50, 1.0, 0.8), x, atol=1e-4)
    t = torch.tensor([3, 900])
    assert torch.allclose(add_noise(start, weight, t, 1.0), scheduler.add_noise(start, weight, t), atol=1e-5)
    assert torch.allclose(add_noise(start, weight, t, 0.3), scheduler.add_noise(0.3 * start, weight, t), atol=1e-5)


@torch.no_grad()
def test_one_step_is_regression_up_to_its_scale(monkeypatch):
    """From x_999 = 0, one step of DDIM is the network's answer times -sqrt(1-g) / (b sqrt(g)): regression's."""
    monkeypatch.setattr(generalist, "draw", lambda what, shape, device: (torch.zeros(shape), None))
    monkeypatch.setattr(generalist, "LIMITS", {"pixel": 1e9})
    diffuse, regress = model(ddim_steps=1), model(objective="regress")
    g = generalist.schedule()[999]
    for t, x in diffuse(*frames(), FEW).items():
        expected = regress(*frames(), FEW)[t] * -(1 - g).sqrt() / (0.3 * g.sqrt())
        assert expected.abs().max() > 1 and torch.allclose(x, expected, rtol=1e-4, atol=1e-4)


# ---- pixels ----

def test_the_pixel_codec_keeps_what_it_holds():
    """Classes: code -> cells -> code -> cells is exact, and so is a map that is constant in each cell; others are means
    of their cells, of the size of the latents, and come back smooth."""
    m, codec = model(), TASKS["semantic"]
    ids = torch.randint(8, (2, 1, 8, 10))
    code = codec.encode(ids, torch.ones_like(ids, dtype=torch.bool)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    cells = m.encode_labels({"semantic": code})
    back = m.decode_labels(cells)
    assert cells["semantic"].shape == (2, 3, 8, 10) and torch.equal(back["semantic"], code)
    assert torch.equal(m.encode_labels(back)["semantic"], cells["semantic"])
    noise = torch.rand(2, 3, 32, 40)
    assert torch.equal(m.encode_labels({"semantic": noise})["semantic"], noise[..., 2::4, 2::4])
    mean = m.encode_labels({"depth": noise})["depth"]
    assert torch.allclose(mean, noise.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)), atol=1e-5)
    ramp = torch.linspace(-1, 1, 40).expand(1, 3, 32, 40)
    back = m.decode_labels(m.encode_labels({"depth": ramp}))["depth"]
    assert torch.allclose(back[..., 2:-2], ramp[..., 2:-2], atol=1e-5)


@pytest.mark.parametrize(("space", "condition", "taken", "given"), [
    ("pixel", "features", 19, 3), ("pixel", "raw", 9, 3), ("pixel", "latent", 11, 3), ("latent", "features", 20, 4),
    ("latent", "raw", 10, 4), ("latent", "latent", 12, 4)])
def test_every_axis_predicts_and_comes_back_from_its_files(space, condition, taken, given, tmp_path):
    """Fresh convolutions only where the number of channels changes; StableMTL.load gives the same maps."""
    for objective in ("regress", "diffuse"):
        m, plain = model(space, objective, condition), tiny.unet()
        assert (m.unet.conv_in.in_channels, m.unet.conv_out.out_channels) == (taken, given)
        torch.manual_seed(0)
        tiny.vae()
        assert torch.equal(tiny.unet().mid_block.resnets[0].conv1.weight, m.unet.mid_block.resnets[0].conv1.weight)
        maps, (a, b) = m.predict(*frames()), frames()
        assert {t: x.shape for t, x in maps.items()} == {t: (2, TASKS[t].channels, 32, 40) for t in FEW}
        assert m.predict(a[..., :30, :37])["depth"].shape == (2, 1, 30, 37)
        m.save(tmp_path)
        again = StableMTL.load(tmp_path)
        assert type(again) is Generalist and again.axes == m.axes and plain.config.in_channels == 12
        assert all(torch.equal(x, again.predict(a, b)[t]) for t, x in maps.items())


def test_frames_matter_in_their_place():
    """One-frame tasks do not see the second frame, the others do."""
    m, (a, b) = model(), frames()
    one, two = m.predict(a, b), m.predict(a, a)
    assert torch.equal(one["depth"], two["depth"]) and not torch.equal(one["optical_flow"], two["optical_flow"])


# ---- what is drawn ----

def test_maps_do_not_depend_on_the_batch():
    """The noise of an image follows from its own bytes: alone, in a batch, in other company, or in parts of the tasks,
    it gets the same maps; another image another noise."""
    m, (a, b) = model(), frames(3)
    drawn, draw = {}, generalist.draw

    def noted(what, shape, device):
        drawn[what] = draw(what, shape, device)
        return drawn[what]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generalist, "draw", noted)
        together = m.predict(a, b)
        first = dict(drawn)
        assert len(first) == 9
        for k in range(3):
            alone = m.predict(a[k:k + 1], b[k:k + 1], rows=1)
            assert torch.equal(alone["semantic"], together["semantic"][k:k + 1])
            assert all(torch.allclose(x, together[t][k:k + 1], atol=1e-4) for t, x in alone.items())
    assert drawn.keys() == first.keys() and all(torch.equal(drawn[w][0], first[w][0]) for w in first)


def loss_of(m, labels, cells, keys=KEYS, seed=5):
    torch.manual_seed(seed)
    a, b = frames()
    predicted, wanted = m.train().learn(a, b, labels, cells, keys)
    return ((predicted["depth"] - wanted["depth"])[cells["depth"].expand_as(wanted["depth"])] ** 2).mean()


def test_what_is_not_valid_has_no_influence():
    """x_0 outside the mask, NaN too, changes neither loss nor gradient; inside it does."""
    m, cells = model(tasks=("depth",)), {"depth": torch.rand(2, 1, 8, 10) < 0.7}
    label = torch.rand(2, 3, 8, 10)
    other = torch.where(cells["depth"], label, torch.full_like(label, torch.nan))
    a, b = loss_of(m, {"depth": label}, cells), loss_of(m, {"depth": other}, cells)
    assert torch.equal(a, b) and not torch.equal(a, loss_of(m, {"depth": label + 0.1}, cells))
    b.backward()
    assert all(p.grad.isfinite().all() for p in m.unet.parameters() if p.grad is not None)
    assert m.stem[0].weight.grad.abs().max() > 0, "the stem learns"


def test_noise_of_training_belongs_to_the_sample():
    """It depends on the seed of the step and on the sample, not on which micro-batch or process has it; held-out
    samples have the same each time."""
    m, x = model(tasks=("depth",)), torch.zeros(2, 3, 8, 10)
    cells = {"depth": torch.ones(2, 1, 8, 10, dtype=torch.bool)}

    def noise(seed, keys, training=True):
        torch.manual_seed(seed)
        a, b = frames()
        n = len(keys)
        with torch.no_grad():
            learnt = m.train(training).learn(a[:n], b[:n], {"depth": x[:n]}, {"depth": cells["depth"][:n]}, keys)
        return learnt[1]["depth"]
    both = noise(1, KEYS)
    assert torch.equal(both[1:], noise(1, KEYS[1:])) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, noise(2, KEYS))
    assert torch.equal(noise(1, KEYS, False), noise(2, KEYS, False))


# ---- commands ----

@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """Folder of a finished run of PIXEL, four steps. Do not write there."""
    out = tmp_path_factory.mktemp("generalist") / "out"
    assert train.main(f"--base {tiny_base} --out {out} {TINY} --tasks {THREE} --steps 4 {PIXEL}".split()) == 0
    return out


def test_the_commands(trained, tmp_path, capsys):
    """evaluate.py, sample.py and StableMTL.load know from the checkpoint alone what it is."""
    flags = f"--limit 1 --trivial 0 --workers 0 --json {tmp_path / 'r.json'}"
    assert evaluate.main(f"--ckpt {trained} {flags}".split()) == 0
    assert "space pixel, objective diffuse, condition features" in capsys.readouterr().out
    assert sample.main(f"--ckpt {trained} --toy real:3 --output {tmp_path / 'maps'}".split()) == 0
    assert (tmp_path / "maps/real-3/panel.png").is_file()
    assert StableMTL.load(trained).axes == {"space": "pixel", "objective": "diffuse", "condition": "features",
                                            "input_scale": 0.3, "ddim_steps": 2}
    assert json.loads((trained / "model.json").read_text())["multi"] is None


def test_resume_equals_uninterrupted(go, trained, tmp_path, monkeypatch):
    """Steps and noise go on as if nothing had happened; the stem is part of the state."""
    stop_at(monkeypatch, "between", 2)
    assert go(f"--tasks {THREE} --steps 4 {PIXEL}")[0] == 130
    assert go("--resume")[0] == 0
    assert compare(trained, tmp_path / "out") == []
    assert torch.equal(StableMTL.load(trained).stem[0].weight, StableMTL.load(tmp_path / "out").stem[0].weight)


@pytest.mark.parametrize("axes", ["--space pixel", "--condition raw", "--condition features --objective diffuse",
                                  "--space pixel --condition latent --objective diffuse"])
def test_the_cache_holds_what_the_axes_need(go, tmp_path, axes):
    """Training from it gives the loss of training without, up to float16; a folder of other axes is refused."""
    losses = []
    for cache in ("none", str(tmp_path / "cache")):
        code, _, error = go(f"--tasks {THREE} --steps 2 {axes} --cache {cache} --out {tmp_path / cache[-5:]}")
        assert code == 0, error
        lines = (tmp_path / cache[-5:] / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and min(losses[0]) > 0
    code, _, error = go(f"--tasks {THREE} --cache {tmp_path / 'cache'} --out {tmp_path / 'other'}")
    assert code == 2 and "was made for something else" in error


@pytest.mark.parametrize(("flags", "says"), [
    ("--stage 2 --space pixel", "would do nothing here: it belongs to --stage 1"),
    ("--input-scale 0.5", "goes with --objective diffuse"),
    ("--space pixel --ddim-steps 5", "goes with --objective diffuse"),
    ("--space pixel --loss latent,task", "--loss would do nothing here"),
    ("--objective diffuse --input-scale 0", "--input-scale"),
    ("--objective diffuse --ddim-steps 1001", "--ddim-steps"),
    ("--space wavelet", "invalid choice"),
])
def test_bad_flags(go, flags, says):
    code, _, error = go(flags)
    assert code == 2 and says in error and "Traceback" not in error


def test_stage_two_and_other_axes_are_refused(go, trained, tmp_path):
    """Stage 2 builds on StableMTL's own stage 1; --init takes the axes over and lets none be changed."""
    code, _, error = go(f"--stage 2 --out {trained}")
    assert code == 2 and "stage 2 needs StableMTL's own stage 1" in error and "space pixel" in error
    code, _, error = go(f"--init {trained} --objective regress")
    assert code == 2 and "contradicts the stage 1" in error
    assert go(f"--init {trained}")[0] == 0
    assert saved(tmp_path / "out")["train"]["ddim_steps"] == 2
    assert StableMTL.load(tmp_path / "out").axes == StableMTL.load(trained).axes


def test_what_has_no_stage_two_is_not_told_to_train_it(trained, capsys):
    """--attention; the card of who diffuses does not say "one step"."""
    assert run(lambda: sample.main(["--ckpt", str(trained), "--toy", "real:3", "--attention"])) == 2
    assert "gave a Generalist, which has none: leave it out" in capsys.readouterr().err
    told = hub.card(trained, read_model_json(trained), "org/name")
    assert "stage 1: 2 DDIM steps of a\npixel diffusion UNet" in told and "one step" not in told


def test_real_formats(go, tmp_path, monkeypatch):
    """In pixels, diffusing, on a dataset as downloaded, made small; evaluated on another."""
    raw.hypersim(tmp_path / "data", frames=[("ai_001_001", "cam_00", k, "train") for k in (0, 1)])
    monkeypatch.setattr(Hypersim, "size", (16, 24))
    code, _, error = go(f"{PIXEL} --data {tmp_path / 'data'} --tasks depth,albedo",
                        TINY.replace("--scenes 2 --size 16x24", ""))
    assert code == 0, error
    raw.own_folder(tmp_path / "test", h=16, w=24)
    argv = f"--ckpt {tmp_path / 'out'} --data {tmp_path / 'test'} --limit 1 --workers 0 --json {tmp_path / 'r.json'}"
    assert evaluate.main(argv.split()) == 0
    assert json.loads((tmp_path / "r.json").read_text())["results"]["folder"].keys() == {"depth", "albedo"}


def test_images_of_no_whole_cells(go, tmp_path):
    """The stem rounded their size up, the labels' grid down: a traceback after the whole cache was built."""
    raw.own_folder(tmp_path / "own", h=17, w=25)
    code, _, error = go(f"--condition features --data {tmp_path / 'own'} --tasks depth,albedo --size 17x25 "
                        f"--cache {tmp_path / 'cache'}", TINY.replace("--scenes 2 --size 16x24", ""))
    assert code == 0, error


@pytest.mark.parametrize("condition", ["features", "raw"])
def test_what_fills_no_cell_is_cropped(condition):
    """Frames are seen as if their last rows and columns were not there; frames of whole cells as before."""
    m, odd = model("latent", "regress", condition), frames(size=(35, 41))
    assert torch.equal(m.stack(*odd), m.stack(*(f[..., :32, :40] for f in odd)))


def test_what_a_small_decoder_learns_from_is_what_is_predicted(monkeypatch):
    """tools.distil: the noise of an image does not follow from its place among others, it is predict's."""
    m, found = model("latent", condition="latent"), []
    for lot in (1, 4):
        monkeypatch.setattr(distil, "LOT", lot)
        seen, _ = distil.lessons(m, distil.Lots([Made("made", ())], FEW, m.codecs, 4, 0, {}))
        ((latents, _, kinds),) = seen.values()
        found.append([latents[kinds == k].float() for k in range(len(FEW))])
    for one, four in zip(*found, strict=True):
        assert torch.allclose(one, four, atol=0.02) and (one[0] - one[1]).abs().max() > 0.1


def test_a_damaged_stem_is_named(trained, tmp_path):
    m = StableMTL.load(trained)
    m.save(tmp_path)
    torch.nn.init.constant_(m.stem[0].weight, torch.nan)
    m.save(tmp_path)
    with pytest.raises(ValueError, match="stem: 1 not finite"):
        StableMTL.load(tmp_path)
    (tmp_path / "stem.safetensors").unlink()
    code = run(lambda: evaluate.main(["--ckpt", str(tmp_path)]))
    assert code == 2
