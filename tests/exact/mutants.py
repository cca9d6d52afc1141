#!/usr/bin/env python
"""Mutants of trainer/exact: one thing in the code is changed, and the fast tests have to notice.

    python tests/exact/mutants.py                                # all mutants
    python tests/exact/mutants.py --number 100 --seed 3          # a random sample of them
    python tests/exact/mutants.py --module tree --jobs 2         # those of trainer/exact/tree.py
    python tests/exact/mutants.py --module tree --list           # their names; runs nothing

A mutant differs from the code in one place: another operator, comparison, number or sign, a condition negated, min for
max (any for all, start for stop), or a call left out whose result nobody takes. A mutant is killed when a test fails,
when the tests take far more processor time than without it, or when they wait forever. First the tests of the module
run, in tests/exact/test_<module>.py, then the rest of tests/exact, then, with --ranks, a few whole runs.

Not changed are places that no program can see or that are no part of what the module computes: texts, annotations,
assertions of our own invariants, decorators, and the bodies of protocols.

A mutant that survives is a missing test, or needless code, or it is equivalent: it computes the same. Equivalent
mutants are listed below by name, each with the reason; they are run nevertheless, and one that is killed is reported
as a wrong entry of the list. The score is killed / (mutants - equivalent). Code that needs a GPU is listed apart, and
counts as survived.

Each mutant is tried in a copy of the repository, by a fork of this process: torch and the test tools are imported once.
Random tests (hypothesis) draw the same examples in every run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("trainer/exact")
TESTS = Path("tests/exact")

# Whole runs, for --ranks: strong scaling with everything awkward in it, and the shards of large gradients.
RANKS = [
    "tests/distributed/test_exactness.py::test_a_users_own_task[fp32]",
    "tests/distributed/test_exactness.py::test_large_gradients_take_another_exchange_to_the_same_bits",
]

# fmt: off
# ruff: noqa: E501
# Why no test can see them -> names of mutants, as --list prints them.
EQUIVALENT: dict[str, tuple[str, ...]] = {
    "choose() sets it before anyone reads it": (
        "checks/audit Audit.__init__: self._leaves = 0  ->  self._leaves = 1",
        "checks/audit Audit.__init__: self._shift = 0  ->  self._shift = 1",
        "checks/audit Audit.__init__: self._step = 0  ->  self._step = 1",
    ),
    "any negative number says that a layer was not called": (
        "batch_norm : _NOT_CALLED = -3e+38  ->  _NOT_CALLED = -3e+38",
    ),
    "the number stands for a momentum that a cumulative average does not use": (
        "batch_norm RunningStatistics.__init__: momenta = [0.5 if momentum is None else momentum  ->  momenta = [1.5 if momentum is None else momentum",
    ),
    "how large gradients may be before they are exchanged in shards: both ways give the same bits, and the limit is measured": (
        "exchange : DIRECT_LIMIT_BYTES = 6 << 20  ->  DIRECT_LIMIT_BYTES = 7 << 20",
        "exchange : DIRECT_LIMIT_BYTES = 6 << 20  ->  DIRECT_LIMIT_BYTES = 6 << 21",
    ),
    "how many weights are made ahead changes none of them": (
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count  ->  length = max(_CHUNK, max(1 << 12, 1 << (count",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(1 >> 12, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(2 << 12, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length  ->  length = min(_CHUNK, max(1 << 13, 1 << (count - 1).bit_length",
        "checks/hashes _first_weights: length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length()  ->  length = min(_CHUNK, max(1 << 12, 2 << (count - 1).bit_length()",
        "checks/hashes _first_weights: _CHUNK, max(1 << 12, 1 << (count - 1).bit_length()))  ->  _CHUNK, max(1 << 12, 1 << (count + 1).bit_length()))",
        "checks/hashes _first_weights: mixed(torch.arange(1, length + 1, device=device)) | 1  ->  mixed(torch.arange(1, length + 2, device=device)) | 1",
        "checks/hashes _first_weights: weights is None or len(weights) < count:  ->  weights is None or len(weights) <= count:",
    ),
    "both give one round for a tensor of at most one word": (
        "checks/hashes hash64: for start in range(0, max(1, len(words)), _CHUNK):  ->  for start in range(0, max(2, len(words)), _CHUNK):",
    ),
    "how many micro-batches are gathered at once changes no bit: it bounds the memory": (
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 64 >> 20",
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 65 << 20",
        "micro_batches : CHUNK_BYTES = 64 << 20  ->  CHUNK_BYTES = 64 << 21",
        "micro_batches MicroBatches.__init__: = max(1, CHUNK_BYTES // max(1, sample_bytes * micro_batch_size  ->  = max(1, CHUNK_BYTES // max(2, sample_bytes * micro_batch_size",
    ),
    "numbers from a table and numbers drawn directly are the same: the limit bounds the memory": (
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 1 >> 20",
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 2 << 20",
        "order SampleRandom: table_limit: int = 1 << 20  ->  table_limit: int = 1 << 21",
        "order SampleRandom._draw: few = self.samples * columns <= self.table_limit  ->  few = self.samples * columns < self.table_limit",
        "order SampleRandom._draw: few = self.samples * columns <= self.table_limit  ->  few = self.samples // columns <= self.table_limit",
    ),
    "of() sets it before anyone reads it": (
        "order SampleRandom: _stream: int = 0  ->  _stream: int = 1",
    ),
    "a sum is finite where a difference is, up to an overflow": (
        "step ExactStep.__call__: health = records.losses.sum() + norm  ->  health = records.losses.sum() - norm",
    ),
    "every place is set before it is read": (
        "order by_length: starts = [0] * len(bounds)  ->  starts = [1] * len(bounds)",
    ),
    "a gradient has no more dimensions than these": (
        "packs/layers Site._differs_for: sign, *[sign] * (like.dim() - 1)], self.g)  ->  sign, *[sign] * (like.dim() + 1)], self.g)",
    ),
    "all pieces have one shape": (
        "packs/layers joined: size in zip(strides, pieces[0].shape))):  ->  size in zip(strides, pieces[1].shape))):",
    ),
    "torch's own does nothing": (
        "packs/pack Pack.__init__: super().__init__()  ->  None",
    ),
    "all micro-batches make the same graph": (
        "packs/pack Pack.apart: if k == 0 and self._trial is not None  ->  if k != 0 and self._trial is not None",
        "packs/pack Pack.apart: if k == 0 and self._trial is not None  ->  if k == 1 and self._trial is not None",
        "packs/pack Pack._apart_forward.call: if k == 0 and trial is not None:  ->  if k != 0 and trial is not None:",
        "packs/pack Pack._apart_forward.call: if k == 0 and trial is not None:  ->  if k == 1 and trial is not None:",
    ),
    "nobody reads it of a module": (
        "packs/pack Pack._apart_forward.call: self._findings.calls[self.form] = Way(False, scaled, ())  ->  self._findings.calls[self.form] = Way(True, scaled, ())",
    ),
    "it matters only while torch traces a function": (
        "packs/pack Pack._note: torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  ->  torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:",
    ),
    "a call of a micro-batch alone is known in trials only": (
        "packs/pack Pack._seen: if self._trial is not None and own is not None:  ->  if self._trial is not None or own is not None:",
    ),
    "what is called without a word about it draws nothing": (
        "packs/pack Pack.apart: dict[str, Any], random: bool=False, scaled: frozenset[int]=frozenset  ->  dict[str, Any], random: bool=True, scaled: frozenset[int]=frozenset",
    ),
    "one use beside the call's own is as good as several": (
        "packs/pack Pack.outputs_of: if k == 0 and self._trial is not None  ->  if k != 0 and self._trial is not None",
        "packs/pack Pack.outputs_of: if k == 0 and self._trial is not None  ->  if k == 1 and self._trial is not None",
    ),
    "all micro-batches give values of one type, and the same": (
        "packs/pack Pack.read:  list)) and value == values[0] for value in values)):  ->   list)) and value == values[1] for value in values)):",
        "packs/pack Pack.read: once = all((isinstance(value, (bool, int  ->  once = any((isinstance(value, (bool, int",
        "packs/pack Pack.read: return values[0]  ->  return values[1]",
    ),
    "how many gradients are added at once changes no bit: it bounds the memory": (
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 4 >> 20",
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 5 << 20",
        "packs/pack_sum : FLUSH_BYTES = 4 << 20  ->  FLUSH_BYTES = 4 << 21",
    ),
    "norms beyond those of the last parameter are left out": (
        "packs/pack_sum PackSum._flush: number * self._count:(number + 1) * self._count])  ->  number * self._count:(number + 2) * self._count])",
    ),
    "a sender sends what is complete, and nothing else": (
        "packs/pack_sum PackSum.take: if complete and self._last is not None:  ->  if complete or self._last is not None:",
    ),
    "of a parameter's modules only the first is read": (
        "packs/packs Packs.__init__: model.named_modules(remove_duplicate=False):  ->  model.named_modules(remove_duplicate=True):",
    ),
    "begin() sets it before end() reads it": (
        "packs/packs Packs.__init__: self._tried = False  ->  self._tried = True",
    ),
    "where the last two differ, the trial refuses in any case": (
        "packs/packs Packs._compare: same_calls(traces[0], traces[-1])):  ->  same_calls(traces[0], traces[-2])):",
    ),
    "all micro-batches of a pack have one shape": (
        "packs/packs Packs._key: part), *shape_of(batch, part[0]))  ->  part), *shape_of(batch, part[1]))",
        "packs/packs Packs.compute_samples: rows = g * shape_of(batch, part[0])[0]  ->  rows = g * shape_of(batch, part[1])[0]",
    ),
    "channels and places lie one after the other, and the reshape brings them into this form": (
        "packs/rules _apart: y.view(len(y), g, -1, *y.shape[2:]).transpose(0, 1).reshape(g  ->  y.view(len(y), g, -1, *y.shape[3:]).transpose(0, 1).reshape(g",
    ),
    "any negative number is no row": (
        "packs/rules _embedding_backward: grad.shape[-1]), rows, g * V, -1, o['scale_grad_by_freq']).view  ->  grad.shape[-1]), rows, g * V, -2, o['scale_grad_by_freq']).view",
    ),
    "all samples have as many places": (
        "packs/rules _group_norm_forward: torch.ops.aten.native_group_norm(x, weight, bias, N, C, x[0, 0].numel(), o['groups'], o  ->  torch.ops.aten.native_group_norm(x, weight, bias, N, C, x[1, 0].numel(), o['groups'], o",
        "packs/rules _group_norm_backward: torch.ops.aten.native_group_norm_backward, site.g, (x.size(1), x[0, 0].numel()))  ->  torch.ops.aten.native_group_norm_backward, site.g, (x.size(1), x[1, 0].numel()))",
    ),
    "of a bias a convolution's backward looks only at whether there is one": (
        "packs/rules _grouped_backward: None if bias is None else [g * bias.numel()]  ->  None if bias is None else [g // bias.numel()]",
    ),
    "a view gives the sums their shape": (
        "packs/rules _summed_to: return by.sum(dims, keepdim=True) if dims else by  ->  return by.sum(dims, keepdim=False) if dims else by",
    ),
    "all micro-batches use the same parameters": (
        "packs/shares Shares._alias: if k == 0:  ->  if k == 1:",
    ),
    "all pieces come from one node of the graph": (
        "packs/shares Shares._piece: self.ends[pieces[0].grad_fn] = self._tensors.named  ->  self.ends[pieces[1].grad_fn] = self._tensors.named",
    ),
    "there are more places than arguments": (
        "packs/shares Shares.part: range(len(flat(value, [])) + 1))  ->  range(len(flat(value, [])) + 2))",
    ),
    "any other number than ALONE says that the rule holds": (
        "packs/sites Sites.holds: weight, bias, like=grad) else 0  ->  weight, bias, like=grad) else 1",
    ),
    "a trial chooses before anyone looks": (
        "packs/sites Sites.layer: self._findings.sites.get(key, len(rules) - 1 if self._checks else ALONE  ->  self._findings.sites.get(key, len(rules) + 1 if self._checks else ALONE",
    ),
    "with a GPU both are there, and without one neither is": (
        "packs/streams Streams.of: if self._gpu is not None and gpu is not None:  ->  if self._gpu is not None or gpu is not None:",
        "packs/streams Streams._rest: if self._gpu is not None and self._resting_gpu is not None  ->  if self._gpu is not None or self._resting_gpu is not None",
    ),
    "what is drawn from the state at rest is refused, whatever it is": (
        "packs/streams Streams.begin: self._host.manual_seed(0)  ->  None",
        "packs/streams Streams.begin: self._host.manual_seed(0)  ->  self._host.manual_seed(1)",
        "packs/streams Streams.begin: self._resting_gpu.manual_seed(0)  ->  self._resting_gpu.manual_seed(1)",
        "packs/streams Streams.aside: self._resting_gpu.manual_seed(0)  ->  self._resting_gpu.manual_seed(1)",
    ),
    "begin_alone() sets it before anyone reads it": (
        "packs/trial Trial.__init__: self._next = 0  ->  self._next = 1",
    ),
    "memory that nobody looks at": (
        "packs/values _laid_out_like: span = 1 + sum(((size - 1) * stride for  ->  span = 2 + sum(((size - 1) * stride for",
        "packs/values _laid_out_like: span = 1 + sum(((size - 1) * stride for size, stride  ->  span = 1 + sum(((size + 1) * stride for size, stride",
    ),
    "of an even number of places none is left over, and what is left over of an odd one becomes 0": (
        "packs/values _pairs: factors[order[half:2 * half]] = float(sign)  ->  factors[order[half:3 * half]] = float(sign)",
        "packs/values _pairs: if length > 1:  ->  if length > 2:",
    ),
    "every pack and every trial sets it": (
        "packs/verdicts Packed: form: int = 0  ->  form: int = 1",
        "packs/verdicts Verdict: random: bool = True  ->  random: bool = False",
    ),
    "any negative number is no step": (
        "packs/verdicts Verdict: step: int = -1  ->  step: int = -2",
    ),
    "a longer search finds nothing more": (
        "plan nearest_possible: largest = -(-B // m) if B is not None and m is  ->  largest = -(-B * m) if B is not None and m is",
        "plan nearest_possible: range(max(world_size, largest) + 1):  ->  range(max(world_size, largest) + 2):",
    ),
}

# What of a GPU they need -> names. These count as survived.
NEEDS_A_GPU: dict[str, tuple[str, ...]] = {
    "a copy that nobody waits for": (
        "flags Flags.read:  torch.empty((), pin_memory=True).copy_(flags.max(), non_blocking  ->   torch.empty((), pin_memory=False).copy_(flags.max(), non_blocking",
        "flags Flags.read: .copy_(flags.max(), non_blocking=True)  ->  .copy_(flags.max(), non_blocking=False)",
    ),
    "the alignment of its memory": (
        "micro_batches : ALIGNMENT_BYTES = {'cpu': 64, 'cuda': 512}  ->  ALIGNMENT_BYTES = {'cpu': 64, 'cuda': 513}",
    ),
}
# fmt: on
SAID_EQUIVALENT = {name for names in EQUIVALENT.values() for name in names}
SAID_GPU = {name for names in NEEDS_A_GPU.values() for name in names}

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitXor: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "start": "stop", "stop": "start"}


@dataclass(frozen=True)
class Mutant:
    """One change: of `module`, whose whole text is then `source`."""

    module: str
    line: int
    name: str
    source: str


# Making mutants


def places(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, ast.AST, str, Any]]:
    """(scope, statement, node, field, new value) of every change, in the order of the text."""

    def visit(node: ast.AST, scope: str, statement: ast.stmt) -> Iterator[tuple[str, ast.stmt, ast.AST, str, Any]]:
        if isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            scope = f"{scope}.{node.name}".lstrip(".")
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
            return
        statement = node if isinstance(node, ast.stmt) else statement
        for field, value in changes(node):
            yield scope, statement, node, field, value
        for field, child in ast.iter_fields(node):
            if isinstance(node, ast.Call) and field == "func":
                child = getattr(child, "value", None)  # of a.start() only a is looked at
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from visit(part, scope, statement)

    yield from visit(tree, "", tree.body[0])


def changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """(field, new value) of each change of one node."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPPED:
        if not (isinstance(node, ast.BinOp) and any(isinstance(s, ast.JoinedStr) for s in (node.left, node.right))):
            yield "op", SWAPPED[type(node.op)]()
    elif isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            yield "ops", [*node.ops[:i], SWAPPED[type(operator)](), *node.ops[i + 1 :]]
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "value", node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and negatable(node.test):
        yield "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):
            if negatable(test):
                yield "ifs", [*node.ifs[:i], ast.UnaryOp(ast.Not(), test), *node.ifs[i + 1 :]]
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "op", ast.UAdd() if not isinstance(node.op, ast.Not) else None
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "value", ast.Constant(None)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("min", "max"):
        yield "func", ast.Attribute(node.func.value, RENAMED[node.func.attr])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RENAMED:
        yield "func", ast.Name(RENAMED[node.func.id])
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in ("start", "stop"):
        yield "attr", RENAMED[node.attr]


