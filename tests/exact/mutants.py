#!/usr/bin/env python
"""Mutants of trainer/exact: one thing in the code is changed, and the fast tests have to notice.

    python tests/exact/mutants.py                                # all mutants
    python tests/exact/mutants.py --number 100 --seed 3          # a random sample of them
    python tests/exact/mutants.py --module tree --jobs 2         # those of trainer/exact/tree.py
    python tests/exact/mutants.py --module checks/audit --list   # the names of those of checks/audit.py; runs nothing

A mutant differs from the code in one place: another operator, comparison, number or sign, a condition negated, min for
max (any for all, start for stop), or a call left out whose result nobody takes. A mutant is killed when a test fails,
when the tests take far more processor time than without it, or when they wait forever. First the tests of the module
run (of checks/audit, tests/exact/checks/test_audit.py), then the rest of tests/exact, then, with --ranks, a few whole
runs.

Not changed are places that no program can see or that are no part of what the module computes: texts, annotations,
assertions of our own invariants, decorators, and the bodies of protocols.

A mutant that survives is a missing test, or needless code, or it is equivalent: it computes the same. Equivalent
mutants are listed in equivalent.py by name, each with the reason. They are run nevertheless, and one that is killed is
reported as a wrong entry of the list. The score is killed / (mutants - equivalent). Code that needs a GPU is listed
apart, and counts as survived.

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

# Of this folder, not of the package `tests`: a fork has to import that from its copy of the repository.
from equivalent import EQUIVALENT, NEEDS_A_GPU

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = Path("trainer/exact")
TESTS = Path("tests/exact")

# Whole runs, for --ranks: strong scaling with everything awkward in it, and the shards of large gradients.
RANKS = [
    "tests/distributed/test_exactness.py::test_a_users_own_task[fp32]",
    "tests/distributed/test_exactness.py::test_large_gradients_take_another_exchange_to_the_same_bits",
]

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
CPU_LIMIT_S, WALL_LIMIT_S = 240, 900


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
    """The tests of a module: of "packs/choice" tests/exact/packs/test_choice.py, or its folder if there is no file."""
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
