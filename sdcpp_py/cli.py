"""The command line: sdcpp generate, info, bench, doctor; more is in cli_lora.py and cli_weights.py.

An error is one sentence on stderr and exit code 1, wrong usage gives 2, Ctrl-C 130.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__, _native, bench, cli_weights, doctor, files
from .cli_lora import app as lora_app
from .cli_shared import console, one_sentence, print_rows, read_size, set_up_log, steps_bar
from .context import SDContext
from .errors import BadArgument, Io
from .image import PaintedImage, Parameters, file_format, is_picture, parse_parameters, read_parameters

app = typer.Typer(
    help="Paint with Stable Diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lora_app, name="lora", help="Look into LoRA files; convert, merge, resize, extract and bake them.")
cli_weights.add_to(app)


def main() -> None:
    """The console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Paint with Stable Diffusion models."""


# ---- generate ------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help='What to paint: "a red heart"; (red:1.3) weighs words.', show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; more pictures get -2, -3, …. [default: sdcpp-SEED.png]"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help=".safetensors, .gguf or diffusers folder. [default: the one that ships]"),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    steps: Annotated[int | None, typer.Option(help="How often the denoiser runs. [default: the model's own]")] = None,
    cfg_scale: Annotated[
        float | None, typer.Option(help="How much the prompt counts; 1 turns guidance off. [default: the model's own]")
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Share of it that is brought back to the prompt's own spread, 0 to 1.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="What FLUX.1 dev and its like are told. [default: the model's own]")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Of the noise levels of SD3 and FLUX. [default: the model's own]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise. [default: a new one]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the model's own]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the model's own]")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"One of: {', '.join(_native.samplers())}.")] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"One of: {', '.join(_native.schedulers())}.")] = None,
    batch_size: Annotated[int, typer.Option(help="How many pictures; picture k has seed + k.")] = 1,
    clip_skip: Annotated[int | None, typer.Option(help="1: the last layer of the text encoder.")] = None,
    rng: Annotated[str | None, typer.Option(help=f"Whose noise: {', '.join(_native.rngs())}.")] = None,
    eta: Annotated[float | None, typer.Option(help="Share of fresh noise. [default: the sampler's own]")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to go away from it, 0 to 1. [default: the model's own]")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Where to repaint it: white.")] = None,
    control_image: Annotated[Path | None, typer.Option(help="Edges or depths to follow, for models that do.")] = None,
    original_size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Width and height that SDXL is told of. [default: those of the picture]", show_default=False),
    ] = None,
    crop_top_left: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Top and left of its cut, likewise. [default: 0 0]", show_default=False),
    ] = None,
    target_size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Width and height it has now, likewise. [default: those of the picture]", show_default=False),
    ] = None,
    reference_image: Annotated[Path | None, typer.Option(help="Picture to change, for FLUX.1 Kontext.")] = None,
    redux_image: Annotated[Path | None, typer.Option(help="Picture to vary, for FLUX.1 with Redux.")] = None,
    redux_strength: Annotated[float | None, typer.Option(help="How much it counts. [default: 1]")] = None,
    vae: Annotated[Path | None, typer.Option(help="Autoencoder to use instead of the model's.")] = None,
    clip_l: Annotated[Path | None, typer.Option(help="Text encoder to use instead of the model's.")] = None,
    clip_g: Annotated[Path | None, typer.Option(help="SDXL's second text encoder, likewise.")] = None,
    clip_h: Annotated[Path | None, typer.Option(help="SD 2.x's text encoder, likewise.")] = None,
    t5xxl: Annotated[Path | None, typer.Option(help="T5 of SD3 and FLUX, likewise.")] = None,
    redux: Annotated[Path | None, typer.Option(help="Image embedder of FLUX.1 Redux.")] = None,
    clip_vision: Annotated[Path | None, typer.Option(help="SigLIP, which Redux looks with.")] = None,
    backend: Annotated[str | None, typer.Option(help="Device, see sdcpp doctor. [default: the best]")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [default: one per core]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of products on the CPU: f32, bf16 or auto. [default: auto]")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="eps or v. [default: as the file says]")] = None,
    zero_snr: Annotated[
        bool | None,
        typer.Option("--zero-snr/--no-zero-snr", help="Of v: begin with noise alone. [default: as the file says]"),
    ] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="Folder of the LoRAs that prompts name.")] = None,
    embedding_dir: Annotated[Path | None, typer.Option(help="Folder of the embeddings that prompts name.")] = None,
    lora_mode: Annotated[str, typer.Option(help="How LoRAs act: runtime, restore or diff.")] = "runtime",
    vae_tile: Annotated[int | None, typer.Option(help="Decode in tiles of so many pixels.")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of weights and activations at a time: 8G. [default: what the device has]"),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="Repeat this picture; other options change single things.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar, no file names.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Tell what happens inside.")] = False,
) -> None:
    """Paint a picture, or several."""
    set_up_log(verbose)
    with one_sentence():
        told = Parameters() if like is None else parse_parameters(read_parameters(like))
        if prompt is None and like is None:
            raise typer.BadParameter('give a prompt, such as "a red heart"', param_hint="PROMPT")
        if told.init_image_hash and init_image is None:
            raise BadArgument(f"{like}: was painted over another picture; give that with --init-image")
        if told.mask_hash and mask is None:
            raise BadArgument(f"{like}: was painted with a mask; give that with --mask")
        if told.control_hash and control_image is None:
            raise BadArgument(f"{like}: was painted with a control image; give that with --control-image")
        if told.reference_hash and reference_image is None:
            raise BadArgument(f"{like}: was painted with a reference image; give that with --reference-image")
        if told.redux_image_hash and redux_image is None:
            raise BadArgument(f"{like}: was painted with a Redux image; give that with --redux-image")
        if output is not None:
            _check_output(output)
        options = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "guidance_rescale": guidance_rescale,
            "guidance": guidance,
            "shift": shift,
            "seed": seed,
            "sampler": sampler,
            "scheduler": scheduler,
            "clip_skip": clip_skip,
            "rng": rng,
            "eta": eta,
            "strength": strength,
            "redux_strength": redux_strength,
            "original_size": original_size,
            "crop_top_left": crop_top_left,
            "target_size": target_size,
            "negative_original_size": None,
            "negative_crop_top_left": None,
            "negative_target_size": None,
            "vae_tile": vae_tile,
        }
        given = {name: value for name, value in options.items() if value is not None}
        repeated = {name: value for name in options if (value := getattr(told, name)) is not None}
        if like is not None:
            repeated.setdefault("rng", "cuda")  # webui does not name its default

        with (
            steps_bar(quiet) as on_step,
            SDContext(
                model or _known("model", like, told.model, told.model_hash),
                vae=vae or _known("vae", like, told.vae, told.vae_hash),
                clip_l=clip_l or _known("clip-l", like, told.clip_l, told.clip_l_hash),
                clip_g=clip_g or _known("clip-g", like, told.clip_g, told.clip_g_hash),
                clip_h=clip_h or _known("clip-h", like, told.clip_h, told.clip_h_hash),
                t5xxl=t5xxl or _known("t5xxl", like, told.t5xxl, told.t5xxl_hash),
                redux=redux or _known("redux", like, told.redux, told.redux_hash),
                clip_vision=clip_vision or _known("clip-vision", like, told.clip_vision, told.clip_vision_hash),
                backend=backend,
                threads=threads,
                precision=precision or told.precision or "auto",
                prediction=prediction or told.prediction,
                zero_snr=told.zero_snr if zero_snr is None else zero_snr,
                lora_dir=lora_dir,
                embedding_dir=embedding_dir,
                lora_mode=lora_mode,
                memory_limit=0 if memory_limit is None else read_size("memory-limit", memory_limit),
            ) as sd_ctx,
        ):
            painted = sd_ctx.generate(
                **{**repeated, **given},
                batch_size=batch_size,
                init_image=init_image,
                mask=mask,
                control_image=control_image,
                reference_image=reference_image,
                redux_image=redux_image,
                on_step=on_step,
            )
        pictures: list[PaintedImage] = painted if isinstance(painted, list) else [painted]
        _compare(told, pictures[0].parameters)
        for picture, path in zip(pictures, _names(output, pictures), strict=True):
            picture.save(path)
            if not quiet:
                typer.echo(f"{path} (seed {picture.parameters.seed})")


def _known(option: str, like: Path | None, name: str | None, short: str | None) -> Path | None:
    """The file that `like` was painted with; None: the default."""
    if like is None or (name is None and short is None):
        return None
    if option == "model":
        with contextlib.suppress(Io):
            shipped = files.shipped_model()
            if short == files.model_hash(shipped) if short else name == shipped.stem:
                return shipped
    for path in files.models_with_hash(short) if short else ():
        return path
    what = f"{name} (hash {short})" if name and short else name or f"hash {short}"
    raise BadArgument(f"{like}: was painted with another {option}, {what}; give its file with --{option}")


def _compare(told: Parameters, used: Parameters) -> None:
    encoders = ("clip_l_hash", "clip_g_hash", "clip_h_hash", "t5xxl_hash", "redux_hash", "clip_vision_hash")
    pictures = ("init_image_hash", "mask_hash", "control_hash", "reference_hash", "redux_image_hash")
    for field in ("model_hash", "vae_hash", *encoders, *pictures, "lora_hashes"):
        before, now = getattr(told, field), getattr(used, field)
        if before and before != now:
            what = field.removesuffix("_hash").removesuffix("_hashes").replace("_", " ")
            console.print(f"not the same picture: the {what} has hash {now}, and had {before}", highlight=False)


def _check_output(path: Path) -> None:
    """Says before painting what would fail after it."""
    file_format(path)
    files.check_target(path)


def _names(output: Path | None, pictures: list[PaintedImage]) -> Iterator[Path]:
    """heart.png, heart-2.png, …; names of our own choice are free ones."""
    if output is None:
        for picture in pictures:
            first = Path(f"sdcpp-{picture.parameters.seed}.png")
            yield next(path for path in _numbered(first) if not path.exists())
    else:
        yield from itertools.islice(_numbered(output), len(pictures))


def _numbered(first: Path) -> Iterator[Path]:
    yield first
    for k in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{k}")


# ---- info and doctor -----------------------------------------------------------------------------------


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A picture, or a model file or folder.", show_default=False)],
    vae: Annotated[Path | None, typer.Option(help="Autoencoder beside the model.")] = None,
    clip_l: Annotated[Path | None, typer.Option(help="Text encoder beside the model.")] = None,
    clip_g: Annotated[Path | None, typer.Option(help="The second one of SDXL and SD3, likewise.")] = None,
    t5xxl: Annotated[Path | None, typer.Option(help="T5 of SD3 and FLUX, likewise.")] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Pixels of a side, for what a picture takes of memory. [default: the model's own]"),
    ] = None,
) -> None:
    """Show the parameters of a picture, or what a model file holds and will take of memory."""
    set_up_log(verbose=False)
    parts = {"vae": vae, "clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl}
    with one_sentence():
        if is_picture(file):
            typer.echo(read_parameters(file))
        else:
            cli_weights.print_info(file, {role: path for role, path in parts.items() if path is not None}, size)


@app.command(name="bench")
def _bench(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help=".safetensors, .gguf or diffusers folder. [default: ours]")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a side. [default: the model's own]")] = None,
    steps: Annotated[int, typer.Option(help="Of the picture, at least 2.", min=2)] = 4,
    precision: Annotated[str, typer.Option(help="f32, bf16 or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [default: one per core]")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes as well.")] = False,
) -> None:
    """Measure how long a model takes here."""
    set_up_log(verbose=False)
    with one_sentence():
        begin = time.perf_counter()
        with SDContext(model, precision=precision, threads=threads) as sd_ctx, steps_bar(quiet=False) as on_step:
            opened = time.perf_counter() - begin
            info = sd_ctx.info
            timing = bench.measure(sd_ctx, size=size, steps=steps, on_step=lambda step, of: on_step(step, of, None))
            peak = sd_ctx.peak_rate() if profile else None
            costs = bench.profile(sd_ctx, size=size) if profile else []
    memory = "unknown" if timing.peak_memory is None else f"{timing.peak_memory / 1e9:.2f} GB"
    rows = [("kernels", f"{info.kernels}, precision {info.precision}, {info.threads} threads"), ("peak memory", memory)]
    for name, seconds in (("open", opened), ("text", timing.text), ("step", timing.step), ("decode", timing.decode)):
        rows.append((name, f"{seconds:.3f} s"))
    if peak:
        rows.append(("peak", f"{peak / 1e9:.0f} GFLOP/s, in products that lie in the second-level cache"))
    print_rows(rows)
    if costs:
        Console().print(_cost_table(costs, peak))


def _cost_table(costs: Sequence[bench.Operation], peak: float | None) -> Table:
    numbers = ("count", "ms", "share", "GFLOP/s", "of peak")
    table = Table("network", "operation", *(Column(name, justify="right") for name in numbers))
    total = sum(cost.seconds for cost in costs)
    for cost in costs:
        rate = cost.flops / cost.seconds if cost.seconds else 0
        gflops = f"{rate / 1e9:.0f}" if rate else ""
        of_peak = f"{rate / peak:.0%}" if rate and peak else ""
        share = f"{cost.seconds / total:.1%}"
        table.add_row(
            cost.network, cost.operation, str(cost.count), f"{cost.seconds * 1e3:.2f}", share, gflops, of_peak
        )
    return table


@app.command(name="doctor")
def _doctor() -> None:
    """Show versions, processor, devices, and how to get a faster build."""
    with one_sentence():
        for title, rows in doctor.report():
            typer.echo(f"{title}")
            print_rows(rows)
        typer.echo("The processor's kernels are chosen by themselves.")
        typer.echo("For a graphics card, build ggml with its backend:")
        typer.echo(f"  {doctor.build_for_cards()}")
