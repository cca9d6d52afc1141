"""Command lines: the flags of trainer/main.py, and `strong-scaling-trainer` (`python -m trainer`) with its commands."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..colours import signalled
from ..config import ready
from ..config.keys import Config, load_config
from ..config.schema import parse_override
from ..errors import UserError
from ..ranks.place import Ranks
from ..ranks.stopping import end_at_once_no_more
from ..tasks.first_look import look
from .version import Version

# The program that the package installs.
COMMAND = "strong-scaling-trainer"


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing usage from every rank.

    It takes no abbreviated flags: one that is clear today could also mean a flag that is added tomorrow.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse. It also keeps what was typed, for hints."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._hint(message)}\n{self.format_usage().strip()}")

    def _hint(self, message: str) -> str:
        """A hint for a misspelt command or flag; an empty text if nothing is near."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong is not None:
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            return _meant([wrong[1]], choices)
        flags = re.findall(r"--\w[\w-]*", self.format_usage())
        typed = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        return _meant([word for word in typed if word not in flags], flags)


def _meant(words: Sequence[str], known: Sequence[str]) -> str:
    """A sentence about the first word that is near to a known one; an empty text if there is none."""
    for word in words:
        found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        if found:
            return f".\nYou typed {word}. Did you mean {found[0]}?"
    return ""


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that describe a run. A flag overrides the file, and the file overrides the default."""
    parser.add_argument(
        "--ds_config", required=True, metavar="FILE", help="JSON config: DeepSpeed's keys and a trainer block"
    )
    parser.add_argument("--task", help="trainer.task: a built-in task, or path/to/file.py:ClassName")
    parser.add_argument("--epochs", type=int, help="trainer.epochs")
    parser.add_argument("--max_steps", type=int, help="trainer.max_steps")
    parser.add_argument("--seed", type=int, help="trainer.seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the file, dotted: trainer.seed=3"
    )


def run_parser() -> argparse.ArgumentParser:
    """The parser of trainer/main.py."""
    parser = _Parser(
        prog="trainer/main.py",
        description="Trains one config on this rank; start it with deepspeed, torchrun or plain python.",
    )
    add_run_flags(parser)
    parser.add_argument("--local_rank", type=int, default=None, help="set by the launcher")
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a training run, whoever starts its ranks."""
    add_config_flags(parser)
    parser.add_argument("--output_dir", help="trainer.output_dir: where results go")
    parser.add_argument(
        "--resume", default="none", metavar="auto|none|DIR", help="continue from a run's newest checkpoint, or DIR's"
    )
    parser.add_argument(
        "--allow_changed_config", action="store_true", help="continue even if a changed config changes the bits"
    )


def config_from(flags: argparse.Namespace) -> Config:
    """The checked config that parsed flags describe. Raises UserError."""
    overrides: dict[str, Any] = dict(parse_override(text) for text in flags.set)
    for name in ("task", "epochs", "max_steps", "seed", "output_dir"):
        value = getattr(flags, name, None)
        if value is not None:
            overrides[f"trainer.{name}"] = value
    return load_config(config_file(flags.ds_config), overrides)


def config_file(given: str) -> str:
    """The path of a config file. The bare name of a ready config is enough; rank 0 then says which file is used.

    Raises:
        UserError: there is no such file, but a ready config has this name or one near to it.
    """

    def tell(sentence: str) -> None:
        if Ranks.from_environment().first:
            print(sentence, file=sys.stderr)

    return str(ready.find(given, tell))


def _pack(text: str) -> int | str:
    """A value of --packs. Raises ArgumentTypeError."""
    if text == "auto" or (text.isdecimal() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f'{text!r} is not "auto" or a whole number of at least 1')


def main(arguments: list[str] | None = None) -> int:
    """`strong-scaling-trainer COMMAND`, or `python -m trainer COMMAND`. Returns the exit code."""
    try:
        before = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # not in the main thread
        return _main(arguments)
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as in `keys | head`
        # Python flushes stdout once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Ends a command as an exception does, so temporary folders are removed, and its ranks are ended."""
    raise SystemExit(128 + number)


