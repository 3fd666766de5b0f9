"""What large models need: compiled blocks, half precision, another memory format. None may change what is learned."""
import json
from functools import partial

import pytest
import tiny
import torch

import train
from cli import run

SMALL = ("--steps 2 --scenes 2 --size 16x24 --batch 2 --micro 2 --picture-every 0 --workers 0 --warmup 1 --processes 1 "
         "--threads 1 --cache none --val-samples 0")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile captures the graphs as ever, and runs them without generating code for them."""
    compile = torch.nn.Module.compile

    def trace(self, **options):
        return compile(self, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)


def test_compiled_blocks_give_the_same_gradients(traced):
    """Every residual block and feed-forward layer of both streams is captured whole (fullgraph); outputs and gradients
    do not change."""
    (z_i, z_j), results = tiny.latents(), []
    for prepare in (lambda m: m, train.compile_blocks):
        model = prepare(tiny.model(multi=True))
        z = model(z_i, z_j, ["depth"])["depth"]
        z.square().mean().backward()
        results.append((z, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (z, grads), (z_compiled, compiled) = results
    assert torch.allclose(z, z_compiled, atol=1e-6) and grads.keys() == compiled.keys()
    assert all(torch.allclose(grads[n], compiled[n], atol=1e-5) for n in grads)


@pytest.mark.parametrize("flags", ["--compile", "--precision fp16 --channels-last", "--precision bf16 --checkpointing"])
def test_switches_of_a_gpu_run_train_as_without(traced, tiny_base, tmp_path, flags):
    """Two steps of each stage with a switch log the losses of those without, up to the precision asked for."""
    logs = []
    for name, extra in (("plain", ""), ("switched", flags)):
        out = tmp_path / name
        for stage in (1, 2):
            argv = f"--stage {stage} --base {tiny_base} --out {out} {SMALL} {extra}".split()
            assert run(partial(train.main, argv)) == 0
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    plain, switched = ([(e["stage"], e["step"], e["task"], e["loss"]) for e in log] for log in logs)
    assert len(plain) == 4 and [p[:3] for p in plain] == [s[:3] for s in switched]
    assert [s[3] for s in switched] == pytest.approx([p[3] for p in plain], rel=1e-5 if "compile" in flags else 2e-2)
