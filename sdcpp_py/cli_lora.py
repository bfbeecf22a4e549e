"""sdcpp lora inspect, diff, convert, merge, scale, resize, prune, extract and bake."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_shared import console, one_sentence, print_rows, set_up_log, work_bar
from .context import SDContext
from .errors import BadArgument
from .lora import tools
from .lora.bake import bake as bake_loras
from .lora.compare import LoraDiff
from .lora.compare import diff as compare_loras
from .lora.extract import Extracted
from .lora.extract import extract as extract_lora
from .lora.outline import FAMILIES
from .lora.rewrite import METHODS, Rewritten
from .lora.spelling import FORMATS
from .lora.tools import Options

app = typer.Typer(no_args_is_help=True)

_SHOWN = 5  # entries of a list

File = Annotated[Path, typer.Argument(help="A LoRA file, or a folder that PEFT saved.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.", show_default=False)]
To = Annotated[str | None, typer.Option(help=f"Format: {', '.join(FORMATS)}. [default: the first file's]")]
Rank = Annotated[int | None, typer.Option(help="The highest rank of a module.")]
Energy = Annotated[float | None, typer.Option(help="Share of each module's energy to keep, such as 0.95.")]
Type = Annotated[str | None, typer.Option("--type", help="f16, bf16 or f32. [default: as read, f32 where that rounds]")]
Family = Annotated[str | None, typer.Option(help=f"If keys leave it open: {', '.join(FAMILIES)}.")]
Model = Annotated[Path | None, typer.Option("-m", "--model", help="Base, for kinds that depend on its weights.")]
SkipUnknown = Annotated[bool, typer.Option("--skip-unknown", help="Leave out modules that mean nothing.")]
Threads = Annotated[int | None, typer.Option(help="Modules at a time. [default: one per core, up to 4]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar, no summary.")]


@app.command("inspect")
def inspect_lora(
    file: File,
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="Model to fit it to. [default: the one that ships]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a LoRA file holds, and what of it fits a model."""
    set_up_log(verbose=False)
    with one_sentence(), SDContext(model) as sd_ctx:
        report = sd_ctx.inspect_lora(file)
        if as_json:
            typer.echo(report.to_json())
        else:
            Console().print(report.table())


