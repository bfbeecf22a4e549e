"""LoRA files on the Python side: names to files, prompts to multipliers, what became of a file, and the workbench.

The tools, all without a model or torch unless they say otherwise: ``diff``, ``convert``, ``merge``, ``scale``,
``resize``, ``prune``, ``extract`` (two models) and ``bake`` (a model).
"""

from .bake import bake
from .compare import LoraDiff, diff
from .extract import Extracted, extract
from .library import LoraLibrary
from .report import LoraReport
from .rewrite import Rewritten
from .tools import convert, merge, prune, resize, scale
from .uses import LoraUse, read_uses

__all__ = [
    "Extracted",
    "LoraDiff",
    "LoraLibrary",
    "LoraReport",
    "LoraUse",
    "Rewritten",
    "bake",
    "convert",
    "diff",
    "extract",
    "merge",
    "prune",
    "read_uses",
    "resize",
    "scale",
]
