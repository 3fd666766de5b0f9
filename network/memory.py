"""What makes training fit a smaller GPU: frozen weights in bfloat16, a main stream of low rank (LoRA), and an Adam with
moments in bfloat16. What each saves and costs is in docs/cost.md.

Weights that are trained stay float32. Files hold diffusers' own names and float32, whatever was chosen here.
"""
import torch

from network import stock
from network.loading import quiet

OPTIMIZERS = "adam", "adam-bf16"
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]     # of every transformer block


def freeze_in_bf16(*modules):
    """Convert to bfloat16, in place, what is not trained."""
    for p in (p for module in modules for p in module.parameters() if not p.requires_grad):
        p.data = p.data.bfloat16()


# ---- LoRA ----

def lora_config():
    """peft's LoraConfig. ValueError without peft."""
    try:
        with quiet():
            from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"--lora needs the package peft, which cannot be imported here ({error}): pip install peft, "
                         "or leave --lora out") from error
    return LoraConfig


def add_lora(unet, rank):
    """Freeze a UNet and add to each linear layer W of its attentions and feed-forward layers a trained B A of this rank
    (arXiv 2106.09685), zero at the start. ValueError without peft, whose layers these are."""
    LoraConfig = lora_config()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS))


def merged(unet):
    """The UNet with each W + B A in one weight, float32 on the CPU, under diffusers' own names; one without LoRA is
    returned as it is."""
    state = unet.state_dict()
    if not any(".lora_A." in name for name in state):
        return unet
    plain = {}
    for name, x in state.items():
        if ".lora_" in name:
            continue
        x, layer = x.float(), name.removesuffix(".base_layer.weight")
        if layer != name:
            x = x + unet.get_submodule(layer).get_delta_weight("default").float()
        plain[name.replace(".base_layer.", ".")] = x.cpu().contiguous()
    with torch.device("meta"):
        whole = stock.UNet2DConditionModel.from_config(unet.config)
    whole.load_state_dict(plain, assign=True)
    return whole


# ---- Adam ----

class AdamBf16(torch.optim.Optimizer):
    """Adam of float32 weights whose moments are kept in bfloat16, 4 bytes per weight instead of 8.

    A step computes in float32 and rounds the new moments up or down at random, so that on average nothing is lost: to
    the nearest, a squared gradient that beta2 = 0.999 adds would vanish beside its 8 bits. The random numbers follow
    from the step and the weight's place alone, so every process and every resumed run draws the same.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        known = [(p, group) for group in self.param_groups for p in group["params"]]
        for place, (p, group) in enumerate(known):
            if p.grad is None:
                continue
            state, (beta1, beta2) = self.state[p], group["betas"]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["step"] += 1
            n = int(state["step"])
            mean = state["exp_avg"].float().lerp_(p.grad, 1 - beta1)
            square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            noise = torch.Generator(p.device).manual_seed(n * len(known) + place)
            round_at_random(state["exp_avg"], mean, noise)
            round_at_random(state["exp_avg_sq"], square, noise)
            scale = square.sqrt_().div_((1 - beta2 ** n) ** 0.5).add_(group["eps"])
            p.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** n))


def round_at_random(out, x, generator):
    """x, float32, into out, bfloat16: to the neighbour above or below, so likely each that the mean is x."""
    below = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    out.copy_((x.view(torch.int32) + below).bitwise_and_(-(1 << 16)).view(torch.float32))
