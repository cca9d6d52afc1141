"""A pack: several micro-batches in one forward and one backward, each with the bits of being computed alone.

A micro-batch belongs to the model: its gradient is a leaf of the tree, its statistics are BatchNorm's, its key seeds
dropout. How many of them one forward carries belongs to the machine, and must not change a bit. `Pack` is active
during the forward and the losses. It sees every function of torch that is called, and takes part where a micro-batch
has something of its own:

- a trained parameter: layers with a rule (`rules`) leave one gradient a micro-batch; any other function is
  called for one micro-batch at a time, with an alias of the parameter for each;
- random numbers: drawn for one micro-batch at a time, each from its own stream, as when it is computed alone;
- BatchNorm's statistics;
- a value that the host reads (`if mask.all():`): it has to be the same for all micro-batches of the pack.

What cannot be taken apart raises `RefusedError`. `packs` then tries another way, and computes single micro-batches in
the end. It also compares: a pack is used only after its bits were found to be those of single micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..batch_norm import RunningStatistics
from .derived import Derived
from .findings import Findings, Way
from .form import Form
from .functions import DRAWN, FUNCTIONS
from .independent import is_in_place
from .layers import name_of, piece
from .leaves import Leaves
from .nested import flat, parts, tensors_of
from .shares import Shares
from .sites import Sites
from .streams import Streams
from .tensors import NUMBERS, PARTED, SAME, Tensors
from .together import Together
from .trace import LOOKS, Call, Trace, custom_functions, forwards_replaced, name_in, versions
from .trial import OWN_FUNCTIONS, Trial
from .verdicts import RefusedError

# Functions that give a gradient a hook.
HOOKS = frozenset((Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad))


class Pack(TorchFunctionMode):
    """Active during the forward and the losses of a pack.

    Attributes:
        g: micro-batches in it.
        tensors: what each tensor is to it.
        shares: what each micro-batch has of them.
        sites: its layers with a rule.
        derived: what follows from parameters alone.

    Args:
        parameters: id of a trained parameter -> its place.
        constants: ids of the model's other tensors.
        statistics: of normalisation layers.
        arrays: the samples.
        rows: how many they are.
        g: micro-batches; rows / g samples each.
        leaves: takes the gradients.
        streams: random numbers.
        findings: what trials have found out. A trial adds to it.
        traces: in a trial, the calls of each micro-batch alone, or None for one whose calls say nothing; else empty.
    """

    def __init__(
        self,
        parameters: Mapping[int, int],
        constants: frozenset[int],
        statistics: RunningStatistics,
        *,
        arrays: Mapping[str, Tensor],
        rows: int,
        g: int,
        leaves: Leaves,
        streams: Streams,
        findings: Findings,
        traces: Sequence[Trace | None],
    ) -> None:
        super().__init__()
        self._rows, self.g, self._streams, self._findings = rows, g, streams, findings
        self.tensors = tensors = Tensors(parameters, constants, arrays)
        self.shares = shares = Shares(g, tensors, leaves, statistics)
        self.derived = Derived(tensors, leaves)
        self._trial = Trial(traces, g, tensors, shares, findings, leaves.device_type) if any(traces) else None
        self._form = Form(tensors, rows, findings, self._trial is not None)
        self._together = Together(g, tensors, shares, streams, findings, leaves.device_type)
        self.sites = Sites(
            g,
            leaves,
            tensors=tensors,
            shares=shares,
            streams=streams,
            findings=findings,
            checks=self._trial is not None,
        )
        self._now: int | None = None  # the micro-batch that is computed alone

    @contextlib.contextmanager
    def active(self, apart: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which the pack sees all calls. apart: modules that are called for one micro-batch at a time."""
        with (
            self,
            forwards_replaced(apart, self._apart_forward),
            custom_functions(self._seen, OWN_FUNCTIONS),
        ):
            yield

    @property
    def form(self) -> int:
        """Names the functions that were called so far, see `form.Form`."""
        return self._form.value

    def close(self) -> None:
        """Lets go of all tensors. Without this they would be freed late, because the graph refers to the pack."""
        self.shares.begin_call()
        self.derived.close()

    def end_of_forward(self) -> None:
        """The task's forward has returned."""
        if self._trial is not None:
            self._trial.end_of_forward()

    def end_of_losses(self) -> None:
        """The losses are there."""
        if self._trial is not None:
            self._trial.check_order()

    # ---- what is called ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func in LOOKS:  # tasks call these often, and they compute nothing
            return func(*args, **(kwargs or {}))
        return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function returns. It is computed by a rule, for one micro-batch at a time, or once for the pack."""
        if func in HOOKS:
            raise RefusedError("a gradient has a hook, which would get that of all samples, or of a copy")
        if self._now is not None:
            return self._seen_alone(func, args, kwargs, self._now)
        given, used, scaled = self._note(func, args, kwargs)
        own, before = None, []
        if self._trial is not None:
            own, scaled = self._trial.compared(func, args, kwargs)
            numbers = tuple(flat((args, kwargs), [])[place] for place in sorted(scaled))
            known = self._findings.calls.get(self.form)
            if known is not None and (known.scaled, known.numbers) != (scaled, numbers):
                raise RefusedError(f"{name_in(func)} gets a number that is that of all samples at times")
            self._findings.calls[self.form] = Way(True, scaled, numbers)
            before = versions((args, kwargs))  # whether the call changes them is compared below
        found = self._called(func, args, kwargs, given, used, scaled, own)
        if self._trial is not None and own is not None:
            if any(t.requires_grad for t in tensors_of(found)):
                self._trial.note_uses((args, kwargs))
            self._trial.compare_memory(func, args, kwargs, own, found, versions((args, kwargs)) != before)
        kind = PARTED if given & (PARTED | NUMBERS) or scaled else SAME
        for tensor in tensors_of(found):
            if self.tensors.is_new(tensor):
                self.tensors.mark(tensor, kind)
        return found

    def _seen_alone(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], k: int) -> Any:
        """What a function returns to micro-batch k, which is computed alone."""
        if k == 0:  # the others do the same, each with its own values
            self._form.add_alone(func, args, kwargs)
        own = self.shares.own(args, k), self.shares.own(kwargs, k)
        if self._trial is not None:
            self._trial.follow(func, args, kwargs, own)
        found = func(*own[0], **own[1])
        if self._trial is not None or k == 0:
            for tensor in tensors_of(found):
                if self.tensors.is_new(tensor):
                    self.tensors.mark_here(tensor)
        return found

    def _called(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: int,
        used: set[int],
        scaled: frozenset[int],
        own: Call | None,
    ) -> Any:
        # A rule first: a function that draws or has a parameter may also be in the list of `independent`.
        parted = bool(given & (PARTED | NUMBERS))
        rule = FUNCTIONS.get(func)
        if rule is not None and not scaled and (parted or used):
            found = rule(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        if not parted and not scaled:
            return self.derived.call(func, args, kwargs, used) if used else func(*args, **kwargs)
        random = func in DRAWN
        if random and kwargs.get("generator") is not None:
            raise RefusedError(f"{name_of(func)} with a generator of its own")
        if own is None:  # as a trial has found
            together = self._findings.calls[self.form].together
        else:
            together = not used and not given & NUMBERS and self._together.may_be(func, args, kwargs, scaled)
        if not together and is_in_place(func, kwargs):
            raise RefusedError(f"{name_of(func)}, which cannot be called one micro-batch at a time, in place")
        found = func(*args, **kwargs) if together else self.apart(func, args, kwargs, random, scaled)
        if own is not None:
            if together and [t.shape for t in tensors_of(found)] != [
                (self.g * s[0], *s[1:]) if s else s for s in own.shapes
            ]:
                if is_in_place(func, kwargs):
                    raise RefusedError(f"{name_of(func)} gives a micro-batch another shape")
                together, found = False, self.apart(func, args, kwargs, random, scaled)
            self._findings.calls[self.form] = self._findings.calls[self.form]._replace(together=together)
        return found

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, set[int], frozenset[int]]:
        """Adds a call to the form.

        Returns:
            Which kinds of tensors are among the arguments; the places of the parameters among them; the places of
            numbers that stand for all samples (empty in a trial, which has to find them).
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise RefusedError("what is saved for the backward goes through hooks, which would get that of all samples")
        given, used = self._form.add(func, args, kwargs)
        if self._trial is not None:
            return given, used, frozenset()
        call = self._findings.calls.get(self.form)
        if call is None:
            raise RefusedError("it calls other functions than in its trials", untried=True)
        if call.scaled and tuple(flat((args, kwargs), [])[place] for place in sorted(call.scaled)) != call.numbers:
            raise RefusedError("it has other numbers than in its trials", untried=True)
        return given, used, call.scaled

    # ---- one micro-batch at a time -------------------------------------------------------------------------------

    def apart(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        random: bool = False,
        scaled: frozenset[int] = frozenset(),
    ) -> Any:
        """Calls a function for one micro-batch at a time, and joins what it returns."""
        found = []
        self.shares.begin_call()
        for k in range(self.g):
            own = self.shares.part((args, kwargs), k, scaled)
            with self._streams.of(k) if random else contextlib.nullcontext():
                found.append(func(*own[0], **own[1]))
            if k == 0 and self._trial is not None:
                self._trial.note_several(func, found[0])
        return self.shares.joined(found, func)

    @contextlib.contextmanager
    def now(self, k: int, random: bool = True, place: int | None = None) -> Iterator[None]:
        """A context in which everything is called for micro-batch k alone.

        Args:
            k: the micro-batch.
            random: whether random numbers may be drawn.
            place: in a trial, which call of the pack a module is; None for the loss.
        """
        assert self._now is None
        self._now = k
        if self._trial is not None:
            self._trial.begin_alone(k, place)
        try:
            with self._streams.of(k) if random else contextlib.nullcontext():
                yield
        finally:
            self._now = None
            self.tensors.leave_scope()

    def _apart_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a module that is called for one micro-batch at a time."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._now is not None:
                return forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                given, _, scaled = self._note(type(module), args, kwargs)
                own, place, trial = None, None, self._trial
                if trial is not None:
                    own, scaled = trial.compared(type(module), args, kwargs)
                    if own.changes:
                        raise RefusedError(f"{type(module).__name__} changes its input in place")
                    self._findings.calls[self.form] = Way(False, scaled, ())
                    place = trial.position - 1
                    trial.note_uses((args, kwargs))
            if not given & (PARTED | NUMBERS):
                name = type(module).__name__
                raise RefusedError(
                    f"{name} has to be computed one micro-batch at a time, and gets the same input for all of them"
                )
            found = []
            self.shares.begin_call()
            # The pack's own work is hidden from torch's modes. Only the module's forward is seen.
            for k in range(self.g):
                with torch._C.DisableTorchFunction():
                    part = self.shares.part((args, kwargs), k, scaled)
                    for tensor in tensors_of(part):
                        self.tensors.mark_here(tensor)
                with self.now(k, place=place):
                    found.append(forward(*part[0], **part[1]))
                if k == 0 and trial is not None:
                    with torch._C.DisableTorchFunction():
                        trial.note_several(type(module), found[0])
            with torch._C.DisableTorchFunction():
                if trial is not None and own is not None and own.aliases:
                    trial.note_copy(type(module).__name__)
                return self.shares.joined(found, type(module).__name__)

        return call

    # ---- for the losses ------------------------------------------------------------------------------------------

    def outputs_of(self, outputs: Any, k: int) -> Any:
        """Micro-batch k's part of what a task's forward returned."""
        with torch._C.DisableTorchFunction():
            tensors = [outputs] if isinstance(outputs, Tensor) else list(parts(outputs))
            if not tensors or not all(self.tensors.has_part(t) for t in tensors):
                raise RefusedError("an output that does not have one row a sample")
            if k == 0 and self._trial is not None:
                self._trial.note_uses(tensors)
            part = self.shares.part(outputs, k)
            for tensor in tensors_of(part):
                self.tensors.mark_here(tensor)
            return part

    def samples_of(self, arrays: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """Micro-batch k's samples of those of the pack."""
        with torch._C.DisableTorchFunction():
            pieces = {name: piece(array, k, self.g) for name, array in arrays.items()}
            for tensor in pieces.values():
                self.tensors.mark_here(tensor)
            return pieces

    def stacked(self, losses: list[Tensor]) -> Tensor:
        """The losses of all micro-batches: (g,)."""
        with torch._C.DisableTorchFunction():
            return torch.stack(losses)

    def summed(self, losses: Any) -> Tensor:
        """The sum of each micro-batch's losses, (g,), of what a task's sample_losses returned: (samples,)."""
        with torch._C.DisableTorchFunction():
            if not self.tensors.has_part(losses) or losses.shape != (self._rows,):
                raise RefusedError("sample_losses() does not return one number a sample")
            if self._trial is not None:
                self._trial.note_uses(losses)
            return losses.view(self.g, -1).sum(1)

    # ---- random numbers, values that the host reads ----------------------------------------------------------------

    def generator(self, k: int, device: torch.device) -> torch.Generator:
        """The generator of micro-batch k on this device."""
        return self._streams.generator(k, device)

    def drawn(self, k: int, func: Any, *args: Any) -> Any:
        """What a function that draws random numbers returns to micro-batch k; its arguments are the same for all."""
        with self._streams.of(k):
            return func(*args)

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the host reads of tensors, if it is the same for all micro-batches."""
        if not self.tensors.has_parts((args, kwargs)):
            return func(*args, **kwargs)
        values = []
        for k in range(self.g):
            own = self.shares.part((args, kwargs), k)
            values.append(func(*own[0], **own[1]))
        if not all(isinstance(value, (bool, int, float, list)) and value == values[0] for value in values):
            # With other samples, a bool or a whole number may be the same for all micro-batches.
            once = all(isinstance(value, (bool, int)) for value in values)
            raise RefusedError(f"{name_of(func)}: what is done next depends on values", once=once)
        return values[0]
