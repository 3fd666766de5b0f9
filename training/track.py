"""The log of training for another program, too: trackio, wandb, or any module that has init, log and finish."""
import contextlib
import importlib
from dataclasses import asdict


def find_tracker(name):
    """The module that --track names, None if it names none; ValueError says what it lacks."""
    if not name:
        return None
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"--track {name}: there is no such module ({error}): pip install it, or leave --track out"
                         ) from error
    if absent := {"init", "log", "finish"} - set(dir(module)):
        raise ValueError(f"--track {name}: this module has no {', '.join(sorted(absent))}, as trackio and wandb have")
    return module


@contextlib.contextmanager
def _told(name):
    """Whatever the module raises, as a ValueError: each has exceptions of its own."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--track {name} failed ({why}): mend that, or leave --track out") from error


@contextlib.contextmanager
def tracking(cfg, chief):
    """Gives a function that takes the entries of log.jsonl and hands them to the module of --track, if there is one:
    the loss once more under the name of its task, what is not finite left out."""
    module = find_tracker(cfg.track) if chief else None
    if module is None:
        yield lambda entry: None
        return

    def track(entry):
        task, dataset = "+".join(entry["task"]), "+".join(entry["dataset"])
        told = entry | {"task": task, "dataset": dataset, f"loss/{task}": entry["loss"]}
        with _told(cfg.track):
            module.log({k: v for k, v in told.items() if v is not None}, step=entry["step"])

    with _told(cfg.track):
        module.init(project="stablemtl", name=f"{cfg.out}, stage {cfg.stage}", config=asdict(cfg))
    try:
        yield track
    finally:
        with _told(cfg.track):
            module.finish()