@app.command()
def diff(
    a: File,
    b: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
    family: Family = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Compare what two LoRAs do to a model, whatever their formats."""
    set_up_log(verbose=False)
    with one_sentence(), work_bar(quiet) as on_step:
        result = compare_loras(a, b, family=family, model=model, on_step=on_step)
    if as_json:
        typer.echo(result.to_json())
    else:
        print_rows(_diff_rows(result))


@app.command()
def convert(
    file: File,
    output: Output,
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.", show_default=False)],
    type: Type = None,
    family: Family = None,
    model: Model = None,
    skip_unknown: SkipUnknown = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA in another format, exactly."""
    options = Options(type=type, family=family, model=model, skip_unknown=skip_unknown, threads=threads)
    _write(partial(tools.convert, file, output, to=to, **options), as_json, quiet)


@app.command()
def merge(
    loras: Annotated[
        list[str],
        typer.Argument(help="FILE, FILE:RATIO, FILE:te=0.5:unet=1 or FILE:0.8:lbw=OUTALL, each.", show_default=False),
    ],
    output: Output,
    to: To = None,
    rank: Rank = None,
    energy: Energy = None,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.")] = "sum",
    density: Annotated[float | None, typer.Option(help="Share that ties and dare keep. [default: 0.5]")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    type: Type = None,
    family: Family = None,
    model: Model = None,
    skip_unknown: SkipUnknown = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the sum of LoRAs of any formats, kinds and ranks, each times its ratio."""
    options = Options(type=type, family=family, model=model, skip_unknown=skip_unknown, threads=threads)
    merged = partial(tools.merge, loras, output, to=to, rank=rank, energy=energy, **options)
    _write(partial(merged, method=method, density=density, seed=seed), as_json, quiet)


@app.command()
def scale(
    file: File,
    ratio: Annotated[float, typer.Argument(help="What 1 shall mean from now on.", show_default=False)],
    output: Output,
    te: Annotated[float | None, typer.Option(help="The same for text encoders. [default: RATIO]")] = None,
    to: To = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA of another strength."""
    _write(partial(tools.scale, file, output, ratio, te=te, to=to), as_json, quiet)


@app.command()
def resize(
    file: File,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    to: To = None,
    type: Type = None,
    model: Model = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the nearest LoRA of a lower rank, and tell what is lost."""
    options = Options(type=type, model=model, threads=threads)
    _write(partial(tools.resize, file, output, rank=rank, energy=energy, to=to, **options), as_json, quiet)


@app.command()
def prune(
    file: File,
    output: Output,
    keep: Annotated[list[str] | None, typer.Option(help="Modules to keep: 'denoiser.single_blocks.*'.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Modules to drop: 'clip.*'.")] = None,
    to: To = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write some modules of a LoRA only."""
    _write(partial(tools.prune, file, output, keep=keep or (), drop=drop or (), to=to), as_json, quiet)


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(help="A model file or diffusers folder.", show_default=False)],
    base: Annotated[Path, typer.Argument(help="What it was tuned from.", show_default=False)],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    to: Annotated[
        str | None, typer.Option(help=f"Format: {', '.join(FORMATS)}. [default: what most tools of the family read]")
    ] = None,
    type: Annotated[str, typer.Option("--type", help="f16, bf16 or f32.")] = "f16",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the LoRA that brings one model as near to another as its rank allows."""
    found = partial(extract_lora, tuned, base, output, rank=rank, energy=energy, to=to, type=type, threads=threads)
    _write(found, as_json, quiet)


@app.command()
def bake(
    model: Annotated[Path, typer.Argument(help="A model file or diffusers folder, not quantised.", show_default=False)],
    loras: Annotated[
        list[str],
        typer.Argument(help='As for merge, or names in --lora-dir; "x:0.8 y:0.3" is two.', show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .gguf or .safetensors file.", show_default=False)],
    type: Annotated[str | None, typer.Option("--type", help="Of matrices: q8_0, q4_K, f16, … [default: own]")] = None,
    tensor_type: Annotated[list[str] | None, typer.Option(help="'regex=type', which comes before --type.")] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="Folder of LoRAs to name as prompts do.")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: one per core]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell the sizes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a model with LoRAs in it: summed in float32, then quantised once."""
    set_up_log(verbose=False)
    with one_sentence(), work_bar(quiet) as on_progress:
        planned = bake_loras(
            model,
            [lora for given in loras for lora in _separate(given)],
            output,
            type=type,
            tensor_types=[_tensor_type(rule) for rule in tensor_type or ()],
            lora_dir=lora_dir,
            threads=threads,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    for note in planned.notes:
        console.print(note, highlight=False, markup=False)
    if not quiet:
        sizes = [(name, f"{n:,} tensors, {size / 1e6:,.1f} MB") for name, (n, size) in planned.by_type().items()]
        print_rows([("file", ", ".join(map(str, planned.paths))), *sizes])


def _separate(given: str) -> list[str]:
    """Several in one argument, unless its spaces are a file's own."""
    return [given] if " " not in given or os.path.exists(tools.read_tag(given).name) else given.split()


def _tensor_type(rule: str) -> tuple[str, str]:
    pattern, equals, type = rule.rpartition("=")
    if not equals:
        raise BadArgument(f"{rule!r}: write it as 'regex=type'")
    return pattern, type


def _write(tool: Callable[..., Rewritten | Extracted], as_json: bool, quiet: bool) -> None:
    """Runs a tool that writes a LoRA, and tells of the result."""
    set_up_log(verbose=False)
    with one_sentence(), work_bar(quiet) as on_step:
        result = tool(on_step=on_step)
    _tell(result, as_json, quiet)


# ---- what is told ----------------------------------------------------------------------------------------


def _tell(result: Rewritten | Extracted, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2, ensure_ascii=False))
        return
    left_out = result.unknown if isinstance(result, Rewritten) else result.left_out
    if left_out:
        console.print(f"left out: {_listed(left_out)}", highlight=False, markup=False)
    for warning in result.warnings if isinstance(result, Rewritten) else ():
        console.print(warning, highlight=False, markup=False)
    if quiet:
        return
    rows = [("file", result.path), ("for", result.family), ("format", result.format)]
    rows.append(("modules", f"{result.modules:,}"))
    if isinstance(result, Rewritten):
        rows.append(("kinds", _counted(result.kinds)))
    if result.ranks:
        rows.append(("ranks", _counted(result.ranks)))
    if result.residuals:
        worst = max(result.residuals, key=lambda stem: result.residuals[stem])
        rows.append(("lost", f"{result.residual:.2%}, at most {result.residuals[worst]:.2%} ({worst})"))
    print_rows(rows)


def _diff_rows(result: LoraDiff) -> list[tuple[str, str]]:
    rows = [
        ("for", result.family),
        ("difference", f"{result.difference:.4g}"),
        ("cosine", f"{result.cosine:.6f}"),
        ("modules", f"{len(result.modules):,} in both"),
    ]
    rows += [
        ("", f"{one.difference:.4g}  cosine {one.cosine:.4f}  {one.name}")
        for one in result.modules[:_SHOWN]
        if one.difference
    ]
    for title, names in (("only in A", result.only_a), ("only in B", result.only_b)):
        if names:
            rows.append((title, _listed(names)))
    rows += [(key, f"{before} / {after}") for key, (before, after) in list(result.metadata.items())[:_SHOWN]]
    return rows


def _counted(counts: dict[Any, int]) -> str:
    return ", ".join(f"{name} ({n:,})" for name, n in counts.items())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
