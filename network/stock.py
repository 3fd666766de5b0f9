"""What is diffusers' and transformers' own, imported when it is first used: `stock.UNet2DConditionModel`.

Importing these two takes seconds, several times as long as torch. A command that imports them here alone answers --help
and a wrong flag without them.
"""
import gc
import importlib
from contextlib import contextmanager

PLACES = {
    "AutoencoderKL": "diffusers", "AutoencoderTiny": "diffusers", "UNet2DConditionModel": "diffusers",
    "BasicTransformerBlock": "diffusers.models.attention", "FeedForward": "diffusers.models.attention",
    "AttnProcessor2_0": "diffusers.models.attention_processor", "ResnetBlock2D": "diffusers.models.resnet",
    "CLIPTextConfig": "transformers", "CLIPTextModel": "transformers", "CLIPTokenizer": "transformers"}


@contextmanager
def _no_garbage():
    """Without garbage collection, which costs a tenth of the time of imports and finds little."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def __getattr__(name):
    if name not in PLACES:
        raise AttributeError(f"stock has no {name}: name its module in stock.PLACES")
    with _no_garbage():
        globals()[name] = thing = getattr(importlib.import_module(PLACES[name]), name)      # asked for once only
    if PLACES[name] == "transformers":      # it has a progress bar for every part that is read or written
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
    return thing


def load():
    """Import all of it now: before processes part, which would each do it again."""
    for name in PLACES:
        __getattr__(name)
