"""What looks like the number of a payment card, and so must not be kept."""

from __future__ import annotations

import re

MIN_DIGITS, MAX_DIGITS = 13, 19
"""Of a card number (ISO/IEC 7812-1)."""
_DIGITS = re.compile(r"(?:[-._/: ]?[0-9]){13,19}")


def is_card_number(text: str) -> bool:
    """Whether it has the length and the check digit (Luhn, ISO/IEC 7812-1) of a card number."""
    if len(text) < MIN_DIGITS or not text[:1].isdigit() or _DIGITS.fullmatch(text) is None:
        return False
    digits = [int(char) for char in reversed(text) if char.isdigit()]
    doubled = (d * 2 - 9 if d > 4 else d * 2 for d in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0
