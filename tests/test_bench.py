"""Counted operations against hand arithmetic and the paper's size, and the command from flags to files."""
import argparse
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train
from cli import run
from evaluate import PAPER_TASKS
from model import StableMTL
from settings import parse_args
from tasks import TASKS
from tools import bench, bench_cpu, bench_memory, gpu_report

ALL = tuple(TASKS)


def meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.fixture
def small_toy(tiny_base, monkeypatch):
    """"toy" has the shapes of the tests' base: the arithmetic is the same, the waiting is not."""
    def like(kind, part):
        return lambda: kind.from_config(kind.load_config(tiny_base, subfolder=part))
    monkeypatch.setattr(bench, "new_unet", like(UNet2DConditionModel, "unet"))
    monkeypatch.setattr(bench, "new_vae", like(AutoencoderKL, "vae"))


# ---- counting ----

@pytest.mark.parametrize("f, expected", [
    (lambda: F.linear(meta(5, 7), meta(11, 7)), 2 * 5 * 7 * 11),
    (lambda: F.conv2d(meta(2, 3, 8, 8), meta(4, 3, 3, 3), padding=1), 2 * 2 * 64 * 4 * 27),
    (lambda: F.scaled_dot_product_attention(meta(2, 3, 10, 4), meta(2, 3, 6, 4), meta(2, 3, 6, 4)),
     2 * (2 * 2 * 3 * 10 * 6 * 4))])
def test_operations_by_hand(f, expected):
    """A multiply-add counts as two, also inside attention, which must not be missed."""
    assert bench.operations(f) == expected


def test_cost_at_the_papers_size():
    """Stable Diffusion 2 at 256x256: the three parts known from the paper's size and the main UNet with six streams;
    seven single-stream tasks are 2 encodes, 7 UNets, 7 decodes; the multi stream needs at most 7.8 T."""
    nets, image = bench.networks("sd2", "meta"), meta(1, 3, 256, 256)
    single = bench.assemble(nets, PAPER_TASKS, multi=False)
    encode, decode, unet = bench.part_operations(single, image, PAPER_TASKS).values()
    assert [round(v / 1e12, 3) for v in (encode, decode, unet)] == [0.273, 0.622, 0.177]
    seven = bench.operations(single.predict, image, image)
    assert seven == pytest.approx(2 * encode + 7 * unet + 7 * decode, rel=1e-3)      # rel: tokens are 3 or 4 long
    assert seven < 6.15e12
    multi = bench.assemble(nets, PAPER_TASKS)
    (name, six), = bench.part_operations(multi, image, PAPER_TASKS).items()
    assert name == "main UNet with 6 streams" and six == pytest.approx(0.237e12, rel=5e-3)
    assert seven < bench.operations(multi.predict, image, image) < 7.8e12


class OnOneDevice(TorchDispatchMode):
    """Fails where a value is fetched from the device, or an operation mixes devices."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(a)]
        stays = all(t.device.type == "meta" for t in tensors)
        assert stays and "_local_scalar_dense" not in str(f), f"{f} leaves the device"
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("multi", [False, True])
def test_predict_never_waits_for_the_device(multi, small_toy):
    """What a CUDA graph may record: no value is fetched, nothing comes from the host but the images."""
    tasks, image = ("depth", "scene_flow", "albedo"), meta(1, 3, 16, 16)
    model = bench.assemble(bench.networks("toy", "meta"), tasks, multi=multi)
    with OnOneDevice():
        model.predict(image, image)


def test_growth_with_the_number_of_tasks(small_toy):
    """A still-image task adds one UNet and one decode to the single stream, a first task about motion also the second
    frame's encode."""
    counted = bench.count("toy", (16, 16), ("normal", "depth", "optical_flow"))
    parts, single = counted["parts"], counted["single"]
    one, encode = parts["UNet"] + parts["VAE decode"], parts["VAE encode"]
    steps = [single[1], single[2] - single[1], single[3] - single[2]]
    assert steps == pytest.approx([one + encode, one, one + encode], rel=0.02)
    assert list(counted["multi"]) == [2, 3] and all(counted["multi"][n] > single[n] for n in counted["multi"])
    assert counted["training"]["stage 1, cached latents"] > 2.5 * parts["UNet"]


