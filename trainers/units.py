"""Numbers as people read them: bytes, times, counts. No torch."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def in_bytes(num_bytes: float, digits: int = 1) -> str:
    """Write bytes in GiB, or from a tenth of one downwards in MiB, and so on to KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= unit / 10:
            return f"{num_bytes / unit:,.{digits}f} {name}"
    return f"{num_bytes / KIB:,.{digits}f} KiB"


def in_time(seconds: float) -> str:
    """Write a time in seconds, minutes, hours or days, with up to three digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:,.1f} days"


def in_digits(number: float) -> str:
    """Write a count with up to three digits: 307k, 1.33M, 70.6B, 15T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"
