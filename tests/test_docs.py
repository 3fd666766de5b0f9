"""README and docs say what is so: commands run, flags exist, links lead somewhere, Python works, files are short."""
import argparse
import re
import shlex
import shutil
from unittest import mock

import cv2
import kill
import numpy as np
import pytest
import tiny
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from test_house import FILES, ROOT

import data
import evaluate
import metrics
import sample
import settings
import train
from readers.folder import Folder
from tasks import TASKS
from tools import app, bench, convert, discover, distil, fullsize, gpu_report, oracle, regions, study, tokens

PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "sample.py": sample.main, "data.py": data.main,
         "tools.bench": bench.main, "tools.study": study.main, "tools.convert": convert.main,
         "tools.distil": distil.main, "tools.gpu_report": gpu_report.main, "tools.oracle": oracle.main,
         "tools.discover": discover.main, "tools.regions": regions.main, "tools.app": app.main,
         "tools.fullsize": fullsize.main, "tools.tokens": tokens.main,
         "tests/kill.py": kill.main}
# what these make of a command line before they act; of the other commands the flags alone are read
PARSERS = {"train.py": settings.parse_args, "evaluate.py": evaluate.parse, "sample.py": sample.parse,
           "tools.bench": bench.parse, "tools.study": study.parse, "tools.distil": distil.parse,
           "tools.gpu_report": gpu_report.parse, "tools.oracle": oracle.parse, "tools.app": app.parse,
           "tools.tokens": tokens.parse}
FOREIGN = {"--nproc_per_node"}      # a flag of torchrun
EXAMPLES = {"readers/mine.py"}      # files that a reader of the pages would write


