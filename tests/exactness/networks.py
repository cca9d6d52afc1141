"""Random networks as JSON blocks, which fuzz_layers.py makes into modules: every layer fits what comes before it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from tests.exactness.flaws import FLAWS

Block = dict[str, Any]

ACTIVATIONS: list[Block] = [
    {"nn": "GELU"},
    {"nn": "GELU", "options": {"approximate": "tanh"}},
    *({"nn": name} for name in ("ReLU", "SiLU", "Mish", "Softplus", "ELU", "Sigmoid", "Tanh", "ReLU6", "Hardswish")),
    *({"nn": name} for name in ("LeakyReLU", "SELU", "CELU", "LogSigmoid", "Softsign", "Tanhshrink", "Hardtanh")),
]
FUNCTIONS = (
    *("sinh", "power", "atan2", "bump", "softmax", "log_softmax", "cumsum", "erf", "log1p", "rsqrt", "normalize"),
    *("sort", "fourier", "neighbours", "noise", "log_sum_exp", "expm1", "asinh", "lgamma", "std", "median", "scatter"),
    *("cummax", "gather", "gated", "zoom", "attend"),
)
PADDING_MODES = ("zeros", "zeros", "circular", "replicate", "reflect")
# The form of the input that a kind needs.
FORMS = {
    "convolutions": "signal",
    "recurrent layers": "places",
    "attention": "places",
    "padded tokens": "tokens",
    "bags of tokens": "tokens",
    "augmentation of a sample": "floats",
    "augmentation of a micro-batch": "floats",
    "uneven counts": "tokens or any",
}


class Network:
    """Draws an input, layers and a head.

    Attributes:
        input, layers, head, outputs: for the spec.
        flaw: a name of FLAWS, or None.
    """

    def __init__(self, chance: random.Random, kind: str, flaw: str | None, single: bool, bfloat16: bool) -> None:
        """Draws it.

        Args:
            chance, kind, flaw: of the case.
            single: whether there is a micro-batch of one sample: BatchNorm needs more than one place then.
            bfloat16: whether it runs under autocast.
        """
        self._chance, self._kind, self.flaw, self._single = chance, kind, flaw, single
        # Without AVX-512, torch 2.13 cannot evaluate an LSTM in bfloat16: "could not create a primitive descriptor".
        self._recurrent_kinds = ["GRU", "RNN"] if bfloat16 else ["GRU", "LSTM", "RNN"]
        # Autocast passes over nn.Bilinear: after a layer that gives bfloat16, its own weights have another type.
        self._dense_kinds = ["bilinear", "mixing", "parametrized", "linear"][bfloat16:]
        self.layers: list[Block] = []
        # What the layers so far give: (B, C), (B, T, C), or (B, C, *size).
        self._form, self._features, self._places = "", 0, 0
        self._size: tuple[int, ...] = (0,)
        self._each_place = False
        self._begin()
        wanted = chance.randint(2, 4)
        forced = self._forced()
        at = chance.randrange(wanted)
        flawed_at = chance.randrange(wanted)
        for i in range(wanted):
            if i == at and forced is not None:
                forced()
            if i == flawed_at and flaw is not None and FLAWS[flaw].layer:
                self._add_flaw(FLAWS[flaw].layer or "")
            self._add()
        self._end()

    # ---- what cases and settings ask -------------------------------------------------------------------------------

    def loss(self) -> dict[str, Any]:
        """The loss's block, which fits the outputs."""
        chance = self._chance
        loss: dict[str, Any] = {"kind": self._loss, "counts": None, "each_place": self._each_place}
        padded = bool(self.input.get("padded"))
        if self._each_place and padded:
            loss |= {"counts": "tokens", "counts_type": chance.choice(["float32", "int64", "float64"])}
        elif (self._kind == "uneven counts" or chance.random() < 0.2) and not self._each_place:
            loss |= {"counts": "weights", "least": 1}
        if loss["kind"] == "cross_entropy" and chance.random() < 0.3:
            loss["smoothing"] = 0.1
        return loss

    def weighted_layers(self) -> list[str]:
        """Names of layers whose weights can be frozen: never those of the head."""
        own = ("Recurrent", "Attention", "Encoder", "Tokens", "Tied", "Mixing", "Position", "Gain")
        plain = ("Linear", "Conv", "BatchNorm")
        return [
            f"layers.{i}"
            for i, block in enumerate(self.layers)
            if (block.get("own") in own or block.get("nn", "").startswith(plain))
            and block.get("options", {}).get("affine", True)
        ]

    def lora_targets(self) -> list[str]:
        """Names of layers that LoRA knows."""
        names = [
            f"layers.{i}"
            for i, block in enumerate(self.layers)
            if block.get("nn") in ("Linear", "Conv2d") and self._adaptable(**block.get("options", {}))
        ]
        # peft goes by the end of a name, which the layers inside of a Residual share.
        inner = {f"layers.{i}" for block in self.layers for i in range(len(block.get("layers", ())))}
        names = [name for name in names if name not in inner]
        return [*names, "head"]

    @staticmethod
    def _adaptable(groups: int = 1, dilation: int = 1, padding_mode: str = "zeros", **others: Any) -> bool:
        """Whether LoRA is not refused: peft leaves these out of its update, or cannot merge it."""
        return groups == dilation == 1 and padding_mode == "zeros"

    # ---- the input -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        chance, wanted = self._chance, FORMS.get(self._kind, "any")
        if self.flaw is not None and FLAWS[self.flaw].tokens:
            wanted = "tokens"
        choices = {
            "any": ["vector", "sequence", "signal", "tokens"],
            "floats": ["vector", "sequence", "signal"],
            "places": ["sequence", "tokens"],
            "tokens or any": ["tokens", "tokens", "vector", "sequence"],
        }
        form = chance.choice(choices.get(wanted, [wanted]))
        if form == "vector":
            self._form, self._features = "vector", chance.randint(1, 19)
            self.input: dict[str, Any] = {"form": form, "size": [self._features]}
        elif form == "sequence":
            self._form, self._features, self._places = "sequence", chance.randint(1, 13), chance.randint(2, 9)
            self.input = {"form": form, "size": [self._places, self._features], "places": self._places}
        elif form == "signal":
            dims = chance.choice([1, 2, 2, 3])
            self._form, self._features = "signal", chance.randint(1, 5)
            self._size = tuple(chance.randint(3, {1: 15, 2: 7, 3: 4}[dims]) for _ in range(dims))
            self.input = {"form": form, "size": [self._features, *self._size]}
        else:
            self._tokens()

    def _tokens(self) -> None:
        chance = self._chance
        vocabulary, places = chance.randint(5, 31), chance.randint(2, 11)
        padded = self._kind in ("padded tokens", "uneven counts") or chance.random() < 0.5
        self.input = {"form": "tokens", "vocabulary": vocabulary, "places": places, "padded": padded}
        self._features, self._places = chance.randint(1, 15), places
        fits = self.flaw is None and FORMS.get(self._kind) != "places"
        if self._kind == "bags of tokens" or (chance.random() < 0.2 and fits):
            mode = chance.choice(["sum", "mean", "max"])
            bag = {"own": "Bag", "vocabulary": vocabulary, "features": self._features, "mode": mode}
            self.layers.append({**bag, "weighted": mode == "sum" and chance.random() < 0.5})
            self._form = "vector"
            return
        options: dict[str, Any] = {"padding_idx": 0} if chance.random() < 0.5 else {}
        if chance.random() < 0.2:
            options["scale_grad_by_freq"] = True
        if self.flaw == "max_norm":
            options = {"max_norm": 0.3}
        tokens = {"own": "Tokens", "vocabulary": vocabulary, "features": self._features, "options": options}
        self.layers.append(tokens)
        self._form = "sequence"

    def _end(self) -> None:
        chance = self._chance
        self._loss = chance.choice(["cross_entropy", "cross_entropy", "mse", "smooth_l1", "bce"])
        self.outputs = chance.randint(2, 7) if self._loss == "cross_entropy" else chance.randint(1, 4)
        if self._form == "signal":
            if chance.random() < 0.5:
                self._put({"own": "Turn"})
                self._form, self._places = "sequence", math.prod(self._size)
                self._put({"own": "Pool", "how": chance.choice(["mean", "max"])})
            else:
                self._put({"nn": "Flatten"})
                self._features *= math.prod(self._size)
            self._form = "vector"
        elif self._form == "sequence":
            wanted = 0.7 if self._kind == "uneven counts" else 0.3
            self._each_place = self._places == self.input.get("places") and chance.random() < wanted
            if not self._each_place:
                self._put({"own": "Pool", "how": chance.choice(["mean", "max", "last"])})
        self.head: Block = {"nn": "Linear", "args": [self._features, self.outputs]}
        if self._kind == "padded tokens" and chance.random() < 0.5:
            self.head["options"] = {"bias": False}

    # ---- layers ----------------------------------------------------------------------------------------------------

    def _put(self, block: Block) -> None:
        self.layers.append(block)

    def _linear(self) -> None:
        out = self._chance.randint(1, 19)
        self._put({"nn": "Linear", "args": [self._features, out], "options": {"bias": self._chance.random() < 0.8}})
        self._features = out

    def _forced(self) -> Callable[[], None] | None:
        """What a kind must have at least once."""
        return {
            "dense layers": self._dense,
            "convolutions": self._convolution,
            "recurrent layers": self._recurrent,
            "attention": self._attention,
            "BatchNorm": self._batch_norm,
            "other normalisation": self._normalisation,
            "dropout": self._dropout,
            "tied and reused weights": self._reused,
            "scalar, unused and rare weights": self._odd_weights,
            "variational": lambda: self._put({"own": "Gaussian", "features": self._last()}),
            "LoRA": lambda: self._linear() if self._form != "signal" else self._convolution(),
            "innocent state": lambda: self._put({"own": self._innocent()}),
            "annealing": self._dropout,
        }.get(self._kind)

    def _innocent(self) -> str:
        return self._chance.choice(["InnocentCounter", "InnocentTable", "InnocentGenerator"])

    def _last(self) -> int:
        """The length of the last dimension."""
        return self._size[-1] if self._form == "signal" else self._features

    def _fewest_places(self) -> int:
        """How many values a channel has in one sample at least; a padded sample may have a single place."""
        places = 1 if self.input.get("padded") else self._places
        return {"signal": math.prod(self._size), "sequence": places}.get(self._form, 1)

    def _add(self) -> None:
        chance = self._chance
        choices: list[Callable[[], None]] = [self._activation, self._activation, self._function, self._normalisation]
        choices += [self._dropout, self._residual, self._odd_weights, self._batch_norm]
        if self._form == "signal":
            choices += [self._convolution] * 6 + [self._pooling]
        else:
            choices += [self._linear] * 4 + [self._dense, self._reused]
        if self._form == "sequence":
            choices += [self._recurrent, self._recurrent, self._attention, self._attention, self._among_places]
        chance.choice(choices)()

    def _activation(self) -> None:
        self._put(self._chance.choice(ACTIVATIONS))

    def _function(self) -> None:
        self._put({"own": "Function", "name": self._chance.choice(FUNCTIONS)})

    def _dense(self) -> None:
        out, C = self._chance.randint(1, 9), self._features
        if self._form == "signal":
            self._convolution()
            return
        kind = self._chance.choice(self._dense_kinds)
        if kind == "bilinear" and C <= 9:
            self._put({"own": "SelfBilinear", "features": C, "out": out})
            self._features = out
        elif kind == "parametrized":
            self._put({"own": "Parametrized", "features": C, "out": out})
            self._features = out
        elif kind == "mixing":
            self._put({"own": "Mixing", "features": C})
        else:
            self._linear()

    def _dropout(self) -> None:
        names = ["Dropout", "Dropout", "AlphaDropout", "FeatureAlphaDropout"]
        if self._form == "signal":
            names.append(f"Dropout{len(self._size)}d")
        elif self._form == "sequence":
            names.append("Dropout1d")
        self._put({"nn": self._chance.choice(names), "args": [self._chance.choice([0.1, 0.3, 0.5])]})

    def _batch_norm(self) -> None:
        chance, C = self._chance, self._features
        options: dict[str, Any] = {"momentum": chance.choice([0.1, 0.3, None]), "affine": chance.random() < 0.7}
        if chance.random() < 0.2:
            options["track_running_stats"] = False
            if (
                self._fewest_places() < 2
            ):  # it normalises by the batch in evaluation, too, which may end with one sample
                options["track_running_stats"] = True
        dims = len(self._size) if self._form == "signal" else 1
        if self._single and self._fewest_places() < 2:
            self._normalisation()
            return
        block = {"nn": f"BatchNorm{dims}d", "args": [C], "options": options}
        self._put({"own": "Sandwich", "inner": block} if self._form == "sequence" else block)

    def _normalisation(self) -> None:
        chance, C = self._chance, self._features
        kinds = ["LayerNorm", "RMSNorm", "PReLU"]
        divisors = [g for g in range(1, C) if C % g == 0]  # at least two channels a group: one value has no variance
        kinds += ["GroupNorm"] * bool(divisors)
        kinds += ["InstanceNorm"] * (self._fewest_places() > 1)
        kind = chance.choice(kinds)
        if kind == "GroupNorm":
            block: Block = {"nn": kind, "args": [chance.choice(divisors), C]}
            self._put({"own": "Sandwich", "inner": block} if self._form == "sequence" else block)
        elif kind == "InstanceNorm":
            dims = len(self._size) if self._form == "signal" else 1
            options = {"affine": chance.random() < 0.5, "track_running_stats": chance.random() < 0.4}
            block = {"nn": f"InstanceNorm{dims}d", "args": [C], "options": options}
            self._put({"own": "Sandwich", "inner": block} if self._form == "sequence" else block)
        elif kind == "PReLU":
            block = {"nn": kind, "args": [chance.choice([1, C])]}
            self._put({"own": "Sandwich", "inner": block} if self._form == "sequence" else block)
        elif kind == "LayerNorm":
            self._put({"nn": kind, "args": [self._last()], "options": {"elementwise_affine": chance.random() < 0.7}})
        else:
            self._put({"nn": kind, "args": [self._last()]})

    def _odd_weights(self) -> None:
        kinds = ["Gain", "Unused", "Sometimes", "Scale"]
        kind = self._chance.choice(kinds)
        if kind == "Scale":
            norm = self._chance.random() < 0.5
            self._put({"own": kind, "features": self._last(), "ones": self._chance.randint(0, 1), "norm": norm})
        elif kind == "Sometimes":
            self._put({"own": kind, "features": self._last(), "above": self._chance.choice([0.5, 1.5, 2.2])})
        else:
            self._put({"own": kind})

    def _reused(self) -> None:
        C = self._last()
        layer = {"nn": "Linear", "args": [C, C]}
        if self._chance.random() < 0.5:
            self._put({"own": "Tied", "features": C})
        else:
            self._put({"own": "Twice", "layer": layer})

    def _residual(self) -> None:
        C = self._last()
        inner = [self._chance.choice(ACTIVATIONS), {"nn": "Linear", "args": [C, C]}]
        skipped = 0.3 if self._chance.random() < 0.3 else 0.0
        self._put({"own": "Residual", "layers": inner, "in_place": self._chance.random() < 0.5, "skipped": skipped})

    def _recurrent(self) -> None:
        chance, hidden = self._chance, self._chance.randint(1, 9)
        kind = chance.choice(self._recurrent_kinds)
        options: dict[str, Any] = {"bidirectional": chance.random() < 0.3, "bias": chance.random() < 0.8}
        if chance.random() < 0.3:
            options |= {"num_layers": 2, "dropout": 0.2}
        self._put({"own": "Recurrent", "kind": kind, "features": self._features, "hidden": hidden, "options": options})
        self._features = hidden * (2 if options["bidirectional"] else 1)

    def _attention(self) -> None:
        chance, C = self._chance, self._features
        heads = chance.choice([h for h in range(1, C + 1) if C % h == 0])
        dropout = chance.choice([0.0, 0.1, 0.3])
        if chance.random() < 0.5:
            weights = chance.random() < 0.5
            self._put({"own": "Attention", "features": C, "heads": heads, "dropout": dropout, "weights": weights})
            return
        options: dict[str, Any] = {
            "dim_feedforward": chance.randint(1, 17),
            "dropout": dropout,
            "norm_first": chance.random() < 0.5,
        }
        options["activation"] = chance.choice(["relu", "gelu"])
        self._put({"own": "Encoder", "features": C, "heads": heads, "options": options})

    def _among_places(self) -> None:
        chance, C = self._chance, self._features
        kind = chance.choice(["gram", "position", "convolution"])
        if kind == "gram":
            self._put({"own": "Gram"})
        elif kind == "position":
            self._put({"own": "Position", "places": self._places, "features": C})
        else:
            out = chance.randint(1, 9)
            conv = {"nn": "Conv1d", "args": [C, out, 3], "options": {"padding": 1}}
            self._put({"own": "Sandwich", "inner": conv})
            self._features = out

    def _convolution(self) -> None:
        chance, dims, C = self._chance, len(self._size), self._features
        groups = chance.choice([g for g in range(1, C + 1) if C % g == 0]) if chance.random() < 0.3 else 1
        out = groups * chance.randint(1, max(1, 6 // groups))
        kernel, stride = chance.choice([1, 3, 3, 2]), chance.choice([1, 1, 2])
        smallest = min(self._size)
        if chance.random() < 0.25 and max(self._size) <= 8:
            options: dict[str, Any] = {"stride": stride, "groups": groups, "bias": chance.random() < 0.7}
            self._put({"nn": f"ConvTranspose{dims}d", "args": [C, out, kernel], "options": options})
            self._size = tuple((n - 1) * stride + kernel for n in self._size)
        else:
            padding = 1 if kernel == 3 else 0
            mode = chance.choice(PADDING_MODES) if padding and smallest > 1 else "zeros"
            if smallest + 2 * padding < kernel:
                return
            options = {"stride": stride, "padding": padding, "groups": groups, "padding_mode": mode}
            if padding and smallest >= 5 and chance.random() < 0.2:
                options |= {"dilation": 2}
            self._put({"nn": f"Conv{dims}d", "args": [C, out, kernel], "options": options})
            reach = options.get("dilation", 1) * (kernel - 1)
            self._size = tuple((n + 2 * padding - reach - 1) // stride + 1 for n in self._size)
        self._features = out

    def _pooling(self) -> None:
        dims, kind = len(self._size), self._chance.choice(["MaxPool", "AvgPool", "Upsample"])
        if kind == "Upsample":
            if max(self._size) <= 6:
                self._put({"nn": kind, "options": {"scale_factor": 2, "mode": "nearest"}})
                self._size = tuple(2 * n for n in self._size)
        elif min(self._size) >= 3:
            self._put({"nn": f"{kind}{dims}d", "args": [2]})
            self._size = tuple(n // 2 for n in self._size)

    def _add_flaw(self, layer: str) -> None:
        with_features = ("FlawedSpectral", "FlawedWriter", "FlawedStart")
        self._put({"own": layer, "features": self._last()} if layer in with_features else {"own": layer})
