"""How a command ends: what its exit status says, and an error in one line with what helps."""

from __future__ import annotations

import os
import sys

DONE, UNWELL, REFUSED, FAILED = 0, 1, 2, 3
INTERRUPTED, NO_READER = 130, 141  # as shells have them: 128 and the number of SIGINT, SIGPIPE

STATUSES = f"""exit status:
  {DONE}    done
  {UNWELL}    ferret doctor: something fails
  {REFUSED}    what you can put right: a setting, a file, memory, a run that cannot go on; the error says it
  {FAILED}    an error of ferret's own; --debug shows where
  {INTERRUPTED}  interrupted; rounds that are done are kept, and ferret resume goes on
"""
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as torch says it
LESS_MEMORY = (
    "less is needed with a smaller training.per_device_train_batch_size or dataset.max_length, with "
    "training.gradient_checkpointing=true, or with dtype=bfloat16"
)


def explain(command: str, error: BaseException) -> int:
    """Prints the line that an error is worth; the exit status."""
    if isinstance(error, BrokenPipeError):  # `ferret inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter flushes into it
        return NO_READER
    if isinstance(error, KeyboardInterrupt):
        print(f"ferret {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    text, status = _line(error)
    print(f"ferret {command}: {text}", file=sys.stderr)
    return status


def _line(error: BaseException) -> tuple[str, int]:
    from ferret_ext.federated.client import DivergedError  # brings torch, which --help can do without
    from ferret_ext.federated.data.errors import DataError
    from ferret_ext.federated.errors import RunError
    from ferret_ext.federated.settings import ConfigError

    if isinstance(error, (ConfigError, DataError, DivergedError, RunError)):
        return f"error: {error}", REFUSED
    first = str(error).partition("\n")[0][:200]
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return f"error: {first or 'out of memory'}; {LESS_MEMORY}", REFUSED
    if isinstance(error, OSError):
        return f"error: {first}; --debug shows where", REFUSED
    return f"internal error: {type(error).__name__}: {first}; --debug shows where", FAILED
