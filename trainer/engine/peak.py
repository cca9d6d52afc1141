"""The peak of a GPU: the most floating-point operations per second, by its name and the precision of the products."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..config.keys import Config


class Peak(NamedTuple):
    """TFLOP/s of one GPU, of dense products (data sheets often print twice as many, for sparse ones).

    None if the GPU cannot compute in this precision, or if no source is known.
    """

    bfloat16: float | None
    tf32: float | None
    float32: float | None


# torch's whole name of a GPU -> its peak. A part of a GPU (MIG) has another name, and so has a card for laptops.
# The comment above an entry is the source of its numbers.
_PEAKS = {
    # https://www.nvidia.com/en-us/data-center/v100/ and https://www.nvidia.com/en-us/data-center/tesla-t4/
    r"Tesla V100-SXM2-(16|32)GB": Peak(None, None, 15.7),
    r"Tesla T4": Peak(None, None, 8.1),
    # https://www.nvidia.com/en-us/data-center/a100/
    r"NVIDIA A100(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe)": Peak(312.0, 156.0, 19.5),
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/ and the same for a30; .../data-center/a40/
    r"NVIDIA A10": Peak(125.0, 62.5, 31.2),
    r"NVIDIA A30": Peak(165.0, 82.0, 10.3),
    r"NVIDIA A40": Peak(149.7, 74.8, 37.4),
    # https://www.nvidia.com/en-us/data-center/l4/ and the same for l40 and l40s
    r"NVIDIA L4": Peak(121.0, 60.0, 30.3),
    r"NVIDIA L40": Peak(181.0, 90.5, 90.5),
    r"NVIDIA L40S": Peak(362.0, 183.0, 91.6),
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet and .../data-center/h200/
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": Peak(989.0, 494.0, 67.0),
    r"NVIDIA H100 PCIe": Peak(756.0, 378.0, 51.0),
    r"NVIDIA H(100|200) NVL": Peak(835.0, 417.0, 60.0),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf, sums in float32
    r"NVIDIA GeForce RTX 3090": Peak(71.0, 35.6, 35.6),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, sums in float32
    r"NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
}


def precision(config: Config, device_type: str) -> str:
    """The type of the factors in a run's matrix products: bfloat16, tf32 or float32."""
    if config.torch_autocast.enabled:
        return "bfloat16"
    return "tf32" if config.trainer.tf32 and device_type == "cuda" else "float32"


def peak_tflops_per_s(device_model: str, kind: str) -> float | None:
    """The most that one device can do; None if that is not known, as of a processor.

    Args:
        device_model: as torch names the GPU.
        kind: as from `precision`.
    """
    for name, peak in _PEAKS.items():
        if re.fullmatch(name, device_model):
            found: float | None = getattr(peak, kind)
            return found
    return None
