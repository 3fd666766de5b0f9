"""The toy stand-ins for Stable Diffusion and for a trained model: folders of weights, and what made them (make.py)."""
from pathlib import Path

BASE = Path(__file__).parent / "base"       # vae/, unet/, text_encoder/, tokenizer/: train.py --stage 0 makes it
MODEL = Path(__file__).parent / "model"     # a trained checkpoint: what predicts where there is no --ckpt and no out/
