"""StableMTL: a Stable Diffusion UNet as a single-step latent regressor for many dense tasks (arXiv 2506.08013).

    stage 1, single stream (section 3.1): z_task = UNet(concat(z_i, z_j, 0), t = 999, task token)
    stage 2, multi stream (section 3.2):  the same UNet, frozen, gives one feature stream per task; a second, trained
                                          UNet predicts the main task while each of its self-attention layers attends
                                          to the streams of the other tasks

The UNets are diffusers' own. What is added: the widened input convolution and, in network/attention.py, the attention
over tasks with the processor that taps and injects features right after spatial self-attention.

Shapes: B images, T tasks, N latent pixels of a block, C its width, h x w the latent grid (f the VAE's factor, h = H/f).
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from checkpoint import link, write_json
from inference import infer
from network import loading, memory
from network.attention import ATTENTIONS, StreamsDone, Tap, TaskAttention, masking, transformer_blocks, watch
from tasks import TASKS, parse_tasks, registry

TIMESTEP = 999  # the last diffusion step: the UNet's input is read as pure noise, its output as the clean latent
SECOND_FRAMES = ("concat", "average", "none")


# ---- the model ----

class StableMTL(nn.Module):
    """Frozen VAE, task tokens, the single-stream UNet and, in stage 2, the main UNet with its task attention.

    vae: AutoencoderKL; unet: UNet2DConditionModel with 12 input channels; tokens: {task: (L, D)} text embeddings;
    palette: the class colours the semantic latents use. ValueError for a task, palette or second_frame there is not.
    """

    space = "latent"    # what the UNet predicts; network/generalist.py knows another

    def __init__(self, vae, unet, tokens, palette="cityscapes", second_frame="concat"):
        super().__init__()
        check_choices("task", tokens, TASKS)
        check_choices("second_frame", [second_frame], SECOND_FRAMES)
        self.vae, self.unet, self.tasks = vae.requires_grad_(False).eval(), unet, tuple(tokens)
        for t in self.tasks:
            self.register_buffer(f"token_{t}", tokens[t].float(), persistent=False)
        self.codecs = {t: registry(palette)[t] for t in self.tasks}
        self.palette, self.second_frame = palette, second_frame
        self.cache_tag = ""                     # of frames and labels, where it is not the VAE's: what a cache goes by
        self.main, self.attention, self.multi = None, None, None
        self.decoder = None                     # a small AutoencoderTiny that decodes in the VAE's place
        self.rho, self.mask = 0.0, "score"      # stage-2 training sets these; they act only in train() mode
        self.size = None                        # (H, W) of its training images, where known: what `infer` goes by
        self.attends = self.tasks               # the streams that may be attended to; () leaves the attention out
        self.truth = None                       # {task: (B,4,h,w)} here fills the third place of `unet` (tools.oracle)
        self.attention_log = None               # a list here receives (block, main task, {other task: mean attention})
        self.watch = None                       # zeros here, one for each of attention.WATCHED, receive their sums

    # -- stage 2 --

    def add_main_stream(self, main, heads=4, shared=False, attention="n-to-1"):
        """Turn the single stream into the multi stream: freeze `unet`, train `main` with task attention.

        main: a UNet of the same shape; ValueError if it is not, or if there are no other tasks to attend to.
        """
        if len(self.tasks) < 2:
            raise ValueError("stage 2 needs at least two tasks to attend to: train stage 1 with more --tasks")
        check_choices("attention", [attention], ATTENTIONS)
        if differs := loading.grouped(loading.mismatch(main.state_dict(), self.unet.state_dict())):
            raise ValueError(f"the main UNet is not of the single stream's shape: {differs}")
        self.unet.requires_grad_(False).eval()
        self.main, self.multi = main, {"heads": heads, "shared": shared, "attention": attention}
        hidden = 2 * main.config.block_out_channels[0]      # 640 for Stable Diffusion, as released
        self.attention = nn.ModuleDict({
            name.replace(".", "/"): TaskAttention(block.attn1.to_q.in_features, self.tasks, heads, hidden, shared)
            for name, block in transformer_blocks(main).items()})
        self._feats, self._kv, self._now, self._masks = {}, {}, (), {}
        for name, block in transformer_blocks(self.unet).items():
            block.attn1.set_processor(Tap(name, self._record))
            self._last = name
        for name, block in transformer_blocks(main).items():
            block.attn1.set_processor(Tap(name, self._inject))
        self._recording = False

    def _record(self, block, a):
        if self._recording:
            self._feats[block] = a
            if block == self._last:
                raise StreamsDone
        return a

    def _inject(self, block, a):
        """a' = a + out(attention over the other tasks at the same pixel); a: (M*B,N,C), the tasks self._now in turn. A
        task without another stream to attend to stays as it is."""
        layer = self.attention[block.replace(".", "/")]
        main = by_task(a.to(layer.to_out_task.weight.dtype), self._now)
        if not any(self._others(task) for task in main):
            return a
        kv = self._kv[block] if self._kv is not None else layer.keys_values({t: main[t] for t in self.attends})
        out = []
        for task, x in main.items():
            if not self._others(task):
                out.append(x)
                continue
            y, weights = layer(x, task, kv, self._masks.get((task, layer)))
            out.append(x + y)
            if self.watch is not None:
                self.watch += watch(weights, x, y)
            if self.attention_log is not None:
                others, means = [t for t in kv[0] if t != task], weights.float().mean((1, 2, 3)).tolist()
                self.attention_log.append((block, task, dict(zip(others, means, strict=True))))
        return torch.cat(out).to(a.dtype)

    def _others(self, task):
        """The streams that this main task attends to."""
        return [t for t in self.attends if t != task]

    # -- latents --

    def use_decoder(self, decoder):
        """Decode by a small AutoencoderTiny from here on, in the VAE's place (errors: loading.read_decoder).

        decoder: a folder, as tools/distil.py writes it, or a hub id such as madebyollin/taesd.
        """
        if self.space != "latent":
            raise ValueError("--decoder would do nothing here: this model predicts pixels, not latents")
        self.decoder = loading.read_decoder(decoder, self.vae).to(self.vae.device).requires_grad_(False).eval()

    @property
    def factor(self):
        """Pixels per latent cell along one side (8 for Stable Diffusion)."""
        return loading.factor(self.vae)

    @property
    def out_channels(self):
        """Of what the UNet predicts (4 for Stable Diffusion)."""
        return self.unet.config.out_channels

    def encode(self, x):
        """(B,3,H,W) in [-1,1] -> (B,4,h,w): the posterior mean times scaling_factor, never sampled."""
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, z):
        """(B,4,h,w) -> (B,3,h*f,w*f), about [-1,1]."""
        vae = self.vae if self.decoder is None else self.decoder    # each has a scaling_factor of its own
        return vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample

    def encode_frame(self, frame):
        """What the UNet is told of a frame (B,3,H,W): its latent."""
        return self.encode(frame)

    def encoded_shape(self, size):
        """(channels, height, width) of that, for a frame of size (H, W)."""
        return self.vae.config.latent_channels, *(s // self.factor for s in size)

    def encode_labels(self, codes):
        """What the UNet is to predict of label codes, {task: (B,3,H,W)} -> {task: (B,4,h,w)}."""
        return {t: self.encode(x) for t, x in codes.items()}

    def decode_labels(self, latents):
        """And back: {task: (B,4,h,w)} -> {task: (B,3,h*f,w*f)}, in one pass of the decoder."""
        return by_task(self.decode(torch.cat([*latents.values()])), tuple(latents))

    # -- the UNet passes --

    def stage1_modules(self):
        """The modules that stage 1 trains, by name."""
        return {"unet": self.unet}

    def stack(self, z_i, z_j, third=None):
        """The UNet's input, 12 channels. The third place stays empty but for who diffuses (network/generalist.py)."""
        return torch.cat([z_i, z_j, torch.zeros_like(z_i) if third is None else third], 1)

    def _run(self, unet, z_i, z_j, tasks, third=None, timestep=TIMESTEP):
        """z_i, z_j: (M*B,4,h,w), the M tasks one after the other -> (M*B,4,h,w)."""
        if self.second_frame == "average":
            z_i = z_j = (z_i + z_j) / 2
        elif self.second_frame == "none":
            z_j = torch.zeros_like(z_i)
        if self.truth is not None and unet is self.unet:
            third = torch.cat([self.truth[t] for t in tasks])
        x = self.stack(z_i, z_j, third).to(unet.dtype)
        own = [self.get_buffer(f"token_{t}") for t in tasks]
        length, each, keep = max(len(o) for o in own), len(x) // len(tasks), None
        tokens = torch.stack([F.pad(o, (0, 0, 0, length - len(o))) for o in own])               # (M, L, D)
        if any(len(o) < length for o in own):   # mask the padding; shapes decide: no value is fetched from the device
            keep = torch.stack([torch.arange(length, device=x.device) < len(o) for o in own]).repeat_interleave(each, 0)
        timestep = torch.full((), timestep, device=x.device) if isinstance(timestep, int) else timestep
        return unet(x, timestep, tokens.repeat_interleave(each, 0).to(x.dtype), encoder_attention_mask=keep).sample

    def encode_frames(self, first, second, tasks):
        """Of two frames; of the second, which may be None, only where a pass that `tasks` take looks at it."""
        z, seen = self.encode_frame(first), tasks if self.main is None else [*tasks, *self.attends]
        return z, z if second is None or not any(TASKS[t].frames == 2 for t in seen) else self.encode_frame(second)

    @staticmethod
    def _pairs(z_i, z_j, tasks):
        """Stack the input of every task: single-frame tasks see frame i twice (j = i)."""
        return z_i.repeat(len(tasks), 1, 1, 1), torch.cat([z_j if TASKS[t].frames == 2 else z_i for t in tasks])

    @torch.no_grad()
    def streams(self, z_i, z_j, tasks, rows=None):
        """Auxiliary features of `tasks` in every block: {block: {task: (B,N,C)}}; rows as in `forward`."""
        feats = {}
        for part in passes(tasks, z_i, rows):
            self._recording = True
            try:
                self._run(self.unet, *self._pairs(z_i, z_j, part), part)
            except StreamsDone:
                pass
            finally:
                self._recording = False
            for block, a in self._feats.items():
                feats.setdefault(block, {}).update(by_task(a, part))
            self._feats.clear()
        return feats

    def forward(self, z_i, z_j, tasks, rows=None, streams=None, keys=()):
        """Predicted label latents of `tasks`, with stage 2 where it exists. z_i, z_j: (B,4,h,w) -> {task: (B,4,h,w)}.

        rows: images (tasks x batch) that pass the UNet at once; None = all. The result does not depend on it.
        streams: what `streams` gives for these latents and all tasks, if it is known already.
        keys: of the samples of a training step, from which masks follow; without, nothing is left out.
        """
        wanted, unet, out = tasks, self.unet, {}
        if self.main is not None:
            unet, self._kv = self.main, None    # the last call's, before this call's need the memory
            if self.multi["attention"] == "n-to-n":     # every task attends to the others' main streams: all at once
                tasks, rows = self.tasks, None
            else:
                needed = self.attends if len(tasks) > 1 else self._others(tasks[0])
                feats = self.streams(z_i, z_j, needed, rows) if streams is None else {
                    block: {t: f[t] for t in needed} for block, f in streams.items()}
                self._kv = {b: self.attention[b.replace(".", "/")].keys_values(f) for b, f in feats.items()}
            self._masks = masking(keys if self.training else (), tasks, self.attention.values(), self.rho, self.mask)
        for part in passes(tasks, z_i, rows):
            self._now = part
            out |= by_task(self._run(unet, *self._pairs(z_i, z_j, part), part), part)
        if not torch.is_grad_enabled():
            self._kv = None         # with gradients it stays: checkpointing runs blocks again in the backward pass
        return {t: out[t] for t in wanted}

    def learn(self, z_i, z_j, latents, cells, keys, streams=None):
        """What a training step compares: (predictions, what they should be), each {task: (B,4,h,w)}.

        latents: of the labels; cells: {task: (B,1,h,w) bool}, where they hold; keys: of the samples (data.Mixture).
        """
        return self(z_i, z_j, tuple(latents), streams=streams, keys=keys), latents

    @torch.no_grad()
    def predict(self, image, next_image=None, tasks=None, rows=None):
        """All maps of an image (or pair), each frame encoded once: the one inference path of evaluate.py and sample.py.

        image, next_image: (B,3,H,W) in [-1,1], any H and W (padded by repetition to whole latent cells, cropped after).
        tasks: names, default all this model knows; without next_image those about motion are left out.
        Returns {task: (B,C,H,W)} native predictions (tasks.py). ValueError for frames or tasks that are not as above,
        FloatingPointError if a prediction is not finite.
        """
        tasks = asked(image, next_image, tasks, self.tasks)
        height, width = image.shape[-2:]
        pad = (0, -width % self.factor, 0, -height % self.factor)
        frames = [f if f is None else F.pad(f, pad, mode="replicate") for f in (image, next_image)]
        z_i, z_j = self.encode_frames(*frames, tasks)
        latents, out, sums = self(z_i, z_j, tasks, rows), {}, {}
        for part in passes(tasks, z_i, rows):
            for t, code in self.decode_labels({t: latents[t] for t in part}).items():
                code = code[..., :height, :width]
                out[t] = self.codecs[t].decode(code)
                sums[t] = code.sum(dtype=torch.float32)     # NaN and infinity survive it
        check_finite(sums)
        return out

    def infer(self, image, next=None, tasks=None, size=None, rows=None, confidence=False, pixels=False, camera=None):
        """Maps of photos as numpy arrays of the photos' own size, {task: array}; of a list of them, a list.

        image: a path, a Pillow image or an (H,W,3) uint8 array; a list of these, of any sizes, passes as one batch per
        size. next: the frame after it, of the same size (for a list: a list, with None where there is none); without
        one, tasks about motion are left out. tasks: names, in a list or as "depth,normal"; default all this model
        knows. size: the longer side in pixels that the network sees, 0 = the photo's own, default: the shorter side as
        in training. rows: images x tasks that pass the UNet at once; 1 needs least memory.

        confidence: also "confidence_<task>", (H,W) float32 in [0,1], from a second prediction, of the mirror image
        (inference/confidence.py). pixels: flow in pixels, by the scales that the two frames tell
        (inference/photometric.py), and "scale_optical_flow", these scales, or None where the frames do not tell and
        flow stays up to scale. camera: (focal length, cx, cy, near, far), the last two the metres of depth 0 and 1:
        then scene flow in metres alike.

        Arrays are (H,W) uint8 of classes, (H,W) float32 of one channel, or (H,W,C) float32: the .npy files of
        sample.py, whose --help lists their units. FileNotFoundError, ValueError: there is no such file, it cannot be
        read, or this model cannot do that; FloatingPointError: a prediction is not finite.
        """
        return infer.infer(self, image, next, tasks, size, rows, confidence, pixels, camera)

    # -- files --

    def save(self, folder, frozen=None):
        """Write vae/, unet/, tokens.safetensors, model.json and, after stage 2, main_unet/ and
        task_attention.safetensors (released key names, LoRA merged). frozen: a checkpoint that has the first three as
        they are; they are linked from there."""
        folder = Path(folder)
        if frozen is None:
            loading.save_part(self.vae, folder / "vae")
            loading.save_part(self.unet, folder / "unet")
            save_file({t: self.get_buffer(f"token_{t}").cpu() for t in self.tasks}, folder / "tokens.safetensors")
        else:
            parts = [f"{part}/{name}" for part in ("vae", "unet") for name in loading.PART_FILES]
            for name in (*parts, "tokens.safetensors"):
                link(Path(frozen) / name, folder / name)
        if self.main is not None:
            loading.save_part(memory.merged(self.main), folder / "main_unet")
            save_file(self.task_attention_state(), folder / "task_attention.safetensors")
        write_json(folder / "model.json", self.facts())

    def facts(self):
        """What model.json says of it."""
        return {"kind": "stablemtl", "tasks": self.tasks, "palette": self.palette, "second_frame": self.second_frame,
                "multi": self.multi}

    def task_attention_state(self):
        """{"<block>.attn1.task_to_q.<task>.net.0.weight": tensor, ...} on the CPU."""
        return {f"{b.replace('/', '.')}.attn1.{k}": v.detach().cpu().contiguous()
                for b, layer in self.attention.items() for k, v in layer.state_dict().items()}

    def load_task_attention(self, state):
        """Strict inverse of task_attention_state; ValueError says what does not fit."""
        released = self.task_attention_state()
        loading.check_state(state, released, "task attention")
        own = self.attention.state_dict()   # in the same order
        self.attention.load_state_dict({k: state[r] for k, r in zip(own, released, strict=True)})

    @classmethod
    def load(cls, folder, stage=None, device="cpu", decoder=None):
        """Model of a folder written by `save`. stage=1 loads the single stream alone, None stage 2 where it exists.

        decoder: as `use_decoder` takes it. FileNotFoundError if there is no model, a part of it is missing, or stage 2
        is asked for and not there; ValueError for damaged files, parts of different models, no such stage or device.
        """
        parts = loading.read_checkpoint(folder, stage)
        spec, axes = parts["spec"], parts["spec"].get("generalist") or {}
        if axes:
            from network.generalist import Generalist as cls  # it builds on this class, so it cannot be known earlier
        with loading.faults_of_checkpoint(folder):
            model = cls(parts["vae"], parts["unet"], parts["tokens"], spec["palette"], spec["second_frame"], **axes)
            if "stem" in parts:
                model.load_stem(parts["stem"])
            if "main_unet" in parts:
                model.add_main_stream(parts["main_unet"], **spec["multi"])
                model.load_task_attention(parts["task_attention"])
        model = loading.ready(model, folder, device)
        if decoder:
            model.use_decoder(decoder)
        return model

    @classmethod
    def from_pretrained(cls, name=None, stage=None, device="cpu", decoder=None):
        """`load` of a folder, or of a hub id, "org/name" or "org/name@revision"; where there is a folder of that name,
        it is the folder. Without a name: out/ where it is, else the trained toy model.

        FileNotFoundError if there is no such folder, and the hub has no such model or is not reachable.
        """
        return cls.load(loading.checkpoint_folder(name), stage, device, decoder)