def command_parser() -> argparse.ArgumentParser:
    """The parser of `strong-scaling-trainer`."""
    # Usage shows what the user has typed: the entry point of the package, or python -m trainer.
    name = Path(sys.argv[0]).name
    parser = _Parser(
        prog=name if name == COMMAND else "python -m trainer", description="Exact strong scaling: plan, verify, study."
    )
    parser.add_argument("--version", action=Version, help="versions of the trainer, torch and DeepSpeed")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    training = commands.add_parser("train", help="train a config; starts the ranks on this machine itself")
    add_run_flags(training)
    training.add_argument("--ranks", type=int, metavar="N", help="how many; default: one for each GPU, else one")
    plan = commands.add_parser("plan", help="show what each world size would do; starts nothing")
    verify = commands.add_parser("verify", help="run a config at several world sizes and compare every bit")
    check = commands.add_parser("check-task", help="say what in a task isn't exact, and why")
    check.add_argument("task", metavar="TASK", help="path/to/file.py:ClassName, or a built-in task")
    check.add_argument("--ds_config", metavar="FILE", help="with this config's micro-batches, optimizer and precision")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="trainer.task_options.x=3")
    guess = commands.add_parser("predict", help="predictions of a trained model for new data")
    guess.add_argument("--model", required=True, metavar="DIR", help="a run's output folder, or the model in it")
    guess.add_argument("--input", required=True, metavar="FILE", help="a file, or a folder if the task takes one")
    guess.add_argument("--output", metavar="FILE", help="where predictions go; default: the console")
    guess.add_argument("--overwrite", action="store_true", help="replace the file of --output, if there is one")
    guess.add_argument("--format", choices=("csv", "jsonl"), help="default: by the output's name, else csv")
    guess.add_argument("--task", metavar="FILE.py:NAME", help="the code of your own task")
    guess.add_argument("--batch_size", type=int, default=32, help="samples of one forward")
    guess.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    examine = commands.add_parser("doctor", help="try on this machine what the trainer promises; takes minutes")
    examine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes GPUs if there are any"
    )
    examine.add_argument("--output", metavar="FILE", default="doctor.json", help="where all figures go, as JSON")
    compare = commands.add_parser("study", help="compare strong and weak scaling over seeds, and judge")
    compare.add_argument("ds_config", metavar="FILE", help='JSON config with a "study" block')
    compare.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the file, dotted: study.seeds=5"
    )
    compare.add_argument("--dry_run", action="store_true", help="show the plan and start no run")
    folded = commands.add_parser("cross-validate", help="k folds, each an ordinary run; the mean and its interval")
    folded.add_argument("ds_config", metavar="FILE", help='JSON config; it may have a "cross_validation" block')
    folded.add_argument("--task", help="trainer.task: a built-in task, or path/to/file.py:ClassName")
    folded.add_argument("--epochs", type=int, help="trainer.epochs")
    folded.add_argument("--folds", type=int, help="cross_validation.folds: 5, for example")
    folded.add_argument("--repeats", type=int, help="cross_validation.repeats: how often to cut the samples")
    folded.add_argument("--group_column", help="samples of one group stay in one fold")
    folded.add_argument("--metric", help="the metric that is named first")
    folded.add_argument("--output_dir", help="where results go; default: runs/<config>-folds")
    folded.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the file: cross_validation.seed=3"
    )
    folded.add_argument("--dry_run", action="store_true", help="check everything, show the plan, start no run")
    seek = commands.add_parser(
        "search", help="search the keys of a config by validation, and test the best values once"
    )
    seek.add_argument("ds_config", metavar="FILE", help='JSON config with a "search" block')
    seek.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the file, dotted: search.trials=20"
    )
    again = commands.add_parser("report", help="write a study's tables and page again, from its results alone")
    again.add_argument("folders", metavar="DIR", nargs="+", help="study.output_dir, of one study or several")
    again.add_argument("--paper", metavar="FILE", help="also write all of them up as one short paper: paper.html")
    start = commands.add_parser("init", help="write a config to start from")
    start.add_argument("task", metavar="TASK", nargs="?", help="a task, or the name of a ready config")
    start.add_argument("file", metavar="FILE", nargs="?", help="default: TASK.json")
    find = commands.add_parser("keys", help="what the keys of a config mean")
    find.add_argument("pattern", metavar="KEY", nargs="?", help="a key, a block, a task, or a part of a name")
    commands.add_parser("schema", help="print the JSON schema of a config, for editors")
    shell = commands.add_parser("completion", help="print what makes a shell complete this command")
    shell.add_argument("shell", choices=("bash", "zsh", "fish"))
    for command in (plan, verify):
        add_config_flags(command)
        command.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2, 3, 4], metavar="W")
    plan.add_argument("--data", action="store_true", help="read the data, to count padding and uneven ranks of texts")
    verify.add_argument(
        "--packs", nargs="+", type=_pack, default=[None], metavar="G", help="also with these sizes of packs: 1 4 auto"
    )
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # an error shows the usage of this command
    return parser


