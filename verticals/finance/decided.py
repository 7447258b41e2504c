"""Decisions on the payments of one batch, in columns, and how they are written.

A door that writes thousands a second asks for bytes: most of an answer and of its evidence is the
same for many payments, or is written a column at a time. Whoever needs a decision as an object gets
the same fields from the same columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from plinth.engine.errors import InputError
from plinth.verticals.card_numbers import MIN_DIGITS
from plinth.verticals.contract import Evidence, Written
from plinth.verticals.finance.asked import Asked
from plinth.verticals.finance.decisions.rules import Action, Verdict
from plinth.verticals.finance.features.online import Batch, Flag
from plinth.verticals.finance.schema import Decision, Payment, Reason, unchecked
from plinth.verticals.finance.versions import Variant

MAX_REASONS = 4
_ACTIONS: tuple[Action, ...] = ("approve", "review", "decline")
_TOLD = tuple(action.encode() for action in _ACTIONS)
LEVELS: Mapping[Action, int] = {action: level for level, action in enumerate(_ACTIONS)}
_PARTIAL = Flag.PARTIAL.value
_FLAGS = (
    ("features_late", Flag.LATE.value),
    ("features_partial", _PARTIAL),
    ("duplicate", Flag.DUPLICATE.value),
    ("conflict", Flag.CONFLICT.value),
)
_ANSWER = (
    b'{"schema_version":1,"transaction_id":"%b","score":%b,"decision":"%b","reason_codes":%b,%b'
)
_RECORD = (
    b'"record":{"kind":"payment","event_time":%b,"amount":%b,"currency":"%b","customer_id":"%b",'
    b'"terminal_id":"%b"%b},"model_digest":%b'
)


@dataclass(frozen=True, eq=False)
class Decided:
    """Payments of one flow, in order, and what was decided on each.

    Args:
        asked: the payments.
        batch: their features.
        scores: of the model.
        by: number of the variant that gave each, uint (n,).
        variants: by that number.
        levels: what to do with each: 0 approve, 1 review, 2 decline.
        verdicts: of the rules, and reasons: of the model, by the payment's place.
        partial: bool (n,): the features are partial by where the payment came from; ``None``: none.
        rules_version: digest of the rules that were in force.
        names: of the columns of features.
    """

    asked: Asked
    batch: Batch
    scores: Sequence[float]
    by: npt.NDArray[np.integer[Any]]
    variants: Sequence[Variant]
    levels: npt.NDArray[np.integer[Any]]
    verdicts: Mapping[int, Verdict]
    reasons: Mapping[int, Sequence[Reason]]
    partial: npt.NDArray[np.bool_] | None
    rules_version: str
    names: tuple[str, ...]

    @cached_property
    def flags(self) -> npt.NDArray[np.uint8]:
        """What was special about each payment, uint8 (n,), bits as in :class:`Flag`."""
        flags = self.batch.flags
        return flags if self.partial is None else flags | (self.partial * np.uint8(_PARTIAL))

    @cached_property
    def decisions(self) -> list[Decision]:
        """Each as an object."""
        made = []
        rows = zip(
            self.asked.payments, self.scores, self.by.tolist(), self.levels.tolist(), strict=True
        )
        flags = self.flags.tolist()
        for place, (request, score, by, level) in enumerate(rows):
            told = {
                "schema_version": 1,
                "transaction_id": request.transaction_id,
                "score": score,
                "decision": _ACTIONS[level],
                "reason_codes": self._reasons(place),
                **self._alike(by, flags[place]),
                "extra": _extra(request, flags[place]),
            }
            made.append(unchecked(told))
        return made

    def written(self, *, audited: bool) -> list[Written | InputError]:
        """Each as the bytes of :meth:`decisions`, with the payment's key.

        Args:
            audited: with what it was made from.

        Returns:
            An error where an unknown field is kept that JSON of ours cannot hold.
        """
        values = self._answers()
        wrong = self._add_extra(values)
        keys = [card.encode() for card in self.asked.cards]
        evidence: Iterable[Evidence | None] = repeat(None)
        if audited:
            evidence = map(Evidence, self._records(), self._numbers(), self._outside(values))
        made: list[Written | InputError] = list(map(Written, keys, values, evidence))
        for place in wrong:
            made[place] = InputError(
                "an unknown field has a value that cannot be written again",
                reason="encode_failed",
                hint="send whole numbers of at most 64 bits, or set unknown_fields = 'ignore'",
            )
        return made

    def _reasons(self, place: int) -> list[Reason]:
        """Of the rules first, then of the model."""
        verdict = self.verdicts.get(place)
        own = () if verdict is None else verdict.reasons
        return [*own, *self.reasons.get(place, ())][:MAX_REASONS]

    def _alike(self, by: int, flags: int) -> dict[str, Any]:
        """The fields that many decisions have in common."""
        variant = self.variants[by]
        return {
            "model": variant.model,
            "model_version": variant.version,
            "rules_version": self.rules_version,
            **{name: bool(flags & bit) for name, bit in _FLAGS},
        }

    def _answers(self) -> list[bytes]:
        """Each decision without unknown fields."""
        ids = _texts(self.asked.ids)
        told = [b"[]"] * len(ids)
        for place in self.verdicts.keys() | self.reasons.keys():
            told[place] = orjson.dumps(self._reasons(place), default=vars)
        kinds = (self.by.astype(np.int64) << 8 | self.flags).tolist()
        ends = {kind: orjson.dumps(self._alike(kind >> 8, kind & 255))[1:] for kind in {*kinds}}
        actions = [_TOLD[level] for level in self.levels.tolist()]
        columns = (ids, _numbers(self.scores), actions, told, [ends[kind] for kind in kinds])
        return [_ANSWER % row for row in zip(*columns, strict=True)]

    def _add_extra(self, values: list[bytes]) -> list[int]:
        """Add the unknown fields that are kept; where one of them cannot be written."""
        wrong: list[int] = []
        if not any(extra is not None for extra in self.asked.extras):
            return wrong
        payments = self.asked.payments
        for place, (one, flags) in enumerate(zip(payments, self.flags.tolist(), strict=True)):
            extra = _extra(one, flags)
            if extra is None:
                continue
            try:
                values[place] = values[place][:-1] + b',"extra":%b}' % orjson.dumps(extra)
            except orjson.JSONEncodeError:
                wrong.append(place)
        return wrong

    def _records(self) -> list[bytes]:
        """Members of the evidence that are told of each record."""
        asked = self.asked
        digests = [orjson.dumps(variant.digest) for variant in self.variants]
        columns = (
            asked.written_times(),
            _numbers(asked.amounts),
            _texts(asked.currencies),
            _texts(asked.customers),
            _texts(asked.terminals),
            [b"" if d is None else b',"device_id":%b' % orjson.dumps(d) for d in asked.devices],
            [digests[by] for by in self.by.tolist()],
        )
        return [_RECORD % row for row in zip(*columns, strict=True)]

    def _numbers(self) -> list[bytes]:
        """Members of the evidence that are the engine's numbers: features and thresholds."""
        thresholds = [
            orjson.dumps({"thresholds": {"review": float(by.review), "decline": float(by.decline)}})
            for by in self.variants
        ]
        ends = [one[1:-1] for one in thresholds]
        told = orjson.dumps(self.batch.rows.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
        rows = zip(told[2:-2].split(b"],["), self.by.tolist(), strict=True)
        member = _features(self.names)
        return [member % (*row.split(b","), ends[by]) for row, by in rows]

    def _outside(self, values: Sequence[bytes]) -> Sequence[bytes]:
        """Texts of senders that are long enough for a card number."""
        asked, devices = self.asked, [device or "" for device in self.asked.devices]
        texts = asked.ids, asked.customers, asked.terminals, devices
        long = [column for column in texts if max(map(len, column)) >= MIN_DIGITS]
        extra = asked.extras
        if not long and not any(extra):
            return [b""] * len(values)
        rows = zip(*long, strict=True) if long else repeat((), len(values))
        return [
            value if more else '"'.join(row).encode()
            for row, value, more in zip(rows, values, extra, strict=True)
        ]


@lru_cache(maxsize=16)
def _features(names: tuple[str, ...]) -> bytes:
    """How the features are written, with a place for each value, and one for what follows."""
    told = (orjson.dumps(name).replace(b"%", b"%%") + b":%b" for name in names)
    return b'"features":{%b},%%b' % b",".join(told)


def _extra(payment: Payment, flags: int) -> dict[str, Any] | None:
    """Its unknown fields, if they are kept; that there are none is told of special payments."""
    return payment.model_extra if payment.model_extra or flags else None


def _texts(values: Sequence[str]) -> Sequence[bytes]:
    """Each as it stands between quotation marks in JSON."""
    joined = " ".join(values)
    if joined.isprintable() and joined.isascii() and '"' not in joined and "\\" not in joined:
        parts = joined.encode().split(b" ")
        if len(parts) == len(values):
            return parts
    return [orjson.dumps(value)[1:-1] for value in values]


def _numbers(values: Sequence[float]) -> list[bytes]:
    return _column(orjson.dumps(values))


def _column(told: bytes) -> list[bytes]:
    """The values of a JSON array of numbers or times."""
    return told[1:-1].split(b",")
