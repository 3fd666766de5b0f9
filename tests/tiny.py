"""Models small enough for tests, of random weights: of Stable Diffusion's layout (four levels, 16 transformer blocks,
several heads), and thin ones, which load and predict several times as fast, where the layout does not matter."""
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from evaluate import PAPER_TASKS
from model import StableMTL
from tasks import TASKS
from toy import make as toybase

WIDTHS = (16, 24, 32, 32)


def unet(in_channels=12, widths=WIDTHS, heads=(2, 2, 4, 4), layers=2):
    attend = len(widths) - 1    # the lowest level has no attention
    return UNet2DConditionModel(
        in_channels=in_channels, out_channels=4, block_out_channels=widths, layers_per_block=layers, norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D"] * attend + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attend,
        cross_attention_dim=24, attention_head_dim=heads, use_linear_projection=True, sample_size=8).eval()


def thin_unet():
    """Two levels, 4 transformer blocks."""
    return unet(widths=(16, 24), heads=(2, 2), layers=1)


def vae():
    """f = 4; latents far from unit variance and a scaling factor that is not 1, so that forgetting it shows."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.7, sample_size=16)


def tokens(tasks=tuple(TASKS)):
    """Prompts of two words are one token longer, as for the real text encoder."""
    g = torch.Generator().manual_seed(7)
    return {t: torch.randn(2 + len(TASKS[t].prompt.split()), 24, generator=g) for t in tasks}


def model(multi=False, tasks=tuple(TASKS), seed=0, unet=unet, **options):
    """A StableMTL in eval mode; with `multi`, a main UNet of its own weights and task attention that is not zero.

    unet: makes a UNet."""
    torch.manual_seed(seed)
    m = StableMTL(vae(), unet(), tokens(tasks))
    if multi:
        m.add_main_stream(unet(), **options)
        for layer in m.attention.values():
            torch.nn.init.normal_(layer.to_out_task.weight, std=0.3)
            torch.nn.init.normal_(layer.to_out_task.bias, std=0.3)
    return m.eval()


def latents(batch=2, size=(8, 8), seed=1):
    """(z_i, z_j), each (batch,4,*size)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *size, generator=g), torch.randn(batch, 4, *size, generator=g)


def base(folder, width=32, **options):
    """Write a base like the toy base, untrained and as small as a UNet can be: f = 2, two levels, 4 transformer blocks,
    widths 8. width: of its text; options: of its UNet."""
    torch.manual_seed(0)
    tokenizer, text_encoder = toybase.new_text(width)
    shape = dict(in_channels=12, attention_head_dim=(1, 1), use_linear_projection=True) | options
    small = UNet2DConditionModel(
        out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=8,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=width, **shape)
    parts = {"vae": toybase.new_vae((8, 8)), "unet": small, "tokenizer": tokenizer, "text_encoder": text_encoder}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


OWN = set(TASKS) - set(PAPER_TASKS)     # tasks that a fork has added: they give these models other numbers


def close(x, expected):
    """Two maps are the same to 1e-4; with tasks of a fork's own to 1e-3, of large numbers in proportion."""
    np.testing.assert_allclose(x, expected, atol=1e-3 * max(1, np.abs(x).max()) if OWN else 1e-4)
