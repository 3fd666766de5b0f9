"""Labels and features where an image has none (HiTTs, section 3.3): a teacher, a finished checkpoint of the same
system, says what a new model of it learns there, beside the true labels of the others.

    L = L_s + L_p + L_f     L_p: as L_s, on what the teacher predicts where it is confident, and only where no label is
                            L_f: squared distance to the teacher's features (hitts.py)

The teacher sees the frames as they are, the student the same in other light. The cache keeps training frames free of
crops and jitter, so what the teacher says of an image is always the same: it is computed when it is needed rather than
stored, which gives what an offline pass would.

Of which tasks labels are discovered, training/discovery.py says.
"""
import torch

from baselines.trunk import first_images, noise, of_step
from readers.reader import some
from training.discovery import discoverable

KEPT, CALIBRATION = 0.5, 16     # share of unlabelled pixels that are confident enough; images per dataset to find where


def with_true_labels(readers, drop):
    """The toy worlds with the labels that could be discovered in them, `drop` among them: (readers, {world: tasks})."""
    out, beside = [], {}
    for reader in readers:
        full = reader.complete()
        known = set(reader.tasks) - drop.get(reader.name, set())
        beside[reader.name] = set(discoverable(full.tasks)) - known
        full.tasks = tuple(t for t in full.tasks if t in reader.tasks or t in beside[reader.name])
        out.append(full)
    return out, beside


def relit(frames, keys):
    """The frames (B,3,H,W) of each sample in other light, alike: contrast and brightness are drawn anew in each step;
    the balance of colours stays, for labels of albedo follow it."""
    facts, device, out = of_step(keys), frames[0].device, []
    contrast, gain = (1 + 0.3 * noise(facts, what, (1, 1, 1), device).clamp(-1, 1) for what in ("contrast", "gain"))
    for frame in frames:
        x = (frame + 1) / 2
        mean = x.mean((1, 2, 3), keepdim=True)
        out.append((((x - mean) * contrast + mean) * gain).clamp(0, 1) * 2 - 1)
    return out


def surest(sure, share):
    """What this share of numbers (N,) exceeds. Those that tie there are all among it, as in discovery.keep: a saturated
    output is as sure in half of the image or more, and none of that is surer than the rest."""
    ordered = sure.sort().values
    least = ordered[int((1 - share) * len(sure))]
    ties = (ordered == least).sum() > 1
    return (least.nextafter(least.new_tensor(-torch.inf)) if ties else least).item()


class Discovery:
    """What a batch of the mixture has beside its labels.

    teacher: a System, or None; labels: "teacher", "true" (of the toy worlds, which know them all: the upper bound) or
    None; features: whether the student follows the teacher's. With neither, what is left is other light: the control
    of a student. ValueError if a training image cannot be read.
    """

    def __init__(self, mixture, tasks, teacher=None, labels="teacher", features=False):
        self.mixture, self.teacher, self.labels, self.features = mixture, teacher, labels, features
        self.every, self.tasks = tasks, discoverable(tasks)
        self.least = self.thresholds() if labels == "teacher" else {}

    def lacks(self, key, task):
        """Whether the image of a key (dataset, index, flip) has no label of the task to train on."""
        return key[1] not in self.mixture.usable.get((key[0], task), ())

    @torch.no_grad()
    def thresholds(self):
        """{task: the confidence that the share KEPT of unlabelled pixels exceeds}, over a few images of each dataset;
        more of them exceed it where many are equally sure (`surest`)."""
        seen, device = {t: [] for t in self.tasks}, next(self.teacher.parameters()).device
        for reader in self.mixture.readers:
            known = some(reader, range(len(reader)), CALIBRATION)
            for index, item in first_images(self.mixture, reader, known, (), self.teacher.codecs):
                lacking = [t for t in self.tasks if self.lacks((reader.name, index), t)]
                pair = [f[None].to(device) for f in item["frames"]]
                for t, (_, sure) in self.teacher.guess(*pair, lacking).items():
                    seen[t].append(sure.flatten().cpu())
        return {t: surest(torch.cat(x), KEPT) for t, x in seen.items() if x}

    @torch.no_grad()
    def ready(self, b):
        """The micro-batch with "pseudo" {task: (code, mask)}, "features" {task: (B,C,h,w)} and "lacks" {task: (B,)
        bool}; its frames relit, and what belongs to "pseudo" out of its labels' masks."""
        pseudo, valid, device = {}, dict(b["valid"]), b["frames"][0].device
        lacks = {t: torch.tensor([self.lacks(key, t) for key in b["keys"]], device=device) for t in self.every}
        lacking = {t: lacks[t].view(-1, 1, 1, 1) for t in self.tasks if lacks[t].any()}
        if self.labels == "true":
            for t in (t for t in lacking if t in b["labels"]):
                pseudo[t], valid[t] = (b["labels"][t], valid[t] & lacking[t]), valid[t] & ~lacking[t]
        elif self.labels:
            guesses = self.teacher.guess(*b["frames"], [t for t in lacking if t in self.least])
            pseudo = {t: (code, (sure.float() > self.least[t]) & lacking[t]) for t, (code, sure) in guesses.items()}
        features = self.teacher.features(*b["frames"]) if self.features else {}
        return b | {"pseudo": pseudo, "features": features, "lacks": lacks, "valid": valid,
                    "frames": relit(b["frames"], b["keys"])}
