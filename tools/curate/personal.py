"""Personal data in texts, found by form and check digit, or names by a model, and masked: the same value of a row in the same way."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tools.curate.config import PERSONAL_KINDS, Personal
from tools.curate.identifiers import digits_of, is_business, is_card, is_iban, is_mrz_field, is_resident
from tools.curate.rows import Item, map_text, view
from trainers.data.formats import BadRow

NOT_IN_NUMBER = r"(?<![\w.\-])"
"""Before a number: no part of a longer one."""
ENDS = r"(?![\w\-]|\.\d)"
TOKENS = (
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]*?-----END (?:[A-Z]+ )*PRIVATE KEY-----",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{40,}\b|\bglpat-[\w\-]{20,}",
    r"\bsk-[A-Za-z0-9_\-]{20,}|\bhf_[A-Za-z0-9]{30,}\b|\bnpm_[A-Za-z0-9]{36}\b",
    r"\bxox[abeoprs]-[A-Za-z0-9\-]{10,}|\bAIza[0-9A-Za-z_\-]{35}",
    r"\beyJ[\w\-]{8,}\.eyJ[\w\-]{8,}\.[\w\-]{8,}",
    r"(?<=Bearer )[A-Za-z0-9_\-.=]{20,}",
    r"(?i:(?<=api_key=)|(?<=api_key = )|(?<=apikey=)|(?<=token=)|(?<=secret=)|(?<=password=))[\"']?(?=\w*\d)(?=\w*[A-Za-z])\w{16,}[\"']?",
)
"""Forms that their issuers document; and what follows a name such as api_key and has letters and digits."""


SIGNS = (
    *("-----begin", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-", "hf_"),
    *("npm_", "xox", "aiza", "eyj", "bearer ", "api_key", "apikey", "token=", "secret=", "password="),
)
"""One of these is in every text that has one."""


@dataclass(frozen=True)
class Kind:
    """A kind of personal data: where it may be, and whether it is there."""

    pattern: re.Pattern[str]
    holds: Callable[[re.Match[str]], bool] = lambda match: True
    may_be: Callable[[str], bool] = lambda text: True
    """A quick look at the whole text."""


def _is_public(match: re.Match[str]) -> bool:
    """Tell whether an address is one that is reached from everywhere; those of a local network and of examples stay.

    Four small numbers are a version more often than an address, and need a word before them.
    """
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4 and all(int(part) < SMALL for part in match[0].split(".")):
        before = match.string[max(0, match.start() - BEFORE) : match.start()].lower()
        if not any(word in before for word in ("ip", "addr", "host", "server", "dns", "ping", "//")):
            return False
    return bool(address.is_global and not address.is_multicast)


SMALL = 40
BEFORE = 20
"""Characters before an address that are looked at."""
COUNTED = "0123456789"
DATE = re.compile(r"\d{1,2}[ .\-]\d{1,2}[ .\-](?:19|20)\d\d(?!\d)")


def _is_phone(match: re.Match[str]) -> bool:
    """Tell whether a number has as many digits as a telephone's, is not a date, and is not one of a row of numbers."""
    number: str = match[0]
    size = len(digits_of(match["main"]))
    if not re.match(r"\(?0[1-9]", number):
        return 8 <= size <= 15
    before, after = match.string[: match.start()], match.string[match.end() :]
    is_in_row = (before[-2:-1].isdigit() and before[-1:] == " ") or (after[:1] in (" ", ":") and after[1:2].isdigit())
    return 9 <= size <= 12 and number not in COUNTED and not DATE.match(number) and not is_in_row


def _is_passport(match: re.Match[str]) -> bool:
    if match["mrz"]:
        return is_mrz_field(match["mrz"][:9], match["mrz"][9]) and is_mrz_field(match["mrz"][13:19], match["mrz"][19])
    return any(char.isdigit() for char in match[0])


DIGITS = re.compile(r"\d(?:[ .\-()]{0,2}\d){6}")


def _may_have_key(text: str) -> bool:
    text = text.lower()
    for sign in SIGNS:  # noqa: SIM110 - any() takes twice as long
        if sign in text:
            return True
    return False


@lru_cache(maxsize=1)
def _has_digits(text: str) -> bool:
    """Several kinds ask for the same text, one after the other."""
    return DIGITS.search(text) is not None


