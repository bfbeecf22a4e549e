"""Paints with Stable Diffusion models on ggml.

>>> from sdcpp_py import SDContext
>>> with SDContext() as sd_ctx:  # doctest: +SKIP
...     sd_ctx.generate("a red heart", seed=7).save("heart.png")
"""

import importlib

try:
    importlib.import_module("._native", __name__)
except ImportError as error:
    raise ImportError(
        f"sdcpp_py: its compiled part is missing or does not load ({error}). In the source folder run "
        "`pip install .`, or `pip install -e .` to work from there; that needs a C++ compiler."
    ) from error

from . import _native
from .context import SDContext
from .engine import add_rpc_devices, devices, rngs, samplers, schedulers
from .errors import (
    BadArgument,
    BadFile,
    Busy,
    Cancelled,
    Internal,
    Io,
    OutOfMemory,
    SdcppError,
    Unsupported,
)
from .files import shipped_model
from .image import PaintedImage, Parameters

__version__ = _native.version()

__all__ = [
    "BadArgument",
    "BadFile",
    "Busy",
    "Cancelled",
    "Internal",
    "Io",
    "OutOfMemory",
    "PaintedImage",
    "Parameters",
    "SDContext",
    "SdcppError",
    "Unsupported",
    "__version__",
    "add_rpc_devices",
    "devices",
    "rngs",
    "samplers",
    "schedulers",
    "shipped_model",
]
