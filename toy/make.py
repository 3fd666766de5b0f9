"""The toy base: a genuine diffusers folder of Stable Diffusion's classes, small enough for a laptop and a repository.

    vae/           AutoencoderKL, 4 latent channels, f = 2; trained on images and label images of the training worlds
    unet/          UNet2DConditionModel, four levels and 16 transformer blocks like SD2's; pre-trained on images alone
    text_encoder/  CLIPTextModel with random weights: a fixed, distinct token per prompt is all that is asked of it
    tokenizer/     CLIPTokenizer that knows the words of the seven prompts

`python train.py --stage 0 --out base/` makes it. The VAE never sees the world `real`; the UNet sees neither that world
nor a label.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import TOY_TRAIN, label_tensors, tensor_image
from model import TIMESTEP
from network import stock
from network.loading import encode_prompts
from readers.raycast import photo
from readers.toyworld import ToyWorld, build
from tasks import CLASSES, IGNORE, PALETTES, TASKS, registry

WIDTHS = 32, 32, 48, 64     # of the UNet's levels
THIN = [CLASSES.index(c) for c in ("pole", "light", "sign")]


# ---- the four parts, untrained ----

def new_vae(widths=(24, 48)):
    """AutoencoderKL with f = 2^(levels-1); no attention in its middle, so that it may be trained on crops."""
    n = len(widths)
    return stock.AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=64,
        scaling_factor=1.0)


def new_unet(widths=WIDTHS, tokens=32, in_channels=12, groups=8):
    """SD2's layout (three levels with cross-attention, one without; 16 transformer blocks), one head per layer."""
    return stock.UNet2DConditionModel(
        in_channels=in_channels, out_channels=4, block_out_channels=widths, layers_per_block=2, norm_num_groups=groups,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=tokens, attention_head_dim=(1,) * len(widths), use_linear_projection=True, sample_size=24)


def new_text(width=32):
    """(tokenizer, text encoder): every word of the seven tasks' prompts is one token; what a fork adds may share pieces
    with one and split it; anything else is spelt out."""
    letters = [chr(c) for c in range(33, 127)]
    vocab, merges = letters + [c + "</w>" for c in letters], []
    for word in sorted({w for t in TASKS.values() for w in t.prompt.split()}):
        left = word[0]
        for piece in [*word[1:-1], word[-1] + "</w>"]:
            if (left, piece) not in merges:
                merges.append((left, piece))
                vocab.append(left + piece)
            left += piece
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = stock.CLIPTokenizer(vocab={v: i for i, v in enumerate(vocab)}, merges=merges)
    start, end = len(vocab) - 2, len(vocab) - 1
    config = stock.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=start, eos_token_id=end, pad_token_id=end)
    return tokenizer, stock.CLIPTextModel(config)


# ---- training material ----