KINDS: dict[str, Kind] = {
    "key": Kind(re.compile("|".join(TOKENS)), may_be=_may_have_key),
    "email": Kind(re.compile(r"(?<![\w.+\-])[\w.+\-]{1,64}@(?:[\w\-]+\.)+[^\W\d_]{2,24}(?![\w\-])"), may_be=lambda text: "@" in text),
    "iban": Kind(re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b"), lambda match: is_iban(match[0]), _has_digits),
    "card": Kind(
        re.compile(
            NOT_IN_NUMBER + r"\d{4}(?:[ \-]?\d{4}){2}[ \-]?\d{1,7}" + ENDS + "|" + NOT_IN_NUMBER + r"\d{4}[ \-]?\d{6}[ \-]?\d{4,5}" + ENDS
        ),
        lambda match: is_card(match[0]),
        _has_digits,
    ),
    "resident": Kind(re.compile(NOT_IN_NUMBER + r"\d{6}[ ]?-?[ ]?[0-9]\d{6}" + ENDS), lambda match: is_resident(match[0]), _has_digits),
    "business": Kind(re.compile(NOT_IN_NUMBER + r"\d{3}-\d{2}-\d{5}" + ENDS), lambda match: is_business(match[0]), _has_digits),
    "passport": Kind(
        re.compile(
            r"(?:(?<=passport )|(?<=passport no. )|(?<=passport number )|(?<=passport number is )|(?<=passport: )|(?<=passport no: )"
            r"|(?<=passport number: )|(?<=여권번호 )|(?<=여권번호: )|(?<=여권번호는 )|(?<=여권 번호 )|(?<=여권 번호: )|(?<=여권 번호는 ))"
            r"(?-i:[A-Z0-9]{7,9})(?![A-Za-z0-9])|(?-i:(?P<mrz>\b[A-Z0-9<]{9}\d[A-Z<]{3}\d{7}[MFX<]\d{7}[A-Z0-9<]{14}\d\d))",
            re.IGNORECASE,
        ),
        _is_passport,
        lambda text: "<<<" in text or "여권" in text or "passport" in text.lower(),
    ),
    "phone": Kind(
        re.compile(
            r"(?<![\w.+\-(/])(?P<main>(?:\+|00)[1-9]\d{0,2}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{1,4}(?:[ .\-]?\d{2,4}){1,4}"
            r"|(?:001[ .\-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.\-])[2-9]\d{2}[.\-]\d{4}"
            r"|(?:\(0[1-9]\d{0,3}\) ?|0[1-9]\d{0,4}[ .\-/])\d{2,8}(?:[ .\-]\d{2,5}){0,4}|0[1-9]\d{8,9})"
            r"(?:(?: ?x| ext\.? ?)\d{1,6})?" + ENDS
        ),
        _is_phone,
        _has_digits,
    ),
    "ip": Kind(
        re.compile(
            r"(?<![\w.:\-])(?<!version )(?<!Version )(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)"
            r"|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,7}(?![\w:]))"
        ),
        _is_public,
        lambda text: text.count(".") >= 3 or text.count(":") >= 2,
    ),
    "mac": Kind(
        re.compile(r"(?<![\w:\-])[0-9A-Fa-f]{2}(?:([:\-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}(?![\w:\-])"),
        may_be=lambda text: text.count(":") >= 5 or text.count("-") >= 5,
    ),
}
"""In the order in which they are looked for: what has a check digit before what has none."""
assert tuple(KINDS) == PERSONAL_KINDS


@dataclass
class Masks:
    """Placeholders of a row."""

    settings: Personal
    by_value: dict[tuple[str, str], str] = field(default_factory=dict)

    def apply(self, text: str) -> str:
        """Return a text with all personal data masked."""
        for name in self.settings.kinds:
            kind = KINDS[name]
            if kind.may_be(text):
                text = kind.pattern.sub(lambda match, name=name, kind=kind: self._mask(match, name, kind), text)  # type: ignore[misc]
        return text if self.settings.names is None else self._without_names(text, Path(self.settings.names))

    def _without_names(self, text: str, model: Path) -> str:
        """Return a text with the names of persons masked, but for those that are part of a placeholder."""
        from tools.curate.names import places  # torch is for those who ask for it

        taken = [match.span() for known in set(self.by_value.values()) for match in re.finditer(re.escape(known), text)]
        pieces, done = list[str](), 0
        for start, end in places(text, model):
            if not self._is_allowed(text[start:end]) and not any(start < last and first < end for first, last in taken):
                pieces += [text[done:start], self._placeholder("name", text[start:end])]
                done = end
        return "".join((*pieces, text[done:]))

    def _mask(self, match: re.Match[str], name: str, kind: Kind) -> str:
        if not kind.holds(match) or self._is_allowed(match[0]):
            return match[0]
        return self._placeholder(name, match[0])

    def _placeholder(self, name: str, found: str) -> str:
        value = (name, "".join(char for char in found.casefold() if char.isalnum() or char in "@._"))
        number = sum(known == name for known, _ in self.by_value) + 1
        return self.by_value.setdefault(value, self.settings.placeholder.format(kind=name.upper(), number=number))

    def _is_allowed(self, value: str) -> bool:
        return any(value.casefold().endswith(end.casefold()) for end in self.settings.allow)

    def words(self) -> str:
        """Say what was masked."""
        names = [name for name, _ in self.by_value]
        return ", ".join(f"{names.count(name)} {name}" for name in (*PERSONAL_KINDS, "name") if name in names)


def mask(item: Item, settings: Personal) -> tuple[bool, str] | None:
    """Mask a row in place; return whether it must be removed instead, and why, or None where nothing is found."""
    masks = Masks(settings)
    row = map_text(item.row, item.layout, masks.apply, everywhere=True)
    if not masks.by_value:
        return None
    if settings.action == "drop":
        return True, masks.words()
    before = item.row, item.raw
    item.replace(row)
    try:
        view(item.row, item.layout)
    except BadRow as error:
        item.row, item.raw = before
        return True, f"{masks.words()}; masked, it {error}"
    return False, masks.words()


def hidden(text: str, settings: Personal | None) -> str:
    """Return a text as a report may show it: without personal data, where it is looked for at all."""
    return text if settings is None else Masks(settings).apply(text)
