"""``plinth deidentify``: copies of images without what says whose they are."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from plinth.pipelines.console import FAILED, say, show_json, show_table

EPILOG = "Example: plinth deidentify ./studies --out ./copies --map ./whose.csv"
KEY = "PLINTH_DEIDENTIFY_KEY"
COLUMNS = ("output", "state", "reason", "message", "kept", "removed", "private", "dates", "uids")


def deidentify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images; zip archives in it are opened.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the copies.")],
    keep_characteristics: Annotated[
        bool, typer.Option("--keep-characteristics", help="Keep sex, age, size and weight.")
    ] = False,
    mapping: Annotated[
        Path | None,
        typer.Option("--map", help="Write which copy is of which file; keep it to yourself."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Copy CT, MR and PET images without names, numbers, free text and private attributes.

    UIDs are replaced and dates moved alike wherever the same key is used. The copies are
    pseudonymous, never anonymous: voxels can show a face.
    """
    from plinth.engine.errors import ConfigError
    from plinth.engine.files import replace_file
    from plinth.pipelines.folders.storage import check_folders, storing
    from plinth.pipelines.keys import hash_key
    from plinth.verticals.medical.privacy.deidentify import Deidentifier
    from plinth.verticals.medical.privacy.folder import deidentify as copied

    check_folders(folder, out)
    if KEY in os.environ:
        key = hash_key(KEY, f"set {KEY} to a secret of your own")
    else:
        say(f"{KEY} is not set: identifiers of this run fit those of no other")
        key = secrets.token_bytes(32)
    cleaner = Deidentifier(key, characteristics=keep_characteristics)
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, str]] = []
    with storing():
        out.mkdir(parents=True, exist_ok=True)
        for row in copied(folder, out, cleaner):
            told = asdict(row) | (asdict(row.counts) if row.counts else {})
            rows.append({name: told.get(name, "") for name in COLUMNS})
            places.append((row.source, row.output))
        replace_file(out / "report.csv", _table(COLUMNS, [tuple(r.values()) for r in rows]))
        if mapping is not None:
            replace_file(mapping, _table(("source", "output"), places), mode=0o600)
    states = Counter(row["state"] for row in rows)
    if states["skipped"] == len(rows):
        raise ConfigError(
            f"deidentify found no DICOM file among {len(rows)} in {folder}",
            hint="check the folder",
        )
    if as_json:
        show_json({"files": len(rows), **states})
    else:
        counted = [(state, str(count)) for state, count in sorted(states.items())]
        show_table(f"{len(rows)} files", ("state", "files"), counted)
    if states["refused"] or states["failed"]:
        raise typer.Exit(FAILED)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
