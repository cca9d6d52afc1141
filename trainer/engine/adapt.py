"""What a config can ask for with any model: frozen parameters, LoRA, gradient checkpointing, groups, compilation.

All of it is applied after the task has made its model. The task's code need not know of it.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import shutil
import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..config.keys import Config, LoraOptions
from ..config.schema import near
from ..errors import UserError

# More shapes than any plan has. At this limit compilation raises an error. Without the error torch would use eager mode
# instead, perhaps on some ranks only, and those would compute other bits.
_MOST_SHAPES = 64


def adapt(model: nn.Module, config: Config) -> nn.Module:
    """The model with everything that `config.trainer` asks for, except compilation. Draws from torch's generators.

    Raises:
        UserError: a pattern names no parameter, or the model cannot do what is asked.
    """
    options = config.trainer
    for pattern in options.freeze:
        for name in _matching(pattern, [n for n, _ in model.named_parameters()], '"trainer.freeze"'):
            model.get_parameter(name).requires_grad_(False)
    if options.gradient_checkpointing:
        _checkpoint(model)
    if options.lora is not None:
        model = _with_lora(model, options.lora)
    if options.freeze or options.lora is not None:
        # With LoRA everything is frozen, except the updates and the modules of which peft trains whole copies.
        _freeze_statistics(model, options.freeze, "" if options.lora is None else "modules_to_save")
    return model


def _freeze_statistics(model: nn.Module, patterns: list[str], all_but: str) -> None:
    """Keeps BatchNorm layers in evaluation mode if their parameters are frozen: frozen means unchanged.

    Otherwise their running statistics would follow the new data. LoRA's adapter does not hold them. Loaded on its base,
    it would then give another model than the one that was trained.

    Args:
        model: with its frozen parameters.
        patterns: `trainer.freeze`.
        all_but: "" or a part of a name. Layers without weights are then frozen unless their name contains it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase) or module.running_mean is None:
            continue
        own = list(module.parameters(recurse=False))
        # A layer without weights of its own belongs to the module that a pattern names.
        named = any(_covers(pattern, f"{name}.running_mean") for pattern in patterns)
        named = named or bool(all_but and all_but not in name)
        if named if not own else not any(parameter.requires_grad for parameter in own):
            module.eval()
            # After each evaluation the whole model's `train()` is called. It must not change this layer. A partial is
            # copied together with the module. A lambda in a copy would still refer to the old module.
            module.train = functools.partial(_stay, module)  # type: ignore[method-assign,assignment]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _covers(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _matching(pattern: str, names: list[str], option: str) -> list[str]:
    """The names that a pattern covers. It may have * and ?; a module's name covers all its parameters."""
    found = [n for n in names if _covers(pattern, n)]
    if not found:
        hint = near(pattern, names)
        if hint.startswith("Known"):  # no name is near, so the first few are shown
            hint = f"It has {', '.join(names[:8])}{', ...' if len(names) > 8 else '.'}"
        raise UserError(f'{option}: "{pattern}" matches no parameter of the model. {hint}')
    return found


def _checkpoint(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    problem = f"{type(model).__name__} has no method gradient_checkpointing_enable(), which models of transformers have"
    if enable is not None:
        try:
            # torch.autograd.grad, which the step uses, does not work with the reentrant kind.
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if getattr(model, "config", None) is not None and hasattr(model.config, "use_cache"):
                model.config.use_cache = False
            return
        except ValueError as error:
            problem = str(error)
    raise UserError(f'"trainer.gradient_checkpointing": {problem}. Leave the key out.')


def _with_lora(model: nn.Module, lora: LoraOptions) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise UserError('"trainer.lora" needs the package peft: pip install "strong-scaling-trainer[lora]"') from error
    kind = type(model).__name__
    task_type = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
    # The last layer of a classifier is new. It has no pretrained weights to adapt, so it is trained as a whole.
    heads = [name for name, _ in model.named_children() if name in ("classifier", "score", "head")]
    # Copies, because peft adds to these lists, and those of the config are compared and recorded.
    also = list(lora.also_train) or (heads if "Classification" in kind else [])
    targets: Any = list(lora.target_modules) or "all-linear"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of tied weights, see `merged`, and of deprecated names inside transformers
            adapted: nn.Module = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=targets,
                    modules_to_save=also or None,
                    task_type=next((t for suffix, t in task_type.items() if kind.endswith(suffix)), None),
                ),
            )
    except (ValueError, AttributeError, TypeError) as error:
        modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise UserError(
            f'"trainer.lora" cannot be applied to {kind}: {str(error).splitlines()[0]}\n'
            f"Name its layers in trainer.lora.target_modules. Its linear layers are {', '.join(modules[:12])}"
            f"{', ...' if len(modules) > 12 else ''}."
        ) from error
    for name, module in adapted.named_modules():
        trouble = _trouble(module.base_layer) if isinstance(module, peft.tuners.lora.LoraLayer) else None
        if trouble is not None:
            raise UserError(
                f'"trainer.lora" cannot adapt {name.removeprefix("base_model.model.")}: {trouble}. '
                "Leave this layer out of trainer.lora.target_modules."
            )
    return adapted


