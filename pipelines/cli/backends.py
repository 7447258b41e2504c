"""``plinth backends``: what can run models here, and why the rest cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from plinth.pipelines.console import show_json, show_table

EPILOG = "Example: plinth backends --json | jq '.backends[] | select(.reason == null) | .name'"


def backends(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")
    ] = False,
) -> None:
    """List execution backends and kinds of hardware, each with its version or why not."""
    from plinth.engine.backends.registry import listings
    from plinth.engine.devices.hardware import hardware

    lines, kinds = listings(), hardware()
    if as_json:
        show_json(
            {
                "backends": [asdict(line) for line in lines],
                "hardware": [asdict(kind) for kind in kinds],
            }
        )
        return
    rows = [
        (line.name, line.version or "-", "yes" if line.automatic else "no", line.reason or "")
        for line in lines
    ]
    show_table("Backends", ("name", "version", "in auto", "why not"), rows)
    found = [
        (kind.hardware.name, ", ".join(kind.devices) or "-", kind.reason or "") for kind in kinds
    ]
    show_table("Hardware", ("kind", "devices", "why not"), found)