class _Scenes(Dataset):
    """Both frames of a training scene and the codes of all its labels, as float16 images in [-1,1]."""

    def __init__(self, scenes, size):
        self.worlds = [ToyWorld(w, "train", scenes, size, all_labels=w != "things") for w in TOY_TRAIN]
        self.scenes = scenes

    def __len__(self):
        return len(self.worlds) * self.scenes

    def __getitem__(self, k):
        world = self.worlds[k % len(self.worlds)]
        sample = world.load(k // len(self.worlds), world.tasks, with_next=True)
        out = [("frame0", tensor_image(sample["image"])), ("frame1", tensor_image(sample["next"]))]
        for t in world.tasks:
            label, valid = label_tensors(sample, t)
            if TASKS[t].categorical:    # several colour codes of one map: keep the ids, colour them in a batch
                if valid.any():
                    out.append((t, torch.where(valid, label, torch.full_like(label, IGNORE))))
            elif valid.any():
                out.append((t, TASKS[t].encode(label[None], valid[None])[0]))
        return [(name, x.half()) for name, x in out]


def _material(scenes, size, workers):
    """{"frame0": (n,3,H,W), ..., task: (n,C,H,W)}; the frames of one scene share their index."""
    out = {}
    jobs = DataLoader(_Scenes(scenes, size), batch_size=8, num_workers=workers, collate_fn=list)
    for group in tqdm(jobs, desc="rendering scenes"):
        for items in group:
            for name, x in items:
                out.setdefault(name, []).append(x)
    return {name: torch.stack(x) for name, x in out.items()}


def _optimise(model, loss, steps, lr, generator, desc):
    """AdamW with a short warm-up and cosine decay; `loss(generator)` draws its own batch."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def rate(step):
        return min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar, smooth = tqdm(range(steps), desc=desc, mininterval=5), None
    for _ in bar:
        value = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)


# ---- the VAE ----

# pictures of each kind in a batch; at second the decoder alone is trained, with more of what it reproduces worst
FIRST = {**dict.fromkeys(("frame0", "frame1", "normal", "depth", "optical_flow", "scene_flow", "shading", "albedo"), 2),
         "semantic": 8}
SECOND = FIRST | {"frame0": 1, "frame1": 1, "normal": 8, "albedo": 4}


def train_vae(vae, material, steps, generator, counts, desc, crop=24, lr=2e-3):
    """Reconstruction of crops. Trains what of the VAE requires a gradient; counts: see FIRST.

    Semantic maps (half of them in each palette) add a cross-entropy over the palette colours, thin classes counting
    threefold. The decoder sees latents with a little noise, as a UNet's predictions will be.
    """
    codecs = {p: registry(p)["semantic"] for p in PALETTES}
    colours = {p: torch.tensor(PALETTES[p], dtype=torch.float32) / 127.5 - 1 for p in PALETTES}
    weight = torch.ones(len(CLASSES))
    weight[THIN] = 3.0

    def draw(name, g):
        pool = material[name]
        rows = torch.randint(len(pool), (counts[name],), generator=g)
        top, left = (int(torch.randint(s - crop + 1, (1,), generator=g)) for s in pool.shape[-2:])
        x = pool[rows, :, top:top + crop, left:left + crop].float()
        return x.flip(-1) if torch.rand((), generator=g) < 0.5 else x

    def loss(g):
        maps = {name: draw(name, g) for name in counts}
        ids = maps.pop("semantic")
        palettes = [list(PALETTES)[i % 2] for i in range(len(ids))]
        semantic = torch.cat([codecs[p].encode(i[None], i[None] != IGNORE) for p, i in zip(palettes, ids, strict=True)])
        x = torch.cat([semantic, *maps.values()])
        z = vae.encode(x).latent_dist.mean
        spread = z.std((0, 2, 3))
        y = vae.decode(z + 0.03 * spread.detach().view(1, -1, 1, 1) * torch.randn(z.shape, generator=g)).sample
        reconstruction = (y - x).abs().mean() + 4 * (y - x).square().mean()
        entropy = 0.0
        for i, p in enumerate(palettes):
            logits = -8 * (y[i, :, None] - colours[p].T[:, :, None, None]).square().sum(0)    # (classes, H, W)
            target = ids[i, 0].long()
            if (target != IGNORE).any():
                entropy = entropy + F.cross_entropy(logits[None], target[None], weight, ignore_index=IGNORE) / len(ids)
        scale = z.mean((0, 2, 3)).square().mean() + (spread - 1).square().mean()
        return reconstruction + 0.3 * entropy + 0.01 * scale

    _optimise(vae, loss, steps, lr, generator, desc)


@torch.no_grad()
def fold_normalisation(vae, material, n=256):
    """Rescale the latent channels to mean 0, variance 1 over images and labels, exactly undone before the decoder: all
    in the weights of the 1x1 convolutions around the latent, so that scaling_factor is 1."""
    names = [m for m in material if m != "semantic"]
    x = torch.cat([material[m][:n // len(names)] for m in names]).float()
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    c = len(mean)
    vae.quant_conv.weight[:c] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.weight[c:] = 0.0     # the posterior's log-variance is not used: a constant, as good as deterministic
    vae.quant_conv.bias[c:] = -20.0
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)


# ---- films: what the UNet is pre-trained on ----

def film(world, index, size):
    """Frames 0, 1 and 2 of a training scene, images alone: (3, 3, H, W) in [-1,1].

    The camera goes on as it went from frame 0 to 1, and so do the solids.
    """
    s = build(world, "train", index)
    turn, go = s.R[0].T @ s.R[1], s.R[0].T @ (s.C[1] - s.C[0])
    s.R, s.C = [*s.R, s.R[1] @ turn], [*s.C, s.C[1] + s.R[1] @ go]
    return torch.stack([tensor_image(photo(s, frame, size, 2, None)) for frame in range(3)])


class _Films(Dataset):
    """Element k: a film (3, 3, H, W); the worlds take turns."""

    def __init__(self, scenes, size):
        self.scenes, self.size = scenes, size

    def __len__(self):
        return len(TOY_TRAIN) * self.scenes

    def __getitem__(self, k):
        return film(TOY_TRAIN[k % len(TOY_TRAIN)], k // len(TOY_TRAIN), self.size)


@torch.no_grad()
def film_latents(vae, scenes, size, workers):
    """(worlds * scenes, 3 frames, 2 flips, 4, h, w) float16; of the films nothing else is kept."""
    out = []
    for images in tqdm(DataLoader(_Films(scenes, size), batch_size=8, num_workers=workers), desc="filming scenes"):
        both = torch.stack([images, images.flip(-1)], 2)
        z = vae.encode(both.flatten(0, 2)).latent_dist.mean
        out.append(z.unflatten(0, both.shape[:3]).half())
    return torch.cat(out)


# ---- the UNet: what it knows before it sees a label ----

PAIRS = torch.tensor([(0, 1), (1, 0), (1, 2), (2, 1)])      # frames i and j: neighbours, either way in time
FILL, MEND, BEFORE = range(3)


def first_lesson(latents, batch, g):
    """What moved where: most cells of frame i are noise, the rest get a little; frame j is clean.

    latents: (n, 3 frames, 2 flips, 4, h, w), of which frames 0 and 1 are used.
    Returns three times (batch, 4, h, w): what is shown as z_i, what is shown as z_j, what is to be predicted.
    """
    rows, flip = torch.randint(len(latents), (batch,), generator=g), torch.randint(2, (batch,), generator=g)
    i = torch.randint(2, (batch,), generator=g)
    z_i, z_j = latents[rows, i, flip].float(), latents[rows, 1 - i, flip].float()
    share = 0.5 + 0.45 * torch.rand((batch, 1, 1, 1), generator=g)
    hidden = torch.rand((batch, 1, *z_i.shape[2:]), generator=g) < share
    noise = torch.randn(z_i.shape, generator=g)
    return torch.where(hidden, noise, z_i + 0.2 * noise), z_j, z_i


def second_lesson(latents, batch, g, shares=(0.6, 0.25, 0.15), blocks=(1, 2, 4)):
    """Inputs more like those of stage 1; each example is one of three exercises. Shapes as in `first_lesson`.

        FILL    frame i with blocks of cells hidden, frame j clean -> frame i      what moved where
        MEND    a noisy, incomplete frame, twice, as single-frame tasks see it -> that frame    what a scene looks like
        BEFORE  frames i and j, both clean -> the frame before i      what moved where, with nothing hidden
    """
    n, _, _, _, h, w = latents.shape
    each = torch.arange(batch)

    def uniform(*shape):
        return torch.rand((batch, *shape), generator=g)

    # exercises and frames
    kind = torch.multinomial(torch.tensor(shares), batch, True, generator=g)
    mend, before = ((kind == k).view(-1, 1, 1, 1) for k in (MEND, BEFORE))
    rows, flip = torch.randint(n, (batch,), generator=g), torch.randint(2, (batch,), generator=g)
    films = latents[rows, :, flip].float()
    i, j = PAIRS[torch.randint(len(PAIRS), (batch,), generator=g)].T
    turned = (kind == BEFORE) & (i != 1)    # here i has to be the frame in the middle
    i, j = torch.where(turned, j, i), torch.where(turned, i, j)
    z_i, z_j = films[each, i], films[each, j]
    target = torch.where(before, films[each, 2 - j], z_i)

    # what is hidden: blocks of 1, 2 or 4 cells along a side; single cells of a frame to mend
    grids = torch.stack([F.interpolate(uniform(1, h // b, w // b), size=(h, w)) for b in blocks])
    size = torch.randint(len(blocks), (batch,), generator=g) * (kind != MEND)
    share = torch.where(mend, 0.2 + 0.6 * uniform(1, 1, 1), 0.5 + 0.45 * uniform(1, 1, 1))
    level = torch.where(mend, 0.5, 0.2) * uniform(1, 1, 1)
    noise = torch.randn(z_i.shape, generator=g)
    shown = torch.where(grids[size, each] < share, noise, z_i + level * noise)
    return torch.where(before, z_i, shown), torch.where(mend, shown, z_j), target


def train_unet(unet, token, latents, lesson, steps, generator, batch=16, lr=2e-3):
    """Generative pre-training on films, images alone. Input layout and timestep are those of stage 1.

    token: (L, D) of the empty prompt: which exercise it is, the input shows.
    lesson(latents, batch, generator): see above.
    """

    def loss(g):
        z_i, z_j, target = lesson(latents, batch, g)
        x = torch.cat([z_i, z_j, torch.zeros_like(z_j)], 1)
        return F.mse_loss(unet(x, TIMESTEP, token.expand(batch, -1, -1)).sample, target)

    _optimise(unet, loss, steps, lr, generator, "pre-training the UNet")


def make(folder, scenes=800, films=4000, size=(32, 48), vae_steps=4000, unet_steps=(2400, 4000), seed=0, workers=2,
         widths=()):
    """Train all of it and write the folder in half precision. An existing vae/ is kept: delete it to train it anew.
    ValueError: the folder holds a base or a trained model.

    scenes: per world, for the VAE and the UNet's first lesson; films: per world, for its second lesson; widths: of the
    UNet's four levels, () = the usual ones.
    """
    folder, generator = Path(folder), torch.Generator()
    if any((folder / name).exists() for name in ("unet", "model.json")):
        raise ValueError(f"{folder} already holds a base or a trained model: name another --out")

    def restart(part):      # every part draws from its own seed, whether or not the one before it was trained
        torch.manual_seed(seed + part)
        generator.manual_seed(seed + part)

    restart(0)
    tokenizer, text_encoder = new_text()
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.half().save_pretrained(folder / "text_encoder")
    if not (folder / "vae").is_dir():
        vae = new_vae()
        material = _material(scenes, size, workers)
        train_vae(vae, material, vae_steps, generator, FIRST, "training the VAE")
        fold_normalisation(vae, material)
        vae.half().float()      # as it will be stored
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        restart(2)
        train_vae(vae, material, vae_steps // 2, generator, SECOND, "training its decoder", lr=1e-3)
        vae.half().save_pretrained(folder / "vae")
    vae = stock.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    latents = film_latents(vae, max(scenes, films), size, workers)
    token = encode_prompts(tokenizer, text_encoder.float(), {"": ""})[""]
    restart(1)
    unet = new_unet(widths or WIDTHS)
    train_unet(unet, token, latents[:len(TOY_TRAIN) * scenes], first_lesson, unet_steps[0], generator)
    unet.half().float()     # so that the second lesson can begin from a stored first one
    restart(3)
    train_unet(unet, token, latents[:len(TOY_TRAIN) * films], second_lesson, unet_steps[1], generator, lr=1.5e-3)
    unet.half().save_pretrained(folder / "unet")
    print(f"the toy base is in {folder}")
