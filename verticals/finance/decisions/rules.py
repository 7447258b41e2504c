"""Rules beside the model: conditions over a payment and its features, whatever the score says."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PrivateAttr, model_validator

from plinth.engine.errors import ConfigError
from plinth.engine.tables import Table
from plinth.verticals.card_numbers import is_card_number
from plinth.verticals.finance.decisions.expressions import (
    WORD,
    Condition,
    Kind,
    Possible,
    condition,
)
from plinth.verticals.finance.features.online import Flag
from plinth.verticals.finance.features.program import STANDARD, Program
from plinth.verticals.finance.plain import MAX_CARD, MAX_ID
from plinth.verticals.finance.schema import Payment, Reason

Action = Literal["approve", "review", "decline"]
MAX_RULES = 200
RESERVED = ("R04", "X01", "X02")
"""Codes that rules of a file may not have, nor any that begins with M and a digit: the model's."""
REUSED_ID = Reason(code="R04", text="Transaction id used before with another amount or terminal")

_FLAGS = {"conflict": Flag.CONFLICT, "late": Flag.LATE, "partial": Flag.PARTIAL}
_TEXTS = ("currency", "card", "customer_id", "terminal_id", "device_id")


def names_of(features: Program) -> dict[str, Kind]:
    """What a condition may speak of where these features are declared, and the kind of each."""
    yes_or_no = features.yes_or_no
    return {
        "amount": "number",
        **{name: "condition" if name in yes_or_no else "number" for name in features.names},
        "score": "number",
        **dict.fromkeys((*_FLAGS, "has_device"), "condition"),
        **dict.fromkeys(_TEXTS, "text"),
    }


NAMES = names_of(STANDARD)
"""What a condition may speak of, with the standard features. Amounts are in base currency."""

_CURRENCY = re.compile("[A-Z]{3}")


def _currency(text: str) -> str | None:
    if _CURRENCY.fullmatch(text):
        return None
    near = text.upper()
    meant = f", did you mean {near}?" if _CURRENCY.fullmatch(near) else ""
    return f"{text} is no currency, which has three capital letters{meant}"


def _id(text: str) -> str | None:
    return None if len(text) <= MAX_ID else f"{text} has more than {MAX_ID} characters"


def _card(text: str) -> str | None:
    if is_card_number(text):
        return "it looks like a card number, and records with one are refused: write the token"
    return None if len(text) <= MAX_CARD else f"a token has at most {MAX_CARD} characters"


def _score(number: float) -> str | None:
    return None if 0 <= number <= 1 else f"{number:g} is no probability, 0 to 1"


POSSIBLE: Mapping[str, Possible] = {
    "currency": _currency,
    "card": _card,
    **dict.fromkeys(("customer_id", "terminal_id", "device_id"), _id),
    "score": _score,
}
"""What values that have a form may be compared with."""

_Entry = Annotated[str, Field(max_length=128, pattern=rf"^{WORD}$")]


class Rule(Table):
    """One rule.

    Args:
        code: of the reason, such as ``B01``.
        text: of the reason; fixed, so that it never holds data of a payment.
        when: a condition over :data:`NAMES`.
        action: what it asks for; the strictest of all rules and the score counts.
        shadow: it is counted and asks for nothing, so that it can be watched before it counts.
    """

    code: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,15}$")]
    text: Annotated[str, Field(min_length=1, max_length=120)]
    when: str
    action: Literal["review", "decline"]
    shadow: bool = False


class RuleBook(Table):
    """The table ``[verticals.finance.rules]``, or the file that stands for it.

    Args:
        rule: the rules; said even where there are none, as a file that is cut off says nothing.
        lists: texts that may stand behind ``in``, by name.
        names: what conditions may speak of; Plinth says it where features are declared.
    """

    names: Annotated[dict[str, Kind] | None, Field(exclude=True, repr=False)] = None
    rule: Annotated[tuple[Rule, ...], Field(max_length=MAX_RULES)]
    lists: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")],
        Annotated[frozenset[_Entry], Field(max_length=1_000_000)],
    ] = Field(default_factory=dict)
    _rules: Rules = PrivateAttr()

    @model_validator(mode="after")
    def _compiled(self) -> RuleBook:
        names = NAMES if self.names is None else self.names
        if both := sorted(names.keys() & self.lists.keys()):
            raise ValueError(f"{both[0]} is a value of the payment: give the list another name")
        seen: set[str] = set()
        conditions: list[Condition] = []
        for place, rule in enumerate(self.rule):
            if rule.code in seen:
                raise ValueError(f"rule {place + 1}: the code {rule.code} is there twice")
            if rule.code in RESERVED or (rule.code[0] == "M" and rule.code[1:2].isdigit()):
                raise ValueError(f"rule {place + 1}: the code {rule.code} is taken by Plinth")
            seen.add(rule.code)
            try:
                conditions.append(condition(rule.when, names, self.lists, POSSIBLE))
            except ConfigError as error:
                hint = f" ({error.hint})" if error.hint else ""
                raise ValueError(
                    f"rule {place + 1} ({rule.code}), when: {error.message}{hint}"
                ) from None
        object.__setattr__(self, "_rules", Rules(self.rule, tuple(conditions), self._digest()))
        return self

    def _digest(self) -> str:
        whole = {
            "rule": [rule.model_dump() for rule in self.rule],
            "lists": {name: sorted(texts) for name, texts in self.lists.items()},
        }
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]

    def compiled(self) -> Rules:
        """Ready to be applied."""
        return self._rules


