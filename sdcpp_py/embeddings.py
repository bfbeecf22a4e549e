"""Textual inversions: files of vectors that stand for a word in prompts (Gal et al., 2022).

    a drawing by easystyle          the word, where embedding_dir has a file easystyle.pt, .bin or .safetensors
    a drawing by embedding:easystyle    the same, and an error where there is no such file
    a photo of <cat-toy>            the word that a file of diffusers names itself

Letters' case does not matter, because the text encoder has no capitals. Words are found among the tokens of a prompt,
as stable-diffusion-webui does, the longest first; a word of n vectors takes the room of n tokens. LoRA files may bundle
embeddings, which prompts can name while the LoRA acts.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from . import check
from .errors import BadArgument, BadFile, Io, SdcppError, from_os_error
from .files import AnyPath
from .prompt import Span, shown
from .weights.source import open_source
from .weights.tensor import Floats, Tensor

log = logging.getLogger("sdcpp_py")

ENDINGS: Final = (".safetensors", ".pt", ".bin")
MOST_FILES: Final = 20_000  # in a folder and below it
MOST_NUMBERS: Final = 1_000_000  # of an embedding
_EXPLICIT = re.compile(r"embedding:\s*([^\s,:()\[\]<>]+)", re.IGNORECASE)
_TOKEN = re.compile(r"<[^<>\s]+>")
_BUNDLED: Final = "bundle_emb."

# Keys of an embedding's tensors, and for which text encoder they are; "" where the file does not tell.
_KEYS: Final = {"string_to_param.*": "", "emb_params": "", "clip_l": "clip_l", "clip_g": "clip_g"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors that stand for a word.

    Attributes:
        name: What prompts call it.
        path: Where it is from.
        vectors: By text encoder, "clip_l" and "clip_g", or "" where the file does not tell: (vectors, width).
        token: What the file itself calls the word, "<cat-toy>"; "" where it does not.
    """

    name: str
    path: Path
    vectors: dict[str, Floats]
    token: str = ""

    def for_family(self, family: str) -> list[Floats]:
        """The vectors for each text encoder of a model.

        Raises:
            BadArgument: The model has an encoder that the file has nothing for.
        """
        single = self.vectors.get("", self.vectors.get("clip_l"))
        wanted = [self.vectors.get("clip_l"), self.vectors.get("clip_g")] if family == "sdxl" else [single]
        found = [table for table in wanted if table is not None]
        if len(found) < len(wanted):
            have = ", ".join(key or "one text encoder" for key in self.vectors)
            need = "clip_l and clip_g" if family == "sdxl" else "clip_l"
            raise BadArgument(
                f"{self.path}: has vectors for {have}, and {family} needs {need}; it was made for another family"
            )
        return found


def read_embedding(path: AnyPath) -> Embedding:
    """Reads a file of webui (.pt, .safetensors), of diffusers (.bin, .safetensors), or one for SDXL's two encoders.

    Raises:
        BadFile: It is damaged, or holds something else.
        Unsupported: It would have to run programs.
        Io: It cannot be read.
    """
    given = check.path("embedding", path)
    with open_source(given) as source:
        known = {tensor.name: tensor for tensor in source.tensors if tensor.name in _KEYS}
        token = ""
        if not known and len(source.tensors) == 1:
            token = source.tensors[0].name
            return Embedding(given.stem, given, {"": _vectors(given, source.tensors[0])}, token)
        if not known:
            first = source.tensors[0].name if source.tensors else "nothing"
            raise BadFile(f"{given}: holds {first} and more, which is no embedding; is it a LoRA or a model?")
        return Embedding(given.stem, given, {_KEYS[name]: _vectors(given, tensor) for name, tensor in known.items()})


def bundled_embeddings(path: Path) -> list[Embedding]:
    """The embeddings that a LoRA file brings along.

    Raises:
        BadFile: One of them is damaged.
        Io: The file cannot be read.
    """
    found: dict[str, dict[str, Floats]] = {}
    if os.path.isdir(path):
        return []
    with open_source(path) as source:
        for tensor in source.tensors:
            if tensor.name.startswith(_BUNDLED):
                name, _, key = tensor.name.removeprefix(_BUNDLED).partition(".")
                if key in _KEYS:
                    found.setdefault(name, {})[_KEYS[key]] = _vectors(path, tensor)
    return [Embedding(name, path, vectors) for name, vectors in found.items()]


def _vectors(path: Path, tensor: Tensor) -> Floats:
    if len(tensor.shape) not in (1, 2) or not 0 < tensor.elements <= MOST_NUMBERS or not tensor.kept_type.is_float:
        raise BadFile(f"{path}: {tensor.name} of shape {list(tensor.shape)} is no embedding, which has some vectors")
    return tensor.floats().reshape(-1, tensor.shape[-1])


