"""DeepSpeed's engine as the trainer uses it: an update is the optimizer's own, and its state goes out and in again.

Engines are made in a rank of its own: DeepSpeed keeps much in globals.
"""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator, real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch import Tensor, nn

from tests.distributed.jobs import small_config
from trainer.config.keys import Config
from trainer.engine.deepspeed_engine import use_accelerator
from trainer.errors import UserError
from trainer.ranks.place import Ranks
from trainer.ranks.rendezvous import start
from trainer.ranks.workers import run_ranks

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True, "fused": True}}
NADAM = {"type": "NAdam", "params": {"lr": 0.01, "weight_decay": 0.1}}  # a product beside its moments


def model_of() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model[1].weight.requires_grad_(False)  # type: ignore[index]
    return model


def engine_of(config: Config, model: nn.Module) -> Any:
    """An engine at rank 0 of 1, with a flat gradient of its own."""
    from trainer.engine.deepspeed_engine import Engine

    engine: Any = Engine(model, config, micro_batch_size=8, world_size=1)
    sizes = [parameter.numel() for parameter in engine.parameters]
    engine.flat = torch.linspace(-1.0, 1.0, sum(sizes))
    engine.use_gradient(engine.flat, [v.view_as(p) for v, p in zip(engine.flat.split(sizes), engine.parameters)])
    return engine


def copies(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().clone().numpy() for name, tensor in tensors.items()}


