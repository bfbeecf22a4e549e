"""Weights in files: opening, converting, quantising, writing. Needs neither torch nor a device.

``convert`` does it all. The streaming core is open to other tools: ``open_source`` gives tensors that are read when
asked for, ``Tensor.changed`` changes their values on the way, ``plan`` decides the types, ``write`` writes.

>>> from sdcpp_py.weights import open_source, plan, write
>>> with open_source("model.safetensors") as source:  # doctest: +SKIP
...     tensors = [tensor.changed(lambda first, rows: 2 * rows) for tensor in source.tensors]
...     write(plan(tensors, "out.gguf", type="q8_0", metadata=source.metadata, family=source.family))
"""

from .conversion import convert
from .imatrix import read_imatrix
from .info import FileInfo, describe
from .source import Source, open_source
from .tensor import TYPES, ElementType, Tensor, element_type, from_array
from .writing import Plan, plan, write

__all__ = [
    "TYPES",
    "ElementType",
    "FileInfo",
    "Plan",
    "Source",
    "Tensor",
    "convert",
    "describe",
    "element_type",
    "from_array",
    "open_source",
    "plan",
    "read_imatrix",
    "write",
]
