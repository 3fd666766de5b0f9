"""What several test files share: the repository on the import path, and small checkpoints of both stages."""
import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model():
    """A stage-2 model with random weights whose task attention is not zero. Shared: do not change it."""
    return tiny.model(multi=True)


def _saved(model, folder):
    model.save(folder)
    (folder / "config.json").write_text(json.dumps({"size": [32, 48]}))
    return folder


@pytest.fixture(scope="session")
def tiny_ckpt(tiny_model, tmp_path_factory):
    """Folder of `tiny_model`: stage 2, and its single stream with stage=1. Do not write there."""
    return _saved(tiny_model, tmp_path_factory.mktemp("stage2"))


@pytest.fixture(scope="session")
def tiny_ckpt_1(tmp_path_factory):
    """Folder of a checkpoint that has stage 1 only. Do not write there."""
    return _saved(tiny.model(), tmp_path_factory.mktemp("stage1"))
