"""The model against stock diffusers, naive loops, its own unbatched self, and the counts of the paper."""
import copy
import math
import shutil
from collections import Counter

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from evaluate import PAPER_TASKS
from model import StableMTL, TaskAttention, transformer_blocks, widen_input
from tasks import TASKS
from tools import bench

ALL = tuple(TASKS)
FLOWS = [t for t in ALL if TASKS[t].frames == 2]


@pytest.fixture(scope="module")
def single():
    return tiny.model()


@pytest.fixture(scope="module")
def multi():
    return tiny.model(multi=True)


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max().item())


@torch.no_grad()
def stock(unet, z_i, z_j, token):
    """diffusers' own forward, nothing of ours."""
    x = torch.cat([z_i, z_j, torch.zeros_like(z_i)], 1)
    return unet(x, 999, encoder_hidden_states=token.expand(len(x), -1, -1)).sample


def counting(modules):
    """{name: Counter(calls, rows)} filled by forward hooks on {name: module}."""
    counts = {name: Counter() for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda m, args, name=name: counts[name].update(calls=1, rows=len(args[0])))
    return counts


# ---- stage 1 is diffusers' UNet ----

@torch.no_grad()
def test_single_stream_is_stock_diffusers(single):
    """Each task's output equals UNet2DConditionModel on (z_i, z_j, 0), t = 999, its unpadded token; one-frame tasks see
    frame i twice."""
    z_i, z_j = tiny.latents()
    out = single(z_i, z_j, ALL)
    for t in ALL:
        close(out[t], stock(single.unet, z_i, z_j if t in FLOWS else z_i, tiny.tokens()[t]))
    assert (out["normal"] - out["depth"]).abs().max() > 1e-3, "tasks must differ, or the test shows nothing"


@torch.no_grad()
def test_padded_tokens_equal_unbatched(single):
    """Tokens of 3 and of 4 vectors in one batch give what each gives alone, and the padding mask is what does it."""
    z_i, z_j = tiny.latents()
    assert len(single.token_depth) == 3 and len(single.token_optical_flow) == 4
    both = single(z_i, z_j, ["depth", "optical_flow"])
    close(both["depth"], single(z_i, z_j, ["depth"])["depth"])
    unmasked = stock(single.unet, z_i, z_i, torch.nn.functional.pad(single.token_depth, (0, 0, 0, 1)))
    assert (both["depth"] - unmasked).abs().max() > 1e-4


@torch.no_grad()
def test_widened_input_equals_the_original():
    """The widened UNet on three copies of a latent equals the original on one; one that takes 12 stays as it is."""
    torch.manual_seed(0)
    narrow = tiny.unet(in_channels=4)
    wide, (z, _) = widen_input(copy.deepcopy(narrow)), tiny.latents()
    token = tiny.tokens()["depth"].expand(2, -1, -1)
    close(wide(z.repeat(1, 3, 1, 1), 999, token).sample, narrow(z, 999, token).sample)
    assert wide.config.in_channels == 12 and widen_input(wide) is wide
    with pytest.raises(ValueError, match="9 channels"):
        widen_input(tiny.unet(in_channels=9))


@torch.no_grad()
@pytest.mark.parametrize("how", ["average", "none"])
def test_second_frame_ablations(how):
    """`average` feeds the mean of both latents twice, `none` leaves the second place empty (paper section 4.2), as
    stock diffusers computes it."""
    torch.manual_seed(0)
    m, (z_i, z_j) = StableMTL(tiny.vae(), tiny.unet(), tiny.tokens(), second_frame=how), tiny.latents()
    out = m.eval()(z_i, z_j, ["depth", "scene_flow"])
    mean, nothing = (z_i + z_j) / 2, torch.zeros_like(z_i)
    flow, still = ((mean, mean), (z_i, z_i)) if how == "average" else ((z_i, nothing), (z_i, nothing))
    close(out["scene_flow"], stock(m.unet, *flow, m.token_scene_flow))
    close(out["depth"], stock(m.unet, *still, m.token_depth))


