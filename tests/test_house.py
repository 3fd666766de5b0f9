"""The house: what imports what, so that one can read from the readers up to the tools and never has to look ahead."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if p.parent.name != "tests")
# Floors from the ground up: a file imports from lower floors, and within its own room. toy/ is but a place of weights;
# what made them knows nearly everything.
FLOORS = [("cli", "checkpoint", "tasks", "draw", "toy", "network"),
          ("readers", "model", "network.generalist", "metrics", "inference.infer", "inference.confidence",
           "inference.photometric"),
          ("data", "inference"), ("training",), ("toy.make", "baselines"),
          ("sample", "evaluate", "settings"), ("train",), ("tools",)]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room(path):
    return room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


def room_of(module):
    """Of "network.generalist.draw": the file, if it has a floor of its own, else its folder."""
    return next((own for own in FLOOR if "." in own and f"{module}.".startswith(f"{own}.")), module.split(".")[0])


def modules(path):
    """All that a file imports, also inside functions: "data", and of `from toy import make` "toy.make"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: name the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path):
    """The rooms of this project that a file imports from."""
    return {room_of(module) for module in modules(path)} & FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """tools -> train -> sample, evaluate -> toy -> data -> readers, model -> tasks, checkpoint, cli, draw."""
    own = room(path)
    wrong = [other for other in imported(path) if other != own and FLOOR[other] > FLOOR[own]]
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}, which is further up"


def test_what_takes_seconds_to_import_waits_in_stock():
    """--help and a wrong flag need neither diffusers nor transformers: files ask network/stock.py for theirs."""
    slow = {path: {"diffusers", "transformers"} & {m.split(".")[0] for m in modules(path)} for path in FILES}
    assert not {str(path.relative_to(ROOT)): names for path, names in slow.items() if names}


def test_every_file_has_a_floor():
    """A new file on top, or a new room, finds its place in FLOORS: that is where its imports are settled."""
    assert {room(path) for path in FILES} <= FLOOR.keys()
    assert not {"model", "data"} & {name for path in FILES if room(path) == "readers" for name in imported(path)}
