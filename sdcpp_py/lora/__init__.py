"""LoRA files on the Python side: names to files, prompts to multipliers, and what became of a file."""

from .library import LoraLibrary
from .report import LoraReport
from .state import LoraUse, read_uses

__all__ = ["LoraLibrary", "LoraReport", "LoraUse", "read_uses"]