@torch.no_grad()
def test_latents_are_the_scaled_posterior_mean(single):
    """encode is deterministic, times scaling_factor; decode undoes the factor."""
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    posterior = single.vae.encode(x).latent_dist
    assert torch.equal(single.encode(x), posterior.mode() * 0.7)
    close(single.decode(posterior.mode() * 0.7), single.vae.decode(posterior.mode()).sample)
    assert single.factor == 4 and single.encode(x).shape == (1, 4, 4, 6)


# ---- task attention ----

def test_stage_two_starts_as_stage_one():
    """With task attention still zero, the main stream equals the single stream bit for bit, for every task."""
    m, (z_i, z_j) = tiny.model(), tiny.latents()
    with torch.no_grad():
        before = m(z_i, z_j, ALL)
        m.add_main_stream(copy.deepcopy(m.unet))
        after = m.eval()(z_i, z_j, ALL)
    assert all(torch.equal(before[t], after[t]) for t in ALL)


def two_layers(project, x):
    return project.fc2(torch.nn.functional.gelu(project.fc1(x)))


def naive(layer, a, task, feats):
    """Task attention one image, pixel, head and task at a time, on the layer's own weights."""
    others, out, width = [t for t in feats if t != task], torch.zeros_like(a), a.shape[-1]
    d, pick = width // layer.heads, (lambda t: "shared") if layer.shared else (lambda t: t)
    for b in range(len(a)):
        for n in range(a.shape[1]):
            q = layer.task_to_q[pick(task)](layer.task_norm_q[pick(task)](a[b, n]))
            k = {t: two_layers(layer.task_to_k[pick(t)], layer.task_norm_k[pick(t)](feats[t][b, n])) for t in others}
            v = {t: two_layers(layer.task_to_v[pick(t)], layer.task_norm_v[pick(t)](feats[t][b, n])) for t in others}
            y = torch.zeros(width)
            for h in range(layer.heads):
                s = slice(h * d, (h + 1) * d)
                e = {t: math.exp(float(q[s] @ k[t][s]) / math.sqrt(d)) for t in others}
                for t in others:
                    y[s] += e[t] / sum(e.values()) * v[t][s]
            out[b, n] = layer.to_out_task.weight @ y + layer.to_out_task.bias
    return out


def attention_layer(heads=2, shared=False, width=8):
    torch.manual_seed(3)
    layer = TaskAttention(width, ALL, heads, hidden=12, shared=shared)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer, torch.randn(2, 3, width), {t: torch.randn(2, 3, width) for t in ALL}


@torch.no_grad()
@pytest.mark.parametrize("heads, shared", [(1, False), (2, False), (4, True)])
def test_task_attention_equals_a_naive_loop(heads, shared):
    """Softmax over the other tasks, per pixel and head, with each task's own projections; the weights sum to one."""
    layer, a, feats = attention_layer(heads, shared)
    y, weights = layer(a, "shading", layer.keys_values(feats))
    close(y, naive(layer, a, "shading", feats))
    assert weights.shape == (len(ALL) - 1, 2, 3, heads)
    close(weights.sum(0), torch.ones(2, 3, heads), 1e-6)


@torch.no_grad()
def test_masked_task_is_as_good_as_absent():
    """Leaving a task out of an image equals never having had its stream there; the mask is drawn from the mean
    attention over pixels and heads."""
    layer, a, feats = attention_layer()
    kv, seen = layer.keys_values(feats), []
    _, weights = layer(a, "semantic", kv)

    def out_of_depth(scores):
        seen.append(scores)
        return torch.tensor([[t == "depth", False] for t in ALL if t != "semantic"])

    masked, _ = layer(a, "semantic", kv, out_of_depth)
    whole, _ = layer(a, "semantic", kv)
    absent, _ = layer(a, "semantic", layer.keys_values({t: f for t, f in feats.items() if t != "depth"}))
    close(masked[0], absent[0])
    close(masked[1], whole[1])
    assert (absent - whole).abs().amax((1, 2)).min() > 1e-4
    close(seen[0], weights.mean((2, 3)), 1e-6)


