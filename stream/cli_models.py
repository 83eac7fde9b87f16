"""The commands about models: train, evaluate, import, export, compile, verify. Thin, as those of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream.settings import home
from stream.terminal import err, out, set_up_logging

models_app = typer.Typer()
BackendOption = Annotated[
    str | None, typer.Option("--backend", help="auto, onnxruntime or openvino (default: auto, the fastest here).")
]


@models_app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="base; a folder of `sightwire train` or of transformers; a torchvision model's name; module:factory; "
            "or a file.onnx.",
            metavar="MODEL",
        ),
    ] = "base",
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the pack (default: the home folder's).")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Its weights, as safetensors.")] = None,
    describe: Annotated[
        Path | None, typer.Option("--describe", help="YAML with what the model's own files do not say.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the pack.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="clip, staged (backbone: frame) or stateful (backbone: stream); default: staged or clip.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Export again even if the pack is up to date.")] = False,
) -> None:
    """Export a trained model as a pack of ONNX graphs, with a parity report."""
    set_up_logging()
    from stream.commands import export_any, export_pack, ours

    if ours(model):
        export_pack(err, model, to or home() / "packs" / model, force=force)
    else:
        export_any(err, model, to, weights=weights, describe=describe, name=name, mode=mode, home=home())


@models_app.command("compile")
def compile_engines(
    pack: Annotated[str, typer.Argument(help="Pack, by name or folder.")],
    backend: Annotated[str, typer.Option("--backend", help="auto, onnxruntime, openvino, tensorrt or torch.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16 or int8.")] = "fp32",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, or cuda:N (default: what the backend has).")
    ] = None,
) -> None:
    """Compile a pack's graphs to engines, measure them on real clips, and remember the fastest."""
    set_up_logging()
    from stream.commands import compile_engines as compile_all

    compile_all(err, pack, backend=backend, precision=precision, device=device, home=home())


@models_app.command()
def verify(
    pack: Annotated[str, typer.Argument(help="Pack, by name or folder.")],
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="onnxruntime, openvino, tensorrt or torch; may be repeated (default: all)."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, fp16, bf16 or int8; may be repeated (default: all with a bound)."),
    ] = None,
    clips: Annotated[
        list[Path] | None,
        typer.Option("--clips", help="A video file, may be repeated (default: those of the extra demo)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="What it was exported from, as for export (default: as remembered here)."),
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Weights of --model.")] = None,
    describe: Annotated[Path | None, typer.Option("--describe", help="Description of --model.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda (default: what the backend has).")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first node that departs in a graph over its bound.")
    ] = False,
) -> None:
    """Compare a pack on every backend here with PyTorch on real clips: errors, latency, throughput."""
    set_up_logging()
    from stream.commands import verify as verify_engines

    verify_engines(
        err,
        pack,
        backends=backend or (),
        precisions=precision or (),
        clips=clips or (),
        model=model,
        weights=weights,
        describe=describe,
        device=device,
        html=html,
        bisect=bisect,
        home=home(),
    )


cache_app = typer.Typer(help="Compiled engines on this machine.", no_args_is_help=True)
models_app.add_typer(cache_app, name="cache")


@cache_app.command("list")
def cache_list() -> None:
    """Show the compiled engines, the last used first."""
    from stream.commands import list_engines

    list_engines(out)


@cache_app.command("prune")
def cache_prune(
    max_mb: Annotated[float | None, typer.Option("--max-mb", min=0, help="Keep at most this many megabytes.")] = None,
    days: Annotated[
        float | None, typer.Option("--older-than-days", min=0, help="Remove what lay unused so long.")
    ] = None,
) -> None:
    """Remove compiled engines, those that were not used for longest first; they are compiled again when needed."""
    from stream.commands import prune_engines

    prune_engines(out, max_mb=max_mb, days=days)


@models_app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training configuration in YAML.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the data sets, instead of the file's.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the weights, instead of the file's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on from a checkpoint.")] = False,
) -> None:
    """Train a model; goes on from the last checkpoint of the same configuration."""
    set_up_logging()
    from stream.commands import train_model

    train_model(err, config, data=data, out=to, resume=not fresh)


@models_app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A pack, by name or folder, or the folder of a training.")],
    manifest: Annotated[
        Path | None, typer.Argument(help="Rows to score, CSV or JSON Lines; without it the base pack's own protocol.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="train, val or test (default: test, else val).")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the report (default: ./evaluation).")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Where the manifest's paths begin.")] = None,
    backend: BackendOption = None,
) -> None:
    """Score a pack or a trained model on labelled recordings: report.md with pictures, and metrics.json."""
    set_up_logging()
    from stream.commands import evaluate_base, evaluate_model

    if manifest is None:
        evaluate_base(err, model, data=data, out=to, home=home())
    else:
        where = to or Path("evaluation")
        evaluate_model(err, model, manifest, split=split, out=where, root=data, backend=backend or "auto", home=home())


@models_app.command("import")
def import_data(
    kind: Annotated[str, typer.Argument(help="Layout: classes, masks, kinetics, esc50, … (a wrong one lists all).")],
    folder: Annotated[Path, typer.Argument(help="Where the data set lies.")],
    manifest: Annotated[Path, typer.Argument(help="The manifest to write, .csv or .jsonl.")],
    group: Annotated[
        str | None, typer.Option("--group", help="Pattern whose first parenthesis is the source in a file's name.")
    ] = None,
    independent: Annotated[bool, typer.Option("--independent", help="No two files come from one source.")] = False,
    captions: Annotated[str, typer.Option("--captions", help="own, label or none.")] = "own",
    void: Annotated[int, typer.Option("--void", min=0, max=255, help="Mask index without a class.")] = 255,
    val_share: Annotated[float, typer.Option("--val-share", min=0.01, max=0.9, help="Share for validation.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Draws the validation groups.")] = 0,
) -> None:
    """Write a manifest for a data set in a folder, split by group."""
    set_up_logging()
    from stream.commands import import_folder

    options = {"group": group, "independent": independent, "void": void, "val_share": val_share, "seed": seed}
    import_folder(err, kind, folder, manifest, {**options, "captions": captions})
