"""GraLoRA (Granular Low-Rank Adaptation, arXiv 2505.20355) as a LoRA variant for Hugging Face PEFT."""

from .config import LoraConfig
from .layers import install

__all__ = ["LoraConfig"]

install()
