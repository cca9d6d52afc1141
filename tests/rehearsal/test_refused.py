"""Operations that torch refuses on GPUs: they are found on a CPU, named with their module, and have a substitute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.rehearsal.refused import SUBSTITUTES, Watch, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


class Here(nn.Module):
    """Calls a function in a forward of its own."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def refused(function: Any, x: Tensor) -> list[tuple[str, str]]:
    """What a GPU would refuse of a forward and a backward."""
    model = nn.Sequential(nn.Identity(), Here(function))
    watch = Watch(model)
    with watch.modules():
        out = model(x.requires_grad_())
        if out.requires_grad:
            out.sum().backward()
    return [(operation.name, operation.where) for operation in watch.refused]


IMAGE, VOLUME, LINE = torch.rand(2, 3, 8, 6), torch.rand(2, 3, 8, 6, 4), torch.rand(2, 3, 8)
LABELS = torch.arange(96).view(2, 8, 6) % 3


@pytest.mark.parametrize(
    ("function", "x", "name"),
    [
        (nn.AdaptiveAvgPool2d(2), IMAGE, "_adaptive_avg_pool2d_backward"),
        (nn.AdaptiveAvgPool1d(2), LINE, "_adaptive_avg_pool2d_backward"),
        (nn.AdaptiveAvgPool3d(2), VOLUME, "_adaptive_avg_pool3d_backward"),
        (nn.AvgPool3d(2), VOLUME, "avg_pool3d_backward"),
        (nn.AdaptiveMaxPool2d(2), IMAGE, "adaptive_max_pool2d_backward"),
        (nn.ReflectionPad2d(1), IMAGE, "reflection_pad2d_backward"),
        (nn.Upsample(scale_factor=2, mode="linear"), LINE, "upsample_linear1d_backward"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE, "upsample_bicubic2d_backward"),
        (lambda x: F.grid_sample(x, torch.zeros(2, 4, 4, 2), align_corners=False), IMAGE, "grid_sampler_2d_backward"),
        (lambda x: F.cross_entropy(x, LABELS, reduction="sum"), IMAGE, "nll_loss2d_forward"),
        (lambda x: x.median(0).values, LINE, "median"),
        (lambda x: torch.histc(x.detach(), 4), LINE, "histc"),
    ],
)
def test_what_a_gpu_refuses_is_found_with_its_module(function: Any, x: Tensor, name: str) -> None:
    assert refused(function, x.clone()) == [(name, "the module 1 (Here)" if not isinstance(function, nn.Module) else
                                             f"the module 1.function ({type(function).__name__})")]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (nn.AdaptiveAvgPool2d(1), IMAGE),  # a mean
        (nn.AvgPool2d(2), IMAGE),
        (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),  # torch computes it in another way there
        (nn.MaxPool3d(2), VOLUME),
        (nn.ReplicationPad2d(1), IMAGE),
        (lambda x: F.cross_entropy(x, LABELS, reduction="none").sum(), IMAGE),
        (lambda x: x.median(), IMAGE),
        (lambda x: x.cumsum(0), IMAGE),
        (lambda x: nn.AvgPool3d(2)(x.detach()), VOLUME),  # no backward, which alone is refused
    ],
)
def test_what_it_takes_is_not(function: Any, x: Tensor) -> None:
    assert refused(function, x.clone()) == []


