"""The steps that a model is a sequence of, and which of them each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from plinth.engine.errors import ModelError


def steps_of(module: nn.Module, stages: int, name: str) -> list[nn.Module]:
    """The steps that a model is a sequence of.

    Args:
        module: a ``Sequential``, or one with a method ``steps`` that gives such modules, each of
            which takes what the one before gave.
        stages: in how many they are to be shared out.
        name: the model's, for errors.

    Raises:
        ModelError: it is no sequence, or has fewer steps than stages.
    """
    made = getattr(module, "steps", None)
    if isinstance(module, nn.Sequential):
        steps = list(_flat(module))
    elif made is not None:
        steps = list(made())
    else:
        raise ModelError(
            f"model {name} is no sequence of steps that pipeline={stages} could share out",
            hint="make it an nn.Sequential, or give it a method steps()",
        )
    if len(steps) < stages:
        raise ModelError(
            f"model {name} has {len(steps)} steps, fewer than pipeline={stages}",
            hint=f"use at most pipeline={len(steps)}",
        )
    return steps


def _flat(module: nn.Sequential) -> list[nn.Module]:
    found: list[nn.Module] = []
    for each in module:
        found += _flat(each) if type(each) is nn.Sequential else [each]
    return found


def shared_out(steps: Sequence[nn.Module], stages: int) -> list[list[nn.Module]]:
    """Neighbouring steps for each stage, so that the largest one has the fewest bytes."""
    sizes = [sum(each.nbytes for each in step.parameters()) + 1 for step in steps]
    ends = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    best = [[(end, [0, last]) for last, end in enumerate(ends)]]
    for count in range(2, stages + 1):
        row: list[tuple[int, list[int]]] = [(0, [])] * count
        for last in range(count, len(steps) + 1):
            cuts = range(count - 1, last)
            cut = min(cuts, key=lambda at: max(best[-1][at][0], ends[last] - ends[at]))
            most = max(best[-1][cut][0], ends[last] - ends[cut])
            row.append((most, [*best[-1][cut][1], last]))
        best.append(row)
    bounds = best[-1][len(steps)][1]
    return [list(steps[a:b]) for a, b in pairwise(bounds)]
