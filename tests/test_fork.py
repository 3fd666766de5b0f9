"""What somebody changes who goes on from this code is noticed by what was made before: caches, results, studies."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

import evaluate
import metrics
from cli import run
from inference import report
from network.attention import watch, watched
from readers.reader import Frame, Reader
from readers.toyworld import ToyWorld
from tasks import TASKS
from tools.study_cost import alike
from tools.study_report import advances, gain, made
from tools.study_variants import STABLEMTL
from training.discovery import PseudoLabels


class Some(Reader):
    """Four samples whose depth labels are those in a list."""

    name, page, splits, use = "some", "", ("train",), {"train": "train"}
    tree = {"image": "{0}.png"}
    tasks, size, known = ("depth",), (16, 24), None
    Frame = Frame

    def labelled(self, task):
        return super().labelled(task) if self.known is None else self.known


def test_a_reader_with_other_labels_is_another(tmp_path):
    """New depth labels were left out of a cache that had been built without them, as zero latent cells."""
    for k in range(4):
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / f"some/{k}.png").touch()
    seen = []
    for known in None, [0, 1, 2, 3], [0, 1], [0, 1, 3]:
        reader = Some(tmp_path, "train")
        reader.known = known
        seen.append(reader.identity())
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_a_new_task_of_two_frames_sees_the_second(monkeypatch):
    """The toy worlds had a list of their own of such tasks."""
    streets = ToyWorld("streets", "train", 1, (16, 24))
    assert "next" not in streets.load(0, ("depth",))
    monkeypatch.setitem(TASKS, "depth", replace(TASKS["depth"], frames=2))
    assert "next" in streets.load(0, ("depth",))


@pytest.fixture
def evaluated(tiny_ckpt_1, tmp_path, capsys):
    """evaluated(name, more flags) -> (report, stdout, stderr) of a copy of a checkpoint in a folder of this name."""
    def call(name, more=""):
        if not (tmp_path / name).is_dir():
            shutil.copytree(tiny_ckpt_1, tmp_path / name)
        flags = f"--ckpt {tmp_path / name} --data toy --limit 1 --trivial 1 --workers 0 {more}"
        assert run(lambda: evaluate.main(flags.split())) == 0
        return json.loads((tmp_path / name / "results.json").read_text()), *capsys.readouterr()
    return call


def test_results_of_other_metrics_are_told(evaluated, tmp_path, monkeypatch):
    """A Delta_m of -11% of a model against itself, from before and after a change of metrics.py."""
    assert evaluated("one")[0]["scoring"] == report.scoring()
    baseline = f"--baseline {tmp_path / 'one/results.json'}"
    assert "have changed since" not in evaluated("two", baseline)[2]
    old = json.loads((tmp_path / "one/results.json").read_text())
    (tmp_path / "one/results.json").write_text(json.dumps(old | {"scoring": "another"}))
    told = f"metrics, tasks or readers have changed since {tmp_path / 'one/results.json'}"
    assert told in evaluated("two", baseline)[2]
    under = {"commits": [], "torch": ["2"], "scorings": ["a"]}
    told = [made({"trained under": under | more, "hardware": "cpu"}) for more in ({}, {"scorings": ["a", "b"]})]
    assert "changed between evaluations" in told[1] and told[1].startswith(told[0])


def test_an_undefined_headline_is_a_cell(evaluated, monkeypatch, capsys):
    """A metric that is NaN ended the evaluation without any table, and a study without a page where it was zero."""
    class Never(metrics.METRICS["depth"].accumulator):
        def score(self, pred, label, valid):
            return {"AbsRel": float("nan")}
    monkeypatch.setitem(metrics.METRICS, "depth", metrics.METRICS["depth"]._replace(accumulator=Never))
    results, said, _ = evaluated("one")
    assert "AbsRel" not in results["results"]["real"]["depth"] and said.count("| undefined |") == 3
    assert "| real | normal | " in said and "depth" not in evaluate.by_task(results["results"])
    assert gain({"depth": {"real": 1.0}}, {"depth": {"real": 0.0}}, ("real",)) is None
    assert "notice: a Delta_m is left out: expected a baseline above zero" in capsys.readouterr().err
    rows = {name: {"seeds": {0: {"results": {"depth": {"real": x}}, "delta_m": {}}}}
            for name, x in (("single", 1.0), ("single-task", 0.0))}
    assert advances(rows, STABLEMTL.zeros[0], ("depth",), "single", "unseen") == {}
    assert advances(rows, STABLEMTL.zeros[0], (), "single", "unseen") == {}


def test_code_in_a_new_folder_counts(tmp_path, monkeypatch):
    """Results were kept when a metric in a folder of its own had changed; and where the whole code lies makes no
    difference."""
    top = tmp_path / "tools/code"
    names = "own/metric.py", "tests/test_it.py", "tools/it.py", "inference/report.py"
    files = {name: top / name for name in names}
    for path in files.values():
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(report, "__file__", str(files["inference/report.py"]))
    for name, path in files.items():
        module = type(report)(name)
        module.__file__ = str(path)
        monkeypatch.setitem(report.sys.modules, name, module)
    assert {*report.source_files()} == {files["own/metric.py"], files["inference/report.py"]}


def test_pseudo_labels_know_the_code_they_are_in(tiny_model, tmp_path, monkeypatch):
    """Beside a latent cache that was built anew, they stayed in the old one."""
    worlds, albedo = [ToyWorld("streets", "train", 2, (16, 24))], TASKS["albedo"]

    def labels():
        return PseudoLabels(tmp_path / "pseudo", worlds, "vae", {"streets": ["albedo"]}, "teacher")
    labels().create(worlds, tiny_model)
    labels()
    monkeypatch.setitem(TASKS, "albedo", replace(albedo, encode=lambda label, valid: -albedo.encode(label, valid)))
    with pytest.raises(ValueError, match="another code of albedo.: name another folder, or work with the code, base"):
        labels()


def test_what_a_step_costs_depends_on_the_unet(tiny_ckpt_1, tmp_path):
    """A study's wider row was said to cost what the first row does."""
    wide = shutil.copytree(tiny_ckpt_1, tmp_path / "wide")
    assert alike(wide) == alike(tiny_ckpt_1)
    path = wide / "unet/config.json"
    path.write_text(path.read_text().replace("block_out_channels", "other_channels"))
    assert alike(wide) != alike(tiny_ckpt_1)


def test_attention_to_a_single_stream_has_no_entropy():
    """Of two tasks it is neither even nor sharp; it was said to be sharp."""
    a = torch.ones(1, 3, 4)
    for others, entropy in (1, None), (2, 1.0):
        sums = watch(torch.full((others, 1, 3, 2), 1 / others), a, a)
        told = watched(dict(zip(("images", "entropy", "largest", "term", "main"), sums.tolist(), strict=True)))
        assert told["attention_entropy"] == entropy and told["attention_largest"] == 1 / others
