"""``sightwire packs``: look at the packs of a running service, and put another in the place of one."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from stream.api import Api, quoted
from stream.cli_sources import ApiOption, JsonOption, api_of
from stream.terminal import err, out, print_whole

packs_app = typer.Typer(help="The packs of a running service.", no_args_is_help=True)

POLL_S = 0.25
_COLOURS = {"serving": "green", "failed": "bold red"}


@packs_app.command("list")
def list_packs(api: ApiOption = None, as_json: JsonOption = False) -> None:
    """All packs, on which engines they run and what they answer."""
    found = api_of(api).call("GET", "/v1/packs")
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("name", "state", "pack", "backend", "heads", "largest parity error", box=None)
    for one in found:
        table.add_row(*_row(one))
    print_whole(out, table)
    for one in found:
        if one["cause"]:
            out.print(f"[bold red]{escape(one['name'])}[/]: {escape(one['cause'])}")


def _row(one: dict[str, Any]) -> list[str]:
    pack, errors = one["pack"], one["parity_max_abs_error"].values()
    heads = [head["name"] for branch in one["branches"] for head in branch["heads"]]
    return [
        f"[bold]{escape(one['name'])}[/]",
        f"[{_COLOURS.get(one['state'], 'yellow')}]{one['state']}[/]",
        "" if pack is None else escape(f"{pack['name']} {pack['version']} ({pack['sha256'][:8]})"),
        "" if pack is None else f"{pack['backend']} {pack['precision']}",
        escape(", ".join(heads)),
        f"{max(errors):.2g}" if errors else "",
    ]


@packs_app.command()
def swap(
    name: Annotated[str, typer.Argument(help="The pack whose place is taken.", metavar="NAME")],
    to: Annotated[
        str | None, typer.Option("--to", help="Name of an exported pack (default: its own folder, read again).")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="auto, onnxruntime, openvino or tensorrt (default: as now).")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16, bf16 or int8 (default: as now).")
    ] = None,
    compare_s: Annotated[
        float | None, typer.Option("--compare", help="Seconds that both run (default: 30); 0 compares nothing.")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            "--max-disagreement", help="Largest share a head may differ by (default: 0.05, masks by precision)."
        ),
    ] = None,
    api: ApiOption = None,
) -> None:
    """Load another pack beside one that serves, compare them on what comes in, and let it take over.

    Exit code 1 when the swap is rolled back; the service goes on as before then.
    """
    given = {
        "pack": to,
        "backend": backend,
        "precision": precision,
        "compare_s": compare_s,
        "max_disagreement": max_disagreement,
    }
    service = api_of(api)
    service.call("POST", f"/v1/packs/{quoted(name)}:swap", {k: v for k, v in given.items() if v is not None})
    done = _follow(service, f"/v1/packs/{quoted(name)}/swap")
    _print_disagreement(done)
    if done["phase"] == "rolled_back":
        err.print(f"[bold red]error:[/] pack {escape(name)} stays as it was: {escape(done['cause'])}")
        raise typer.Exit(1)
    new = done["new"]
    out.print(
        f"pack {escape(name)}: {escape(new['name'])} {escape(new['version'])} took over "
        f"({new['backend']} {new['precision']})"
    )


def _follow(service: Api, path: str) -> dict[str, Any]:
    """Show how a swap goes until it is over; gives its last report."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}")
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("loading", total=1.0, told="")
        while True:
            report: dict[str, Any] = service.call("GET", path)
            _show(progress, bar, report)
            if report["phase"] in ("done", "rolled_back"):
                return report
            time.sleep(POLL_S)


def _show(progress: Progress, bar: TaskID, report: dict[str, Any]) -> None:
    worst = max((head["disagreement"] for head in report["heads"].values()), default=0.0)
    told = f"{report['windows']} windows, at most {worst:.1%} apart" if report["windows"] else ""
    progress.update(bar, description=report["phase"], completed=report["progress"], told=told)


def _print_disagreement(report: dict[str, Any]) -> None:
    if not report["heads"]:
        return
    table = Table("head", "windows", "disagreement", "mean score difference", "masks agree", box=None)
    for head, found in report["heads"].items():
        difference, agreement = found["score_difference"], found["mask_agreement"]
        table.add_row(
            escape(head),
            str(found["windows"]),
            f"{found['disagreement']:.2%}",
            "" if difference is None else f"{difference:.2g}",
            "" if agreement is None else f"{agreement:.2%}",
        )
    out.print(table)
    if report["new_ms_per_window"] is not None:
        out.print(f"a window took {report['new_ms_per_window']:.1f} ms, before {report['old_ms_per_window']:.1f} ms")
