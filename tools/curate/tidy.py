"""The first steps, a row at a time: is it a row, and is it spelt in one way."""

from __future__ import annotations

import re
import unicodedata

from tools.curate.config import Normalise
from tools.curate.rows import Item, View, map_text, to_json, view
from trainers.config.choices import Layout
from trainers.data.formats import BadRow, recognise, strict_json

CP1252 = {byte: bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(256)}
"""Windows-1252, with its five gaps filled from Latin-1, as browsers do (WHATWG's encoding standard)."""
TO_BYTE = {char: byte for byte, char in CP1252.items()} | {chr(byte): byte for byte in range(0x80, 0xA0)}
CONTINUATION = "".join(sorted(char for char, byte in TO_BYTE.items() if 0x80 <= byte < 0xC0))
_MORE = f"[{re.escape(CONTINUATION)}]"
MISREAD = re.compile(f"(?:[ÂÃ]{_MORE}|[Ä-ß]{_MORE}|[à-ï]{_MORE}{{2}}|[ð-ô]{_MORE}{{3}})+")
"""Characters that are the bytes of UTF-8."""
FOLLOWS = "‘’‚“”„‹›«»…–—•·°º²³¹ª™®©€\u00a0"
"""Of what may be a byte after the first: characters that follow a word."""
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
"""Control characters but tab, line feed, carriage return and NEL; soft hyphen, characters without a width, byte order marks.

Joiners (U+200C, U+200D) and marks of direction stay: scripts and emoji need them.
"""
LINE_END = re.compile(r"\r\n?|[\x85\u2028\u2029]")
BLANK = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
TRAILING = re.compile(r"[ \t]+(?=\n)")
MANY_LINES = re.compile(r"\n{4,}")


def check_schema(item: Item, expected: Layout | None) -> View | str:
    """Parse a row and return what it says, or what is wrong with it: in its layout or, where nothing is expected, as its fields tell."""
    try:
        if item.bad:
            raise BadRow(item.bad)
        _read(item)
        item.layout = recognise(item.row)
        if expected not in (None, item.layout):
            raise BadRow(f"has the layout {item.layout}, and {expected} is expected")
        return view(item.row, item.layout)
    except BadRow as error:
        return str(error)


def _read(item: Item) -> None:
    try:
        item.row = strict_json(item.raw.decode())
        if b"\\u" in item.raw:
            to_json(item.row)
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise BadRow(f"is not JSON: {error}") from None
    if not isinstance(item.row, dict):
        raise BadRow("is not an object with named fields")


def normalise(item: Item, settings: Normalise) -> str | None:
    """Spell a row's texts in one way, in place; say what was done."""
    done: set[str] = set()
    ends = item.layout not in (Layout.prompt_completion, Layout.text)

    def change(text: str) -> str:
        return _normalised(text, settings, ends, done)

    row = map_text(item.row, item.layout, change)
    if row == item.row:
        return None
    item.replace(row)
    return ", ".join(sorted(done))


def _is_plain(text: str) -> bool:
    """Tell at a glance of most texts that there is nothing to normalise."""
    return (
        text.isascii()
        and text.replace("\n", "").replace("\t", "").isprintable()
        and not any(found in text for found in (" \n", "\t\n", "\n\n\n\n"))
        and text.strip() == text
    )


def _normalised(text: str, settings: Normalise, ends: bool, done: set[str]) -> str:
    """Return a text in one spelling, and note in `done` what was needed for it."""
    if _is_plain(text):
        return text
    steps = []
    if settings.encodings and not text.isascii():
        steps.append(("encoding", read_again))
    if settings.controls:
        steps.append(("control characters", lambda text: CONTROLS.sub("", text)))
    if settings.spaces:
        steps.append(("spaces", lambda text: one_blank(text, ends)))
    if settings.unicode and not text.isascii():
        steps.append(("NFC", lambda text: unicodedata.normalize("NFC", text)))
    for name, step in steps:
        changed = step(text)
        if changed != text:
            done.add(name)
            text = changed
    return text


def one_blank(text: str, ends: bool) -> str:
    """Return a text with one kind of line end and of blank, and with at most two empty lines in a row.

    Spaces that begin a line are code's, and stay. Blanks at the end and empty lines at both ends go where `ends` is set: the parts of
    a text that is put together from parts keep theirs.
    """
    text = BLANK.sub(" ", LINE_END.sub("\n", text))
    text = MANY_LINES.sub("\n\n\n", TRAILING.sub("", text))
    return text.lstrip("\n").rstrip() if ends else text


def read_again(text: str) -> str:
    """Return a text with what was UTF-8 and was read as Windows-1252 or Latin-1 read again, twice where it happened twice.

    A run is read again where its bytes are UTF-8. One pair alone that does not begin with `Â` or `Ã` may be the end of a word with
    what follows it, such as a German quotation that ends in `ß”`, and stays where it may.
    """
    for _ in range(2):
        changed = MISREAD.sub(_decoded, text)
        if changed == text:
            break
        text = changed
    return text


def _decoded(match: re.Match[str]) -> str:
    found = match[0]
    if len(found) == 2 and found[0] not in "ÂÃ" and found[1] in FOLLOWS:
        return found
    try:
        return bytes(TO_BYTE[char] for char in found).decode("utf-8")
    except UnicodeDecodeError:
        return found