def test_the_module_is_that_of_the_forward() -> None:
    """Autograd comes to the operations later, when no module's forward goes on; a layer can be used twice."""
    model = nn.Sequential(
        nn.ReflectionPad2d(1), nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2)), nn.Flatten()
    )
    watch = Watch(model)
    with watch.modules():
        loss = (
            model(IMAGE.clone().requires_grad_()).pow(2).sum()
            + F.interpolate(model(IMAGE)[:, None], 30, mode="linear").sum()
        )
        loss.backward()
    assert [tuple(operation) for operation in watch.refused] == [
        ("upsample_linear1d_backward", ""),
        ("_adaptive_avg_pool2d_backward", "the module 1.1 (AdaptiveAvgPool2d)"),
        ("reflection_pad2d_backward", "the module 0 (ReflectionPad2d)"),
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def expression(name: str) -> str:
    return SUBSTITUTES[name].partition(";")[0]


HALF, INDICES = F.max_pool2d(IMAGE, 2, return_indices=True)
WORDS, TABLE = torch.arange(12).view(3, 4) * 5 % 7, torch.randn(7, 5)
SAMPLES: dict[str, tuple[Tensor, Any, dict[str, Any]]] = {
    "adaptive_avg_pool2d": (IMAGE, nn.AdaptiveAvgPool2d((3, 4)), {"height": 3, "width": 4}),
    "adaptive_avg_pool3d": (VOLUME, nn.AdaptiveAvgPool3d((3, 4, 1)), {"output_size": (3, 4, 1)}),
    "avg_pool3d": (VOLUME, nn.AvgPool3d(3, 1), {"kernel_size": 3, "stride": 1, "output_size": (6, 4, 2)}),
    "adaptive_max_pool2d": (IMAGE, nn.AdaptiveMaxPool2d((4, 3)), {"k": 2}),
    "adaptive_max_pool3d": (VOLUME, nn.AdaptiveMaxPool3d((4, 3, 2)), {"k": 2}),
    "upsample_linear1d": (LINE, nn.Upsample(13, mode="linear"), {"length": 13}),
    "upsample_bicubic2d_aa": (
        IMAGE, lambda x: F.interpolate(x, (5, 9), mode="bicubic", antialias=True),
        {"height": 5, "width": 9, "mode": "bicubic"},
    ),
    "upsample_bilinear2d_aa": (
        IMAGE, lambda x: F.interpolate(x, (5, 9), mode="bilinear", antialias=True),
        {"height": 5, "width": 9, "mode": "bilinear"},
    ),
    "upsample_bicubic2d": (IMAGE, nn.Upsample((11, 9), mode="bicubic"), {"height": 11, "width": 9, "mode": "bicubic"}),
    "reflection_pad": (LINE, nn.ReflectionPad1d(3), {"p": 3}),
    "max_unpool": (HALF, lambda x: F.max_unpool2d(x, INDICES, 2), {"indices": INDICES, "N": 2, "C": 3}),
    "nll_loss2d": (IMAGE, lambda x: F.cross_entropy(x, LABELS, reduction="sum"), {"target": LABELS}),
    "embedding_bag": (TABLE, lambda w: F.embedding_bag(WORDS, w, mode="max"), {"indices": WORDS, "weight": TABLE}),
    "bincount": (WORDS.flatten(), lambda x: torch.bincount(x, TABLE.flatten()[:12]),
                 {"n": 7, "weights": TABLE.flatten()[:12]}),
    "median": (IMAGE, lambda x: x.median(2).values, {"dim": 2}),
    "kthvalue": (IMAGE, lambda x: x.kthvalue(3, 2).values, {"dim": 2, "k": 3}),
    "put": (LINE, lambda x: x.put(WORDS.flatten()[:4], TABLE[0, :4]),
            {"indices": WORDS.flatten()[:4], "values": TABLE[0, :4]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SUBSTITUTES)
def test_each_substitute_computes_the_same(name: str) -> None:
    """The values, and the gradient."""
    x, function, values = SAMPLES[name]
    results = []
    sizes = {"H": 8, "W": 6}
    for compute in (function, lambda x: eval(expression(name), {"torch": torch, "F": F, **sizes, **values, "x": x})):
        own = x.clone().requires_grad_(x.is_floating_point() and name != "embedding_bag")
        out = compute(own)
        if own.requires_grad:
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append((out.detach(), own.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("torch_says", "words"),
    [
        ("adaptive_avg_pool2d_backward_cuda", "the same, up to rounding: F.adaptive_avg_pool1d"),
        ("upsample_bicubic2d_backward_out_cuda", "mode=mode)[0, 0]"),
        ("max_unpooling2d_forward_out", "scatter"),
        ("nll_loss2d_forward_out_cuda_template", 'reduction="none"'),
        ("embedding_bag_backward_cuda_max", "F.embedding("),
        ("_bincount_cuda", "index_add"),
        ("median CUDA with indices output", "x.sort(dim)"),
        ("put_", "index_copy"),
        ("ctc_loss_backward_gpu", "Nothing in torch computes exactly the same"),
        ("nanmedian CUDA with indices output", "Nothing in torch computes exactly the same"),
    ],
)
def test_torchs_own_words_are_understood(torch_says: str, words: str) -> None:
    advice = (
        "but you set 'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
    )
    error = refusal(
        RuntimeError(f"{torch_says} does not have a deterministic implementation, {advice}"), "the module a"
    )
    assert error is not None
    assert f"the module a uses {torch_says.strip('_')}. " in str(error)
    assert words in str(error)
    assert "turn off" not in str(error)
    assert refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
