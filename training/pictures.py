"""A picture now and then, while a model trains: what it makes of a sample of every dataset."""
import torch

from data import picture, prepare, tasks_with_labels, unreadable
from draw import COMPARED, cell, compare, draw_panel, sample_rows
from inference.infer import network_maps
from inference.results import put_made
from metrics import aligned


def first_sample(reader, wanted, codecs, skip_bad):
    """(those of the wanted tasks that it has labels of, what data.prepare makes of it) of the first sample with any;
    None if there is none. ValueError if it cannot be read, or with skip_bad the next one is taken."""
    tasks = tasks_with_labels(reader, wanted)
    for index in (i for t in tasks for i in reader.indices(t)):
        own = tuple(t for t in tasks if index in reader.indices(t))
        try:
            return own, prepare(reader, index, own, codecs)
        except (OSError, ValueError) as error:
            if not skip_bad:
                raise unreadable(reader, index, error, skip_bad, "for a picture, ") from error
    return None


def samples(readers, model, skip_bad):
    """Yield (reader, tasks, sample) until each task that a dataset has labels of has come once, or none can be read."""
    for reader in readers:
        left = set(model.tasks)
        while sample := first_sample(reader, left, model.codecs, skip_bad):
            yield reader, *sample
            left -= {*sample[0]}


@torch.no_grad()
def save_picture(model, readers, path, skip_bad=False):
    """Of every dataset a sample, or more until each of its tasks is shown: the frames, then labels beside predictions,
    fitted as for the metric.

    Leaves the model in eval mode.
    """
    device, cells, shown = next(model.parameters()).device, [], set()
    model.eval()
    for reader, tasks, item in samples(readers, model, skip_bad):
        pairs = []
        pair = [f[None].to(device) for f in item["frames"]]
        maps = network_maps(model, *pair, tasks, rows=1)      # a task at a time: the memory is training's
        for t in tasks:
            codec, predicted, valid = model.codecs[t], maps[t][0].float().cpu(), item["valid"][t][0]
            label = codec.decode(item["labels"][t][None])[0]
            pairs.append(compare(codec, label, valid, aligned(codec, predicted, label, valid), native=False))
        titles = [f"{reader.name} {reader.split}", "second frame"][:1 if torch.equal(*item["frames"]) else 2]
        frames = [(title, cell(picture(f))) for title, f in zip(titles, item["frames"], strict=False)]
        cells += sample_rows(frames, pairs, 5)
        shown.update(tasks)
    if cells:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_made(path, draw_panel(cells, 5, [model.codecs[t] for t in model.tasks if t in shown], COMPARED).save, "PNG")
