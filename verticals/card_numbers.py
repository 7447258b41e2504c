"""What looks like the number of a payment card, and so must not be kept."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

MIN_DIGITS, MAX_DIGITS = 13, 19
"""Of a card number (ISO/IEC 7812-1)."""
SEPARATORS = b"-._/: "
"""What stands between groups of digits, one or two of them."""
_NO_LETTERS = re.compile(r"[^A-Za-z]+")
_DIGITS = re.compile(r"[0-9]")
_RUN = re.compile(rb"[0-9]+(?:[-._/: ]{1,2}[0-9]+)*")
_GROUP = re.compile(rb"[0-9]+")
_NUMBER = re.compile(rb"(?<![.eE+])(?<![eE]-)([2-6][0-9]{13,18})(?:\.0+)?(?![0-9.eE])")
"""A number that may be a card's, as floats are written too; times in microseconds begin with 1."""
_SHORTEST_GROUP = 3
"""Digits of a group of a card number; those of dates and hours are shorter."""
_DIGEST = 32
"""So many digits in hexadecimal are no card number."""
_HEX = b"0123456789abcdef"


def is_card_number(text: str) -> bool:
    """Whether it has the length and the check digit (Luhn, ISO/IEC 7812-1) of a card number.

    Whatever stands between, before or behind the digits does not matter, but a letter.
    """
    return bool(_digits_of(text))


def by_digits(text: str) -> str:
    """A card number by its digits alone, however it is spelled; any other text as it is."""
    return "".join(_digits_of(text)) or text


def _digits_of(text: str) -> list[str]:
    """Of a card number; none of anything else."""
    if len(text) < MIN_DIGITS or text[0].isalpha() or _NO_LETTERS.fullmatch(text) is None:
        return []
    digits = _DIGITS.findall(text if text.isascii() else folded(text).decode())
    is_one = MIN_DIGITS <= len(digits) <= MAX_DIGITS and _checks([*map(int, digits)])
    return digits if is_one else []


def _checks(digits: list[int]) -> bool:
    doubled = (d * 2 - 9 if d > 4 else d * 2 for d in digits[-2::-2])
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def folded(text: str) -> bytes:
    """A byte for each character: digits, spaces and dashes of every script as those of ASCII."""
    if text.isascii():
        return text.encode()
    return "".join(map(_plain, text)).encode()


def _plain(char: str) -> str:
    if char.isascii():
        return char
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    kind = unicodedata.category(char)
    return " " if kind == "Zs" else "-" if kind == "Pd" else "?"


def runs_of_digits(text: bytes, start: int, end: int) -> Iterator[re.Match[bytes]]:
    """Digits in groups, at least as many characters as the shortest card number has digits."""
    return (run for run in _RUN.finditer(text, start, end) if len(run[0]) >= MIN_DIGITS)


def number_at(text: bytes, first: int) -> bytes | None:
    """The digits of a JSON number that begins there and looks like a card's."""
    found = _NUMBER.match(text, first)
    return found[1] if found is not None and _is_card(found[1]) else None


def groups_of_cards(text: bytes, run: re.Match[bytes]) -> list[tuple[int, int]]:
    """From where to where a run of digits in groups is a card number, places in ``text``."""
    if _in_digest(text, run.start(), run.end()):
        return []
    groups = [(first + run.start(), end + run.start()) for first, end in _groups(run[0])]
    found, at = [], 0
    while at < len(groups):
        behind = _card_from(text, groups, at)
        if behind > at:
            found.append((groups[at][0], groups[behind - 1][1]))
        at = max(behind, at + 1)
    return found


def _groups(run: bytes) -> list[tuple[int, int]]:
    return [group.span() for group in _GROUP.finditer(run)]


def _card_from(text: bytes, groups: list[tuple[int, int]], at: int) -> int:
    """Behind which group a card number ends that begins with group ``at``; ``at``: none does."""
    digits = b""
    for number, (first, last) in enumerate(groups[at : at + MAX_DIGITS], at + 1):
        digits += text[first:last]
        if last - first < _SHORTEST_GROUP or len(digits) > MAX_DIGITS:
            return at
        if len(digits) >= MIN_DIGITS and _is_card(digits):
            return number
    return at


def _is_card(digits: bytes) -> bool:
    return _checks([digit - 48 for digit in digits])


def _in_digest(body: bytes, first: int, end: int) -> bool:
    """Whether digits are part of a digest in hexadecimal."""
    before, behind = body[max(0, first - _DIGEST) : first], body[end : end + _DIGEST]
    around = len(before) - len(before.rstrip(_HEX)) + len(behind) - len(behind.lstrip(_HEX))
    return end - first + around >= _DIGEST


def without_card_numbers(value: Any) -> Any:
    """A value as JSON has it, with stars for what in it looks like a card number, keys too."""
    if isinstance(value, str):
        return _starred(value)
    if isinstance(value, dict):
        return {_starred(key): without_card_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_card_numbers(inner) for inner in value]
    if isinstance(value, int | float) and abs(value) < 10**MAX_DIGITS:
        number = number_at(repr(abs(value)).encode(), 0)
        return value if number is None else "*" * len(number)
    return value


def _starred(text: str) -> str:
    if len(text) < MIN_DIGITS:
        return text
    if is_card_number(text):
        return "*" * len(text)
    plain, told = folded(text), list(text)
    for run in runs_of_digits(plain, 0, len(plain)):
        for first, end in groups_of_cards(plain, run):
            told[first:end] = "*" * (end - first)
    return "".join(told)
