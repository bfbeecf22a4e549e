"""The commands for weights: sdcpp convert, quality, and what info tells of a model file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from . import files
from .calibrate import calibrate
from .cli_shared import one_sentence, print_rows, read_size, set_up_log, work_bar
from .context import SDContext
from .errors import BadArgument, BadFile, from_os_error
from .quality import compare
from .weights import TYPES
from .weights.conversion import convert as convert_weights
from .weights.families import PARTS
from .weights.info import LONGEST_VALUE, Holdings, describe
from .weights.writing import Plan

_MOST_PROMPTS = 1 << 24  # bytes of a file of prompts
_WRITTEN = ", ".join(kind.name for kind in TYPES.values() if kind.can_write)


def add_to(app: typer.Typer) -> None:
    """Makes the commands known."""
    app.command()(convert)
    app.command()(quality)
    app.command()(imatrix)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help=".safetensors, .gguf, .ckpt, .pt, .bin, or a diffusers folder.", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".gguf or .safetensors.", show_default=False)],
    type: Annotated[
        str | None,
        typer.Option(help=f"Of the matrices: {_WRITTEN}. [default: as they are]"),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE", help="For tensors whose name matches; may be repeated, the first match counts."
        ),
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Put this autoencoder into the file.")] = None,
    clip_l: Annotated[Path | None, typer.Option(help="Put this text encoder into the file.")] = None,
    clip_g: Annotated[Path | None, typer.Option(help="Put this second text encoder of SDXL into the file.")] = None,
    clip_h: Annotated[Path | None, typer.Option(help="Put this text encoder of SD 2 into the file.")] = None,
    t5xxl: Annotated[Path | None, typer.Option(help="Put this T5 of SD 3 or FLUX into the file.")] = None,
    only: Annotated[str | None, typer.Option(help=f"Write one part alone: {', '.join(PARTS)}.")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave these tensors out; may be repeated.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix, which tells the columns that matter.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest size of a file: 2G, 500M; more are numbered.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="That convert. [default: one per core]")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would be written.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar, no summary.")] = False,
) -> None:
    """Convert a model to another file format or type of weights."""
    set_up_log(verbose=False)
    parts = (("vae", vae), ("clip_l", clip_l), ("clip_g", clip_g), ("clip_h", clip_h), ("t5xxl", t5xxl))
    with one_sentence(), work_bar(quiet or dry_run) as on_progress:
        plan = convert_weights(
            source,
            target,
            type=type,
            tensor_types=[_rule(text) for text in tensor_type or []],
            components={role: path for role, path in parts if path is not None},
            only=only,
            drop=drop or [],
            imatrix=imatrix,
            split=None if split is None else read_size("split", split),
            threads=threads,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    if not quiet:
        _print_plan(plan)


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, type = text.rpartition("=")
    if not equals:
        raise BadArgument(f"tensor-type {text!r}: expected REGEX=TYPE, such as 'attn2=q8_0'")
    return pattern, type


def _print_plan(plan: Plan) -> None:
    for path in plan.paths:
        typer.echo(str(path))
    rows = [(name, f"{n:,} tensors, {size / 1e6:,.1f} MB") for name, (n, size) in plan.by_type().items()]
    print_rows([*rows, ("together", f"{len(plan.tensors):,} tensors, {plan.bytes / 1e6:,.1f} MB")])
    for note in plan.notes:
        typer.echo(f"  {note}")


def quality(
    source: Annotated[Path, typer.Argument(metavar="A", help="The model that B was made from.", show_default=False)],
    converted: Annotated[Path, typer.Argument(metavar="B", help="The model to judge.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(help="Paint this with both; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    steps: Annotated[int, typer.Option(help="Of each picture.")] = 20,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [default: one per core]")] = None,
    worst: Annotated[int, typer.Option(help="How many tensors to show.")] = 5,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Show how much a converted model differs from its source."""
    set_up_log(verbose=False)
    with one_sentence(), work_bar(quiet) as on_progress:
        found = compare(
            source, converted, prompts=prompt or [], seed=seed, steps=steps, threads=threads, on_progress=on_progress
        )
    for group in found.by_type():
        typer.echo(
            f"{group.type:<8} {group.tensors:>6,} tensors {group.bytes / 1e6:>10,.1f} MB"
            f"   relative RMSE {group.relative_rmse:.2e}   largest {group.largest:.2e}"
        )
    if worst > 0:
        typer.echo("the worst:")
    for error in found.tensors[: max(worst, 0)]:
        typer.echo(f"  {error.relative_rmse:.2e}  {error.source_type} to {error.type}  {error.name}")
    for picture in found.pictures:
        typer.echo(
            f"picture {picture.prompt!r} (seed {picture.seed}): {picture.psnr:.1f} dB, "
            f"RMSE {picture.rmse:.2f} and at most {picture.largest} of 255"
        )
    for what, names in (("only in A", found.missing), ("only in B", found.added)):
        if names:
            typer.echo(f"{what}: {len(names):,} tensors, first {names[0]}")


