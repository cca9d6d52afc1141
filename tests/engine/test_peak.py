"""The peak of a GPU by its name."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.keys import parse
from trainer.engine.peak import peak_tflops_per_s, precision


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H200", "tf32", 494.0),
        ("NVIDIA H200 NVL", "bfloat16", 835.0),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312.0),
        ("NVIDIA L4", "float32", 30.3),
        ("NVIDIA L40S", "tf32", 183.0),
        ("Tesla T4", "float32", 8.1),
        ("Tesla T4", "bfloat16", None),  # it has no such products
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),  # a part of one
        ("NVIDIA A10G", "bfloat16", None),  # another card than the A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float32", None),
        ("AMD EPYC 7763 64-Core Processor (25/1)", "float32", None),
    ],
)
def test_the_peak_is_that_of_the_very_card(name: str, kind: str, peak: float | None) -> None:
    assert peak_tflops_per_s(name, kind) == peak


@pytest.mark.parametrize(
    ("keys", "device", "kind"),
    [
        ({}, "cuda", "float32"),
        ({"trainer": {"tf32": True}}, "cuda", "tf32"),
        ({"trainer": {"tf32": True}}, "cpu", "float32"),
        ({"trainer": {"tf32": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "cuda", "bfloat16"),
    ],
)
def test_the_precision_of_products(keys: dict[str, Any], device: str, kind: str) -> None:
    assert precision(parse({"train_batch_size": 8} | keys), device) == kind
