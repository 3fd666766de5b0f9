"""The files of evaluations: nothing that was measured is lost, and what is in the way is told."""
import json
import resource
import shutil

import pytest

import cli
import evaluate
from cli import run
from readers.toyworld import ToyWorld


@pytest.fixture
def names(monkeypatch):
    """Of the worlds that there are to test on, small ones."""
    names = ["streets"]
    monkeypatch.setattr(evaluate, "test_readers",
                        lambda *args, **options: [ToyWorld(name, "test", 2, (16, 24)) for name in names])
    return names


@pytest.fixture
def go(capsys, names):
    """go(checkpoint, flags) -> (exit code, stderr)"""
    def call(ckpt, flags=""):
        argv = f"--ckpt {ckpt} --workers 0 --processes 1 --trivial 0 {flags}".split()
        return run(lambda: evaluate.main(argv)), capsys.readouterr().err
    return call


def reports(folder):
    """{name: what it says}"""
    return {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")
            if p.name not in ("config.json", "model.json")}


MORE = ["--limit 1", "--trivial 1", "--confidence", "--pixels", "--split val --json results.json"]


def test_other_settings_cost_no_report(go, tiny_ckpt_1, tmp_path, monkeypatch):
    """A quick look, or one more number, took the place of a full evaluation without a word."""
    out, seen = shutil.copytree(tiny_ckpt_1, tmp_path / "out"), []
    monkeypatch.chdir(out)
    for flags in ["", *MORE]:
        code, said = go(out, flags)
        there = reports(out)
        assert code == 0 and len(there) == len(seen) + 1 and all(old in there.values() for old in seen)
        assert ("of other settings or another checkpoint" in said) == bool(seen)
        seen.append(there["results.json"])
    assert {"results.before.json", "results.before_5.json"} < there.keys()
    assert "kept from" in go(out, f"{MORE[-1]} --stage 1")[1] and reports(out) == there
    assert "kept from" not in go(out, f"{MORE[-1]} --overwrite")[1] and reports(out) == there


def test_weights_that_are_no_more_make_room(go, tiny_ckpt_1, tmp_path):
    """What they measured is not kept; a report that does not say which they were is."""
    out = shutil.copytree(tiny_ckpt_1, tmp_path / "out")
    assert go(out)[0] == 0
    path, weights = out / "results.json", out / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1
    weights.write_bytes(data)
    assert go(out, "--limit 1")[0] == 0
    assert list(reports(out)) == ["results.json"]
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("weights", "flags")}
    path.write_text(json.dumps(old))        # of an earlier version
    assert go(out)[0] == 0
    assert reports(out)["results.before.json"] == old


def test_a_named_file_keeps_the_other_checkpoints_report(go, tiny_ckpt, tiny_ckpt_1, tmp_path):
    """--json, twice the same by mistake."""
    seen = []
    for ckpt, flags, n in ((tiny_ckpt_1, "", 1), (tiny_ckpt, "", 2), (f"{tiny_ckpt}/", "", 2),
                           (tiny_ckpt, "--stage 1", 3)):
        assert go(ckpt, f"{flags} --json {tmp_path / 'r.json'}")[0] == 0
        there = {name: (r["stage"], r["results"]) for name, r in reports(tmp_path).items()}
        seen += [there["r.json"]] * (len(seen) < n)
        assert len(there) == n and all(old in there.values() for old in seen)
    assert {"r.before.json", "r.before_2.json"} < there.keys()


def test_a_test_set_that_is_away_is_not_lost(go, names, tiny_ckpt_1, tmp_path):
    """Its disk is not mounted, say: it cannot be measured again now."""
    out = shutil.copytree(tiny_ckpt_1, tmp_path / "out")
    names.append("things")
    assert go(out)[0] == 0
    before = reports(out)["results.json"]
    del names[0]
    assert go(out)[0] == 0
    assert reports(out)["results.before.json"] == before and list(reports(out)["results.json"]["results"]) == names


def test_results_of_stage_1_outlive_stage_2(go, tiny_ckpt, tiny_ckpt_1, tmp_path):
    """The numbers of the single stream move aside when the multi stream in the same folder is evaluated, and take no
    place of others."""
    out = shutil.copytree(tiny_ckpt_1, tmp_path / "out")
    assert go(out)[0] == 0
    single = reports(out)["results.json"]
    shutil.copytree(tiny_ckpt, out, dirs_exist_ok=True)
    assert go(out)[0] == 0
    there = reports(out)
    assert there.keys() == {"results.json", "results_stage1.json"} and there["results_stage1.json"] == single
    assert (single["stage"], there["results.json"]["stage"]) == (1, 2)
    shutil.copy(out / "results_stage1.json", out / "results.json")
    (out / "results_stage1.json").write_text(json.dumps(single | {"commit": "another"}))
    assert go(out)[0] == 0
    assert {k: r["commit"] for k, r in reports(out).items()} == {
        "results.json": None, "results_stage1.json": "another", "results_stage1_2.json": None}


def test_what_cannot_be_written_is_told(go, tiny_ckpt_1, tmp_path, monkeypatch):
    """A read-only checkpoint is refused before the work, with the way out; a full disk ends in a sentence that names
    the file, and no half of it stays."""
    out = shutil.copytree(tiny_ckpt_1, tmp_path / "out")

    def refused(**_):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as m:
        m.setattr(cli.tempfile, "TemporaryFile", refused)
        code, error = go(out)
    assert code == 2 and f"results.json cannot be written: Permission denied in {out}; name another file with" in error
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, error = go(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and f"{out / 'results.json'} cannot be written (File too large): make room; what is" in error
    assert not list(out.glob("results*"))


def test_what_may_not_be_read_is_told(go, tiny_ckpt_1, tmp_path, monkeypatch):
    """A file of somebody else's: the bare error of the system."""
    baseline = tmp_path / "theirs.json"
    baseline.touch()
    read = evaluate.Path.read_text

    def refused(path, **options):
        if path == baseline:
            raise PermissionError(13, "Permission denied")
        return read(path, **options)
    monkeypatch.setattr(evaluate.Path, "read_text", refused)
    code, error = go(tiny_ckpt_1, f"--json {tmp_path / 'r.json'} --baseline {baseline}")
    assert code == 2 and f"{baseline} may not be read: ask its owner" in error
