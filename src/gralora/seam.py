"""Every name of PEFT's that is private, or may change, and that gralora relies on: imported here, nowhere else."""

from peft.tuners.lora.layer import Conv1d, MultiheadAttention

__all__ = ["Conv1d", "MultiheadAttention"]
