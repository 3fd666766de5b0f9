"""training/losses.py: the usual losses of tasks, pixel by pixel, by hand."""
import pytest
import torch

from tasks import TASKS
from training.losses import DENSE


def pixels(*columns):
    """Pixels in a row, each a tuple of three channels -> (1,3,1,n)."""
    return torch.tensor(columns).T[None, :, None]


@pytest.mark.parametrize("task, image, code, errors", [
    ("albedo", [(0.5, -0.5, 0.2), (1.0, 1.0, 1.0)], [(0.0, 0.0, 0.2), (0.0, -1.0, 1.0)], [1 / 3, 1.0]),
    ("optical_flow", [(0.5, -1.0, 0.5)], [(0.0, 1.0, 0.0)], [1.0]),
    ("normal", [(2.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.6, 0.0, 0.8)],
     [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)], [1.0, 2.0, 0.2]),
])
def test_losses_by_hand(task, image, code, errors):
    """L1, mean over channels; of directions 1 - cosine."""
    image, code = pixels(*image), pixels(*code)
    found = DENSE[TASKS[task].dense_loss](image, code, torch.ones_like(code[:, :1], dtype=torch.bool), TASKS[task])
    torch.testing.assert_close(found.flatten(), torch.tensor(errors))


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.3, 0.5)])
def test_the_loss_of_depth_is_l1_after_scale_and_shift(scale, shift):
    """A prediction -1, -1, 1, 1 of -1, 0, 0, 1 is best halved: what is left is 0.5 at every pixel, whatever its scale
    and shift were; its three channels count by their mean, and an invalid pixel for nothing."""
    wanted, told = torch.tensor([-1.0, 0, 0, 1, 50]), torch.tensor([-1.0, -1, 1, 1, -80]) * scale + shift
    image, code = torch.stack([told - 0.4, told, told + 0.4])[None, :, None], wanted.expand(1, 3, 1, 5)
    valid = torch.arange(5).view(1, 1, 1, 5) < 4
    errors = DENSE[TASKS["depth"].dense_loss](image, code, valid, TASKS["depth"])
    torch.testing.assert_close(errors[valid], torch.full((4,), 0.5))