# ---- training memory ----

def test_bytes_alive_by_hand():
    """Two arrays at once are the peak of a chain of three, and views cost nothing."""
    x = meta(1000)
    with bench_memory.Alive() as alive:
        y = x * 2
        z = y.view(10, 100)[:5] + 1
        del y, z
        w = x.bfloat16()
    assert (alive.peak, alive.now) == (4000 + 2000, 2000) and w.nbytes == 2000


def test_autocast_by_hand():
    """Linear layers in bfloat16, norms in float32; the copies of trained weights stay to the end of the context, those
    of frozen ones go; fused attention keeps no square of weights."""
    with torch.device("meta"):
        first, norm, last = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4).requires_grad_(False)
    with bench_memory.Alive() as alive, torch.no_grad(), bench_memory.Autocast():
        h = first(meta(3, 8))
        kinds = [h.dtype, norm(h).dtype, last(norm(h)).dtype]
        attended = F.scaled_dot_product_attention(*(meta(2, 1, 500, 8) for _ in range(3)))
    assert kinds == [torch.bfloat16, torch.float32, torch.bfloat16] and attended.dtype == torch.bfloat16
    del h, attended
    assert alive.now == 0
    first, last = first.weight, last.weight
    with bench_memory.Alive() as alive, torch.no_grad(), bench_memory.Autocast():
        F.linear(meta(3, 8), first), F.linear(meta(3, 16), last)
        assert alive.now == first.nbytes / 2
    assert alive.peak < 500 * 500


def test_training_memory(small_toy):
    """Weights and moments of each choice by hand; LoRA and checkpointing lower the peak, and more images raise it."""
    tasks = ("normal", "depth", "optical_flow")
    rows = {stage: {r["flags"]: r for r in counted}
            for stage, counted in bench_memory.counts(partial(bench.on_meta, "toy", tasks), tasks).items()}
    model = bench.on_meta("toy", tasks, 2)
    vae, unet, attention = (sum(p.numel() for p in m.parameters()) for m in (model.vae, model.unet, model.attention))
    assert rows[1][""]["states"] == 4 * vae + 12 * unet
    assert rows[2][""]["states"] == 4 * (vae + unet) + 12 * (unet + attention)
    assert rows[2][bench_memory.SMALL]["states"] == 2 * (vae + unet) + 8 * (unet + attention)
    lora = rows[2]["--frozen bf16 --lora 16"]["states"] - 2 * (vae + 2 * unet) - 12 * attention
    assert 0 < lora < 12 * unet and lora % 12 == 0
    for stage, few in rows.items():
        assert few["--checkpointing"]["peaks"][16] < few[""]["peaks"][16]
        assert all(r["states"] < r["peaks"][2] < r["peaks"][16] for r in few.values()), stage


def test_what_fits():
    """Powers of two up to what was counted; none where even the smaller micro-batch does not fit."""
    room = 24 * 2**30 - bench_memory.SPARE
    for free, expected in ((-1, 0), (0, 2), (5e8, 4), (14e8, 16), (9e9, 16)):
        assert bench_memory.fitting({2: room - free, 16: room - free + 14e8}, 24) == expected
    assert "none" in bench_memory.table({1: [{"flags": "", "states": 1e9, "peaks": {2: 1e12, 16: 2e12}}]})[-1]


# ---- the command ----