def negatable(test: ast.expr) -> bool:
    """Whether the negation is a mutant of its own: that of `a == b` is `a != b`, and that of `not a` is `a`."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return not isinstance(test.ops[0], (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn))
    return not isinstance(test, ast.Constant) and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))


def common(one: str, other: str) -> int:
    """How many characters at the beginning of two texts are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def difference(before: str, after: str) -> str:
    """What differs between two statements, with some of the text around it, in one line."""
    before, after = (re.sub(r"\s+", " ", text.split("\n    ")[0]) for text in (before, after))
    head = common(before, after)
    tail = common(before[head:][::-1], after[head:][::-1])

    def shown(text: str) -> str:
        first, last = max(0, head - 28), min(len(text), len(text) - tail + 28)
        # Whole words: no name is cut in two.
        while first > 0 and (text[first - 1].isalnum() or text[first - 1] in "_."):
            first -= 1
        while last < len(text) and (text[last].isalnum() or text[last] == "_"):
            last += 1
        return text[first:last]

    return f"{shown(before)}  ->  {shown(after)}"


def mutants_of(module: str, text: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    tree, found, names = ast.parse(text), [], Counter[str]()
    for scope, statement, node, field, value in list(places(tree)):
        before, kept = ast.unparse(statement), getattr(node, field)
        if field == "op" and value is None:  # `not x` -> `x`
            kept_fields = copy.copy(node.__dict__)
            node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)  # type: ignore[attr-defined]
            after, source = ast.unparse(statement), ast.unparse(tree)
            node.__dict__.update(kept_fields)
        else:
            setattr(node, field, value)
            ast.fix_missing_locations(tree)
            after, source = ast.unparse(statement), ast.unparse(tree)
            setattr(node, field, kept)
        name = f"{module} {scope}: {difference(before, after)}"
        names[name] += 1
        if names[name] > 1:
            name += f" (place {names[name]})"
        found.append(Mutant(module, getattr(node, "lineno", statement.lineno), name, source))
    assert ast.unparse(tree) == ast.unparse(ast.parse(text))
    return found


