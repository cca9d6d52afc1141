"""The pretended device refuses, counts and notes what a GPU would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.pretended_gpu.device import NAME, Pretended, PretendedGpu

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as gpu:
        yield gpu


def test_it_is_there_only_meanwhile() -> None:
    before = torch.cuda.device_count(), torch.nn.Module.to, torch.tensor
    with PretendedGpu(2):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        assert torch.cuda.get_device_name(0) == NAME
    assert (torch.cuda.device_count(), torch.nn.Module.to, torch.tensor) == before
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_tensors_say_where_they_are(gpu: PretendedGpu) -> None:
    made = [
        torch.zeros(2, device=CUDA),
        torch.tensor([1.0], device="cuda"),
        torch.ones(2).to(CUDA),
        torch.ones(2).cuda(),
    ]
    for x in (*made, made[0] + 1, made[0].view(1, 2), torch.zeros_like(made[0]), made[0].to(torch.float64)):
        assert x.device == CUDA and x.is_cuda and isinstance(x, Pretended)
    assert made[0].cpu().device.type == "cpu" and made[0].to("cpu").numpy().tolist() == [0.0, 0.0]
    assert made[0].to(CUDA) is made[0]


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))])
def test_a_model_moves_there_and_back(gpu: PretendedGpu, model: nn.Module) -> None:
    before = [t.clone() for t in model.state_dict().values()]
    model.to(CUDA)
    assert all(t.is_cuda for t in model.state_dict().values())
    assert [p.is_cuda for p in model.to(CUDA).parameters()] == [True] * len(list(model.parameters()))
    model.to("cpu").to("cpu")
    assert not any(t.is_cuda for t in model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


def test_gradients_are_the_cpus_and_tied_parameters_stay_tied(gpu: PretendedGpu) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    ids = torch.tensor([[0, 1, 4]])
    expected = torch.autograd.grad(F.cross_entropy(model(ids).flatten(0, 1), ids[0]), list(model.parameters()))
    model.to(CUDA)
    assert model[2].weight is model[0].weight
    there = ids.to(CUDA)
    loss = F.cross_entropy(model(there).flatten(0, 1), there[0])
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(f.is_cuda and torch.equal(f.cpu(), e) for f, e in zip(found, expected))


def test_what_a_gpu_refuses_is_refused(gpu: PretendedGpu) -> None:
    x = torch.ones(2, 3, device=CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.ones(3)[torch.tensor([0], device=CUDA)]
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.ones(1, device="cuda:1")
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.cuda.set_device(1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            x.cumsum(1)
        image = torch.ones(1, 1, 4, 4, device=CUDA, requires_grad=True)
        pooled = F.adaptive_avg_pool2d(image, 2).sum()
        with pytest.raises(RuntimeError, match="_adaptive_avg_pool2d_backward_cuda"):
            pooled.backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_waits_are_noted_with_their_place(gpu: PretendedGpu) -> None:
    x = torch.ones(2, device=CUDA)
    gpu.reset()
    host = torch.empty(2, pin_memory=True).copy_(x, non_blocking=True)
    assert not gpu.waits and host.tolist() == [1.0, 1.0]
    _ = x.sum().item(), bool(x.any()), x.tolist(), x.nonzero(), x.cpu(), x[x > 0]
    torch.cuda.synchronize()
    assert sum(gpu.waits.values()) == 7
    assert all(place.startswith("tests/pretended_gpu/test_device.py:") for _, place in gpu.waits)
    assert not gpu.copies
    x.add_(torch.ones(2).to(CUDA))
    assert sum(gpu.copies.values()) == 1


def test_kernels_are_counted(gpu: PretendedGpu) -> None:
    layer = nn.Conv2d(2, 4, 3).to(CUDA)
    x = torch.ones(2, 2, 5, 5, device=CUDA, requires_grad=True)
    gpu.reset()
    y = layer(x).view(2, -1)
    assert +gpu.launches == {"convolution": 1}
    torch.autograd.grad(F.dropout(y, 0.5), [x, *layer.parameters()], torch.ones_like(y))
    assert gpu.launches["convolution_backward"] == 3 and gpu.launches["dropout"] == 1
    gpu.reset()
    torch._foreach_add_([torch.ones(1, device=CUDA) for _ in range(61)], 1.0)
    assert gpu.launches["_foreach_add_"] == 2


def test_a_device_has_random_numbers_of_its_own(gpu: PretendedGpu) -> None:
    torch.cuda.default_generators[0].manual_seed(3)
    torch.manual_seed(4)
    drawn = torch.rand(3, device=CUDA)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(drawn.cpu(), torch.rand(3, generator=torch.Generator().manual_seed(3)))
