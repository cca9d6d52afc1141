"""What a config asks of any model: patterns that name parameters, groups, frozen weights, low rank, checkpointing."""

from __future__ import annotations

import copy
import shutil
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.keys import Config, parse
from trainer.engine.adapt import adapt, compile_in_place, frozen_share, merged, parameter_groups
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two layers, one of whose names begins with the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.header, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.header(self.head(x)))


def config(**trainer: Any) -> Config:
    return parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "trainer": trainer})


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], {"head.weight", "head.bias", "header.weight", "header.bias", "norm.weight", "norm.bias"}),
        (["head"], {"header.weight", "header.bias", "norm.weight", "norm.bias"}),
        (["head*"], {"norm.weight", "norm.bias"}),
        (["*.bias"], {"head.weight", "header.weight", "norm.weight"}),
        (["head.weight", "norm"], {"head.bias", "header.weight", "header.bias"}),
        (["head??.*"], {"head.weight", "head.bias", "norm.weight", "norm.bias"}),
    ],
)
def test_what_a_pattern_freezes(patterns: list[str], left: set[str]) -> None:
    model = Net()
    assert adapt(model, config(freeze=patterns)) is model
    assert trained(model) == left


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("encoder", "It has head.weight, head.bias, header.weight, header.bias, norm.weight, norm.bias."),
        ("header.wieght", 'Did you mean "header.weight"?'),
    ],
)
def test_a_pattern_without_a_parameter_is_refused_with_the_names_said_once(pattern: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        adapt(Net(), config(freeze=[pattern]))
    assert str(refused.value) == f'"trainer.freeze": "{pattern}" matches no parameter of the model. {hint}'


def grouped(model: nn.Module, groups: dict[str, Any], vectors: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups, with names in the place of parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    made = parameter_groups(model, config(parameter_groups=groups), vectors)
    return [group | {"params": [names[p] for p in group["params"]]} for group in made]


NOT_DECAYED = {"weight_decay": 0.0}


def test_biases_and_gains_are_a_group_of_their_own() -> None:
    assert grouped(Net(), {}, NOT_DECAYED) == [
        {"params": ["head.weight", "header.weight"]},
        {"params": ["head.bias", "header.bias", "norm.weight", "norm.bias"], "weight_decay": 0.0},
    ]
    every = [name for name, _ in Net().named_parameters()]
    assert grouped(Net(), {}, {}) == [{"params": every}], "one group where nothing differs"


def test_the_last_pattern_that_covers_a_parameter_wins_and_the_usual_group_comes_first() -> None:
    groups = {"head": {"lr": 0.5}, "*.bias": {"lr": 0.1, "weight_decay": 0.3}}
    assert grouped(Net(), groups, NOT_DECAYED) == [
        {"params": ["header.weight"]},
        {"params": ["head.weight"], "lr": 0.5},
        {"params": ["norm.weight"], "weight_decay": 0.0},
        {"params": ["head.bias", "header.bias", "norm.bias"], "lr": 0.1, "weight_decay": 0.3},
    ]


def test_frozen_parameters_are_in_no_group() -> None:
    model = adapt(Net(), config(freeze=["head", "norm"]))
    assert grouped(model, {}, {}) == [{"params": ["header.weight", "header.bias"]}]
    with pytest.raises(UserError, match=r'"trainer\.parameter_groups": "head" matches no parameter'):
        grouped(model, {"head": {"lr": 0.1}}, {})


def test_how_much_of_a_model_is_trained() -> None:
    model = Net()
    assert frozen_share(model) == (30, 30)
    adapt(model, config(freeze=["head"]))
    assert frozen_share(model) == (14, 30)
    part = nn.Parameter(torch.empty(0))
    part.ds_numel = 12  # type: ignore[attr-defined]  # at ZeRO stage 3
    assert frozen_share(nn.ParameterList([part])) == (12, 12)  # type: ignore[arg-type]


class Block(nn.Module):
    """A nested layer with BatchNorm, and one without weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.bare = nn.BatchNorm1d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.norm(self.conv(x)))


def blocks() -> nn.Module:
    return nn.Sequential(nn.Sequential(Block(), Block()), Block())


@pytest.mark.parametrize(
    ("patterns", "still"),
    [
        ([], set()),
        (["0"], {"0.0.norm", "0.0.bare", "0.1.norm", "0.1.bare"}),
        (["0.1"], {"0.1.norm", "0.1.bare"}),
        (["*.norm.*"], {"0.0.norm", "0.1.norm", "1.norm"}),
        (["1.norm.weight", "1.norm.bias"], {"1.norm"}),
        (["*.weight"], set()),
        (["0", "1.conv"], {"0.0.norm", "0.0.bare", "0.1.norm", "0.1.bare"}),
    ],
)
def test_frozen_means_that_running_statistics_stay_too(patterns: list[str], still: set[str]) -> None:
    model = adapt(blocks(), config(freeze=patterns))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    for again in (model, copy.deepcopy(model)):  # a copy, too, as of a merged model
        again.eval()
        again.train()  # as after an evaluation
        again(torch.randn(8, 2, 3))
        moved = {name for name, tensor in again.named_buffers() if not torch.equal(tensor, before[name])}
        norms = {name for name, module in again.named_modules() if isinstance(module, nn.BatchNorm1d)}
        assert norms - {name.rpartition(".")[0] for name in moved} == still
        assert again.training


# ---------------------------------------------------------------- gradient checkpointing


class Checkpoints(Net):
    """As models of transformers do it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(use_cache=True)
        self.asked: dict[str, Any] = {}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.asked = gradient_checkpointing_kwargs


def test_gradient_checkpointing_is_of_the_kind_that_gradients_can_be_taken_of() -> None:
    model = Checkpoints()
    assert adapt(model, config(gradient_checkpointing=True)) is model
    assert model.asked == {"use_reentrant": False}
    assert model.config.use_cache is False, "a cache would keep what is to be computed again"


def test_a_model_that_cannot_checkpoint_is_refused_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Net has no method gradient_checkpointing_enable\(\).*Leave the key out"):
        adapt(Net(), config(gradient_checkpointing=True))

    def refuses(self: Any, gradient_checkpointing_kwargs: Any) -> None:
        raise ValueError("Checkpoints does not support gradient checkpointing")

    monkeypatch.setattr(Checkpoints, "gradient_checkpointing_enable", refuses)
    with pytest.raises(UserError, match="does not support gradient checkpointing"):
        adapt(Checkpoints(), config(gradient_checkpointing=True))


# ---------------------------------------------------------------- low rank


class NetForSequenceClassification(nn.Module):
    """Named as models of transformers are, whose last layer is new."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.middle(self.body(x)))


def test_low_rank_updates_begin_at_nothing_and_are_merged_into_the_plain_model() -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    torch.manual_seed(0)
    plain, x = Net().eval(), torch.randn(5, 3)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    expected = plain(x).detach()
    model = adapt(plain, config(lora={"rank": 2, "alpha": 4, "target_modules": ["head"]}))
    assert torch.equal(model(x), expected), "the updates begin at 0"
    assert len(trained(model)) == 2
    assert all("lora" in name for name in trained(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    changed = model(x).detach()
    assert not torch.allclose(changed, expected)
    whole = merged(model)
    assert set(whole.state_dict()) == set(before)
    torch.testing.assert_close(whole(x), changed)
    moved = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight"}
    assert torch.equal(model(x), changed), "the run goes on with its adapters"


def test_a_model_without_adapters_is_its_own_merged_one() -> None:
    model = Net()
    assert merged(model) is model


@pytest.mark.parametrize("also", [[], ["middle"]])
def test_a_classifiers_last_layer_is_trained_whole_beside_what_the_config_names(also: list[str]) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    asked = config(lora={"also_train": also})
    model = adapt(NetForSequenceClassification(), asked)
    whole = {name for name in trained(model) if "lora" not in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in whole} == {*also, "classifier"}
    assert any("lora" in name for name in trained(model))
    assert asked == config(lora={"also_train": also}), "peft adds to its lists: not to those that the manifest records"


def test_low_rank_updates_of_what_has_no_such_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    with pytest.raises(UserError) as caught:
        adapt(Net(), config(lora={"target_modules": ["query"]}))
    assert '"trainer.lora" cannot be applied to Net' in str(caught.value)
    assert "Its linear layers are head, header." in str(caught.value)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'"trainer\.lora" needs the package peft: pip install'):
        adapt(Net(), config(lora={}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": 2}, "grouped convolution"),
        ({"dilation": 2}, "is not dilated"),
        ({"padding": 1, "padding_mode": "circular"}, "the layer's padding_mode is circular"),
    ],
)
def test_low_rank_updates_that_peft_makes_wrong_or_cannot_save_are_refused_at_once(
    settings: dict[str, Any], words: str
) -> None:
    """Random tasks met the first after training, and the second as a traceback. The third saved another model."""
    pytest.importorskip("peft", reason="the extra lora is not installed")

    def model() -> nn.Module:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 8, 3, **settings), plain=nn.Conv2d(8, 4, 3)))

    with pytest.raises(UserError, match=rf"cannot adapt conv: .*{words}.* Leave this layer out of trainer"):
        adapt(model(), config(lora={"rank": 2, "target_modules": ["conv", "plain"]}))
    merged(adapt(model(), config(lora={"rank": 2, "target_modules": ["plain"]})))


# ---------------------------------------------------------------- compilation


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r'"trainer\.compile": torch\.compile needs a C and C\+\+ compiler'):
        compile_in_place(Net())


def test_each_shape_is_compiled_for_itself_and_never_left_to_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ranks would fall back and others not: so too many shapes are an error."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc" if name == "clang" else None)
    monkeypatch.setattr(dynamo, "recompile_limit", dynamo.recompile_limit)
    monkeypatch.setattr(dynamo, "fail_on_recompile_limit_hit", False)
    if hasattr(inductor, "deterministic"):
        monkeypatch.setattr(inductor, "deterministic", False)
    asked: dict[str, Any] = {}
    model = Net()
    monkeypatch.setattr(model, "compile", lambda **options: asked.update(options))
    compile_in_place(model)
    assert asked == {"dynamic": False}
    assert dynamo.fail_on_recompile_limit_hit
    assert getattr(inductor, "deterministic", True)


def test_an_adapter_leaves_the_statistics_of_its_base() -> None:
    """It does not hold them, so on its base it would be another model than the one that was trained."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    model = adapt(blocks(), config(lora={"rank": 1, "target_modules": ["conv"]}))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.train()
    model(torch.randn(8, 2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    whole = adapt(blocks(), config(lora={"rank": 1, "target_modules": ["conv"], "also_train": ["1"]}))
    whole.train()
    before = {name: tensor.clone() for name, tensor in whole.named_buffers()}
    whole(torch.randn(8, 2, 3))
    moved = {name for name, tensor in whole.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("modules_to_save" in name for name in moved)


def test_low_rank_updates_of_tied_weights_come_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """Of peft on tied weights, which `merged` unties, and of transformers on names that peft uses."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=9, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(tied)
    recwarn.clear()
    merged(adapt(model, config(lora={"rank": 1, "target_modules": ["lm_head"]})))
    assert [str(warning.message) for warning in recwarn] == []
