"""Pictures with the parameters that made them, as stable-diffusion-webui writes and reads them.

A PNG carries a text chunk "parameters": the prompt, "Negative prompt: …" and one line of fields, "Steps:
20, Sampler: Euler a, …". A value with a comma, a colon or a line break is quoted as JSON.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from . import check
from .errors import BadArgument, BadFile, from_os_error
from .files import AnyPath, check_regular, whole_file

# Our names and webui's.
SAMPLERS: Final = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpm++2s_a": "DPM++ 2S a",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m_sde": "DPM++ 2M SDE",
    "ddim": "DDIM",
    "lcm": "LCM",
    "tcd": "TCD",
    "unipc": "UniPC",
}
SCHEDULERS: Final = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "ays": "Align Your Steps",
}
RNGS: Final = {"cpu": "CPU", "cuda": "NV"}


@dataclass(frozen=True)
class Parameters:
    """What made a picture. None: not said, so the default of whoever repeats it.

    Sizes are in pixels, hashes are the first 10 digits of SHA-256. `other` holds fields that mean nothing to
    us, as text.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    scheduler: str | None = None
    cfg_scale: float | None = None
    guidance_rescale: float | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model_hash: str | None = None
    model: str | None = None
    vae_hash: str | None = None
    vae: str | None = None
    clip_l_hash: str | None = None
    clip_l: str | None = None
    clip_g_hash: str | None = None
    clip_g: str | None = None
    clip_h_hash: str | None = None
    clip_h: str | None = None
    t5xxl_hash: str | None = None
    t5xxl: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    strength: float | None = None
    clip_skip: int | None = None
    eta: float | None = None
    rng: str | None = None
    vae_tile: int | None = None
    init_image_hash: str | None = None
    mask_hash: str | None = None
    control_hash: str | None = None
    reference_hash: str | None = None
    redux_image_hash: str | None = None
    redux_strength: float | None = None
    redux_hash: str | None = None
    redux: str | None = None
    clip_vision_hash: str | None = None
    clip_vision: str | None = None
    lora_hashes: str | None = None
    backend: str | None = None
    precision: str | None = None
    version: str | None = None
    other: dict[str, str] = field(default_factory=dict)


# ---- text ----------------------------------------------------------------------------------------------