def steps(ranks: Ranks, config: Config, other: Config) -> dict[str, Any]:
    """Several updates, out and in again; and what is refused."""
    import deepspeed

    from trainer.engine.deepspeed_engine import _deepspeed_config, builds_an_op

    deepspeed.ops.__compatible_ops__ = {}
    start(ranks, "gloo", 60.0)
    engine = engine_of(config, model_of())
    found: dict[str, Any] = {"names": list(engine.names.values()), "shapes": engine.whole_shapes()}
    found["forward_module"] = engine.forward_module is engine.model
    with engine.autocast():
        found["autocast"] = str((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
    found["rates"] = [engine.set_learning_rate(factor) for factor in (0.5, None, 1.0)]
    before = copies(engine.model_state())
    engine.update(unused=[1])
    found["updated"] = {name: (before[name], array) for name, array in copies(engine.model_state()).items()}
    found["gradients_there"] = all(p.grad is not None for p in engine.parameters)
    found["state"] = sorted(engine.state())

    saved_model = {name: torch.from_numpy(array) for name, array in copies(engine.model_state()).items()}
    tensors, values = engine.optimizer_state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again = engine_of(config, model_of())
    again.load_state(saved_model, tensors, values)
    found["loaded"] = all(torch.equal(saved_model[n], t) for n, t in again.model_state().items())
    for each in (engine, again):
        each.flat.mul_(-0.5)
        each.update()
    one, two = engine.state(), again.state()
    found["goes_on"] = set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    found["not_shared"] = all(one[name].data_ptr() != two[name].data_ptr() for name in one)
    flag = torch.zeros(())
    found["skips"] = engine.skip_update_where(flag)
    for each in (engine, again):
        each.update()
    found["not_skipped"] = all(torch.equal(t, two[name]) for name, t in engine.state().items())
    flag.fill_(1.0)
    before = copies(engine.model_state())
    engine.flat[::2] = math.nan
    engine.update()
    found["skipped"] = all((before[n] == a).all() for n, a in copies(engine.model_state()).items())
    found["op"] = builds_an_op(config)
    found["json"] = _deepspeed_config(config, 8, 3, 0.0)

    def refused(make: Any) -> str:
        try:
            make()
        except UserError as error:
            return str(error)
        return ""

    frozen = model_of().requires_grad_(False)
    found["refused"] = {
        "frozen": refused(lambda: engine_of(config, frozen)),
        "double": refused(lambda: engine_of(config, model_of().double())),
        "groups": refused(lambda: engine_of(other, model_of()).load_state(saved_model, tensors, values)),
    }
    return found


@pytest.fixture(scope="module", params=[ADAMW, NADAM], ids=["AdamW, fused", "NAdam"])
def optimizer(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def found(optimizer: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    one = small_config(folder, optimizer=optimizer, decay_biases_and_norms=True)
    groups = small_config(folder, optimizer=optimizer, parameter_groups={"scale": {"lr": 0.5}})
    return run_ranks(steps, 1, one, groups)[0]


def test_an_update_is_that_of_torchs_optimizer(found: dict[str, Any], optimizer: dict[str, Any]) -> None:
    model = model_of()
    parameters = [p for p in model.parameters() if p.requires_grad]
    params = {name: value for name, value in optimizer["params"].items() if name not in ("torch_adam", "fused")}
    theirs = getattr(torch.optim, optimizer["type"])(parameters, **params)
    flat = torch.linspace(-1.0, 1.0, sum(p.numel() for p in parameters))
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter).clone()
    parameters[1].grad = None
    theirs.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(found["updated"][name][1]), parameter.detach(), msg=name)


def test_what_is_trained_is_listed_in_the_models_order(found: dict[str, Any]) -> None:
    trained = [name for name, parameter in model_of().named_parameters() if parameter.requires_grad]
    assert found["names"] == trained
    assert "1.weight" not in trained
    shapes = {name: tuple(tensor.shape) for name, tensor in model_of().state_dict().items()}
    assert found["shapes"] == shapes
    assert found["forward_module"], "without ZeRO, nothing stands between the step and the model"


def test_unused_and_frozen_parameters_stay_and_keep_a_place_for_their_gradient(found: dict[str, Any]) -> None:
    unused = found["names"][1]
    stays = {name for name, (before, after) in found["updated"].items() if (before == after).all()}
    assert stays == {unused, "1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert found["gradients_there"]


def test_the_rate_is_a_multiple_of_the_configs(found: dict[str, Any]) -> None:
    assert found["rates"] == [0.005, 0.005, 0.01]  # None leaves it as it is


def test_a_state_that_is_loaded_goes_on_to_the_same_bits(found: dict[str, Any]) -> None:
    assert found["loaded"]
    assert found["goes_on"]
    assert found["not_shared"]
    assert {name.split()[0] for name in found["state"]} == {"parameter", "buffer", "optimizer"}
    assert "optimizer scale.exp_avg" in found["state"]


def test_a_fused_kernel_skips_its_update_where_it_is_told(found: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """So that the host need not wait for a loss to know whether it is finite."""
    assert found["skips"] and found["not_skipped"] and found["skipped"]


def test_what_deepspeed_is_told_is_consistent_for_it(found: dict[str, Any], optimizer: dict[str, Any]) -> None:
    told = found["json"]
    assert told["train_batch_size"] == told["train_micro_batch_size_per_gpu"] * 3 == 24
    assert told["gradient_accumulation_steps"] == 1
    assert told["optimizer"] == optimizer
    assert told["timers"] == {"throughput": {"enabled": False}}
    assert "zero_optimization" not in told
    assert found["op"] is False
    assert found["autocast"] == "torch.float32"


def test_models_and_checkpoints_that_cannot_be_trained(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert "no parameter that requires a gradient" in refused["frozen"]
    assert "The parameter scale is float64. Trained parameters must be float32" in refused["double"]
    assert "The checkpoint has 1 parameter groups, this run has 3." in refused["groups"]


def one_step(ranks: Ranks, config: Config) -> dict[str, Any]:
    """What DeepSpeed's step() does with a reduced gradient: whether it changes it, and which collectives it calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.record.console import DeepSpeedLog
    from trainer.run.build import build

    class Collectives(TorchDispatchMode):
        """Every operation of a process group passes here, whatever called it."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(function).startswith("c10d."):
                self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    log = DeepSpeedLog(keep=False)
    log.install()
    engine = build(config, ranks, config.plan(ranks.world_size), log).engine
    sizes = [parameter.numel() for parameter in engine.parameters]
    flat = torch.linspace(-1.0, 1.0, sum(sizes))
    engine.use_gradient(flat, [v.view_as(p) for v, p in zip(flat.split(sizes), engine.parameters)])
    inner = engine._engine
    before = [parameter.detach().clone() for parameter in engine.parameters]
    given = flat.clone()
    found: dict[str, Any] = {"norm": float(torch.linalg.vector_norm(flat))}
    with Collectives() as quiet:
        engine.update()
    found["left_alone"] = torch.equal(flat, given)
    found["moved"] = all(not torch.equal(a, b) for a, b in zip(before, engine.parameters))
    found["kept_gradient"] = all(parameter.grad is not None for parameter in engine.parameters)
    inner.enable_backward_allreduce = True
    with Collectives() as loud:
        engine.update()
    return found | {"collectives": quiet.seen, "collectives_with_allreduce": loud.seen}


@pytest.mark.parametrize("clipping", [0.001, 0.0])
def test_an_update_clips_nothing_and_sends_nothing(tmp_path: Path, clipping: float) -> None:
    for found in run_ranks(one_step, 2, small_config(tmp_path / "run", gradient_clipping=clipping)):
        assert found["norm"] > 1.0
        assert found["left_alone"]  # the step has clipped before
        assert found["moved"]
        assert found["kept_gradient"]
        assert found["collectives"] == []
        # The switch is what keeps it quiet.
        assert any("allreduce" in name for name in found["collectives_with_allreduce"])


# ---------------------------------------------------------------- one part at a time


@pytest.mark.parametrize(("fused", "where"), [(False, "cpu"), (True, "meta")])
def test_where_a_loaded_state_lies(fused: bool, where: str) -> None:
    """A moment goes to its parameter's device, also one of no dimension; the step to where the kernel wants it."""
    from trainer.engine.deepspeed_engine import Engine

    engine = Engine.__new__(Engine)
    engine.optimizer = types.SimpleNamespace(param_groups=[{"fused": fused}])
    parameter, saved = torch.nn.Parameter(torch.ones((), device="meta")), torch.tensor(3.0)
    placed = {kind: engine._placed(f"logit_scale.{kind}", saved, parameter) for kind in ("exp_avg", "step")}
    assert placed["exp_avg"].device.type == "meta"
    assert placed["step"].device.type == where
    assert {tensor.shape for tensor in placed.values()} == {torch.Size([])}


def test_what_a_config_asks_of_deepspeed_reaches_it(tmp_path: Path) -> None:
    from trainer.engine.deepspeed_engine import _deepspeed_config

    zero = {"stage": 2, "overlap_comm": False}
    asked = small_config(
        tmp_path,
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        steps_per_print=7,
        torch_autocast={"enabled": True, "dtype": "bfloat16"},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    )
    told = _deepspeed_config(asked, 8, 2, 0.5)
    assert told["zero_optimization"] == zero
    assert told["zero_allow_untested_optimizer"] is True
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert told["scheduler"] == {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    assert (told["steps_per_print"], told["gradient_clipping"]) == (7, 0.5)
    assert "communication_data_type" not in told, "what the config leaves out is DeepSpeed's own choice"
    layerwise = small_config(tmp_path, optimizer={"type": "LAMB", "params": {"lr": 0.1}})
    assert "optimizer" not in _deepspeed_config(layerwise, 8, 1, 0.0), "it arrives as an object"


@pytest.mark.parametrize(
    ("optimizer", "built"),
    [
        (ADAMW, False),
        ({"type": "Adam", "params": {"lr": 0.1}}, True),
        ({"type": "Lion", "params": {"lr": 0.1}}, True),
        ({"type": "SGD", "params": {"lr": 0.1}}, False),
    ],
)
def test_which_optimizers_deepspeed_compiles(optimizer: dict[str, Any], built: bool, tmp_path: Path) -> None:
    from trainer.engine.deepspeed_engine import builds_an_op

    assert builds_an_op(small_config(tmp_path, optimizer=optimizer)) is built


@pytest.mark.parametrize(("device", "other"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_deepspeed_works_on_the_device_that_we_chose(device: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it chose by itself, or by DS_ACCELERATOR."""
    made = {"cpu": CPU_Accelerator, "cuda": CUDA_Accelerator}[other]()
    monkeypatch.setattr(real_accelerator, "ds_accelerator", made)
    use_accelerator(torch.device(device, 0))
    assert get_accelerator().device_name() == device
    chosen = get_accelerator()
    use_accelerator(torch.device(device, 0))
    assert get_accelerator() is chosen


def probes(ranks: Ranks, config: Config) -> list[str]:
    """Which of DeepSpeed's kernels are looked at while an engine is made."""
    import deepspeed

    vars(deepspeed.ops).pop("__compatible_ops__", None)
    looked_at: list[str] = []
    deepspeed.ops._probe_compatible_ops = lambda: looked_at.append("all of them") or {}
    start(ranks, "gloo", 60.0)
    engine_of(config, model_of())
    return looked_at


def test_no_rank_tries_kernels_that_nobody_asked_for() -> None:
    """On a GPU these are 23, in 1 to 3 s."""
    assert run_ranks(probes, 1, small_config("unused", optimizer=ADAMW))[0] == []


def late(ranks: Ranks, config: Config) -> list[Any]:
    """Updates in which some parameters are used later than others; the same by torch's plain optimizer."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    start(ranks, "gloo", 60.0)
    engine, model = engine_of(config, model_of()), model_of()
    parameters = [p for p in model.parameters() if p.requires_grad]
    params = {name: value for name, value in config.optimizer.params.items() if name != "fused"}
    plain = torch.optim.SGD(parameters, **params)
    found = []
    for unused in ([1, 3], [1], [], [2], []):
        for i, (parameter, own) in enumerate(zip(parameters, engine.parameters)):
            parameter.grad = None if i in unused else own.grad.clone()
        plain.step()
        engine.update(unused)
        engine.flat.mul_(-0.5)
        found.append(
            all(torch.allclose(p, own) for p, own in zip(parameters, engine.parameters))
            and all(own.grad is not None for own in engine.parameters)
        )
    return found


def test_a_parameter_that_is_used_later_than_others_gets_a_first_step() -> None:
    """Torch's fused SGD with momentum fails where some parameters have a buffer and others do not."""
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "fused": True}}
    assert run_ranks(late, 1, small_config("unused", optimizer=sgd))[0] == [True] * 5


@pytest.mark.usefixtures("group_of_one")
def test_thin_weights_in_channels_last_are_sent() -> None:
    """They are contiguous in two ways at once, and torch takes them for tensors that overlap themselves."""
    from trainer.engine.deepspeed_engine import Engine

    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in model.parameters()]
    engine = Engine.__new__(Engine)
    engine.model, engine.zero_stage = model, 0
    assert engine._send_odd_parameters()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
