"""What several test files share: small checkpoints of both stages."""
import gc
import json
import os
import signal

import pytest

gc.disable()    # until all tests are collected: what imports make is kept, and there is nothing to find among it
pytest_plugins = ["runs"]      # the fixtures of training
os.environ["HF_HUB_OFFLINE"] = "1"      # before the first import of diffusers: no test waits for a network

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

import cli  # noqa: E402

cli.keep_memory()           # as every command does
torch.set_num_threads(1)    # two tests run at a time (pyproject.toml), and some fork


# in the background a shell has these ignored, and so would all that tests start and then stop
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish():
    """What the imports left in memory stays to the end: let no garbage collection look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model():
    """A thin stage-2 model with random weights whose task attention is not zero. Shared: do not change it."""
    return tiny.model(multi=True, unet=tiny.thin_unet)


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
    return _saved(tiny.model(unet=tiny.thin_unet), tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of an untrained base as thin as its layout allows. Do not write there."""
    return tiny.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def clip(tmp_path):
    """A video of five frames, 48x32 pixels, ten a second, that turn from black to red."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write MJPG")
    for i in range(5):
        writer.write(np.full((32, 48, 3), (0, 0, 50 * i), np.uint8))   # OpenCV's order: blue, green, red
    writer.release()
    return path