def _main(arguments: list[str] | None) -> int:
    # Each command is imported only when it is called: most load torch, which takes seconds.
    parser = command_parser()
    try:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could follow
            from .completion import complete

            complete(parser)
        flags, unknown = parser.parse_known_args(arguments)
        if unknown:
            flags.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        # From here on, Ctrl-C ends a command as an exception does, with its clean-up. `train` has nothing to remove
        # while it imports torch, and there the exception would come out as an ImportError.
        if flags.command != "train":
            end_at_once_no_more()
        if flags.command == "init":
            from .start import start

            return start(flags.task, flags.file, parser.prog)
        if flags.command == "keys":
            from .keys import keys

            return keys(flags.pattern, parser.prog)
        if flags.command == "schema":
            print((ready.folder() / ready.SCHEMA).read_text(encoding="utf-8"), end="")
            return 0
        if flags.command == "completion":
            from .completion import script

            print(script(COMMAND, flags.shell))
            return 0
        if flags.command == "train":
            from .train import train

            return train(config_from(flags), flags)
        if flags.command == "check-task":
            from .check_task import check_task

            file = None if flags.ds_config is None else config_file(flags.ds_config)
            return check_task(flags.task, dict(parse_override(text) for text in flags.set), file)
        if flags.command == "predict":
            from .predict import predict

            return predict(
                flags.model,
                flags.input,
                flags.output,
                flags.format,
                flags.task,
                flags.batch_size,
                flags.device,
                flags.overwrite,
            )
        if flags.command == "doctor":
            from .doctor.doctor import doctor

            return doctor(flags.device, flags.output)
        if flags.command == "study":
            from ..study.runner import study

            return study(config_file(flags.ds_config), flags.dry_run, dict(parse_override(text) for text in flags.set))
        if flags.command == "cross-validate":
            return _cross_validate(flags)
        if flags.command == "search":
            from ..search.runner import search

            return search(config_file(flags.ds_config), dict(parse_override(text) for text in flags.set))
        if flags.command == "report":
            from ..study.page import report

            return report(flags.folders, flags.paper)
        if min(flags.world_sizes) < 1:
            raise UserError(f"--world_sizes {min(flags.world_sizes)}: a world size must be at least 1.")
        config = config_from(flags)
        if flags.command == "plan":
            from .show_plan import plan_table

            if not flags.data:
                print(plan_table(config, flags.world_sizes))
                return 0
            look(config.trainer.task, config.trainer.task_options)
            from .text_work import text_work

            print(plan_table(config, flags.world_sizes, text_work(config)))
            return 0
        look(config.trainer.task, config.trainer.task_options)
        from .verify import verify as run_verify

        return run_verify(config, flags.world_sizes, flags.packs)
    except UserError as error:
        print(signalled(f"error: {error}", sys.stderr), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped from the keyboard", file=sys.stderr)
        return 130


def _cross_validate(flags: argparse.Namespace) -> int:
    from ..folds.runner import cross_validate

    overrides: dict[str, Any] = dict(parse_override(text) for text in flags.set)
    for block, names in (
        ("trainer", ("task", "epochs")),
        ("cross_validation", ("folds", "repeats", "group_column", "metric", "output_dir")),
    ):
        given = {f"{block}.{name}": getattr(flags, name) for name in names}
        overrides |= {key: value for key, value in given.items() if value is not None}
    return cross_validate(config_file(flags.ds_config), overrides, flags.dry_run)
