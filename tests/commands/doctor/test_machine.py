"""What `doctor` says of devices and packages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.commands.doctor import machine
from trainer.commands.doctor.machine import Machine
from trainer.errors import UserError

CPU = Machine(gpus=0, cores=2)


def test_versions_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said, figures = machine.versions(CPU)
    assert f"DeepSpeed {figures['deepspeed']}" in said
    found = machine.importlib.metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda n: "1.9" if n == "torch" else found(n))
    with pytest.raises(UserError, match=r"torch is 1\.9 \(torch<3,>=2\.6 is needed\)\. Install"):
        machine.versions(CPU)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"^deepspeed is not installed \(deepspeed.* is needed\)"):
        machine.versions(CPU)


def with_gpus(monkeypatch: pytest.MonkeyPatch, built: list[str], *gpus: tuple[str, int, int]) -> Machine:
    """A machine with GPUs of a name and a compute capability, and a torch that was built for some kinds."""
    properties = [SimpleNamespace(name=n, major=a, minor=b, total_memory=80 * 2**30) for n, a, b in gpus]
    monkeypatch.setattr(machine.torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", properties.__getitem__)
    return Machine(len(gpus), 8)


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        (["sm_80", "sm_90"], (8, 0), True),
        (["sm_80"], (8, 6), True),  # a binary for 8.0
        (["sm_90"], (8, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),  # compiled by the driver
        (["sm_80", "sm_120"], (12, 0), True),
        (["sm_80"], (12, 0), False),
    ],
)
def test_a_gpu_for_which_torch_has_no_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, built: list[str], capability: tuple[int, int], fits: bool
) -> None:
    found = with_gpus(monkeypatch, built, ("A card", *capability))
    if fits:
        said, figures = machine.devices(found)
        assert said.endswith("1 x A card")
        gpu: dict[str, Any] = figures["gpus"][0]
        assert gpu == {"name": "A card", "gib": 80.0, "capability": ".".join(map(str, capability))}
        return
    with pytest.raises(UserError, match=rf"no kernels for GPU 0 \(A card, {capability[0]}\.{capability[1]}\)"):
        machine.devices(found)


def test_different_gpus_are_said_to_be_labelled_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = machine.devices(with_gpus(monkeypatch, ["sm_80"], ("A", 8, 0), ("B", 8, 0)))
    assert said.endswith("different GPUs, so ranks on both are labelled tolerance: 2 x A, B")
    assert "tolerance" not in machine.devices(with_gpus(monkeypatch, ["sm_80"], ("A", 8, 0), ("A", 8, 0)))[0]


def test_without_a_gpu_the_cpu_is_named() -> None:
    said, figures = machine.devices(Machine(gpus=0, cores=1))
    assert said == f"{figures['cpu']}, 1 core; no GPU is used"
    assert Machine(0, 2).device == "cpu"
    assert Machine(2, 2).device == "cuda"
