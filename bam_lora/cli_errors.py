"""What a command raises, as one line and the exit status of the contract."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from bam_lora.errors import Interrupted, UserError, first_line
from bam_lora.gpu_memory import is_out_of_memory
from bam_lora.quiet import quiet
from bam_lora.terminal_text import escaped

VERBOSE = "BAM_LORA_VERBOSE"
_LESS = "Close what else uses it, then give the same command again; docs/troubleshooting.md says what takes less"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns what a command raises into one line and the exit status of the contract; keeps its examples in lines."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        quiet(verbose=VERBOSE in os.environ)
        try:
            function(*args, **kwargs)
        except UserError as error:
            _fail(str(error), 1)
        except KeyboardInterrupt as interrupt:
            _fail(_interrupted(interrupt), 130)
        except OSError as error:
            _fail(_refused(error), 1)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _fail(f"out of memory: {str(error).splitlines()[0] if str(error) else 'the system gave none'}. {_LESS}", 1)

    guarded.__doc__ = _with_whole_lines(inspect.getdoc(function) or "")
    return guarded


def _with_whole_lines(text: str) -> str:
    """Marks the list of examples for click, which otherwise fills paragraphs: a broken command cannot be copied."""
    return text.replace("Examples:\n", "\b\nExamples:\n")


def _fail(message: str, status: int) -> None:
    if os.environ.get(VERBOSE):
        traceback.print_exc()
    shown = "\n".join(map(escaped, message.split("\n")))  # it may quote a data set
    typer.echo(f"error: {shown}" if status == 1 else shown, err=True)
    raise typer.Exit(status) from None


def _refused(error: OSError) -> str:
    """What the system would not do, and where; of a temporary file beside its place only the folder is of interest."""
    what, name = error.strerror or first_line(error), str(error.filename or "the system")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        path = Path(os.fsdecode(error.filename)).absolute()
        name = str(path.parent if path.name.startswith(".") else path)
        return f"{name}: {what}. Work in a folder of your own, or name a file or --output that you may write to"
    return f"{name}: {what}. Put that right and start again"


def _interrupted(interrupt: KeyboardInterrupt) -> str:
    again = shlex.join(["bam-lora", *sys.argv[1:]])
    kept = f"stopped by {interrupt}" if isinstance(interrupt, Interrupted) and interrupt.args[0] else "interrupted"
    return f"{kept}; what is finished is kept. Go on with: {again}"
