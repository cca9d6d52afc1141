"""Messages for failures of the machine: no memory, no disk, a lost rank."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import torch

from ..errors import TrainerError, UserError
from ..exact.plan import BatchPlan
from ..record.checkpoints import way_on
from ..record.folder import OutputFolder
from ..rehearsal.refused import refusal

# Exceptions of gloo or NCCL come from these modules. Most are plain RuntimeErrors, so their type does not show it.
_COLLECTIVES = ("torch.distributed.", "trainer.ranks.collectives", "deepspeed.comm.")

# What torch says of tensors of two types, and of classes that are too large. Its errors have no types of their own.
_TYPES = re.compile(r"\bdtype\b|scalar types?|should be the same|can't be cast")
_TARGET = re.compile(r"^Target .* out of bounds")


def of_a_collective(error: BaseException) -> bool:
    """Whether an exception was raised in a collective, as happens when another rank is gone."""
    return isinstance(error, RuntimeError) and any(place.startswith(_COLLECTIVES) for place in _places(error))


def _places(error: BaseException) -> list[str]:
    """The functions in an exception's traceback, as "module.function"."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}" for frame in frames]


def explained(error: BaseException, plan: BatchPlan, folder: OutputFolder | None) -> TrainerError | None:
    """The message for an error of the machine; None for any other."""
    if isinstance(error, SystemExit):
        return _ended_by_the_task(error)
    if _is_out_of_memory(error):
        m = plan.micro_batch_size
        advice = (
            f"Try half of it, {m // 2} (train_micro_batch_size_per_gpu), or" if m > 1 else "It is the smallest. Try"
        )
        return TrainerError(
            f"A micro-batch of {m} samples does not fit into the memory of this device: "
            f"{str(error).splitlines()[0][:200]}\n"
            f"{advice} trainer.gradient_checkpointing=true, which keeps the bits. "
            "Another micro-batch size changes the bits: it is another model."
        )
    return refusal(error, _line_of_the_task(error)) or of_types(error) or of_the_folder(error, folder)


def of_types(error: BaseException) -> UserError | None:
    """The message for arrays of a type or with values that torch does not take, in a task's own code; else None.

    numpy and pandas give float64 and int32 by themselves, so this is the first error that many people meet.
    """
    where = _line_of_the_task(error)
    if not where:
        return None
    says = str(error).strip().partition("\n")[0]
    if isinstance(error, IndexError) and _TARGET.search(says):
        return UserError(
            f"{where} fails: {says}\nA class goes beyond the outputs. Count classes from 0, and give the model one "
            "output for each class."
        )
    if isinstance(error, RuntimeError) and _TYPES.search(says):
        return UserError(
            f"{where} gets a tensor of the wrong type: {says}.\nUsually inputs have to be float32, and classes and "
            'tokens int64. In splits(), convert them: x.astype("float32"), y.astype("int64").'
        )
    return None


def _line_of_the_task(error: BaseException) -> str:
    """The innermost line of an exception's traceback that is neither ours nor torch's; "" if there is none."""
    others = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, Path(__file__).parent))
    lines = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(code, line) for code, line in lines if not code.co_filename.startswith((*others, "<"))]
    return f"{own[-1][0].co_filename}, line {own[-1][1]}, in {own[-1][0].co_name}()," if own else ""


def _ended_by_the_task(error: SystemExit) -> TrainerError:
    library = str(Path(os.__file__).parent)  # of Python: exit() and argparse call sys.exit() there
    places = [(f.f_code, line) for f, line in traceback.walk_tb(error.__traceback__)]
    code, line = [place for place in places if not place[0].co_filename.startswith((library, "<"))][-1]
    said = f" ({error.code})" if isinstance(error.code, str) else ""
    return TrainerError(
        f"The task ended the process in the middle of the run{said}: {code.co_filename}, line {line}, in "
        f"{code.co_name}().\nA task must return, or raise an exception. Replace sys.exit(), exit() or quit() there."
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # Torch's allocator for the CPU raises a plain RuntimeError. Only its text differs from that of others.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def of_the_folder(error: BaseException, folder: OutputFolder | None) -> TrainerError | None:
    """The message for an error in writing to the output folder; None for any other."""
    from safetensors import SafetensorError

    if folder is None:
        return None
    if isinstance(error, SafetensorError) and "safetensors.torch.save_file" in _places(error):  # as for a full disk
        what, where = str(error), None
    elif isinstance(error, OSError) and error.errno is not None:
        what, where = error.strerror or str(error), error.filename
    else:
        return None
    return TrainerError(
        f"The output folder {folder.path} cannot be written: {what}{f' ({where})' if where else ''}.\n"
        f"Free some space, or make the folder writable again. {way_on(folder.path)}"
    )