def test_command(small_toy, tmp_path, monkeypatch, capsys):
    """The toy base is counted, timed and trained; table, JSON and picture hold the same numbers of tasks."""
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench_memory, "CHOICES", {stage: few[-1:] for stage, few in bench_memory.CHOICES.items()})
    for name, less in (("measure", {"steps": 1}), ("peak", {"seconds": 0.1})):
        monkeypatch.setattr(bench_cpu, name, partial(getattr(bench_cpu, name), **less))
    flags = ["--size", "16x16", "--tasks", "2", "--micro", "1", "--device", "cpu", "--channels-last", "--memory"]
    bench.main([*flags, "--json", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.png")])
    text, result = capsys.readouterr().out, json.loads((tmp_path / "cost.json").read_text())
    assert "torch " + torch.__version__ in text and "2 tasks, multi" in text and "stage 2, images" in text
    assert "Stage 1, images: of a task of one frame" in text
    assert "--lora 16 --checkpointing" in text
    assert set(result["inference"]["single"]) == {"1", "2"} and set(result["inference"]["multi"]) == {"2"}
    assert {(r["stage"], r["source"]) for r in result["cpu"]} == set(bench_cpu.ROWS)
    row = result["training"]["stage 1, cached latents"]
    assert row["seconds"] > 0 and row["hours"] == pytest.approx(20_000 * 2 * row["seconds"] / 2 / 3600)
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.format == "PNG" and picture.width > 600


@pytest.mark.parametrize("n", range(1, len(ALL) + 1))
def test_a_timed_step_is_of_one_frame(small_toy, monkeypatch, n):
    """It was of the last of the --tasks: from images, five tasks were timed with two frames and seven with one."""
    seen = []
    monkeypatch.setattr(bench, "measured", lambda f, *args, **limit: {"images_per_s": 1.0})
    monkeypatch.setattr(bench, "batches", lambda model, args, task, source: seen.append(task) or [])
    args = argparse.Namespace(base="toy", device=torch.device("cpu"), dtype="fp32", micro=1, channels_last=False,
                              compile=False)
    bench.training_of(args, bench.make_trainer(args, ALL[:n], 1), "images")
    assert [TASKS[t].frames for t in seen] == [1]


def test_picture():
    """Operations in the power of ten that the axis names, milliseconds beside them; a curve per kind of stream."""
    rows = {n: {"seconds": n / 100} for n in (1, 2, 3)}
    result = {"device": "abacus", "counted": {"single": {1: 2e12, 2: 3e12, 3: 4e12}, "multi": {2: 5e12, 3: 6e12}},
              "inference": {"single": rows, "multi": {n: rows[n] for n in (2, 3)}}}
    counted, timed = bench.plot(result).axes
    assert [line.get_xydata().tolist() for line in counted.lines] == [[[1, 2], [2, 3], [3, 4]], [[2, 5], [3, 6]]]
    assert [line.get_xydata().tolist() for line in timed.lines] == [[[1, 10], [2, 20], [3, 30]], [[2, 20], [3, 30]]]
    assert "10^{12}" in counted.get_ylabel() and "ms" in timed.get_ylabel() and "abacus" in timed.get_title()
    assert len(bench.plot({k: v for k, v in result.items() if k != "inference"}).axes) == 1


def test_a_folder_is_counted_only(tiny_base, capsys, monkeypatch):
    """A diffusers folder gives its shapes; on a CPU nothing but the toy base is timed, and no weights are read."""
    monkeypatch.setattr(bench, "inference", None)
    bench.main(["--base", str(tiny_base), "--size", "16x16", "--tasks", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "1 tasks, single" in out and "multi" not in out and "img/s" not in out


@pytest.mark.parametrize("flags, sentence", [
    ("--graph --device cpu", "--graph records CUDA kernels"), ("--base nowhere", "no vae/config.json"),
    ("--tasks 99", "--tasks: '99' is not a whole number from 1"), ("--batch 0", "--batch: '0'"),
    ("--size big", "--size big: expected HEIGHTxWIDTH"), ("--json nowhere/x.json", "nowhere/x.json cannot be written"),
    ("--plot nowhere/x.png", "nowhere/x.png cannot be written"), ("--plot x.gif", "x.gif does not end in .png"),
    ("--json .", "it is a folder"), ("--micro x", "--micro")])
def test_mistakes_end_in_a_sentence_before_the_work(flags, sentence, monkeypatch, capsys, tmp_path):
    """Each names flag or file and what was expected; an output that cannot be written was found out after minutes."""
    if "--base" not in flags:
        monkeypatch.setattr(bench, "count", lambda *a: pytest.fail("the work has begun"))
    monkeypatch.chdir(tmp_path)
    assert run(lambda: bench.main(flags.split())) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- the report of a GPU ----

@pytest.mark.parametrize("multi", [False, True])
def test_the_plain_program_predicts_the_same(multi):
    """What the report compares with encodes 2 x 7 + 7 x 7 = 63 frames (single stream: 9) where predict encodes 2, and
    gives the same maps."""
    model, encodes = tiny.model(multi, PAPER_TASKS), []
    image, following = (torch.rand(1, 3, 16, 24) * 2 - 1 for _ in range(2))
    expected = model.predict(image, following)
    encode = model.encode
    model.encode = lambda x: encodes.append(1) or encode(x)
    found = gpu_report.plain(model, image, following)
    assert len(encodes) == (63 if multi else 9) and found.keys() == expected.keys()
    for t, x in expected.items():
        agrees = torch.isclose(found[t].float(), x.float(), atol=1e-4)
        assert agrees.float().mean() > (0.99 if TASKS[t].categorical else 0.9999), t


@pytest.fixture
def short_report(small_toy, monkeypatch):
    """Two steps of training, every call timed once, and nothing compiled. -> {modules that were to be compiled}"""
    compiled = set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.add(type(self).__name__))
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(gpu_report, "LIMIT", 0)
    monkeypatch.setattr(gpu_report, "TOY_RUN", "--stage 1 --steps 2 --scenes 2 --size 16x24 --batch 2 --micro 2 "
                        "--val-samples 0 --picture-every 0 --processes 1 --cache none --tasks depth,normal")
    return compiled


REPORT = ["--base", "toy", "--device", "cpu", "--size", "16x16", "--train-size", "16x16", "--tasks", "2",
          "--micro", "1", "--minutes", "600"]


def only(monkeypatch, wanted):
    """Leave in the plan the rows for which wanted(row); the others take no time."""
    plan = gpu_report.plan

    def fewer(args, tasks):
        rows, shelf = plan(args, tasks)
        return [row for row in rows if wanted(row)], shelf
    monkeypatch.setattr(gpu_report, "plan", fewer)


def test_report(short_report, tmp_path, capsys):
    """Every section, on the CPU at a small size: every check holds, and all rows are in the table."""
    assert run(lambda: gpu_report.main([*REPORT, "--json", str(tmp_path / "out.json")])) == 0
    text, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    apart = {(r["stream"], r["how"]): r for r in result["agreement"]}
    assert apart.keys() == {(kind, how) for kind in bench.KINDS for how in ("bf16", "bf16, compiled", "fp32, compiled")}
    for (_, how), r in apart.items():       # that compiled code is none here shows what it is compared with
        assert r["holds"] and (r["difference"] == 0 if "compiled" in how else 1e-4 < r["difference"] < 0.05)
    assert short_report == {"ResnetBlock2D", "FeedForward"}
    seen = {(r["stream"], r["how"], r["tasks"]) for r in result["prediction"]}
    assert seen == {(kind, how, n) for kind, n in (("single", 1), ("single", 2), ("multi", 2)) for how in (
        "bf16", "bf16, plain", "bf16, small decoder", "fp32", "bf16, compiled")} | {
        ("single", "fp32, plain", 2), ("multi", "fp32, plain", 2)}
    assert {(r["training"], r["how"]) for r in result["training"]} == {
        (f"stage {stage}, {source}", how) for stage, sources in bench.SOURCES.items() for source in sources
        for how in ("as it is", "channels-last", "compiled", "channels-last, compiled")}
    assert [r["run"] for r in result["toy"]] == ["cpu, fp32", "cpu, bf16"]
    assert result["toy"][0]["difference"] == 0 and 0 < result["toy"][1]["difference"] < 0.05
    assert result["left out"] == []
    assert "| multi | bf16, plain | ms |" in text and "| stage 2, images | channels-last, compiled |" in text
    assert "| multi | bf16 |" in text and "| yes |" in text and "**no**" not in text and "Failed" not in text


def test_a_report_without_time(short_report, tmp_path, capsys):
    """Nothing starts after the minutes given; each row is named, and no table is empty."""
    assert run(lambda: gpu_report.main([*REPORT, "--minutes", "0", "--json", str(tmp_path / "out.json")])) == 0
    text, left_out = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["left out"]
    assert left_out[0] == "agreement: multi, bf16"
    assert left_out[-1] == "training: stage 2, images, channels-last, compiled"
    assert len(left_out) == len(set(left_out)) and left_out[7] in text and "|" not in text


def test_rows_that_would_not_be_over_in_time(short_report, monkeypatch):
    """A row begins only where the time left suffices for the longest of its kind: generating code has its own. The last
    of a section may end after the limit without its section being called incomplete."""
    clock = [0.0]

    def takes(seconds):
        clock[0] += seconds
        return {"seconds": seconds}
    rows = [gpu_report.Row("prediction", {"how": f"row {k}"}, partial(takes, t), generates)
            for k, (t, generates) in enumerate([(10, False), (50, True), (10, False), (1, True), (1, False)])]
    monkeypatch.setattr(gpu_report, "GENERATING", {"prediction": 20})
    monkeypatch.setattr(gpu_report, "plan", lambda *_: (rows, gpu_report.Shelf()))
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: clock[0])
    result = gpu_report.gather(gpu_report.parse([*REPORT, "--minutes", "1"]), ALL[:2])
    assert [r["how"] for r in result["prediction"]] == ["row 0", "row 1"]
    assert result["left out"] == ["prediction: row 2", "prediction: row 3", "prediction: row 4"]
    clock[0], rows[:] = 0.0, rows[:2]
    assert gpu_report.gather(gpu_report.parse([*REPORT, "--minutes", "1"]), ALL[:2])["left out"] == []


def test_a_stop_ends_the_report(monkeypatch, capsys):
    """Also where torch.compile makes an error of its own of it, which would be a row that failed."""
    begun = []

    def compiling():
        begun.append(True)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("the backend compiler failed") from error
    rows = 2 * [gpu_report.Row("agreement", {"stream": "multi", "how": "bf16"}, compiling, False)]
    monkeypatch.setattr(gpu_report, "plan", lambda *_: (rows, gpu_report.Shelf()))
    assert run(lambda: gpu_report.main(REPORT)) == 130
    assert len(begun) == 1 and "interrupted" in capsys.readouterr().err


def test_sizes_of_the_report(capsys):
    """--size alone is the size of training, too, as for tools.bench; without it each has the paper's; what cannot be
    read is told under the flag's own name."""
    for flags, sizes in (("", [(256, 256), (288, 384)]), ("--size 32x48", [(32, 48), (32, 48)]),
                         ("--train-size 64x96", [(256, 256), (64, 96)]),
                         ("--size 32x48 --train-size 64x96", [(32, 48), (64, 96)])):
        args = gpu_report.parse([*flags.split(), "--device", "cpu"])
        assert [args.size, args.train_size] == sizes
    assert run(lambda: bench.main("--gpu-report x.json --device cpu --train-size 5".split())) == 2
    assert "--train-size 5: expected HEIGHTxWIDTH" in capsys.readouterr().err


def test_a_report_by_the_bench(short_report, tmp_path, capsys):
    """The bench hands the command line on, and what the report has no use for is refused."""
    for flag in (["--gpu-report", str(tmp_path / "a.json")], [f"--gpu-report={tmp_path / 'b.json'}"]):
        assert run(lambda given=flag: bench.main([*REPORT, "--minutes", "0", *given])) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert "did not suffice" in capsys.readouterr().out
    assert run(lambda: bench.main([*REPORT, "--gpu-report", str(tmp_path / "c.json"), "--count-only"])) == 2
    assert "--count-only" in capsys.readouterr().err and not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("error, word, sentence", [
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", "out of memory"),
    (FloatingPointError("step 3: not\nfinite"), "failed", "FloatingPointError: step 3: not finite")])
def test_a_row_that_fails(error, word, sentence, short_report, monkeypatch, capsys):
    """What was measured from latents stays when images do not fit; a row that fails for any reason says so in words,
    those after it are made from anew, and a check that fails is none that holds."""
    measured, streams = bench.measured, StableMTL.streams

    def fails(f, *args, **options):
        if f.args[3].encode:
            raise error
        return measured(f, *args, **options)
    monkeypatch.setattr(bench, "measured", fails)

    def no_streams(self, z_i, *args):
        if z_i.dtype == torch.bfloat16:
            raise error
        return streams(self, z_i, *args)
    monkeypatch.setattr(StableMTL, "streams", no_streams)
    only(monkeypatch, lambda row: row.section == "agreement" or "as it is" in str(row))
    assert run(lambda: gpu_report.main(REPORT)) == 1
    out, err = capsys.readouterr()
    for stage in (1, 2):
        assert f"| stage {stage}, images | as it is | {word} |" in out
        assert f"| stage {stage}, cached latents | as it is | {word} |" not in out
        assert f"- stage {stage}, images, as it is, {sentence}" in out
    assert f"| multi | bf16 | {word} |" in out and "| multi | fp32, compiled | 0 |" in out
    assert err.endswith(f"not every check holds: multi, bf16: {sentence}; multi, bf16, compiled: {sentence}\n")


def test_a_check_that_does_not_hold(short_report, monkeypatch, capsys):
    """The table says no, a sentence says which, and the exit code is 1."""
    monkeypatch.setattr(gpu_report, "TOLERANCES", dict.fromkeys(gpu_report.TOLERANCES, 1e-9))
    only(monkeypatch, lambda row: row.section in ("agreement", "toy"))
    assert run(lambda: gpu_report.main(REPORT)) == 1
    out, err = capsys.readouterr()
    assert out.count("**no**") == 3 and "not every check holds: multi, bf16: 0.0" in err and "; cpu, bf16: " in err
    assert not gpu_report.judged(float("nan"), 0.1)["holds"]


def test_the_toy_run_takes_one_process(monkeypatch, tmp_path):
    """On the CPU too, whatever its cores: those that fork after CUDA has begun cannot use Adam."""
    monkeypatch.setattr(train.cli, "cores", lambda: 8)
    cfg = parse_args([*gpu_report.TOY_RUN.split(), "--device", "cpu", "--out", str(tmp_path)])
    assert train.number_of_processes(cfg) == 1


def test_toy_losses_that_are_not_numbers(monkeypatch):
    """A step without a finite loss is named; it was a TypeError about None."""
    def trains(argv):
        place = Path(argv[argv.index("--out") + 1])
        (place / "log.jsonl").write_text('{"loss": 1.0}\n{"loss": null}\n')
    monkeypatch.setattr(gpu_report.train, "main", trains)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is not finite"):
        gpu_report.losses_of("cpu", "fp32")


def test_fp32_is_fp32(monkeypatch):
    """The report turns off TF32, with which convolutions in fp32 have 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(gpu_report, "plan", lambda *_: ([], gpu_report.Shelf()))
    gpu_report.gather(gpu_report.parse(REPORT), ALL[:2])
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_blocks_are_compiled_for_every_shape():
    """Of stage 2, 38 shapes for each of the paper's three image sizes and two lengths of micro-batches: torch's limits,
    of one code object and of all its compilations, left some uncompiled."""
    with torch._dynamo.config.patch(cache_size_limit=8, accumulated_cache_size_limit=64):
        train.compile_blocks(torch.nn.ModuleList())
        limits = torch._dynamo.config.cache_size_limit, torch._dynamo.config.accumulated_cache_size_limit
    assert min(limits) > 38 * 3 * 2


@pytest.mark.skipif(not shutil.which("g++"), reason="generated code needs a compiler, g++")
def test_generated_code_equals_eager(tmp_path, monkeypatch):
    """One small residual block through the real torch.compile, which the other tests replace: what --compile does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=2).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        expected = block(x, None)
        generated = train.compile_blocks(torch.nn.ModuleList([block]))[0](x, None)
    torch.testing.assert_close(generated, expected, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.rglob("*.cpp"))
    torch.compiler.reset()
