"""A program on a pseudo-terminal: what a person would see, and what they would type."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are Unix's", allow_module_level=True)
import pty

ROOT = Path(__file__).resolve().parents[1]
SLOW = 120.0  # seconds; a loaded machine imports torch for a long time


class Terminal:
    """A program that believes in a person."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        given = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", **(environment or {})}
        self.screen, self._read = "", 0
        self.process, self._end = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background has it ignored
            os.execvpe(command[0], list(command), given)

    def see(self, words: str, seconds: float = SLOW) -> str:
        """Waits until new text on the screen holds these words; returns what came before and with them."""
        end = time.monotonic() + seconds
        while words not in self.screen[self._read :]:
            if not self._pull(0.2) or time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
                raise AssertionError(f"expected {words!r} on the screen, found {self.screen[self._read :]!r}")
        start = self._read
        self._read = self.screen.index(words, start) + len(words)
        return self.screen[start : self._read]

    def type(self, keys: str) -> None:
        """Types keys; "\\r" is Enter, "\\t" Tab, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._end, keys.encode())

    def answer(self, question: str, text: str) -> str:
        """Waits for a question and types the answer, with Enter."""
        seen = self.see(question)
        self.type(text + "\r")
        return seen

    def finish(self, press: str | None = None) -> int:
        """Waits for the program's end, pressing a key until then every ten seconds; its exit status.

        A Ctrl-C that comes between a prompt and the reading of the answer is seen with the next key only.
        """
        end = time.monotonic() + SLOW
        pressed = time.monotonic() - 9  # the first after a second
        while True:
            if press is not None and time.monotonic() > pressed + 10:
                pressed = time.monotonic()
                self.type(press)
            if not self._pull(0.2):
                break
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
                raise AssertionError(f"expected the program to end, found it waiting: {self.screen[-500:]!r}")
        _, status = os.waitpid(self.process, 0)
        os.close(self._end)
        return os.waitstatus_to_exitcode(status)

    def _pull(self, seconds: float) -> bool:
        """Reads what has come; False at the end."""
        if not select.select([self._end], [], [], seconds)[0]:
            return True
        try:
            found = os.read(self._end, 65536)
        except OSError:  # how Linux says that nobody holds the other end any more
            return False
        self.screen += found.decode(errors="replace")
        return bool(found)