def test_heads_must_divide_the_width():
    """--heads 3 at width 8 is refused with a sentence that names both."""
    with pytest.raises(ValueError, match="--heads 3 does not divide the width 8"):
        TaskAttention(8, ALL, heads=3)


@torch.no_grad()
def test_attention_log(multi):
    """The log names every block, in the order they run, with the mean attention to the other tasks."""
    multi.attention_log = []
    multi(*tiny.latents(1), ["depth"])
    log, multi.attention_log = multi.attention_log, None
    assert [block for block, _, _ in log] == list(transformer_blocks(multi.main)) and len(log) == 16
    for _, task, attention in log:
        assert task == "depth" and set(attention) == set(ALL) - {"depth"}
        assert sum(attention.values()) == pytest.approx(1, abs=1e-5)


# ---- batching and cost ----

@torch.no_grad()
@pytest.mark.parametrize("stage", ["single", "multi"])
@pytest.mark.parametrize("batch, size", [(2, (8, 8)), (2, (11, 13)), (1, (23, 77))])
def test_batched_equals_one_by_one(request, stage, batch, size):
    """All tasks in one pass equal one task per pass, also for sizes that no level divides evenly."""
    m, z = request.getfixturevalue(stage), tiny.latents(batch, size)
    together, apart = m(*z, ALL), m(*z, ALL, rows=1)
    for t in ALL:
        close(together[t], apart[t])
        assert together[t].shape == (batch, 4, *size)


@torch.no_grad()
def test_a_task_alone_equals_the_task_among_all(multi):
    """Asking for one task of stage 2 gives the same map as asking for all."""
    z = tiny.latents(2, (11, 13))
    close(multi(*z, ["albedo"])["albedo"], multi(*z, ALL)["albedo"])


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_predict_computes_nothing_twice(rows):
    """Stage 2, n tasks, one pair: 2 encodes, n auxiliary and n main rows, n decodes, each projection once per stream,
    no text encoder."""
    m, pair, n = tiny.model(multi=True), torch.rand(2, 1, 3, 32, 32), len(ALL)
    layer = m.attention["mid_block/attentions/0/transformer_blocks/0"]
    queries, streams, keys_values = {f"q {t}": layer.task_to_q[t] for t in ALL}, [], layer.keys_values
    layer.keys_values = lambda feats: streams.append(tuple(feats)) or keys_values(feats)
    counts = counting({"encode": m.vae.encoder, "decode": m.vae.decoder,
                       "auxiliary": m.unet.conv_in, "main": m.main.conv_in,
                       "auxiliary end": m.unet.conv_out, "main end": m.main.conv_out, **queries})
    out = m.predict(*pair, rows=rows)
    assert {part: c["rows"] for part, c in counts.items() if part not in queries} == {
        "encode": 2, "decode": n, "auxiliary": n, "main": n, "auxiliary end": 0, "main end": n}
    assert counts["auxiliary"]["calls"] == {None: 1, 1: n, 3: math.ceil(n / 3)}[rows]
    assert all(counts[q]["calls"] == 1 for q in queries) and streams == [ALL]
    assert not any("CLIP" in type(module).__name__ for module in m.modules())
    assert {t: x.shape[1] for t, x in out.items()} == {t: TASKS[t].channels for t in ALL}


def test_predict_leaves_out_what_nobody_asks_for():
    """One task of stage 2 needs an auxiliary row of each other and one main row; a still-image task of stage 1 does not
    encode the second frame."""
    m, s, pair = tiny.model(multi=True), tiny.model(), torch.rand(2, 1, 3, 32, 32)
    counts = counting({"auxiliary": m.unet.conv_in, "main": m.main.conv_in, "encode": s.vae.encoder})
    m.predict(*pair, ["depth"])
    assert (counts["auxiliary"]["rows"], counts["main"]["rows"]) == (len(ALL) - 1, 1)
    s.predict(*pair, ["depth"])
    assert counts["encode"]["rows"] == 1
    assert set(s.predict(pair[0])) == set(ALL) - set(FLOWS)
    with pytest.raises(ValueError, match="second frame"):
        s.predict(pair[0], tasks=FLOWS)