def asked(image, next_image, tasks, known):
    """The tasks that `predict` is to do: those named, or all known, without a next_image less those about motion.
    ValueError for frames or tasks that are not as predict says, or if no task is left."""
    check_frames([image] if next_image is None else [image, next_image])
    tasks = known if tasks is None else tasks
    wanted = parse_tasks(tasks) if isinstance(tasks, str) else list(tasks)
    check_choices("task", wanted, known)
    tasks = [t for t in wanted if TASKS[t].frames == 1 or next_image is not None]
    if not tasks:
        raise ValueError("nothing to predict: these tasks are about motion to a second frame, and there is none")
    return tasks


def check_finite(sums):
    """FloatingPointError names the tasks of {task: sum of a prediction, a scalar} that are not finite."""
    if _readable(next(iter(sums.values()))) and not torch.stack(list(sums.values())).isfinite().all():
        bad = ", ".join(t for t, x in sums.items() if not x.isfinite())
        raise FloatingPointError(f"the prediction of {bad} is not finite: damaged weights, or too low a precision")


def check_choices(what, chosen, known):
    """ValueError unless all that is chosen is known, and something is."""
    unknown = [x for x in chosen if x not in known]
    if unknown or not chosen:
        raise ValueError(f"unknown {what} {', '.join(unknown) or '(none)'}: choose from {', '.join(known)}")