def _trouble(layer: nn.Module) -> str | None:
    """Why peft's update of a layer would be wrong, or could not be saved; None if there is no problem."""
    if getattr(layer, "groups", 1) > 1:
        return "peft cannot merge the update of a grouped convolution, so the trained model could not be saved"
    # peft's update takes over only kernel, stride and padding of a convolution. It ignores everything else.
    if set(getattr(layer, "dilation", ())) - {1} and max(layer.kernel_size) > 1:  # type: ignore[arg-type]
        return "peft's update of a dilated convolution is not dilated"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return (
            f"peft's update of a convolution is padded with zeros, but the layer's padding_mode is {layer.padding_mode}"
        )
    return None


def merged(model: nn.Module) -> nn.Module:
    """A model without adapters: a copy with LoRA's updates added to its weights, or the model itself if it has none.

    An update belongs to one layer. The layer may share its weight with another one, as an output layer often does with
    the embedding. Then it gets a weight of its own in the copy.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    plain = copy.deepcopy(model)
    users: dict[Tensor, int] = {}
    for module in plain.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[parameter] = users.get(parameter, 0) + 1
    untied = False
    for module in plain.modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.Module) and isinstance(weight, nn.Parameter) and users.get(weight, 0) > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            users[weight] -= 1
            untied = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that embeddings are no longer tied
        plain = plain.merge_and_unload()  # type: ignore[operator]
    if untied and hasattr(plain, "config"):
        for config in {id(c): c for c in (plain.config, plain.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return plain


def parameter_groups(model: nn.Module, config: Config, vectors: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's groups: [{"params": [...], and the settings that differ from optimizer.params}, ...], none empty.

    A parameter belongs to the last pattern of `trainer.parameter_groups` that covers it.

    Args:
        model: its trained parameters are grouped, in their order.
        config: the run's.
        vectors: the settings that differ for biases and the gains of norms (parameters of at most one dimension).
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    settings: dict[str, dict[str, Any]] = {name: {} for name in named}
    for name, parameter in named.items():
        if parameter.ndim <= 1:
            settings[name] = dict(vectors)
    for pattern, changes in config.trainer.parameter_groups.items():
        for name in _matching(pattern, list(named), '"trainer.parameter_groups"'):
            settings[name] = settings[name] | changes
    groups: dict[str, dict[str, Any]] = {}
    for name, changes in settings.items():
        group = groups.setdefault(repr(sorted(changes.items())), {"params": [], **changes})
        group["params"].append(named[name])
    # The group with the fewest changes comes first, because the learning rate in the logs is that of the first group.
    return sorted(groups.values(), key=len)


def compile_in_place(model: nn.Module) -> None:
    """Compiles a model's forward with torch.compile, the same kernels on every rank. Raises UserError.

    Each shape is compiled separately (dynamic=False). Otherwise torch would choose kernels by the order in which a rank
    meets its micro-batches, and this order depends on the number of ranks.
    """
    if shutil.which("gcc") is None and shutil.which("cc") is None and shutil.which("clang") is None:
        raise UserError('"trainer.compile": torch.compile needs a C and C++ compiler (gcc or clang); none was found.')
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = _MOST_SHAPES
    dynamo.fail_on_recompile_limit_hit = True
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # kernels must not be chosen by timing them
    model.compile(dynamic=False)


def frozen_share(model: nn.Module) -> tuple[int, int]:
    """The numbers of a model's trained parameters and of all its parameters, elements counted."""
    every = list(model.parameters())
    return sum(_numel(p) for p in every if p.requires_grad), sum(_numel(p) for p in every)


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # at ZeRO stage 3 a rank holds only a part
