"""The Diffusion Generalist's axes on StableMTL's stage 1 (Fan et al., Toward a Diffusion-Based Generalist for Dense
Vision Tasks, 2024): our adaptation, stage 1 only.

    space      what the UNet predicts: latents of label codes (StableMTL), or their pixels at the size of the latents
    objective  regress: one step at t = 999 (StableMTL); diffuse: the noise in a noised target, then DDIM
    condition  what the UNet is told of a frame: its latent (StableMTL), features of a small trained stem, or raw pixels

The noised target is the third part of the UNet's input, where StableMTL's is zero:

    x_t = sqrt(g_t) b x_0 + sqrt(1 - g_t) e,    e ~ N(0, 1),    b the input scale, g_t the product of 1 - beta

b < 1 makes the same t noisier. Betas are Stable Diffusion's. All that is drawn belongs to a sample, so that neither the
batch nor the number of processes has a part in it.
"""
import zlib
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model import TIMESTEP, StableMTL, by_task, check_choices, passes
from network import loading
from network.attention import generator
from tasks import TASKS

SPACES, OBJECTIVES, CONDITIONS = ("latent", "pixel"), ("regress", "diffuse"), ("latent", "features", "raw")
STABLEMTL = {"space": "latent", "objective": "regress", "condition": "latent"}
LIMITS = {"latent": 5.0, "pixel": 1.0}      # DDIM clips its estimates of x_0 there; the toy base's latents reach 6
FEATURES, WIDTH = 8, 32                     # channels of the stem: out, inside


# ---- diffusion ----

