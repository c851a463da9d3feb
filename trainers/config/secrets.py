"""Secrets in texts that are kept or sent: tokens, keys and passwords become `***`. No torch."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from functools import cache
from typing import Any

MASK = "***"
VALUE = re.compile(r"(?![/~.])(?:(?=.*\d).{8,}|.{16,})", re.DOTALL)
"""Of an environment variable's value that is taken for a secret: words and paths are none."""
NAMES = (
    r"(?:api|access|secret|private|auth|account|signing|encryption)[_-]?key|secret|passw(?:or)?d|passphrase|(?:auth|access|api)?[_-]?token"
)
"""Of what holds a secret, as the last part of a name; `tokens` and `tokenizer` are none."""
IN_ENVIRONMENT = re.compile(rf"(?:^|_)(?:{NAMES}|key|pat|credentials?)$", re.IGNORECASE)
OPTION = re.compile(rf"--(?:[a-z0-9]+[_-])*(?:{NAMES}|key)", re.IGNORECASE)
"""A word of a command line that says that the next one is a secret."""
BY_FORM = "|".join(
    (
        r"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}",  # Hugging Face
        r"\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|\b(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}",  # OpenAI, Anthropic and others; Stripe
        r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}",  # GitHub, GitLab
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS
        r"\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\bGOCSPX-[\w-]{16,}",  # Google
        r"\bxox[abeoprs]-[\w-]{10,}|\bxapp-[\w-]{10,}|https://hooks\.slack\.com/services/[\w/]+",  # Slack
        r"\bwandb_v\d_\w{16,}|\bnvapi-[\w-]{30,}|\bgsk_\w{30,}|\br8_\w{30,}",  # W&B, NVIDIA, Groq, Replicate
        r"\bdapi[0-9a-f]{32}\b",  # Databricks
        r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-AgE[\w-]{16,}|\bdckr_pat_[\w-]{16,}|\bSG\.[\w-]{16,}\.[\w-]{16,}",  # registries, SendGrid
        r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",  # JSON web tokens
        r"\b\d{8,10}:[\w-]{35}\b",  # Telegram
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    )
)
PATTERNS = (
    (re.compile(BY_FORM, re.DOTALL), MASK),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"]*:?[^\s/@'\"]*@", re.IGNORECASE), rf"\1{MASK}@"),  # of a URL
    (re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/-]{8,}=*"), rf"\1{MASK}"),
    (re.compile(r"(\b(?:X-Amz-(?:Signature|Credential|Security-Token)|AccountKey|SharedAccessKey|sig)=)[^\s&;'\"]{8,}"), rf"\1{MASK}"),
    (re.compile(rf"((?:{NAMES})[\\\"']*\s*[:=]\s*\\*[\"'])[^\"'\s<>\\]{{8,}}", re.IGNORECASE), rf"\1{MASK}"),  # name = "value"
    (re.compile(rf"(\b(?:[A-Z0-9]+_)*(?:{NAMES.upper()})=)[^\s'\",;<>]{{8,}}"), rf"\1{MASK}"),  # NAME=value
    (re.compile(rf"(--(?:[a-z0-9]+[_-])*(?:{NAMES})[= ])[^\s'\"]{{4,}}"), rf"\1{MASK}"),  # --name value
    (re.compile(rf"(--(?:[a-z0-9]+[_-])*(?:{NAMES})[\"']?,\s*[\"']?)[^\s'\",\]]+"), rf"\1{MASK}"),  # [--name,value]
)


def masked(text: str) -> str:
    """Return a text without what has the form of a secret, and without the secrets of this process's environment."""
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    for value in _of_environment():
        text = text.replace(value, MASK)
    return text


@cache
def _of_environment() -> tuple[str, ...]:
    """Return the values of variables that are named as secrets, the longest first."""
    found = {value for name, value in os.environ.items() if IN_ENVIRONMENT.search(name) and VALUE.fullmatch(value)}
    return tuple(sorted(found, key=len, reverse=True))


def mask(value: Any) -> Any:
    """Return settings, or what JSON holds, with every text masked; of a list also what follows a word such as --api-key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{item.name: mask(getattr(value, item.name)) for item in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {key: mask(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        before = [None, *value][: len(value)]
        return type(value)(MASK if type(one) is str and is_option(name) else mask(one) for name, one in zip(before, value, strict=True))
    return masked(value) if type(value) is str else value


def is_option(word: object) -> bool:
    """Tell a word of a command line after which a secret comes, such as --api-key."""
    return isinstance(word, str) and OPTION.fullmatch(word) is not None


def mask_diff(diff: bytes) -> bytes:
    """Return a diff of git's with masked lines. A change that held a secret no longer applies as it was."""
    lines = diff.decode("utf-8", "surrogateescape").split("\n")
    kept = [masked(line) if line[:1] in ("+", "-", " ") else line for line in lines]
    return _without_keys("\n".join(kept)).encode("utf-8", "surrogateescape")


def _without_keys(diff: str) -> str:
    """Mask the lines of private keys, which a diff gives a sign each."""
    return re.sub(
        r"(-----BEGIN [A-Z ]*PRIVATE KEY-----|\*\*\*)((?:\n[+ -][A-Za-z0-9+/=]{16,})+)\n([+ -])-----END", rf"{MASK}\n\3-----END", diff
    )


class MaskRecords(logging.Filter):
    """Masks what is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the finished message, masked, into a record."""
        record.msg, record.args = masked(record.getMessage()), ()
        return True