def check_frames(frames):
    """ValueError unless the frames are alike, (B,3,H,W) of floats in [-1,1]."""
    fit = all(f.shape == frames[0].shape and f.ndim == 4 and f.shape[1] == 3 and f.is_floating_point() for f in frames)
    if not fit:
        found = " and ".join(f"{tuple(f.shape)} of {f.dtype}" for f in frames)
        raise ValueError(f"expected frames of one size, (B,3,H,W) floats in [-1,1], found {found}")
    if _readable(frames[0]) and not all(f.abs().max() <= 1.001 for f in frames):
        raise ValueError("expected frames in [-1,1], found other values: divide 0..255 by 127.5, then subtract 1")


def _readable(x):
    """Whether values can be looked at: not on the meta device, nor while a CUDA graph is recorded."""
    return not (x.is_meta or x.is_cuda and torch.cuda.is_current_stream_capturing())


def by_task(x, tasks):
    """(M*B,...), the M tasks one after the other -> {task: (B,...)}."""
    return dict(zip(tasks, x.chunk(len(tasks)), strict=True))


def passes(tasks, z, rows):
    """Split the task list so that tasks x batch stays within `rows` (at least one task at a time)."""
    size = max(1, len(tasks) if rows is None else rows // len(z))
    return [tuple(tasks[i:i + size]) for i in range(0, len(tasks), size)]


# ---- the base: a Stable Diffusion folder or hub id ----

def widen_input(unet):
    """Give a 4-channel UNet its 12 input channels, concat(z_i, z_j, 0): weights repeated three times and divided by
    three, bias kept, so that three copies of a latent give what it gave. A UNet that takes 12 is returned as it is."""
    latent, old = unet.config.out_channels, unet.conv_in
    if unet.config.in_channels == 3 * latent:
        return unet
    if unet.config.in_channels != latent:
        raise ValueError(f"its unet takes {unet.config.in_channels} channels, expected {latent} or {3 * latent}")
    new = nn.Conv2d(3 * latent, old.out_channels, old.kernel_size, old.stride, old.padding).to(old.weight)
    with torch.no_grad():
        new.weight.copy_(old.weight.repeat(1, 3, 1, 1) / 3)
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=3 * latent)
    return unet


def load_base(base):
    """(vae, 12-channel unet, tokenizer, text_encoder) of a base, in float32 (errors: loading.read_base)."""
    vae, unet, tokenizer, text_encoder = loading.read_base(base)
    return vae, widen_input(unet), tokenizer, text_encoder


def from_base(base, tasks, palette="cityscapes", second_frame="concat"):
    """A stage-1 model at its start: the base's VAE and UNet, and the tokens of `tasks` (errors: loading.read_base)."""
    vae, unet, tokenizer, text_encoder = load_base(base)
    with loading.faults_of_base(base):
        tokens = loading.encode_prompts(tokenizer, text_encoder, {t: TASKS[t].prompt for t in tasks})
        loading.check_tokens(tokens)
    return StableMTL(vae, unet, tokens, palette, second_frame)