@pytest.mark.parametrize("size", [(1, 1), (30, 41), (32, 44)])
def test_predict_at_any_size(single, size):
    """Any height and width come back as they were: padded by repetition to whole cells, then cropped."""
    image = torch.rand(1, 3, *size) * 2 - 1
    rows, columns = (torch.arange(-(-s // 4) * 4).clamp(max=s - 1) for s in size)
    padded = single.predict(image[..., rows, :][..., columns], tasks=["albedo"])["albedo"]
    out = single.predict(image, tasks=["albedo"])["albedo"]
    assert torch.equal(out, padded[..., :size[0], :size[1]]) and out.shape[-2:] == size


@pytest.mark.parametrize("frames, tasks, says", [
    ([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], None, r"floats in \[-1,1\], found \(1, 3, 8, 8\) of torch.uint8"),
    ([torch.full((1, 3, 8, 8), 200.0)], None, r"expected frames in \[-1,1\].*127.5"),
    ([torch.full((1, 3, 8, 8), torch.nan)], None, r"expected frames in \[-1,1\]"),
    ([torch.zeros(3, 8, 8)], None, r"expected frames of one size, \(B,3,H,W\)"),
    ([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 12)], None, r"found \(1, 3, 8, 8\).* and \(1, 3, 8, 12\)"),
    ([torch.zeros(1, 3, 8, 8)], ["deph"], "unknown task deph: choose from semantic, normal, depth")])
def test_predict_refuses_what_is_no_frame(single, frames, tasks, says):
    """Bytes and 0..255 were predicted silently; frames of two sizes, or an unknown task, ended in a traceback."""
    with pytest.raises(ValueError, match=says):
        single.predict(*frames, tasks=tasks)


def test_tasks_as_text(single):
    """As `infer` takes them; predict took the letters for tasks."""
    image = torch.zeros(1, 3, 8, 8)
    assert single.predict(image, tasks="depth,normal").keys() == {"normal", "depth"}


@pytest.mark.parametrize("rows", [None, 1])
def test_a_prediction_that_is_not_finite_is_no_prediction(rows):
    """NaN was written as a map, for classes as class 0: an error that names the tasks."""
    model = tiny.model()
    model.token_depth[0, 0] = model.token_semantic[0, 0] = torch.inf
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(FloatingPointError, match="the prediction of semantic, depth is not finite"):
        model.predict(image, tasks=["semantic", "normal", "depth"], rows=rows)
    assert model.predict(image, tasks=["normal"])["normal"].isfinite().all()
    with torch.device("meta"):      # bench.py counts operations there: no value to look at
        assert model.to("meta").predict(torch.zeros(1, 3, 8, 8))["depth"].is_meta


@torch.no_grad()
def test_n_to_n_attends_to_the_other_main_streams():
    """N-to-N runs for any subset, uses no auxiliary pass, and another task's token alone changes this task's output."""
    m, z = tiny.model(multi=True, attention="n-to-n"), tiny.latents()
    counts = counting({"auxiliary": m.unet.conv_in, "main": m.main.conv_in})
    before = m(*z, ["depth"])
    assert set(before) == {"depth"} and counts["auxiliary"]["rows"] == 0 and counts["main"]["rows"] == 2 * len(ALL)
    close(before["depth"], m(*z, ALL)["depth"])
    m.token_albedo += 1
    assert (m(*z, ["depth"])["depth"] - before["depth"]).abs().max() > 1e-4


# ---- training ----

@pytest.mark.parametrize("rho", [0.0, 1.0])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_checkpointing_gives_the_same_gradients(stage, rho):
    """Blocks run again in the backward pass see the same streams and masks; only the task at hand gets a
    query gradient."""
    m, z = tiny.model(multi=stage == 2), tiny.latents()
    trained = m.main if stage == 2 else m.unet
    params = {n: p for n, p in m.named_parameters() if p.requires_grad}
    m.rho, m.training, grads, keys = rho, True, [], [("rooms", k, False) for k in range(len(z[0]))]
    for checkpointing in (False, True):
        if checkpointing:
            trained.enable_gradient_checkpointing()
        calls = counting({"block": next(iter(transformer_blocks(trained).values())).ff})
        m(*z, ["depth"], keys=keys)["depth"].square().mean().backward()
        grads.append({n: p.grad for n, p in params.items() if p.grad is not None})
        assert calls["block"]["calls"] == 1 + checkpointing
        m.zero_grad()
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 500
    for n in grads[0]:
        close(grads[0][n], grads[1][n], 1e-6)
    queries = {n.split("task_to_q.")[1].split(".")[0] for n in grads[0] if "task_to_q." in n}
    assert queries == ({"depth"} if stage == 2 else set()) and not any(n.startswith("vae.") for n in grads[0])
    assert stage == 1 or not any(n.startswith("unet.") for n in grads[0])


# ---- files ----

def test_save_and_load(tmp_path, multi):
    """A saved model predicts bit-equally after loading; stage=1 loads the single stream; unet/ is plain diffusers."""
    multi.save(tmp_path)
    pair = torch.rand(2, 1, 3, 16, 24)
    a, b = multi.predict(*pair), StableMTL.load(tmp_path).predict(*pair)
    assert all(torch.equal(a[t], b[t]) for t in ALL)
    one, (z_i, z_j) = StableMTL.load(tmp_path, stage=1), tiny.latents()
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert one.main is None and plain.config.in_channels == 12
    with torch.no_grad():
        assert torch.equal(one(z_i, z_j, ["depth"])["depth"], stock(plain, z_i, z_i, multi.token_depth))


def test_load_says_what_is_missing(tmp_path, multi):
    """No checkpoint, no stage 2, and every part that an incomplete copy may lack end in a sentence that names it."""
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*train.py --stage 1"):
        StableMTL.load(tmp_path)
    tiny.model().save(tmp_path / "single")
    with pytest.raises(FileNotFoundError, match="holds no stage 2"):
        StableMTL.load(tmp_path / "single", stage=2)
    for stage in (0, 3, "1"):
        with pytest.raises(ValueError, match=f"^stage {stage!r}: expected 1, 2, or None"):
            StableMTL.load(tmp_path / "single", stage)
    for device in ("tpu", "meta", "hpu", None):
        with pytest.raises(ValueError, match=f"^device {device} is not available here"):
            StableMTL.load(tmp_path / "single", device=device)
    folder = tmp_path / "multi"
    multi.save(folder)
    for part in ("vae", "unet/config.json", "main_unet/diffusion_pytorch_model.safetensors", "tokens.safetensors",
                 "task_attention.safetensors"):
        shutil.move(folder / part, tmp_path / "aside")
        with pytest.raises(FileNotFoundError, match=f"is incomplete: no .*{part}"):
            StableMTL.load(folder)
        shutil.move(tmp_path / "aside", folder / part)
    shutil.rmtree(folder / "main_unet")
    assert StableMTL.load(folder, stage=1).main is None


# ---- the real size ----

def test_parameter_counts_of_stable_diffusion_2():
    """On the meta device: the widened UNet has 865,933,764 parameters under 686 keys, task attention over seven tasks
    390,528,320."""
    with torch.device("meta"):
        unet = widen_input(UNet2DConditionModel(**bench.SD2_UNET))
        layers = [TaskAttention(block.attn1.to_q.in_features, PAPER_TASKS, heads=4, hidden=640)
                  for block in transformer_blocks(unet).values()]

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(unet) == 865_933_764 and len(unet.state_dict()) == 686
    assert len(layers) == 16 and sum(map(count, layers)) == 390_528_320
