"""What a user sees of flags and mistakes: one sentence that names the cause and the remedy, exit code 2, no traceback."""
import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing its usage: a wrong flag ends as any other mistake does, in one sentence."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists every flag)")


def whole(least):
    """argparse type: an integer of at least `least`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)
    return number


def parse_device(text):
    """"auto" -> cuda where there is one, else cpu."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {text} is not available here: use cpu, or cuda on a machine with a GPU") from None
    return torch.device(text)


def run(main):
    """Call main(); a user's mistake ends in one sentence on stderr and exit code 2, without a traceback."""
    try:
        return main() or 0
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: out of GPU memory: lower --micro, add --checkpointing, or use smaller images ({error})", file=sys.stderr)
    return 2
