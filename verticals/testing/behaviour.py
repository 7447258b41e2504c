"""The clauses of the contract about what a vertical does with requests, good and bad.

Each raises AssertionError with what the author should change.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from plinth.engine import InputError
from plinth.verticals.testing.case import (
    Case,
    NotApplicable,
    changed,
    close,
    difference,
    dump,
    hostile,
    leaves,
    strict,
)
from plinth.verticals.testing.clauses import Clause, must
from plinth.verticals.testing.flows import run_with_models
from plinth.verticals.testing.watch import watched

MARKER = "plinth-4111111111111111"
MALFORMED = (b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"[" * 5000)


def malformed(case: Case) -> None:
    """What is not a JSON object is refused with a reason."""
    for raw in MALFORMED if case.takes_records else (b"{}",):
        must(
            _refusal(case, raw, f"the record {raw[:12]!r}"),
            f"parse({raw[:12]!r}) was accepted: raise InputError for what is not a JSON object",
        )


def fields(case: Case) -> None:
    """A wrong field is named in the refusal, and its value is not repeated."""
    _needs_records(case)
    for path, _ in leaves(case.example):
        where = ".".join(map(str, path))
        for wrong in ({"unexpected": MARKER}, MARKER):
            error = _refusal(case, dump(changed(case.example, path, wrong)), f"a wrong {where}")
            if error is None:
                continue
            must(error.field, f"the InputError for a wrong {where} names no field: set field=")
            must(
                MARKER not in str(error.as_dict()),
                f"the InputError for a wrong {where} repeats the value: leave it out, "
                "errors end up in logs and dead-letter topics",
            )


def flows(case: Case) -> None:
    """A flow opens nothing and starts nothing."""
    seen: list[str] = []
    case.run(case.requests[:1])  # late imports and caches happen here, unwatched
    run_with_models(case.vertical, case.requests[:1], around_steps=lambda: watched(seen))
    must(
        not seen,
        f"infer() {', '.join(dict.fromkeys(seen))}: read in models(), load() or __init__, "
        "write in write(); a flow only yields Calls",
    )


def calls(case: Case) -> None:
    """Each Call names a model of models(), with the rows its spec asks for, on the host."""
    run_with_models(case.vertical, case.requests)


def round_trip(case: Case) -> None:
    """An answer is JSON, its own type reads it back, and it says the same again."""
    encoded = case.vertical.encode(case.one(case.vertical.example()))
    data = strict(encoded)
    try:
        back = case.vertical.response.model_validate_json(encoded)
    except ValueError as error:
        raise AssertionError(
            f"encode() gave JSON that {case.vertical.response.__name__} cannot read: {error}. "
            "Clients use its schema, so the two must agree"
        ) from None
    must(
        close(strict(case.vertical.encode(back)), data),
        "an answer encoded, read and encoded again is another: exclude what JSON cannot carry",
    )


def batch_first(case: Case) -> None:
    """Answers come in order, and are the same alone and in a list."""
    requests = case.requests
    with case.fresh():
        together = case.run(requests)
    with case.fresh():
        alone = [case.run([request])[0] for request in requests]
    for number, (a, b) in enumerate(zip(together, alone, strict=True)):
        must(
            close(a, b),
            f"request {number} of {len(requests)} is answered otherwise in a list than alone "
            f"({difference(a, b)}): keep the order, let no row see another's, "
            "and return nothing that is not a function of the requests (clock, random number)",
        )
    must(case.run([]) == [], "infer([]) must return []: yield no Call for no rows")


def neighbours(case: Case) -> None:
    """An odd request is answered or refused alone."""
    _needs_records(case)
    example = case.vertical.example()
    with case.fresh():
        wanted = case.run([example])[0]
    for field, data in hostile(case.example):
        try:
            odd = case.vertical.parse(dump(data))
        except InputError:
            continue
        with case.fresh():
            first, second = _infer_with(case, field, [example, odd])
        must(
            close(first, wanted),
            f"an odd {field} in the next request changed the answer of the one before it: "
            "answer the odd one with an InputError value",
        )
        if isinstance(second, InputError):
            must(second.reason, f"the InputError for an odd {field} has no reason")
        else:
            _answerable(case, field, second)


def state(case: Case) -> None:
    """State goes out and comes back; observing is inferring without an answer."""
    vertical, example = case.vertical, case.vertical.example()
    case.run([example])  # an empty state would prove little
    kept = vertical.snapshot()
    first = case.run([example])[0]
    if kept is None:
        must(
            close(case.run([example])[0], first),
            "the same request was answered otherwise the second time, and snapshot() is None: "
            "a vertical with state gives it out in snapshot() and takes it in restore()",
        )
        raise NotApplicable("stateless")
    second = case.run([example])[0]
    vertical.restore(kept)
    must(
        close(case.run([example])[0], first),
        "after restore(snapshot()) the answer is another: put everything that changes into it",
    )
    vertical.restore(kept)
    vertical.observe([example])
    must(
        close(case.run([example])[0], second),
        "observe() leaves another state than infer() does: after a restart, records are "
        "replayed through observe(), and answers must go on as if nothing had happened",
    )
    vertical.restore(kept)
    _damaged(case, kept)
    must(
        close(case.run([example])[0], first),
        "a damaged snapshot changed the state: check it before taking it",
    )


def written(case: Case) -> None:
    """All files of an answer are inside the folder it was given, and all are returned."""
    result = case.one(case.vertical.example())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        files = {path.resolve() for path in case.vertical.write(result, folder)}
        must(files, "write() returned no files: return every path it wrote")
        for path in files:
            must(path.is_file(), f"write() returned {path.name}, which is not a file")
            must(
                path.is_relative_to(folder),
                f"write() put {path.name} outside the folder it was given",
            )
        left = {path.resolve() for path in folder.rglob("*") if path.is_file()} - files
        must(not left, f"write() left {sorted(p.name for p in left)} and did not return them")


def _needs_records(case: Case) -> None:
    if not case.takes_records:
        raise NotApplicable("takes folders only")


def _refusal(case: Case, raw: bytes, what: str) -> InputError | None:
    """The InputError that parse raises for a record, or None if it takes it."""
    try:
        case.vertical.parse(raw)
    except InputError as error:
        refusal = error
    except Exception as error:
        raise AssertionError(
            f"parse() of {what} raised {type(error).__name__}: raise InputError instead"
        ) from error
    else:
        return None
    must(refusal.reason and refusal.message, f"the InputError for {what} says no reason")
    return refusal


def _infer_with(case: Case, field: str, requests: list[Any]) -> list[Any]:
    try:
        return case.run(requests)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"infer() raised {type(error).__name__} for an odd {field} ({error}): refuse it in "
            "parse(), or return an InputError in its place so that its neighbours are answered"
        ) from error


def _answerable(case: Case, field: str, result: Any) -> None:
    encoded = case.vertical.encode(result)
    strict(encoded)
    try:
        case.vertical.response.model_validate_json(encoded)
    except ValueError:
        raise AssertionError(
            f"an odd {field} was answered with a number JSON does not know (NaN or infinite): "
            "bound the field in the request type, or return an InputError"
        ) from None


def _damaged(case: Case, kept: bytes) -> None:
    for damaged in (b"", b"not a snapshot", kept[: len(kept) // 2]):
        try:
            case.vertical.restore(damaged)
        except InputError:
            continue
        raise AssertionError("restore() took a damaged snapshot: check it and raise InputError")


BEHAVIOUR: dict[str, Clause] = {
    "malformed records are refused": malformed,
    "wrong fields are named, not echoed": fields,
    "calls fit the models": calls,
    "flows open and start nothing": flows,
    "answers survive JSON": round_trip,
    "the same alone and in a list": batch_first,
    "one bad request stays alone": neighbours,
    "state goes out and comes back": state,
    "answers are written in their folder": written,
}
"""What must hold -> the function that checks it."""
