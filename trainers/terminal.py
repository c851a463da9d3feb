"""What is written to standard output and error: it never ends what it tells of. No torch."""

from __future__ import annotations

import io
import sys
from typing import Any


class _Lossy(io.FileIO):
    """A file whose writes never fail: what a closed pipe, a full disk or a terminal that is gone does not take is lost."""

    def write(self, data: Any, /) -> int:
        """Write what can be written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def never_fail() -> None:
    """Let standard output and error take any text, replacing what their encoding does not have, and lose what nobody takes.

    A run is done though its sample is in Korean and the terminal in ASCII, and though `| head` has read enough.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # other ones are a test's, or None where it is closed
        if type(stream) is not io.TextIOWrapper or type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:
            continue
        stream.flush()
        lossy: Any = _Lossy(stream.fileno(), "w", closefd=False)
        buffer = lossy if stream.write_through else io.BufferedWriter(lossy)
        lines, through = stream.line_buffering, stream.write_through
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=lines, write_through=through))
