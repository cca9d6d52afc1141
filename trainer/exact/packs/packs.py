"""Which micro-batches may be computed as a pack: it compares packs with single micro-batches.

A new shape is tried first. Its micro-batches are computed one by one, which is what counts, and as a pack. Losses,
statistics and gradients are compared bit for bit. Layers that differ are computed one micro-batch at a time in later
packs. If the whole differs, that shape has no packs. So a pack that is used has always been compared, on this device
and with these kernels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norm import RunningStatistics
from ..micro_batches import GlobalBatch, MicroBatches
from ..splits import Batch
from .choice import Choice
from .compiled import compiler_was_at_work, has_compiled_part
from .findings import Findings, Key
from .grouping import parts_of, shape_of
from .leaves import Leaves, Sink
from .pack import Pack
from .streams import Streams
from .trace import Trace, same_calls
from .verdicts import HashedSums, Packed, RefusedError, Single, Verdict, difference, out_of_memory, told

# Steps in which packs of a shape are compared before they are used. More than one, because weights may be 0 by design
# in the first step.
TRIALS = 3
_NO_MEMORY = "there is not enough memory"
# At most this many sequences of functions are compared for a shape. A task with more calls others in nearly every step.
MOST_FORMS = 16
# How many trials of a shape may end without a verdict. Each costs time.
MOST_POSTPONED = 20
# With "auto", this many shapes are tried at once, and more only while trials take less than this share of the time.
FREE_SHAPES, TRIAL_SHARE = 8, 0.05
# In a shorter run it does not pay to look for the fastest size.
FEWEST_STEPS = 60
# A rank's micro-batches may be computed in another order if all their gradients take at most this many bytes: gradients
# then wait for their neighbours in the tree.
WAITING_BYTES = 256 << 20
# Modules that take samples and parameters apart in ways of their own.
_APART = (nn.RNNBase, nn.MultiheadAttention)


class Packs:
    """Computes packs.

    Args:
        micro_batches: computes single ones.
        parameters: the trained ones, in order.
        model: has them.
        statistics: of its normalisation layers.
        device: of the model.
        size: micro-batches of a pack; None to find the fastest by the clock, while the run goes on.
        steps: the length of the run.

    Attributes:
        size: micro-batches of the packs of this step, at most.
        packed: how many micro-batches of all steps have been computed in packs, trials not counted.
        notes: sentences for the user; the code that prints them removes them.
    """

    def __init__(
        self,
        micro_batches: MicroBatches,
        parameters: Sequence[Tensor],
        model: nn.Module,
        statistics: RunningStatistics,
        device: torch.device,
        size: int | None = None,
        steps: int = FEWEST_STEPS,
    ) -> None:
        self._micro_batches, self._trained = micro_batches, list(parameters)
        self._model, self._statistics, self._device = model, statistics, device
        self._bytes = 4 * sum(p.numel() for p in self._trained)
        self._places = {id(p): place for place, p in enumerate(self._trained)}
        tensors = [*model.parameters(), *model.buffers()]
        self._constants = frozenset(id(t) for t in tensors if id(t) not in self._places)
        self._owners: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for p in module.parameters(recurse=False):
                if id(p) in self._places:
                    self._owners.setdefault(self._places[id(p)], []).append(name)
        self._compiled = has_compiled_part(model)
        self._apart = {name for name, module in model.named_modules() if isinstance(module, _APART)}
        self._findings = Findings()
        self._losses_apart = not micro_batches.gives_sample_losses
        self._verdicts: dict[Key, Verdict] = {}
        self._postponed: dict[Key, int] = {}
        self.size = 1 if size is None else size
        self.packed, self._all = 0, 0
        self.notes: list[str] = []
        self._limit: int | None = None  # what fits into memory
        self._choice = Choice(device) if size is None and steps >= FEWEST_STEPS else None
        self._tried = False
        self._began, self._trial_s = time.perf_counter(), 0.0

    # ---- how many ------------------------------------------------------------------------------------------------

    def begin(self, batch: GlobalBatch, block: range) -> int:
        """A step begins; `block` are this rank's micro-batches. Returns the size of its packs."""
        self._tried = False
        self._all += len(block)
        # Asked in each step: a task may compile a function in its first one.
        self._compiled = self._compiled or compiler_was_at_work()
        if self._compiled:
            self.size = 1
        elif self._choice is not None:
            work = sum(m * max(1, longest) for m, longest in (shape_of(batch, j) for j in block))
            self.size = self._choice.begin(len(block), work, self._limit, self._refused_sizes())
        elif self._limit is not None:
            self.size = min(self.size, self._limit)
        return self.size

    def end(self) -> None:
        """The micro-batches of the step have been computed."""
        if self._choice is not None and not self._compiled:
            self._choice.end(self._tried)

    def _refused_sizes(self) -> set[int]:
        by_size: dict[int, list[bool]] = {}
        for key, verdict in self._verdicts.items():
            by_size.setdefault(key[0], []).append(verdict.refusal is not None)
        return {size for size, refused in by_size.items() if all(refused)}

    def shrink(self, size: int) -> None:
        """Memory ran out in a pack of `size` micro-batches: from now on packs have at most half as many."""
        self._limit = max(1, size // 2)
        self.notes.append(
            f"memory ran out in a pack of {size} micro-batches. From now on packs have {self._limit} at most: this "
            "changes the speed, and no bit."
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # smaller packs cannot use the pieces that were reserved for the large one

    def refuse(self, batch: GlobalBatch, part: Sequence[int], error: Exception) -> None:
        """Notes that a pack could not be computed, although its shape can. Not tried again, unless it was by chance."""
        if not isinstance(error, RefusedError):
            error = RefusedError(told(error, self._model))
        if not error.once:
            self._verdicts[self._key(batch, part)].refusal = str(error)

    def summary(self) -> dict[str, Any]:
        """For summary.json: size, share of micro-batches in packs, gain, limits, and what is computed one at a time."""
        found: dict[str, Any] = {"size": self.size, "share": round(self.packed / max(1, self._all), 3)}
        if self._choice is not None and self._choice.speed_up is not None:
            found["speed_up"] = round(self._choice.speed_up, 3)
        if self._limit is not None:
            found["limited_by_memory_to"] = self._limit
        if self._compiled:
            found["refused"] = {"all": "a part of the model is compiled"}
        elif self._postponed and not any(v.refusal is None and v.trials for v in self._verdicts.values()):
            found["refused"] = {str(key[0]): "no trial came to its end" for key in sorted(self._postponed)}
        if self.refusals():
            found["refused"] = {str(size): why for size, why in sorted(self.refusals().items())}
        apart = {*self._apart, *(key[0] for key in self._findings.alone())}
        if self._losses_apart and self._micro_batches.gives_sample_losses:
            apart.add("loss()")
        if apart:
            found["one_at_a_time"] = sorted(apart)
        return found

    # ---- which micro-batches share one ---------------------------------------------------------------------------

    def parts(self, batch: GlobalBatch, block: range) -> Iterator[Sequence[int]]:
        """A rank's block in parts, each of which may be a pack, see `grouping.parts_of`."""
        return parts_of(batch, block, self.size, anywhere=len(block) * self._bytes <= WAITING_BYTES)

    def known(self, batch: GlobalBatch, part: Sequence[int]) -> bool | None:
        """Whether a part may be a pack; None if that is not known yet."""
        verdict = self._verdicts.get(self._key(batch, part))
        if verdict is None:
            return None if self.may_try_more() else False
        most = max(verdict.trials.values(), default=0)
        if verdict.refusal is None and (most < TRIALS or verdict.step == batch.step):
            return None
        return verdict.refusal is None

    def may_try_more(self) -> bool:
        """Whether there is time for a trial of something new. Texts have many shapes."""
        if self._choice is None or len(self._verdicts) < FREE_SHAPES:
            return True
        return self._trial_s <= TRIAL_SHARE * (time.perf_counter() - self._began)

    def refusals(self) -> dict[int, str]:
        """Size -> why there are no such packs."""
        return {key[0]: v.refusal for key, v in self._verdicts.items() if v.refusal is not None}

    def _key(self, batch: GlobalBatch, part: Sequence[int]) -> Key:
        return (len(part), *shape_of(batch, part[0]))

    # ---- computing -----------------------------------------------------------------------------------------------

    def keys(self, batch: GlobalBatch, part: Sequence[int]) -> list[int]:
        """Seeds of a pack's micro-batches."""
        return [self._micro_batches.forward_key(batch, j) for j in part]

    def compute(
        self, batch: GlobalBatch, part: Sequence[int], scale: Tensor, sink: Sink, traces: Sequence[Trace | None] = ()
    ) -> Packed:
        """Computes a pack; its gradients go to the sink.

        Args:
            batch: the global batch.
            part: its micro-batches in the pack.
            scale: () the gradient of each loss.
            sink: takes the gradients.
            traces: in a trial, the calls of each micro-batch alone. Each function is looked at by itself, too.
                Otherwise they have to be those of a trial.

        Raises:
            RefusedError: this cannot be done. The sink may have taken some gradients.
        """
        arrays, streams = self._micro_batches.pack_samples(batch, part), Streams(len(part), self._device)
        streams.begin(self.keys(batch, part))
        try:
            return self.compute_samples(batch, part, scale, sink, arrays, streams, traces)
        finally:
            streams.end()

    def compute_samples(
        self,
        batch: GlobalBatch,
        part: Sequence[int],
        scale: Tensor,
        sink: Sink,
        arrays: Batch,
        streams: Streams,
        traces: Sequence[Trace | None] = (),
    ) -> Packed:
        """As `compute`, of given samples: `arrays` as from `MicroBatches.pack_samples`. `streams` has begun."""
        if any(p._backward_hooks for p in self._trained):
            raise RefusedError("a parameter's gradient has a hook, which would not be called")
        g = len(part)
        verdict = self._verdicts.get(self._key(batch, part))
        random = verdict is None or verdict.random
        leaves = Leaves(self._trained, g, sink)
        rows = g * shape_of(batch, part[0])[0]
        pack = Pack(
            self._places,
            self._constants,
            self._statistics,
            arrays=arrays,
            rows=rows,
            g=g,
            leaves=leaves,
            streams=streams,
            findings=self._findings,
            traces=traces,
        )
        try:
            with pack.active(self._modules_apart()):
                losses = self._micro_batches.pack_losses(batch, pack, arrays, random=random, apart=self._losses_apart)
            pack.end_of_losses()
            # Before the backward: what it leaves may be sent at once.
            if several := {*leaves.shared, *pack.derived.used_several_times()}:
                raise RefusedError("a parameter is used in several ways", tuple(several))
            known = {} if verdict is None else verdict.trials
            if not traces and known.get(pack.form, 0) < TRIALS:
                raise RefusedError("it calls other functions than in its trials", untried=True)
            inputs = [*self._trained, *pack.derived.inputs]
            # Every gradient goes to `leaves` on the way. One that arrives here took a way that the pack does not know.
            found = torch.autograd.grad(losses, inputs, scale.expand(g), allow_unused=True)
            if any(gradient is not None for gradient in found):
                raise RefusedError("a parameter is used where packs do not see it")
            if streams.disturbed():
                raise RefusedError("random numbers are drawn where packs do not see it")
            pack.derived.pass_on(self._trained)
            leaves.finish()
            return Packed(losses.detach().float(), self._statistics.rows_of(pack.shares.scratch, g), pack.form)
        finally:
            pack.close()
            leaves.clear()

    def _modules_apart(self) -> list[nn.Module]:
        modules = dict(self._model.named_modules()) if self._apart else {}
        return [modules[name] for name in self._apart]

    # ---- trials --------------------------------------------------------------------------------------------------

    def try_out(
        self, batch: GlobalBatch, part: Sequence[int], scale: Tensor, singly: Callable[[Sequence[int]], list[Single]]
    ) -> None:
        """A trial: computes micro-batches one by one and as a pack, and notes whether the bits are the same.

        Args:
            batch, part, scale: as for `compute`.
            singly: computes and adds the micro-batches, and returns the hashes of what it found.
        """
        self._tried = True
        traces: list[Trace] = []

        def watch(arrays: Batch) -> contextlib.AbstractContextManager[Trace]:
            traces.append(Trace(arrays, frozenset(self._places) | self._constants, self._modules_apart()))
            return traces[-1].active()

        self._micro_batches.watch = watch
        try:
            singles = singly(part)
        finally:
            self._micro_batches.watch = None
        began = time.perf_counter()
        self._compare(batch, part, scale, singles, traces)
        self._trial_s += time.perf_counter() - began

    def _compare(
        self, batch: GlobalBatch, part: Sequence[int], scale: Tensor, singles: list[Single], traces: list[Trace]
    ) -> None:
        key = self._key(batch, part)
        before = self._verdicts.get(key)
        random = any(single.random for single in singles) or (before is not None and before.random)
        refusal: str | None = None
        own: list[Trace | None] = list(traces)
        if len(traces) > 2 and not same_calls(traces[0], traces[-1]):
            own[0] = None  # the first of all may make what later ones find already there
            del traces[0]
        trials = {} if before is None else dict(before.trials)
        # Each further round computes more layers, or the losses, one micro-batch at a time.
        for _ in range(len(self._owners) + 4):
            sums = HashedSums(len(part))
            self._verdicts[key] = Verdict(None, random)
            known = len(self._findings.alone())
            try:
                if not all(same_calls(traces[0], trace) for trace in traces[1:]):
                    raise RefusedError("micro-batches call different functions", once=True)
                broken = next((trace.broken for trace in traces if trace.broken), "")
                if broken:
                    raise RefusedError(broken)
                packed = self.compute(batch, part, scale, sums, own)
            except RefusedError as error:
                refusal = str(error)
                if len(self._findings.alone()) > known:
                    continue  # a layer has been found that has to be computed one micro-batch at a time
                if error.once and self._may_be_postponed(key, before):
                    return
                if not error.once and self._set_apart(error):
                    self._postpone(key, before)  # the calls of single micro-batches were noted without it
                    return
                if error.once or not self._set_losses_apart():
                    break
                continue
            except Exception as error:  # a task's code may raise anything when it gets more samples than it expects
                if out_of_memory(error):
                    refusal = _NO_MEMORY
                    break
                refusal = told(error, self._model)
                if not self._set_losses_apart():
                    break
                continue
            refusal = difference(singles, packed, sums, self._owners)
            if refusal is None:
                again = before is not None and before.step == batch.step and packed.form in trials
                trials[packed.form] = trials.get(packed.form, 0) + (not again)
                if len(trials) > MOST_FORMS:
                    refusal = "other functions are called in nearly every step"
                break
            # If layers that differ have been found in this round, there is another round, without their rules.
            if len(self._findings.alone()) == known and not self._set_losses_apart():
                break
        self._verdicts[key] = Verdict(refusal, random, trials, batch.step)
        if refusal == _NO_MEMORY:
            self.shrink(len(part))

    def _may_be_postponed(self, key: Key, before: Verdict | None) -> bool:
        """Leaves a verdict open, because micro-batches had different values. Not for ever, because trials cost time."""
        self._postponed[key] = self._postponed.get(key, 0) + 1
        if self._postponed[key] > MOST_POSTPONED:
            return False
        self._postpone(key, before)
        return True

    def _postpone(self, key: Key, before: Verdict | None) -> None:
        if before is None:
            del self._verdicts[key]
        else:
            self._verdicts[key] = before

    def _set_losses_apart(self) -> bool:
        """Makes packs call the task's loss for one micro-batch at a time from now on. False if they do already."""
        changed, self._losses_apart = not self._losses_apart, True
        return changed

    def _set_apart(self, error: RefusedError) -> bool:
        """Makes packs call the refusing module for one micro-batch at a time from now on. False if there is none."""
        owners = [self._owners[place][0] for place in error.parameters if place in self._owners]
        if not owners:
            return False
        # The innermost module that has all these parameters.
        paths = [owner.split(".") for owner in owners]
        common: list[str] = []
        for names in zip(*paths):
            if len(set(names)) > 1:
                break
            common.append(names[0])
        name = ".".join(common)
        if not name or name in self._apart:
            return False
        self._apart.add(name)
        return True
