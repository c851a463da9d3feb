"""Numbers with check digits: is it one, or does it only look like one. Pure functions."""

from __future__ import annotations

import datetime
from itertools import cycle

CENTURIES = {"1": 1900, "2": 1900, "3": 2000, "4": 2000, "5": 1900, "6": 1900, "7": 2000, "8": 2000, "9": 1800, "0": 1800}
MAESTRO = (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763)
RANDOM_SINCE = datetime.date(2020, 10, 5)
"""From then on new Korean registration numbers have no check digit (Enforcement Rule of the Resident Registration Act)."""


def digits_of(text: str) -> str:
    """Return the decimal digits of a text, those of any script as ASCII."""
    return "".join(str(int(char)) for char in text if char.isdecimal())


def is_card(text: str) -> bool:
    """Tell whether digits are the number of a payment card: a known prefix with its length, and Luhn's check digit (ISO/IEC 7812-1)."""
    number = digits_of(text)
    four, size = int(number[:4] or 0), len(number)
    known = (
        (number[0] == "4" and size in (13, 16, 19))
        or ((5100 <= four <= 5599 or 2221 <= four <= 2720) and size == 16)
        or (number[:2] in ("34", "37") and size == 15)
        or ((four == 6011 or 6440 <= four <= 6599 or 3528 <= four <= 3589) and 16 <= size <= 19)
        or ((3000 <= four <= 3059 or number[:2] in ("36", "38", "39")) and 14 <= size <= 19)
        or (number[:2] == "62" and 16 <= size <= 19)
        or (four in (1800, 2131) and size == 15)
        or (four in MAESTRO and 12 <= size <= 19)
        or (number[:1] == "9" and size == 16)  # cards for use in Korea
    )
    return known and luhn(number)


def luhn(number: str) -> bool:
    """Tell whether the last digit is Luhn's check digit of those before it."""
    total = 0
    for place, char in enumerate(reversed(number)):
        value = int(char) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def is_iban(text: str) -> bool:
    """Tell whether a text is an IBAN: letters as two digits, the first four characters last, 1 modulo 97 (ISO 13616)."""
    code = "".join(text.split()).upper()
    turned = code[4:] + code[:4]
    return 15 <= len(code) <= 34 and int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


def is_resident(text: str) -> bool:
    """Tell whether 13 digits are a Korean resident or foreigner registration number: a date, and the check digit where there is one."""
    number = digits_of(text)
    try:
        born = datetime.date(CENTURIES[number[6]] + int(number[:2]), int(number[2:4]), int(number[4:6]))
    except ValueError:
        return False
    total = sum(int(char) * weight for char, weight in zip(number, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=False))
    check = (13 if number[6] in "5678" else 11) - total % 11
    return check % 10 == int(number[12]) or born >= RANDOM_SINCE


def is_business(text: str) -> bool:
    """Tell whether 10 digits are a Korean business registration number, by its check digit."""
    number = [int(char) for char in digits_of(text)]
    total = sum(digit * weight for digit, weight in zip(number, (1, 3, 7, 1, 3, 7, 1, 3, 5), strict=False)) + number[8] * 5 // 10
    return (10 - total % 10) % 10 == number[9]


def is_mrz_field(text: str, check: str) -> bool:
    """Tell whether a field of a passport's machine-readable zone has its check digit (ICAO Doc 9303, part 3, section 4.9)."""
    values = [0 if char == "<" else int(char, 36) for char in text]
    return sum(value * weight for value, weight in zip(values, cycle((7, 3, 1)), strict=False)) % 10 == int(check)