# Trying them


@dataclass
class Trial:
    """A mutant that is being tried by a process, in a copy of the repository."""

    mutant: Mutant
    folder: Path
    stages: list[list[str]]
    pid: int = 0
    began_s: float = 0.0


PYTEST = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
PYTEST += ["-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin"]
CPU_LIMIT_S, WALL_LIMIT_S = 100, 900


def start(trial: Trial) -> None:
    """Runs the trial's next stage in a fork of this process."""
    trial.began_s = time.monotonic()
    trial.pid = os.fork()
    if trial.pid:
        return
    try:
        os.setsid()
        os.chdir(trial.folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
        resource.setrlimit(resource.RLIMIT_DATA, (16 << 30, 16 << 30))
        sys.path.insert(0, str(trial.folder))
        sys.dont_write_bytecode = True  # a mutant's bytecode could be taken for that of the next one

        import pytest

        code = pytest.main([*PYTEST, *trial.stages[0]])
        assert str(sys.modules["trainer"].__file__).startswith(str(trial.folder))
        sys.stdout.flush()
        os._exit(int(code))
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(99)


def wait_for_one(running: dict[int, Trial]) -> tuple[Trial, str | None]:
    """Waits until a stage ends. Returns its trial, and what killed the mutant, or None."""
    while True:
        for pid, trial in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - trial.began_s > WALL_LIMIT_S
            if not done and late:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if done or late:
                del running[pid]
                code = os.waitstatus_to_exitcode(status) if done else -1
                if code == 0:
                    return trial, None
                if code in (4, 5):  # not a failed test: pytest was called wrongly, or found none
                    sys.exit((trial.folder / "log.txt").read_text(errors="replace")[-2000:])
                if code < 0:
                    return trial, "the time limit" if late or -code in (signal.SIGXCPU, signal.SIGKILL) else f"{-code}"
                log = (trial.folder / "log.txt").read_text(errors="replace")
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
                return trial, failed[0].rpartition("/")[2] if failed else log[-500:]
        time.sleep(0.02)


def import_all() -> None:
    """Imports what the tests need, but nothing of the trainer."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # Of pytest's plugins only those that the tests use.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import _hypothesis_pytestplugin  # noqa: F401
    import hypothesis
    import pytest
    import pytest_timeout  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import torch.distributed
    import torch.nn.modules.batchnorm

    torch.set_num_threads(1)
    # The same examples every time, none from earlier runs, and no search for a smaller one. Slowness is no failure.
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutants")
    # pytest imports some of itself late.
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*PYTEST, "--version"])
    assert "trainer" not in sys.modules
    gc.freeze()  # the forks need not look at what was made here


@contextlib.contextmanager
def copies(count: int) -> Iterator[list[Path]]:
    """Copies of the repository's code, which mutants are written into."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(i)) for i in range(count)]
        for folder in folders:
            folder.mkdir()
            shutil.copy2(ROOT / "pyproject.toml", folder)
            for part in ("trainer", "tests", "ds_configs"):
                shutil.copytree(ROOT / part, folder / part)
        yield folders


def test_file(module: str) -> str:
    """The tests of a module: of "packs/choice", tests/exact/packs/test_choice.py; its folder, where there is no file."""
    folder, _, name = module.rpartition("/")
    own = TESTS / folder / f"test_{name}.py"
    return str(own if (ROOT / own).exists() else TESTS / folder)


def stages_of(module: str, own_only: bool, ranks: bool) -> list[list[str]]:
    """The arguments of pytest, one list a stage."""
    own = test_file(module)
    stages = [[own], [str(TESTS), f"--deselect={own}"], RANKS]
    return stages[:1] if own_only else stages[: 2 + ranks]


def run(chosen: list[Mutant], jobs: int, own_only: bool, ranks: bool) -> dict[str, list[Mutant]]:
    """Tries the mutants. Returns the killed and the survived ones."""
    import_all()
    ends: dict[str, list[Mutant]] = {"killed": [], "survived": []}
    originals = {m.module: (ROOT / PACKAGE / f"{m.module}.py").read_text() for m in chosen}
    waiting = list(reversed(chosen))
    with copies(jobs) as folders:
        unchanged = Trial(
            Mutant("", 0, "", ""),
            folders[0],
            [[str(TESTS)]] if not own_only else [[test_file(name) for name in originals]],
        )
        start(unchanged)
        _, failed = wait_for_one({unchanged.pid: unchanged})
        if failed is not None:
            sys.exit(f"The tests fail without any mutant: {failed}")
        free, running = list(folders), dict[int, Trial]()
        while waiting or running:
            while free and waiting:
                mutant = waiting.pop()
                trial = Trial(mutant, free.pop(), stages_of(mutant.module, own_only, ranks))
                (trial.folder / PACKAGE / f"{mutant.module}.py").write_text(mutant.source)
                shutil.rmtree((trial.folder / PACKAGE / mutant.module).parent / "__pycache__", ignore_errors=True)
                start(trial)
                running[trial.pid] = trial
            trial, killer = wait_for_one(running)
            trial.stages.pop(0)
            if killer is None and trial.stages:
                start(trial)
                running[trial.pid] = trial
                continue
            mutant = trial.mutant
            (trial.folder / PACKAGE / f"{mutant.module}.py").write_text(originals[mutant.module])
            free.append(trial.folder)
            ends["survived" if killer is None else "killed"].append(mutant)
            word = "SURVIVED" if killer is None else "killed  "
            said = f"    [{killer}]" if killer else ""
            if killer is None and (mutant.name in SAID_EQUIVALENT or mutant.name in SAID_GPU):
                word = "as said "
            if killer and mutant.name in SAID_EQUIVALENT:
                word = "KILLED, but said to be equivalent"
            print(f"{word} {mutant.module}.py:{mutant.line} {mutant.name.partition(' ')[2]}{said}", flush=True)
    return ends


def report(chosen: list[Mutant], ends: dict[str, list[Mutant]]) -> None:
    """Prints a row for each module, and the score."""
    equivalent = {m.name for m in ends["survived"]} & SAID_EQUIVALENT
    gpu = {m.name for m in ends["survived"]} & SAID_GPU
    print("\n| module | mutants | killed | equivalent | need a GPU | survived |\n|---|---|---|---|---|---|")
    for module in [*sorted({m.module for m in chosen}), "all"]:
        of = [m for m in chosen if module in (m.module, "all")]
        killed = sum(m in of for m in ends["killed"])
        same, device = sum(m.name in equivalent for m in of), sum(m.name in gpu for m in of)
        print(f"| {module} | {len(of)} | {killed} | {same} | {device} | {len(of) - killed - same - device} |")
    counted = len(chosen) - len(equivalent)
    print(f"\n{len(ends['killed'])} of {counted} killed: {len(ends['killed']) / max(1, counted):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutants of trainer/exact.")
    parser.add_argument("--number", type=int, help="how many, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--module", nargs="+", help="only of these modules, for example tree")
    parser.add_argument("--match", default="", help="only mutants whose name holds this text")
    parser.add_argument("--names", type=Path, help="only those in this file, one a line as --list prints them")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--own", action="store_true", help="run only the tests of the mutant's module")
    parser.add_argument("--ranks", action="store_true", help="survivors go through a few whole runs, too")
    parser.add_argument("--list", action="store_true", help="print the names; run nothing")
    options = parser.parse_args()
    modules = options.module or sorted(
        str(p.relative_to(ROOT / PACKAGE).with_suffix(""))
        for p in (ROOT / PACKAGE).rglob("*.py")
        if p.stem != "__init__"
    )
    every = [m for name in modules for m in mutants_of(name, (ROOT / PACKAGE / f"{name}.py").read_text())]
    names = {m.name for m in every}
    gone = [n for n in sorted(SAID_EQUIVALENT | SAID_GPU) if n.partition(" ")[0] in modules and n not in names]
    if gone:
        sys.exit("Listed as equivalent, but no mutant any more:\n" + "\n".join(gone))
    chosen = [m for m in every if options.match in m.name]
    if options.names is not None:
        wanted = set(options.names.read_text().splitlines())
        chosen = [m for m in chosen if m.name in wanted]
    if options.number is not None and options.number < len(chosen):
        drawn = set(random.Random(options.seed).sample(range(len(chosen)), options.number))
        chosen = [m for i, m in enumerate(chosen) if i in drawn]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return
    report(chosen, run(chosen, options.jobs, options.own, options.ranks))


if __name__ == "__main__":
    main()
