"""Which model answers, what stands beside it, and how far payments are from its training."""

from __future__ import annotations

from plinth.verticals.finance.cases.questions import ChallengerStands, Drifted, Models
from plinth.verticals.finance.versions import Versions


def standing(versions: Versions) -> Models:
    """How the models of a process stand, as far as it has held them against each other.

    Args:
        versions: of the process; the challenger's figures are those of the last look at them.
    """
    serving, report = versions.serving, versions.report
    by, drift = serving.variants[0], serving.drift
    challenger = None
    if versions.shadow is not None and report is not None:
        challenger = ChallengerStands(
            version=report["challenger"], figures=report["figures"], unmet=report["unmet"]
        )
    found = [] if drift is None else sorted(drift.indices.items(), key=lambda one: -one[1])
    return Models(
        champion=by.version,
        review_threshold=by.review,
        decline_threshold=by.decline,
        challenger=challenger,
        drift=[
            Drifted(name=name, psi=round(psi, 4), shifted=drift is not None and psi > drift.alarm)
            for name, psi in found
        ],
        drift_alarm=0.0 if drift is None else drift.alarm,
        labels_missing=drift is not None and drift.labels_missing,
    )
