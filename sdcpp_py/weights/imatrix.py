"""Importance matrices: for each column of a matrix, the mean square of what it is multiplied with.

Files are GGUF as llama.cpp writes them (tools/imatrix): for each matrix NAME a tensor "NAME.in_sum2" with the sums of
squares, (1, columns), and one "NAME.counts" with how many vectors they are of.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadFile
from ..files import AnyPath
from .gguf_file import Value, text, u32
from .source import open_source
from .tensor import Floats, from_array
from .writing import plan, write

SUMS, COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: AnyPath) -> dict[str, Floats]:
    """The importance of columns by the name of a matrix.

    Raises:
        BadFile: It is no such file, or holds numbers that are no sums of squares.
        Io: It cannot be read.
    """
    with open_source(path) as source:
        tensors = {tensor.name: tensor for tensor in source.tensors}
        out: dict[str, Floats] = {}
        for name, tensor in tensors.items():
            if not name.endswith(SUMS):
                continue
            matrix = name.removesuffix(SUMS)
            counts = tensors.get(matrix + COUNTS)
            if counts is None or tensor.rows != 1 or counts.elements != 1:
                raise BadFile(
                    f"{path}: has no one count of vectors for the one row of {name!r}; is it an importance matrix?"
                )
            sums, n = tensor.floats().reshape(-1), float(counts.array().reshape(-1)[0])
            if not np.isfinite(sums).all() or (sums < 0).any() or not 0 < n < np.inf:
                raise BadFile(f"{path}: {name!r} holds numbers that are no sums of squares; the file is damaged")
            out[matrix] = (sums / np.float32(n)).astype(np.float32)
    if not out:
        raise BadFile(f"{path}: has no tensors that end in {SUMS!r}; is it an importance matrix?")
    return out


def write_imatrix(path: AnyPath, sums: Mapping[str, tuple[NDArray[Any], int]], pictures: int) -> None:
    """Writes a file that ``read_imatrix`` and llama.cpp read.

    Args:
        path: The file: .gguf.
        sums: By the name of a matrix: the sums of squares of its columns, and over how many vectors.
        pictures: That they are of.

    Raises:
        BadArgument: There are none, or another ending.
        Io: It cannot be written.
    """
    tensors = []
    for name, (squares, count) in sorted(sums.items()):
        tensors.append(from_array(name + SUMS, squares.reshape(1, -1)))
        tensors.append(from_array(name + COUNTS, np.full((1, 1), count)))
    values: dict[str, Value] = {"general.type": text("imatrix"), "imatrix.chunk_count": u32(pictures)}
    write(plan(tensors, path, values=values))
