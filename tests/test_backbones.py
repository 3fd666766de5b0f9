"""Bases of other Stable Diffusions: what their config.json files say differs, and nothing else has to.

Version 1.5 has text of width 768, eight heads everywhere (attention_head_dim, an int) and convolutions around its
transformer blocks; 2.x has text of width 1024, heads of 64 channels (a list) and linear layers there. One step at
t = 999 reads no scheduler: epsilon or v-prediction, a base is the same to us.
"""
import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from kill import log_lines
from runs import THREE

from cli import run
from evaluate import PAPER_TASKS
from model import StableMTL
from tasks import TASKS
from tools import bench, convert

pytestmark = pytest.mark.usefixtures("quick")
# as released, beside the shape that they share; also what we have no use for
LIKE = {"1.5": dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        "2.1": dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
                    upcast_attention=True, dual_cross_attention=False, num_class_embeds=None, sample_size=96)}
SMALL = {"1.5": dict(in_channels=4, attention_head_dim=2, use_linear_projection=False, width=24),
         "2.1": dict(in_channels=4, attention_head_dim=[1, 2], use_linear_projection=True, upcast_attention=True)}


@pytest.fixture(scope="module", params=SMALL)
def base(request, tmp_path_factory):
    """A small random base of that version's kind, with the scheduler that its folder has."""
    folder = tiny.base(tmp_path_factory.mktemp("base"), **SMALL[request.param])
    kind = {"1.5": "epsilon", "2.1": "v_prediction"}[request.param]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))
    return folder


def test_both_stages(go, base, tmp_path):
    """Stage 1 and stage 2 from such a base train, load and predict; step 0 of stage 2 is stage 1; the UNets are stock
    diffusers' to load, and the released format takes them out and in again."""
    out = tmp_path / "out"
    assert go(f"--base {base} --tasks {THREE} --steps 3 --lr 0.001")[0] == 0
    assert go(f"--stage 2 --base {base} --rho 0 --steps 3 --lr 0.001 --save-every 1 --val-samples 2")[0] == 0
    single, multi = StableMTL.load(out, stage=1), StableMTL.load(out)
    config = UNet2DConditionModel.load_config(base, subfolder="unet")
    kept = ("cross_attention_dim", "attention_head_dim", "use_linear_projection")
    assert all(multi.main.config[k] == config[k] for k in kept)
    UNet2DConditionModel.from_pretrained(out / "main_unet")
    image, following = (torch.rand(1, 3, 16, 24) * 2 - 1 for _ in range(2))
    maps = multi.predict(image, following)
    assert maps.keys() == set(THREE.split(",")) and maps["optical_flow"].shape == (1, 2, 16, 24)
    first = next(e for e in log_lines(out) if (e["stage"], e["step"]) == (2, 0))
    assert first["loss"] > 0 and len(log_lines(out)) == 6
    multi.main.load_state_dict(single.unet.state_dict())
    for layer in multi.attention.values():
        torch.nn.init.zeros_(layer.to_out_task.weight)
        torch.nn.init.zeros_(layer.to_out_task.bias)
    assert all(torch.equal(x, single.predict(image, following)[t]) for t, x in multi.predict(image, following).items())


def test_released_format(go, base, tmp_path):
    """Weights of all tasks go out as released state dicts and come in again, on their own base."""
    assert go(f"--base {base} --steps 1")[0] == 0
    assert go(f"--stage 2 --base {base} --steps 1")[0] == 0
    assert run(lambda: convert.main(["--export", str(tmp_path / "theirs"), "--ckpt", str(tmp_path / "out")])) == 0
    files = ["--single", str(tmp_path / "theirs/single.pth"), "--multi", str(tmp_path / "theirs/multi.pth")]
    assert run(lambda: convert.main(["--base", str(base), *files, "--out", str(tmp_path / "ours")])) == 0
    before, after = (StableMTL.load(folder).state_dict() for folder in (tmp_path / "out", tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("version", LIKE)
def test_true_shapes(version, tmp_path):
    """On shapes alone: both streams of the true size predict and train."""
    shared = {k: v for k, v in bench.SD2_UNET.items() if k not in ("use_linear_projection", "attention_head_dim")}
    kinds = {"vae": (AutoencoderKL, bench.SD2_VAE), "unet": (UNet2DConditionModel, shared | LIKE[version])}
    for part, (kind, config) in kinds.items():
        with torch.device("meta"):
            kind.from_config(config).save_config(tmp_path / part)
    model = bench.on_meta(str(tmp_path), PAPER_TASKS, 2)
    image = torch.empty(1, 3, 64, 64, device="meta")
    maps = model.predict(image, image)
    assert {t: x.shape[1] for t, x in maps.items()} == {t: TASKS[t].channels for t in PAPER_TASKS}
    assert sum(p.numel() for p in model.attention.parameters()) == 390_528_320      # as with 2.0: widths decide
    assert bench.step_operations(model, torch.empty(1, 4, 8, 8, device="meta"), "depth") > 0