@dataclass(frozen=True, slots=True)
class Payments:
    """Payments of one batch, as conditions see them.

    Args:
        asked: the payments.
        amounts: float64 (n,), base currency.
        features: float32 (n, columns of the declared features).
        flags: int (n,), see :class:`Flag`.
        scores: float32 (n,), of the model.
        declared: the features.
    """

    asked: Sequence[Payment]
    amounts: npt.NDArray[np.float64]
    features: npt.NDArray[np.float32]
    flags: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    declared: Program = STANDARD

    def __len__(self) -> int:
        return len(self.asked)

    def column(self, name: str) -> npt.NDArray[Any]:
        """See :class:`plinth.verticals.finance.decisions.expressions.Rows`.

        Numbers but the amount are float32, and numbers that a rule compares them with are rounded
        alike: what equals a limit is not above it.
        """
        if name == "amount":
            return self.amounts
        if name == "score":
            return self.scores
        if name in _FLAGS:
            set_: npt.NDArray[Any] = (self.flags & _FLAGS[name].value).astype(bool)
            return set_
        if name == "has_device":
            return np.array([one.device_id is not None for one in self.asked], dtype=bool)
        if name in _TEXTS:
            return np.array([getattr(one, name) for one in self.asked], dtype=object)
        column: npt.NDArray[Any] = self.features[:, self.declared.names.index(name)]
        return column != 0 if name in self.declared.yes_or_no else column


@dataclass(slots=True)
class Verdict:
    """What the rules ask for of one payment, and why: what declines comes first."""

    action: Action = "approve"
    reasons: list[Reason] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules that were checked.

    Args:
        rules: as they were written.
        conditions: one for each.
        version: digest of all of them, 12 hexadecimal digits.
    """

    rules: tuple[Rule, ...]
    conditions: tuple[Condition, ...]
    version: str

    def apply(self, payments: Payments) -> tuple[defaultdict[int, Verdict], dict[str, list[int]]]:
        """What the rules ask for, by the payment's place, and the places where each rule held.

        A transaction id that came before with another amount or terminal is at least reviewed
        (R04), whatever the rules are.
        """
        verdicts: defaultdict[int, Verdict] = defaultdict(Verdict)
        hits: dict[str, list[int]] = {}
        self._ask("decline", payments, verdicts, hits)
        _add(verdicts, np.flatnonzero(payments.column("conflict")).tolist(), REUSED_ID, "review")
        self._ask("review", payments, verdicts, hits)
        return verdicts, hits

    def _ask(
        self,
        action: Action,
        payments: Payments,
        verdicts: defaultdict[int, Verdict],
        hits: dict[str, list[int]],
    ) -> None:
        for rule, holds in zip(self.rules, self.conditions, strict=True):
            if rule.action != action:
                continue
            held = np.flatnonzero(holds(payments)).tolist()
            if not held:
                continue
            hits[rule.code] = held
            if not rule.shadow:
                _add(verdicts, held, Reason(code=rule.code, text=rule.text), action)


def _add(
    verdicts: defaultdict[int, Verdict], places: Sequence[int], reason: Reason, action: Action
) -> None:
    for place in places:
        verdict = verdicts[place]
        verdict.reasons.append(reason)
        if verdict.action != "decline":
            verdict.action = action


def limits(
    hard_amount: float | None, card_count_5m: int | None, device_cards_24h: int | None
) -> RuleBook:
    """The built-in rules; ``None`` leaves one out.

    Args:
        hard_amount: base currency; a larger payment is declined (R01).
        card_count_5m: payments with one card within 5 minutes; more go to review (R02).
        device_cards_24h: cards on one device within 24 hours; more go to review (R03).
    """
    written: list[tuple[str, str, str, float | None, Literal["review", "decline"]]] = [
        ("R01", "Amount above the hard limit", "amount", hard_amount, "decline"),
        (
            "R02",
            "Too many payments with the card within 5 minutes",
            "card_count_5m",
            card_count_5m,
            "review",
        ),
        (
            "R03",
            "Too many cards on the device within 24 hours",
            "device_cards_24h",
            device_cards_24h,
            "review",
        ),
    ]
    return RuleBook(
        rule=tuple(
            Rule(code=code, text=text, when=f"{name} > {limit!r}", action=action)
            for code, text, name, limit, action in written
            if limit is not None
        )
    )
