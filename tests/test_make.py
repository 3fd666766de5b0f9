"""toy/make.py: films are those of the worlds, the lessons show and hide what they say, and what is made is a base."""
import shutil

import numpy as np
import pytest
import torch

import train
from data import TOY_TRAIN, tensor_image
from model import StableMTL, from_base
from readers.toyworld import ToyWorld
from toy import make

SIZE = (16, 24)


@pytest.mark.parametrize("world", TOY_TRAIN)
def test_a_film_goes_on_where_the_sample_ends(world):
    """Frames 0 and 1 are those of the training sample; frame 2 is as far from 1 as 1 is from 0, and not frame 0."""
    film = make.film(world, 3, SIZE)
    sample = ToyWorld(world, "train", size=SIZE, all_labels=True).load(3, (), with_next=True)
    assert torch.equal(film[0], tensor_image(sample["image"])) and torch.equal(film[1], tensor_image(sample["next"]))
    first, second, both = ((film[a] - film[b]).abs().mean() for a, b in ((0, 1), (1, 2), (0, 2)))
    assert both > 0.8 * first and first / 3 < second < 3 * first


def latents(n=6):
    """Films whose every cell tells its frame, so that what a lesson shows can be told apart."""
    z = torch.zeros(n, 3, 2, 4, 8, 12)
    for frame in range(3):
        z[:, frame] = 10.0 * (frame + 1)
    return z.half()


def shown(z):
    """(B,) frame numbers of latents of which at least one cell was left as it is, -1 if none was: noise is around 0."""
    return (z.flatten(1).amax(1) / 10).round().long() - 1


def test_the_first_lesson_hides_cells_of_one_frame_of_two():
    z_i, z_j, target = make.first_lesson(latents(), 64, torch.Generator().manual_seed(0))
    assert torch.equal(z_j.unique(), torch.tensor([10.0, 20.0]))
    assert torch.equal(target.flatten(1)[:, 0], 30 - z_j.flatten(1)[:, 0])      # the other one is to be predicted
    hidden = ((z_i - target).abs() > 4).float().mean((1, 2, 3))
    assert 0.4 < hidden.min() and hidden.max() <= 1 and 0.6 < hidden.mean() < 0.85


def test_the_second_lesson_has_three_exercises():
    """Fill in from the neighbour, mend a frame seen twice, tell the frame before: in about the stated shares."""
    z_i, z_j, target = make.second_lesson(latents(), 600, torch.Generator().manual_seed(0))
    mend = (z_i == z_j).flatten(1).all(1)
    wanted, i, j = shown(target), shown(z_i), shown(z_j)
    before = ~mend & (wanted != i) & (i >= 0)
    fill = ~mend & ~before
    assert [part.float().mean().item() for part in (fill, mend, before)] == pytest.approx([0.6, 0.25, 0.15], abs=0.06)
    assert (i[before] == 1).all() and (wanted[before] == 2 - j[before]).all() and (j[before] != 1).all()
    assert ((wanted - j)[fill].abs() == 1).all() and mend.any()


def test_the_command_hands_on_its_flags(tmp_path, monkeypatch):
    """--stage 0: folder, seed and widths; without --widths the usual ones."""
    calls = []
    monkeypatch.setattr(train, "make", lambda *args, **options: calls.append((args, options)))
    for flags in ("--seed 3 --widths 40,40,64,80", ""):
        train.main(f"--stage 0 --out {tmp_path / 'base'} {flags}".split())
    assert calls == [((tmp_path / "base",), {"seed": seed, "widths": widths})
                     for seed, widths in ((3, (40, 40, 64, 80)), (0, ()))]
    assert tuple(make.new_unet().config.block_out_channels) == make.WIDTHS


def test_make(tmp_path, monkeypatch):
    """A base that StableMTL starts from, in half precision; an existing VAE is kept, the world `real` never drawn."""
    seen, init = set(), ToyWorld.__init__

    def spy(self, world, *args, **more):
        seen.add(world)
        init(self, world, *args, **more)
    monkeypatch.setattr(ToyWorld, "__init__", spy)
    monkeypatch.setattr(make, "new_vae", lambda widths=(8, 8), new=make.new_vae: new(widths))
    sizes = dict(scenes=2, films=3, size=(24, 24), vae_steps=2, unet_steps=(1, 1), workers=0, widths=(8, 8, 16, 16))
    make.make(tmp_path, **sizes)
    model = from_base(str(tmp_path), ("depth", "normal"))
    assert tuple(model.unet.config.block_out_channels) == sizes["widths"]
    assert isinstance(model, StableMTL) and seen == set(TOY_TRAIN)
    before = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    unet = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a base or a trained model: name another --out"):
        make.make(tmp_path, **sizes)
    shutil.rmtree(tmp_path / "unet")
    make.make(tmp_path, **sizes)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == unet     # the same seeds
    z = make.film_latents(model.vae, 2, (24, 24), 0)
    assert z.shape == (6, 3, 2, 4, 12, 12) and z.dtype == torch.float16 and np.isfinite(z.numpy()).all()
