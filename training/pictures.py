"""A picture now and then, while a model trains: what it makes of a sample of every dataset."""
import torch

from data import picture, prepare, tasks_with_labels, unreadable
from draw import COMPARED, cell, compare, draw_panel, sample_rows
from inference.infer import network_maps
from inference.results import put_made
from metrics import aligned


def first_sample(reader, wanted, codecs, skip_bad):
    """(tasks, what data.prepare makes of it) of the first sample with a label of the wanted tasks; None if there is
    none. ValueError if it cannot be read, or with skip_bad the next one is taken."""
    tasks = tasks_with_labels(reader, wanted)
    for index in (i for t in tasks for i in reader.indices(t)):
        own = tuple(t for t in tasks if index in reader.indices(t))
        try:
            return own, prepare(reader, index, own, codecs)
        except (OSError, ValueError) as error:
            if not skip_bad:
                raise unreadable(reader, index, error, skip_bad, "for a picture, ") from error
    return None


@torch.no_grad()
def save_picture(model, readers, path, skip_bad=False):
    """A sample of every dataset: its frames, then every label beside the prediction, fitted as for the metric.

    Leaves the model in eval mode.
    """
    device, cells = next(model.parameters()).device, []
    model.eval()
    for reader in readers:
        sample = first_sample(reader, model.tasks, model.codecs, skip_bad)
        if not sample:
            continue
        (tasks, item), pairs = sample, []
        pair = [f[None].to(device) for f in item["frames"]]
        maps = network_maps(model, *pair, tasks, rows=1)      # a task at a time: the memory is training's
        for t in tasks:
            codec, predicted, valid = model.codecs[t], maps[t][0].float().cpu(), item["valid"][t][0]
            label = codec.decode(item["labels"][t][None])[0]
            pairs.append(compare(codec, label, valid, aligned(codec, predicted, label, valid), native=False))
        titles = [f"{reader.name} {reader.split}", "second frame"][:1 if torch.equal(*item["frames"]) else 2]
        frames = [(title, cell(picture(f))) for title, f in zip(titles, item["frames"], strict=False)]
        cells += sample_rows(frames, pairs, 5)
    if cells:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_made(path, draw_panel(cells, 5, [model.codecs[t] for t in model.tasks], COMPARED).save, "PNG")