def schedule():
    """g_0, ..., g_999 as (1000,) float32: betas from 0.00085 to 0.012, evenly spaced in their square root."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, TIMESTEP + 1, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def add_noise(x0, noise, t, scale):
    """x_t of x0, noise: (B,C,h,w) at steps t: (B,) int."""
    g = schedule().to(x0.device)[t].view(-1, 1, 1, 1)
    return g.sqrt() * scale * x0 + (1 - g).sqrt() * noise


def ddim(denoise, x, steps, scale, limit):
    """x_0 from pure noise x: (B,C,h,w) in `steps` evenly spaced steps, the first at t = 999; nothing is drawn (eta 0).

    denoise(x_t, t), t an int -> the noise in x_t; estimates of x_0 are clipped to [-limit, limit].
    """
    g, times = schedule(), [round((TIMESTEP + 1) * (1 - k / steps)) - 1 for k in range(steps)]
    for t, after in zip(times, [*times[1:], None], strict=True):
        noise, now = denoise(x, t).float(), g[t].item()
        x0 = ((x - (1 - now) ** 0.5 * noise) / (scale * now ** 0.5)).clamp(-limit, limit)
        if after is not None:
            then = g[after].item()
            x = then ** 0.5 * scale * x0 + (1 - then) ** 0.5 * noise
    return x0


# ---- the model ----

def new_stem(factor):
    """Features of a frame (B,3,H,W) on the latent grid, (B,8,H/f,W/f): a 3x3 convolution, then one per halving."""
    halvings = factor.bit_length() - 1
    layers = [nn.Conv2d(3, WIDTH, 3, padding=1)]
    for k in range(halvings):
        layers += [nn.SiLU(), nn.Conv2d(WIDTH, FEATURES if k == halvings - 1 else WIDTH, 3, 2, 1)]
    return nn.Sequential(*layers)


def fit_channels(unet, taken, given):
    """Fresh first and last convolutions where a UNet takes or gives another number of channels."""
    def fresh(old, inputs, outputs):
        return nn.Conv2d(inputs, outputs, old.kernel_size, old.stride, old.padding).to(old.weight)
    if unet.config.in_channels != taken:
        unet.conv_in = fresh(unet.conv_in, taken, unet.conv_in.out_channels)
    if unet.config.out_channels != given:
        unet.conv_out = fresh(unet.conv_out, unet.conv_out.in_channels, given)
    unet.register_to_config(in_channels=taken, out_channels=given)


class Generalist(StableMTL):
    """A single stream of other axes. Shapes are those of StableMTL, but that what is called latents there has the
    channels of `space`, and frames are what `condition` makes of them.

    unet: of any channels; `fit` builds one from StableMTL's. ValueError if it does not fit the axes.
    """

    def __init__(self, vae, unet, tokens, palette="cityscapes", second_frame="concat", space="latent",
                 objective="regress", condition="latent", input_scale=0.3, ddim_steps=50):
        super().__init__(vae, unet, tokens, palette, second_frame)
        for what, chosen, known in (("space", space, SPACES), ("objective", objective, OBJECTIVES),
                                    ("condition", condition, CONDITIONS)):
            check_choices(what, [chosen], known)
        self.axes = {"space": space, "objective": objective, "condition": condition, "input_scale": input_scale,
                     "ddim_steps": ddim_steps}
        self.space, self.objective, self.condition = space, objective, condition
        self.stem = new_stem(self.factor) if condition == "features" else None
        taken, given = channels(vae, space, condition)
        if (unet.config.in_channels, unet.config.out_channels) != (taken, given):
            raise ValueError(f"its unet goes from {unet.config.in_channels} to {unet.config.out_channels} channels; "
                             f"{space} space and {condition} frames need {taken} to {given}")
        seen = "latent" if condition == "latent" else "raw"
        self.cache_tag = "" if space == seen == "latent" else f", {space} labels, {seen} frames"
        self.seeds = None       # of the noise that DDIM starts from, one per image of the batch

    @classmethod
    def fit(cls, model, **axes):
        """Of a StableMTL at its start, with these axes."""
        fit_channels(model.unet, *channels(model.vae, axes["space"], axes["condition"]))
        tokens = {t: model.get_buffer(f"token_{t}") for t in model.tasks}
        return cls(model.vae, model.unet, tokens, model.palette, model.second_frame, **axes)

    def add_main_stream(self, *args, **options):
        told = ", ".join(f"{axis} {self.axes[axis]}" for axis in STABLEMTL)
        raise ValueError(f"stage 2 needs StableMTL's own stage 1, and this one has {told}: train another")

    def stage1_modules(self):
        return super().stage1_modules() | ({"stem": self.stem} if self.stem is not None else {})

    # -- what is seen and what is predicted --

    def encode_frame(self, frame):
        """A latent, or the frame as it is: the stem is trained, so it comes later."""
        return super().encode_frame(frame) if self.condition == "latent" else frame

    def encoded_shape(self, size):
        return super().encoded_shape(size) if self.condition == "latent" else (3, *size)

    def encode_labels(self, codes):
        """Pixel space: classes are picked, all else is averaged over the pixels of a cell."""
        if self.space == "latent":
            return super().encode_labels(codes)
        return {t: _pick(x, self.factor) if TASKS[t].categorical else F.avg_pool2d(x, self.factor)
                for t, x in codes.items()}

    def decode_labels(self, latents):
        if self.space == "latent":
            return super().decode_labels(latents)
        return {t: F.interpolate(z.float(), scale_factor=self.factor, mode="nearest" if TASKS[t].categorical
                                 else "bilinear") for t, z in latents.items()}

    def stack(self, z_i, z_j, third=None):
        """concat(frame i, frame j, noised target or 0) on the latent grid."""
        frames = z_i, z_j
        if self.condition == "features":    # strided convolutions round up, and the grid of the labels rounds down
            frames = [self.stem(_whole(frame, self.factor)) for frame in frames]
        elif self.condition == "raw":
            frames = [F.avg_pool2d(frame, self.factor) for frame in frames]
        if third is None:
            third = z_i.new_zeros(len(z_i), self.unet.config.out_channels, *frames[0].shape[-2:])
        return torch.cat([*frames, third], 1)

    # -- training --

    def learn(self, z_i, z_j, latents, cells, keys, streams=None):
        """To diffuse: the noise, at a step drawn for each sample, from the seed of the training step while training.
        What is not valid counts as 0 in x_0, so that it cannot reach the prediction of what is."""
        if self.objective == "regress":
            return super().learn(z_i, z_j, latents, cells, keys, streams)
        tasks, seed = tuple(latents), torch.initial_seed() if self.training else 0
        x0 = torch.cat([torch.where(cells[t], latents[t], torch.zeros_like(latents[t])) for t in tasks])
        drawn = [draw(f"{seed} {t} {key}", x0.shape[1:], x0.device) for t in tasks for key in keys]
        noise, steps = (torch.stack(x) for x in zip(*drawn, strict=True))
        noised = add_noise(x0, noise, steps, self.axes["input_scale"])
        predicted = self._run(self.unet, *self._pairs(z_i, z_j, tasks), tasks, noised, steps)
        return by_task(predicted, tasks), by_task(noise, tasks)

    # -- prediction --

    def forward(self, z_i, z_j, tasks, rows=None, streams=None, keys=()):
        if self.objective == "regress":
            return super().forward(z_i, z_j, tasks, rows)
        grid = [s // (1 if self.condition == "latent" else self.factor) for s in z_i.shape[-2:]]
        shape, seeds, out = (self.unet.config.out_channels, *grid), self.seeds or range(len(z_i)), {}
        for part in passes(tasks, z_i, rows):
            noise = torch.stack([draw(f"{seed} {t}", shape, z_i.device)[0] for t in part for seed in seeds])
            step = partial(self._run, self.unet, *self._pairs(z_i, z_j, part), part)
            x0 = ddim(step, noise, self.axes["ddim_steps"], self.axes["input_scale"], LIMITS[self.space])
            out |= by_task(x0, part)
        return out

    @torch.no_grad()
    def predict(self, image, next_image=None, tasks=None, rows=None):
        """As StableMTL.predict. The noise that DDIM starts from follows from the task and the image's bytes alone."""
        with seeded(self, image):
            return super().predict(image, next_image, tasks, rows)

    # -- files --

    def save(self, folder, frozen=None):
        """As StableMTL.save, and of trained features stem.safetensors."""
        super().save(folder, frozen)
        if self.stem is not None:
            state = {k: v.detach().cpu().contiguous() for k, v in self.stem.state_dict().items()}
            save_file(state, f"{folder}/stem.safetensors")

    def facts(self):
        return super().facts() | {"generalist": self.axes}

    def load_stem(self, state):
        """Strict; ValueError says what does not fit."""
        loading.check_state(state, self.stem.state_dict(), "stem")
        self.stem.load_state_dict(state)