def blocks(page, language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page):
    """(program, arguments) of every command line, in a block or in code marks. Programs: MAINS, pip, pytest."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    text = re.sub("```.*?```", "", PAGES[page], flags=re.DOTALL)
    lines += re.findall("`((?:python|torchrun|pip) [^`]+)`", text)
    for part in (part for line in lines for part in line.split(" && ")):
        words = shlex.split(part, comments=True)
        if words:
            assert words[0] in ("python", "torchrun", "pip"), f"{page}: {part}: a command that this test does not know"
            before = 2 if words[1] == "-m" or words[0] == "torchrun" else 0 if words[0] == "pip" else 1
            yield words[before], words[before + 1:]


COMMANDS = sorted({(program, *argv) for page in PAGES for program, argv in commands(page)})


@pytest.fixture
def workshop(tmp_path, monkeypatch, tiny_ckpt):
    """The current folder, with what the pages take for granted: checkpoints in out/, mtl/, a small decoder, photos,
    a video, data of one's own."""
    shutil.copytree(tiny_ckpt, tmp_path / "out")
    (tmp_path / "mtl").symlink_to("out")
    distil.new_decoder(tiny.vae()).save_pretrained(tmp_path / "out/decoder")
    rng = np.random.default_rng(0)
    for path in ("photo.jpg", "next.jpg", "my/images/street.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / path)
    film = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (48, 32))
    for _ in range(3):
        film.write(rng.integers(0, 256, (32, 48, 3), np.uint8))
    film.release()
    (tmp_path / "my/depth").mkdir()
    np.save(tmp_path / "my/depth/street.npy", rng.uniform(1, 9, (60, 90)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- commands ----

class Parsed(Exception):
    """Raised where a command would begin to work."""


def cheap(program, argv):
    """Seconds, nothing downloaded, with what is in the workshop."""
    shown = argv[argv.index("--show") + 1].split(":")[0] if "--show" in argv else ""
    return program == "sample.py" or program == "data.py" and (shown in data.TOY_TEST or "my" in argv)


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_commands_of_the_pages_run_or_at_least_parse(line, workshop, monkeypatch):
    """A cheap command is run as printed; of any other the flags and their values are read by its own parser."""
    program, *argv = line
    if program in ("pip", "pytest"):
        named = [value for flag, value in zip(argv, argv[1:], strict=False) if flag in ("-r", "-c")]
        assert all((ROOT / name).is_file() for name in named)
        return
    if "--help" in argv:
        with pytest.raises(SystemExit) as end:
            MAINS[program](argv)
        assert end.value.code == 0
    elif cheap(program, argv):
        assert not MAINS[program](argv)
    elif program in PARSERS:
        PARSERS[program](argv)
    else:
        read = argparse.ArgumentParser.parse_args

        def parse_args(*args, **kwargs):
            read(*args, **kwargs)
            raise Parsed
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            MAINS[program](argv)


def test_the_readme_sets_up_a_fresh_machine():
    """In two commands: one to the main job, one to the tests. And every command of the house is on some page."""
    lines = "".join(blocks("README.md", "sh")).splitlines()
    main, tests = [line.split(" && ") for line in lines if line.startswith("pip ")]
    assert main == ["pip install -r requirements.txt -c constraints.txt", "python train.py --stage 1",
                    "python train.py --stage 2 --rho 0.4", "python evaluate.py --ckpt out/"]
    assert tests == ["pip install -r requirements.txt -r requirements-dev.txt -c constraints.txt",
                     "python -m pytest -q"]
    assert {line[0] for line in COMMANDS} == {*MAINS, "pip", "pytest"}


def test_flags_in_the_text_exist(capsys):
    """Every --flag that any page mentions is a flag of some command."""
    known = set(FOREIGN)
    for main in MAINS.values():
        with pytest.raises(SystemExit):
            main(["--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for page, text in PAGES.items():
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
        assert not unknown, f"{page} mentions {', '.join(sorted(unknown))}"


# ---- Python ----

@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, workshop, monkeypatch):
    """All blocks of a page in order, as one program."""
    monkeypatch.setattr(Folder.Frame, "inverse_depth", None, raising=False)     # undone after the test
    space = {}
    with mock.patch.dict(TASKS), mock.patch.dict(metrics.METRICS), mock.patch.dict(Folder.suffixes):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), space)
    if page == "README.md":     # what it says of the maps
        table = re.findall(r"^\| (\w+) \| ([123]) \|", PAGES[page], re.MULTILINE)
        assert {task: (60, 90, int(n))[:3 if n > "1" else 2] for task, n in table} == {
            task: space["maps"][task].shape for task in evaluate.PAPER_TASKS}


def test_the_new_dataset_of_the_pages_reads(tmp_path):
    """docs/extending.md: its tree, its unit, its mask."""
    space = {}
    exec(next(block for block in blocks("docs/extending.md", "python") if "class Mine" in block), space)
    folder = tmp_path / "mine/train/scene1"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(folder / "rgb_0001.png")
    Image.fromarray(np.array([[0, 1500, 1, 1, 1, 1]] * 4, np.uint16)).save(folder / "depth_0001.png")
    reader = space["Mine"](tmp_path, "train")
    sample = reader.load(0, ["depth"])
    assert len(reader) == 1 and sample["labels"]["depth"][0, 1, 0] == pytest.approx(1.5)
    assert sample["valid"]["depth"][0].tolist() == [False] + [True] * 5

    exec(next(block for block in blocks("docs/extending.md", "python") if "class Partial" in block), space)
    partial, before = space["Partial"](tmp_path, "train"), space["Partial"](tmp_path, "train").identity()
    label = tmp_path / "mine/labels/depth/0.png"
    label.parent.mkdir(parents=True)
    assert partial.labelled("depth") == [] and before != reader.identity()
    label.touch()
    assert partial.labelled("depth") == [0] and partial.identity() == reader.identity()


def test_the_new_task_of_the_pages_codes():
    """docs/extending.md: near is bright, far is dark, what is invalid has no influence."""
    space = {}
    with mock.patch.dict(TASKS):
        exec(next(block for block in blocks("docs/extending.md", "python") if "def encode" in block), space)
    label, valid = torch.tensor([[[[2.0, 1.0, 0.0, 9.0]]]]), torch.tensor([[[[True, True, True, False]]]])
    code = space["encode"](label, valid)
    assert code[0, :, 0, :3].tolist() == [[1, 0, -1]] * 3
    assert space["decode"](code)[0, 0, 0, :3].tolist() == [1, 0.5, 0]


# ---- links, sizes, versions ----

def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files, pictures and headings that there are; so do the names of Python files in the text."""
    here = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        target, _, anchor = link.partition("#")
        if not target.startswith("https://"):
            there = (here.parent / target).resolve() if target else here
            assert there.exists(), f"no {target}"
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(slug, headings), f"no heading {link}"
    for name in re.findall(r"(?<![\w./])[\w/]+\.py\b", PAGES[page]):
        assert (ROOT / name).is_file() or name in EXAMPLES, f"no {name}"


def test_nothing_is_left_out():
    """The README names every file on top and every room; every picture is on some page."""
    rooms = {path.name if path.parent == ROOT else f"{path.parent.name}/" for path in FILES} | {"docs/", "tests/"}
    drawn = re.findall(r"^    (\S+)  (?:(tests/)  )?", PAGES["README.md"], re.MULTILINE)
    assert rooms == {name for names in drawn for name in names if name}
    shown = set(re.findall(r"assets/([\w.]+)", "".join(PAGES.values())))
    assert shown == {path.name for path in (ROOT / "assets").iterdir()}


def test_sizes():
    """A README of one sitting; files that one keeps in mind."""
    assert len(PAGES["README.md"]) <= 12_000
    lines = {path: len(path.read_text().splitlines()) for path in [*FILES, *(ROOT / "tests").glob("*.py")]}
    most = {ROOT / "train.py": 600, ROOT / "evaluate.py": 600}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > most.get(path, 450)}


def read_requirements(name):
    """{package: its specifier} of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {r.name: r.specifier for r in map(Requirement, filter(None, lines))}


def test_versions_agree():
    """constraints.txt pins all that is required, within its range; the table of what was tested says the same."""
    need, pins = read_requirements("requirements.txt"), read_requirements("constraints.txt")
    for package, wanted in {**need, **read_requirements("requirements-dev.txt")}.items():
        pin, = pins.pop(package)
        assert pin.operator == "==" and wanted.contains(pin.version)
    assert not pins
    pins, page = read_requirements("constraints.txt"), PAGES["docs/troubleshooting.md"]
    rows = {name: tested for name, *tested in re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)}
    assert rows.keys() == need.keys()
    for package, (oldest, newest) in rows.items():
        lowest = next(Version(s.version) for s in need[package] if s.operator == ">=").release
        assert Version(oldest).release[:len(lowest)] == lowest
        assert [s.version for s in pins[package]] == [newest]
