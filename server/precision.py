"""What "auto" means for dtype and quantisation, on the device at hand."""

from __future__ import annotations

import torch

from swarm.tensors import DTYPES

from .config import DTypeSetting, Quantization, QuantizationSetting

#: What torch calls the instructions of a processor that multiply in bfloat16: x86 with AVX-512 or AMX, ARM.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def choose_dtype(setting: DTypeSetting, stored: torch.dtype, native_bfloat16: bool) -> torch.dtype:
    """stored: the checkpoint's. Where bfloat16 is not native it is emulated, slower than what is stored may be."""
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if native_bfloat16 else stored


def choose_quantization(setting: QuantizationSetting, device: torch.device) -> Quantization:
    """NF4 on CUDA, where memory is what decides how many blocks a server holds; nothing on a CPU."""
    if setting != "auto":
        return setting
    return "nf4" if device.type == "cuda" else "none"


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. Elsewhere torch emulates it, and calls that supported too."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