def imatrix(
    model: Annotated[Path, typer.Argument(help="The model to be quantised.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .gguf.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to paint; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.")] = None,
    steps: Annotated[int, typer.Option(help="Of each picture.")] = 20,
    size: Annotated[int | None, typer.Option(help="Pixels of a side. [default: the model's own]")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [default: one per core]")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Paint pictures and write which columns of a model's matrices matter, for convert --imatrix."""
    set_up_log(verbose=False)
    with one_sentence(), work_bar(quiet) as on_progress:
        texts = [*(prompt or []), *_lines(prompts)]
        n = calibrate(model, output, texts, steps=steps, size=size, threads=threads, on_progress=on_progress)
    if not quiet:
        typer.echo(f"{output} ({n:,} matrices, {len(texts):,} pictures)")


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_PROMPTS + 1)
        if len(raw) > _MOST_PROMPTS:
            raise BadFile(f"{path}: has more than {_MOST_PROMPTS:,} bytes; is it a list of prompts?")
        return [line for line in raw.decode("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise from_os_error(path, error) from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: is no text in UTF-8") from error


def print_info(path: Path, components: Mapping[str, Path], side: int | None) -> None:
    """What sdcpp info tells of a model file: with these beside it, of pictures with sides of so many pixels."""
    info = describe(path, components)

    def size(held: Holdings) -> str:
        return f"{held.tensors:,} tensors, {held.parameters / 1e6:,.1f} M parameters, {held.bytes / 1e6:,.1f} MB"

    rows = [("file", str(path)), ("family", info.family or "none that is known")]
    rows.append(("paints", "yes" if info.paints else f"no: {info.missing}"))
    if info.paints:
        with SDContext(path, **components) as sd_ctx:  # type: ignore[arg-type]  # roles are its arguments
            model, memory = sd_ctx.info, sd_ctx.estimate_memory(width=side, height=side)
        rows.append(("prediction", model.prediction))
        rows.append(("native size", f"{model.native_size} x {model.native_size}"))
        rows.append(("input channels", str(model.input_channels)))
        rows.append(("weights", f"{model.weight_bytes / 1e6:,.1f} MB as they are used"))
        rows.append(("memory", f"{memory.peak / 1e6:,.1f} MB for a picture of {memory.width} x {memory.height}"))
        rows += [
            (
                f"memory {of.name}",
                f"{of.weights / 1e6:,.1f} MB of weights, {of.activations / 1e6:,.1f} MB of activations",
            )
            for of in memory.networks
        ]
    rows.append(("whole", size(info.whole)))
    rows += [(f"part {name}", size(held)) for name, held in info.parts.items()]
    rows += [(f"type {name}", size(held)) for name, held in info.types.items()]
    rows += [("besides", what) for what in info.left_out]
    rows.append(("hash", files.model_hash(path) or "none"))
    rows += [(key, _short(value)) for key, value in sorted(info.metadata.items())]
    print_rows(rows)


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}… ({len(value):,} characters)"