_NEGATIVE = "Negative prompt:"
_FIELD = re.compile(r'\s*(\w[\w \-/+]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_FIELDS_AT_LEAST = 3  # as webui: a last line with fewer is part of the prompt

_NOISE_SCHEDULES: Final = {True: "Zero Terminal SNR", False: "Default"}


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if not match:
        raise ValueError
    return int(match[1]), int(match[2])


def _zero_snr(text: str) -> bool:
    return {name: value for value, name in _NOISE_SCHEDULES.items()}[text]


# Name in the text, attribute, what reads it. The order is the order in the text.
_FIELDS: Final = (
    ("Steps", "steps", int),
    ("Sampler", "sampler", str),
    ("Schedule type", "scheduler", str),
    ("CFG scale", "cfg_scale", float),
    ("CFG rescale", "guidance_rescale", float),
    ("Distilled CFG Scale", "guidance", float),  # as forge writes it
    ("Shift", "shift", float),
    ("Seed", "seed", int),
    ("Size", "size", str),
    ("Model hash", "model_hash", str),
    ("Model", "model", str),
    ("VAE hash", "vae_hash", str),
    ("VAE", "vae", str),
    ("CLIP-L hash", "clip_l_hash", str),
    ("CLIP-L", "clip_l", str),
    ("CLIP-G hash", "clip_g_hash", str),
    ("CLIP-G", "clip_g", str),
    ("CLIP-H hash", "clip_h_hash", str),
    ("CLIP-H", "clip_h", str),
    ("T5-XXL hash", "t5xxl_hash", str),
    ("T5-XXL", "t5xxl", str),
    ("Prediction", "prediction", str),
    ("Noise Schedule", "zero_snr", _zero_snr),  # as webui writes it
    ("Original size", "original_size", _pair),
    ("Crop top left", "crop_top_left", _pair),
    ("Target size", "target_size", _pair),
    ("Negative original size", "negative_original_size", _pair),
    ("Negative crop top left", "negative_crop_top_left", _pair),
    ("Negative target size", "negative_target_size", _pair),
    ("Denoising strength", "strength", float),
    ("Clip skip", "clip_skip", int),
    ("Eta", "eta", float),
    ("RNG", "rng", str),
    ("VAE tile", "vae_tile", int),
    ("Init image hash", "init_image_hash", str),
    ("Mask hash", "mask_hash", str),
    ("Control image hash", "control_hash", str),
    ("Reference image hash", "reference_hash", str),
    ("Redux image hash", "redux_image_hash", str),
    ("Redux strength", "redux_strength", float),
    ("Redux hash", "redux_hash", str),
    ("Redux", "redux", str),
    ("CLIP vision hash", "clip_vision_hash", str),
    ("CLIP vision", "clip_vision", str),
    ("Lora hashes", "lora_hashes", str),
    ("Device", "backend", str),
    ("Precision", "precision", str),
    ("Version", "version", str),
)
_EXACT = {"Exact prompt": "prompt", "Exact negative prompt": "negative_prompt"}


def format_parameters(parameters: Parameters) -> str:
    """The text of the "parameters" chunk, from which `parse_parameters` reads the same again.

    A prompt that the form cannot hold, such as one with a line "Negative prompt:", is added to the last line
    once more, quoted.
    """
    text = _format(parameters, exact=False)
    return text if parse_parameters(text) == parameters else _format(parameters, exact=True)


def _format(parameters: Parameters, exact: bool) -> str:
    values: dict[str, object] = {}
    for name, attribute, _ in _FIELDS:
        if attribute != "size":
            values[name] = getattr(parameters, attribute)
        elif parameters.width is not None and parameters.height is not None:
            values[name] = f"{parameters.width}x{parameters.height}"
    for name, table in (("Sampler", SAMPLERS), ("Schedule type", SCHEDULERS), ("RNG", RNGS)):
        if values[name] is not None:
            values[name] = table.get(str(values[name]), values[name])
    if exact:
        values.update({name: getattr(parameters, key) for name, key in _EXACT.items()})
    version = values.pop("Version")
    values.update({name: value for name, value in parameters.other.items() if name not in values})
    values["Version"] = version
    fields = ", ".join(f"{name}: {_quote(value)}" for name, value in values.items() if value is not None)
    negative = f"{_NEGATIVE} {parameters.negative_prompt}" if parameters.negative_prompt else None
    return "\n".join(line for line in (parameters.prompt, negative, fields or None) if line is not None)


def parse_parameters(text: str) -> Parameters:
    """Reads what we or stable-diffusion-webui wrote. Any text can be read: what is no field is prompt."""
    *lines, last = text.rstrip("\n").split("\n")
    fields = dict(_fields(last))
    if len(fields) < _FIELDS_AT_LEAST and not _EXACT.keys() <= fields.keys():
        lines, fields = [*lines, last], {}
    negative = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    values: dict[str, Any] = {
        "prompt": "\n".join(lines[:negative]),
        "negative_prompt": "\n".join(lines[negative:]).removeprefix(_NEGATIVE).removeprefix(" "),
    }
    for name, attribute, kind in _FIELDS:
        if name in fields and attribute == "size":
            values["width"], values["height"] = _read(_pair, fields.pop(name)) or (None, None)
        elif name in fields:
            values[attribute] = _read(kind, fields.pop(name))
    for name, attribute in _EXACT.items():
        if name in fields:
            values[attribute] = fields.pop(name)
    _translate(values)
    return Parameters(**values, other=fields)


def _fields(line: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(line):
        match = _FIELD.match(line, at)
        if match:
            yield match[1].rstrip(), _unquote(match[2])
        at = match.end() if match else line.find(",", at) + 1 or len(line)


def _quote(value: object) -> str:
    if isinstance(value, tuple):
        value = "x".join(map(str, value))
    elif isinstance(value, bool):
        value = _NOISE_SCHEDULES[value]
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    plain = text and text == text.strip() and not re.search(r'[,:\n]|^"', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquote(text: str) -> str:
    if text.startswith('"') and text.endswith('"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(text, strict=False))
    return text.strip()


def _read(kind: Callable[[str], Any], text: str) -> Any:
    """The value of a field, or None where it is none of its type."""
    try:
        value = kind(text)
    except (ValueError, KeyError):
        return None
    return None if value != value or value in (float("inf"), float("-inf")) else value


def _translate(values: dict[str, Any]) -> None:
    """webui's names to ours; a name that is not known stays for the engine to refuse."""
    ours = {theirs.casefold(): our for our, theirs in SCHEDULERS.items()} | {"uniform": "normal"}
    scheduler = values.get("scheduler")
    if scheduler is not None:
        values["scheduler"] = None if scheduler == "Automatic" else ours.get(scheduler.casefold(), scheduler)
    samplers = {theirs.casefold(): our for our, theirs in SAMPLERS.items()}
    sampler = values.get("sampler")
    if sampler is not None:
        before, _, ending = sampler.casefold().rpartition(" ")
        if before in samplers and ending in ours and sampler.casefold() not in samplers:  # "DPM++ 2M Karras"
            values["sampler"] = samplers[before]
            values["scheduler"] = values.get("scheduler") or ours[ending]
        else:
            values["sampler"] = samplers.get(sampler.casefold(), sampler)
    rng = values.get("rng")
    if rng is not None:
        values["rng"] = {"CPU": "cpu", "NV": "cuda", "GPU": "cuda"}.get(rng, rng)


# ---- pictures ------------------------------------------------------------------------------------------


class PaintedImage(Image.Image):
    """A Pillow picture that knows how it was made: ``info["parameters"]``, which ``save`` writes into a PNG.

    Copies and conversions are plain Pillow pictures.
    """

    @classmethod
    def from_pixels(cls, rgb: NDArray[np.uint8], parameters: str) -> "PaintedImage":
        """A picture of an array (height, width, 3).

        Raises:
            BadArgument: It is no such array.
        """
        painted = cls()
        painted.__setstate__(_of_array(rgb, "rgb").__getstate__())
        painted.info["parameters"] = check.text("parameters", parameters)
        return painted

    @property
    def parameters(self) -> Parameters:
        """How it was made, as data."""
        return parse_parameters(str(self.info.get("parameters", "")))

    def save(
        self,
        fp: AnyPath | bytes | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """Writes the picture as Pillow does. A file appears whole or not at all.

        Raises:
            BadArgument: Nothing is known to write files with this ending.
            Io: No such folder, no permission, no space.
        """
        if not isinstance(fp, (str, bytes, os.PathLike)):
            super().save(fp, format, **self._with_parameters(format, params))
            return
        path = check.path("file", os.fsdecode(fp))
        format = format or file_format(path)
        try:
            if path.exists() and not path.is_file():  # a device or a pipe
                with path.open("wb") as stream:
                    super().save(stream, format, **self._with_parameters(format, params))
                return
            with whole_file(path) as stream:
                super().save(stream, format, **self._with_parameters(format, params))
        except OSError as error:
            raise from_os_error(path, error) from error

    def _with_parameters(self, format: str | None, params: dict[str, Any]) -> dict[str, Any]:
        if "pnginfo" in params or "parameters" not in self.info or (format or "PNG").upper() != "PNG":
            return params
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", str(self.info["parameters"]))
        return {**params, "pnginfo": chunks}


def file_format(path: Path) -> str:
    """Pillow's name of the format that a file's ending asks for.

    Raises:
        BadArgument: Nothing is known to write files with this ending.
    """
    format = Image.registered_extensions().get(path.suffix.lower())
    if format is None or format.upper() not in Image.SAVE:
        raise BadArgument(f"{path}: no picture is written with the ending {path.suffix!r}; try .png")
    return format


def is_picture(path: Path) -> bool:
    """Whether a file begins as pictures do; it may still be damaged.

    Raises:
        Io: It cannot be read.
    """
    if os.path.isdir(path):
        return False
    check_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(4).startswith((b"\x89PNG", b"\xff\xd8", b"RIFF"))
    except OSError as error:
        raise from_os_error(path, error) from error


def read_parameters(path: AnyPath) -> str:
    """The text of a picture's "parameters" chunk.

    Raises:
        BadFile: It is no picture, or carries no parameters.
        Io: It cannot be read.
    """
    text = _open_picture(check.path("picture", path)).info.get("parameters")
    if not isinstance(text, str):
        raise BadFile(f"{path}: carries no parameters; was it saved by a program that keeps them, as PNG?")
    return text


def _open_picture(path: Path) -> Image.Image:
    check_regular(path)
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise BadFile(f"{path}: is no picture that Pillow can read") from error
    except OSError as error:
        if error.errno:
            raise from_os_error(path, error) from error
        raise BadFile(f"{path}: is damaged ({error})") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        raise BadFile(f"{path}: is damaged ({error})") from error


def open_picture(source: object, argument: str) -> Image.Image:
    """A picture from a path, a Pillow picture, or an array of bytes; `argument` is what messages call it.

    Raises:
        BadArgument: It is none of these, or has no pixels.
        BadFile: It is damaged, or no picture.
        Io: The file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        return ImageOps.exif_transpose(_open_picture(check.path(argument, source)))
    if isinstance(source, Image.Image):
        try:
            source.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise BadFile(f"{argument}: is damaged ({error})") from error
        if 0 in source.size:
            raise BadArgument(f"{argument}: is {source.width} x {source.height}, which has no pixels")
        return source
    return _of_array(source, argument)


def _of_array(source: object, argument: str) -> Image.Image:
    if not isinstance(source, np.ndarray):
        raise BadArgument(f"{argument}: must be a path, a picture or an array, not {type(source).__name__}")
    if not source.size or source.dtype != np.uint8 or source.shape[2:] not in ((), (3,), (4,)) or source.ndim < 2:
        raise BadArgument(
            f"{argument}: an array must be uint8 with shape (height, width, 3), "
            f"not {source.dtype} with shape {source.shape}"
        )
    return Image.fromarray(source)


def pixels(picture: Image.Image, mode: str, size: tuple[int, int], *, bicubic: bool = False) -> NDArray[np.uint8]:
    """A picture as the engine takes it, scaled to a width and a height, `bicubic` as networks were trained with.

    The array is (height, width, 3) for mode "RGB", transparent parts white, and (height, width) for mode "L".

    Raises:
        BadArgument: The picture is of a mode that Pillow cannot convert.
    """
    try:
        picture = _eight_bits(picture)
        if mode == "RGB" and (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert(mode)
    except ValueError as error:
        raise BadArgument(f"a picture of Pillow's mode {picture.mode} cannot be read; convert it to RGB") from error
    if picture.size != size:
        smooth = Image.Resampling.BICUBIC if bicubic else Image.Resampling.LANCZOS
        picture = picture.resize(size, smooth if mode == "RGB" else Image.Resampling.BOX)
    return np.ascontiguousarray(picture)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits, as maps of depths are, scaled to 8; Pillow itself would cut them off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "I" and values.max() <= 255:  # whole numbers that are no wider than bytes
        return picture
    return Image.fromarray((np.clip(values, 0, 65535) / 257).round().astype(np.uint8))
