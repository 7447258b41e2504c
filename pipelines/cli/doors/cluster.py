"""``plinth cluster``: nodes of a Ray cluster on this machine, for lanes on other machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.console import say, show_json, show_table

if TYPE_CHECKING:
    from plinth.engine.lanes.cluster.nodes import Running

cluster = typer.Typer(
    help="Let machines run lanes for one engine: a head, and machines that join it.\n\n"
    "1. On the first machine: [bold]plinth cluster start[/]. It listens on 127.0.0.1 alone "
    "unless --host names an address of this machine; then Ray listens on all of its addresses, "
    "and whoever has the token can run code: keep its ports inside a private network.\n\n"
    "2. Copy the token (~/.ray/auth_token, mode 0600) to each other machine, install the same "
    "Plinth there, and run: [bold]plinth cluster join HOST:6379[/].\n\n"
    '3. In plinth.toml: [bold]devices = \\["ray:cpu", "ray:cpu"][/] under \\[engine], and the '
    "address under \\[cluster]. The engine's own machine has to be one of the cluster's.\n\n"
    "There is no dashboard, nothing is reported to anybody, and no payload is written to a disk.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

AddressOption = Annotated[
    str, typer.Option("--address", help="host:port of the head.", show_default=True)
]
TokenOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="The cluster's token.", show_default="~/.ray/auth_token"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
CpusOption = Annotated[
    int | None, typer.Option("--cpus", min=0, help="Cores for lanes.", show_default="all")
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=0, help="Accelerators.", show_default="as found")
]
StoreOption = Annotated[
    int,
    typer.Option("--store-mb", min=80, help="Shared memory for batches; one may take half."),
]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", help="name=word, for cluster.labels; repeat it.")
]
ResourceOption = Annotated[
    list[str] | None,
    typer.Option("--resource", help="name=number, for cluster.resources; repeat it."),
]
_ADDRESS = "127.0.0.1:6379"


@cluster.command(epilog="Example: plinth cluster start --host 10.0.0.5 --cpus 8 --label zone=a")
def start(
    host: Annotated[
        str, typer.Option("--host", help="Address that others reach this machine by.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Of the head.")] = 6379,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    store_mb: StoreOption = 512,
    label: LabelOption = None,
    resource: ResourceOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a cluster with this machine as its head, in the background; makes the token once."""
    has = _has(cpus, gpus, store_mb, label, resource)
    _start({"address": f"{host}:{port}", "head": True, "token_file": token_file, **has}, as_json)


@cluster.command(epilog="Example: plinth cluster join 10.0.0.5:6379 --cpus 8 --label zone=b")
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the head.")],
    host: Annotated[
        str | None,
        typer.Option("--host", help="Address of this machine.", show_default="the one that fits"),
    ] = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    store_mb: StoreOption = 512,
    label: LabelOption = None,
    resource: ResourceOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let this machine run lanes of a cluster, in the background."""
    has = _has(cpus, gpus, store_mb, label, resource)
    _start({"address": address, "host": host, "token_file": token_file, **has}, as_json)


@cluster.command(epilog="Example: plinth cluster status --json | jq '.machines[].host'")
def status(
    address: AddressOption = _ADDRESS,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which machines the cluster has, and which of its nodes this user started here."""
    from plinth.engine.lanes.cluster import nodes
    from plinth.engine.lanes.cluster.settings import Cluster

    machines = nodes.members(Cluster(address=address, token_file=token_file))
    here = [dataclasses.asdict(each) for each in nodes.running()]
    if as_json:
        show_json({"address": address, "machines": machines, "here": here})
        return
    columns = ("host", "node", "alive", "cores free", "of", "gpus", "store MB", "labels")
    show_table(f"cluster {address}", columns, [_row(each) for each in machines])


@cluster.command(epilog="Example: plinth cluster stop")
def stop(as_json: JsonOption = False) -> None:
    """End the nodes that this user started on this machine; their lanes run elsewhere, or end."""
    from plinth.engine.lanes.cluster import nodes

    ended = sorted(nodes.running(), key=lambda each: each.head)  # the head is the last
    for node in ended:
        nodes.stop(node)
        say(f"ended the {'head' if node.head else 'node'} of {node.address} on {node.host}")
    if as_json:
        show_json([dataclasses.asdict(node) for node in ended])
    elif not ended:
        say("no node of a cluster runs here that this user started")


def _has(
    cpus: int | None,
    gpus: int | None,
    store_mb: int,
    labels: list[str] | None,
    resources: list[str] | None,
) -> dict[str, Any]:
    return {
        "cpus": cpus,
        "gpus": gpus,
        "store_mb": store_mb,
        "labels": dict(_pair("--label", each) for each in labels or ()),
        "resources": {
            name: _number(name, value)
            for name, value in (_pair("--resource", each) for each in resources or ())
        },
    }


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{text!r} is not name=value", param_hint=option)
    return name, value


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(
            f"{name} is {value!r}, expected a number", param_hint="--resource"
        ) from None


def _start(wanted: dict[str, Any], as_json: bool) -> None:
    from plinth.engine.lanes.cluster import nodes

    node = nodes.start(nodes.Wanted(**wanted))
    if as_json:
        show_json(dataclasses.asdict(node))
        return
    _tell(node)


def _tell(node: Running) -> None:
    from plinth.engine.lanes.cluster.settings import is_loopback

    role = "the head" if node.head else "a node"
    bound = "this machine alone" if is_loopback(node.host) else "all addresses of this machine"
    say(f"{role} of {node.address} runs on {node.host}; it listens on {bound}")
    say(f"token: {node.token_file} (every machine needs a copy, mode 0600)")
    if node.head and not is_loopback(node.host):
        say(f"next, on another machine: plinth cluster join {node.address}")
    say("to end it: plinth cluster stop")


def _row(member: dict[str, Any]) -> tuple[Any, ...]:
    labels = ", ".join(f"{name}={label}" for name, label in member["labels"].items())
    return (
        member["host"],
        member["node"][:12],
        "yes" if member["alive"] else "no",
        f"{member['cpus_free']:g}",
        f"{member['cpus']:g}",
        f"{member['gpus']:g}",
        member["store_mb"],
        labels,
    )