def channels(vae, space, condition):
    """(channels that the UNet takes, channels it gives) on these axes."""
    latent = vae.config.latent_channels
    given = {"latent": latent, "pixel": 3}[space]
    return 2 * {"latent": latent, "features": FEATURES, "raw": 3}[condition] + given, given


def draw(what, shape, device):
    """(noise of this shape, a step 0..999) that follow from the text `what` alone."""
    g = generator(what)
    return torch.randn(shape, generator=g).to(device), torch.randint(TIMESTEP + 1, (), generator=g).to(device)


@contextmanager
def seeded(model, image):
    """While the block runs, the noise that DDIM starts from follows from the task and the bytes of each image
    (B,3,H,W), not from the others of its batch. A model that draws none looks at no seeds."""
    pixels = (image.detach().float() * 127.5).round().to(torch.int16).cpu()
    model.seeds = [zlib.crc32(x.numpy().tobytes()) for x in pixels]
    try:
        yield
    finally:
        model.seeds = None


def _whole(x, factor):
    """(B,C,H,W) without the rows and columns at its end that fill no whole cell."""
    h, w = (s // factor * factor for s in x.shape[-2:])
    return x[..., :h, :w]


def _pick(x, factor):
    """(B,C,H,W) -> (B,C,H//f,W//f): of each cell the pixel that nearest-exact resizing takes."""
    return _whole(x, factor)[..., factor // 2::factor, factor // 2::factor]