class EmbeddingLibrary:
    """The embeddings in a folder and below it, by their files' names."""

    def __init__(self, folder: AnyPath | None) -> None:
        """`folder` None: none.

        Raises:
            BadArgument: `folder` is no path.
            Io: There is no such folder.
        """
        self.folder = check.optional(check.path, "embedding_dir", folder)
        self._read: dict[Path, tuple[tuple[int, int], Embedding, Embedding]] = {}
        self._bundled: dict[Path, tuple[tuple[int, int], list[Embedding]]] = {}
        if self.folder is not None and not os.path.isdir(self.folder):
            raise Io(f"{folder}: is no folder; embedding_dir is the folder that embeddings lie in")

    def names(self) -> list[str]:
        """What prompts may call the embeddings here, sorted."""
        return sorted({path.stem for path in self._files()})

    def find(self, name: str) -> Embedding:
        """The embedding of that name, in letters of any case, with or without its file's ending.

        Raises:
            BadArgument: There is none, or more than one.
            BadFile, Unsupported, Io: As ``read_embedding``.
        """
        wanted = check.text("embedding", name).lower()
        found = [path for path in self._files() if wanted in (path.stem.lower(), path.name.lower())]
        if self.folder is None:
            raise BadArgument(f"embedding {shown(name)}: there is no folder of embeddings; give embedding_dir")
        if len(found) > 1:
            raise BadArgument(f"embedding {shown(name)}: may be {found[0]} or {found[1]}; rename one of them")
        if not found:
            known = ", ".join(self.names()[:5]) or "none"
            raise BadArgument(f"embedding {shown(name)}: {self.folder} has no such file; there are: {known}")
        return self._load(found[0])[0]

    def named_in(self, text: str) -> list[Embedding]:
        """Those that a text may name by a plain word. A file that cannot be read is left out with a warning."""
        squeezed = _squeezed(text)
        tokens = {token.lower() for token in _TOKEN.findall(text)}
        out = []
        for path in self._files():
            if _squeezed(path.stem) not in squeezed and not tokens:
                continue
            try:
                own, called = self._load(path)
            except SdcppError as error:
                if _squeezed(path.stem) in squeezed:
                    log.warning("%s", error)
                continue
            if _squeezed(path.stem) in squeezed:
                out.append(own)
            elif own.token.lower() in tokens:
                out.append(called)
        return out

    def bundled(self, path: Path) -> list[Embedding]:
        """Those that a LoRA file brings along; as ``bundled_embeddings``, which is asked once as long as it stays."""
        state = _state(path)
        kept = self._bundled.get(path)
        if kept is None or kept[0] != state:
            kept = self._bundled[path] = (state, bundled_embeddings(path))
        return kept[1]

    def _files(self) -> list[Path]:
        if self.folder is None:
            return []
        try:
            found = [
                path for path in sorted(self.folder.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file()
            ]
        except OSError as error:
            raise from_os_error(self.folder, error) from error
        if len(found) > MOST_FILES:
            raise BadArgument(f"{self.folder}: has {len(found):,} embeddings; {MOST_FILES:,} are allowed")
        return found

    def _load(self, path: Path) -> tuple[Embedding, Embedding]:
        """By its file's name, and by what the file itself calls it."""
        state = _state(path)
        kept = self._read.get(path)
        if kept is None or kept[0] != state:
            own = read_embedding(path)
            kept = self._read[path] = (state, own, replace(own, name=own.token or own.name))
        return kept[1:]


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise from_os_error(path, error) from error
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Words:
    """The embeddings that prompts name.

    Attributes:
        asked: Those named by ``embedding:``, which have to fit.
        met: Those that a plain word may mean.
    """

    asked: list[Embedding]
    met: list[Embedding]


def resolve(spans: Sequence[Span], library: EmbeddingLibrary, bundled: Sequence[Embedding]) -> tuple[list[Span], Words]:
    """Prompts with the names of embeddings in place of ``embedding:name``, and the embeddings that they may name.

    Raises:
        BadArgument: ``embedding:name`` names none.
        BadFile, Unsupported, Io: As ``read_embedding``.
    """
    asked: dict[str, Embedding] = {}

    def take(match: "re.Match[str]") -> str:
        inside = next((one for one in bundled if one.name.lower() == match[1].lower()), None)
        embedding = inside or library.find(match[1])
        asked.setdefault(embedding.name.lower(), embedding)
        return f" {embedding.name} "

    out = [span if span.text is None else Span(_EXPLICIT.sub(take, span.text), span.weight) for span in spans]
    text = " ".join(span.text for span in out if span.text is not None)
    met: dict[str, Embedding] = {}
    for embedding in [*bundled, *library.named_in(text)]:
        if embedding.name.lower() not in asked and _squeezed(embedding.name) in _squeezed(text):
            met.setdefault(embedding.name.lower(), embedding)
    return out, Words(list(asked.values()), list(met.values()))


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()
