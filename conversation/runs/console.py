"""console.log: the console output of a run."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from conversation.errors import as_user_error

BAR_SECONDS = 60  # between logged states of a progress bar; the log of a killed run shows its progress


class _Log:
    """console.log, appended line by line. A full disk loses lines of it but does not stop the work."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"{stamp} {text}\n".encode(errors="backslashreplace"))


class _Tee:
    """A stream that also logs each line written to it, with the time. It goes on without a closed terminal."""

    def __init__(self, stream: TextIO, log: _Log):
        self._stream, self._log, self._line, self._logged = stream, log, "", time.monotonic()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = line.rstrip("\r").rsplit("\r", 1)[-1]  # the last state of a progress bar
            if shown.strip():
                self._log.line(shown)
        if "\r" in self._line:
            self._line = self._line[self._line.rindex("\r") :]
            if time.monotonic() - self._logged > BAR_SECONDS and self._line.strip():
                self._log.line(self._line.strip())
                self._logged = time.monotonic()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def logged_console(path: Path) -> Iterator[None]:
    """Log everything printed inside the block, with times, and the error that ends it."""
    with open(path, "ab", buffering=0) as file:
        log = _Log(file)
        out, err = sys.stdout, sys.stderr
        log.line(f"$ {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)
        try:
            yield
        except BaseException as error:
            found = as_user_error(error)
            for line in (f"error: {found}" if found else traceback.format_exc()).splitlines():
                log.line(line)
            if found and found.hint:
                log.line(f"hint: {found.hint}")
            raise
        finally:
            sys.stdout, sys.stderr = out, err
