"""Where PyTorch computes, and in what type."""

import torch

_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # as PyTorch names them, of x86 and of Arm


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype(device: str) -> str:
    """bfloat16 where the hardware multiplies in it, otherwise float32."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if any(known.get(name) for name in _BF16_FEATURES) else "float32"
