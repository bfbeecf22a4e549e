"""How the tools spell what they write: names of modules and roles by format, as the engine reads them back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .. import check
from ..errors import Unsupported
from .algebra import Pair, swap_halves
from .outline import DIFFUSERS, NORM, PLACES, TABLE, Module, Outline, Part
from .source import Change, Floats
from .writer import PEFT_PREFIX


@dataclass(frozen=True)
class Unit:
    """What a format takes for one module: all rows of ours, or those of a part.

    Attributes:
        stem: What its keys begin with.
        part: As diffusers has it; None: all rows, in the original order.
        first: Its first row, in units of the module's rows.
        units: How many.
    """

    stem: str
    part: Part | None
    first: int
    units: int


@dataclass(frozen=True)
class Format:
    """A convention that tools write.

    Attributes:
        name: As --to takes it.
        about: What reads it, for help.
        peft: Whether factors are called lora_A and lora_B and the scale lies in them, else there is an alpha.
        parts: Whether modules are diffusers' own, projections of attention apart.
        lycoris: Whether there are kinds other than LoRA.
        dotted: Whether paths keep their dots.
    """

    name: str
    about: str
    peft: bool
    parts: bool
    lycoris: bool
    dotted: bool

    def units(self, outline: Outline, module: Module) -> Iterator[Unit]:
        """The modules that this format has in place of ours."""
        prefix = self._prefix(outline.family, module.component)
        if self._has_parts(outline.family, module):
            for part in module.parts:
                yield Unit(prefix + self._path(part.diffusers), part, part.first, part.units)
        else:
            yield Unit(prefix + self._path(module.name), None, 0, module.units)

    def _has_parts(self, family: str, module: Module) -> bool:
        if module.component != "denoiser":
            return True  # one part with the same name
        return self.parts or (self.name == "kohya" and family in ("sd1", "sd2"))

    def _path(self, path: str) -> str:
        return path if self.dotted else path.replace(".", "_")

    def _prefix(self, family: str, component: str) -> str:
        if self.name in _TEXT_NUMBERS and component != "denoiser":
            number = _TEXT_NUMBERS[self.name].get((family, component), _TEXT_NUMBERS["kohya"].get((family, component)))
            return f"lora_te{number}_"
        if self.name == "peft":
            return PEFT_PREFIX
        if self.name == "comfy":
            return PLACES[component].removeprefix("model.")
        if self.name == "onetrainer" and DIFFUSERS[family]["denoiser"] == "transformer":
            return "lora_transformer_"
        return f"{DIFFUSERS[family][component]}." if self.dotted else "lora_unet_"


# What trainers call their text encoders.
_TEXT_NUMBERS: Final[Mapping[str, Mapping[tuple[str, str], Any]]] = {
    "kohya": {
        ("sd1", "clip"): "",
        ("sd2", "clip"): "",
        ("sdxl", "clip"): 1,
        ("sdxl", "clip_2"): 2,
        ("sd3", "clip"): 1,
        ("sd3", "clip_2"): 2,
        ("sd3", "t5"): 3,
        ("flux", "clip"): 1,
        ("flux", "t5"): 3,
    },
    "onetrainer": {("flux", "t5"): 2},
}

_KOHYA: Final = Format("kohya", "sd-scripts, stable-diffusion-webui, ComfyUI", False, False, True, False)
_DIFFUSERS: Final = Format("diffusers", "diffusers and peft", True, True, False, True)
FORMATS: Final = {
    format.name: format
    for format in (
        _KOHYA,
        _DIFFUSERS,
        Format("ai-toolkit", "AI-Toolkit: for SD 3 and FLUX as diffusers, for others as kohya", True, True, True, True),
        Format("peft", "peft: a folder with a config, of one network", True, True, False, True),
        Format("comfy", "ComfyUI", False, False, True, True),
        Format("onetrainer", "OneTrainer", False, True, True, False),
    )
}


def format_of(name: str, family: str) -> Format:
    """The format of that name for a family.

    Raises:
        BadArgument: There is none.
    """
    check.one_of("format", name, tuple(FORMATS))
    if name == "ai-toolkit" and family in ("sd1", "sd2", "sdxl"):
        return _KOHYA
    return FORMATS[name]


# ---- what a file holds under a stem ---------------------------------------------------------------------


def in_order(unit: Unit, rows: Floats) -> Floats:
    """Rows in the model's order as the format has them."""
    return swap_halves(rows) if unit.part is not None and unit.part.swaps else rows


def pair_tensors(format: Format, unit: Unit, module: Module, pair: Pair) -> dict[str, Floats]:
    """A LoRA, by keys."""
    ones = (1,) * len(module.kernel())
    if format.peft:
        pair = pair.folded()
    up = in_order(unit, pair.up).reshape(-1, pair.rank, *ones)
    if format.peft and module.form == TABLE:  # peft's lie as of the transposed table
        return {f"{unit.stem}.lora_embedding_A": up.T, f"{unit.stem}.lora_embedding_B": pair.down.T}
    down = pair.down.reshape(pair.rank, pair.down.shape[1] // module.taps, *module.kernel())
    if format.peft:
        return {f"{unit.stem}.lora_A.weight": down, f"{unit.stem}.lora_B.weight": up}
    alpha = np.array(pair.weight * pair.rank, np.float32)
    return {f"{unit.stem}.lora_down.weight": down, f"{unit.stem}.lora_up.weight": up, f"{unit.stem}.alpha": alpha}


def dense_tensors(format: Format, unit: Unit, module: Module, leaf: str, change: Floats) -> dict[str, Floats]:
    """A whole difference: of a matrix, a norm or a bias; (rows, columns) with 1 column for vectors.

    Raises:
        Unsupported: The format has no such thing.
    """
    rows = in_order(unit, change)
    if format.peft and leaf == "bias":
        return {f"{unit.stem}.lora_B.bias": rows.reshape(-1)}
    if not format.lycoris or format.peft:
        what = "a norm" if module.form == NORM else "a bias" if leaf == "bias" else "a whole difference"
        raise Unsupported(
            f"{unit.stem}: changes {what}, which {format.name}'s format does not have; write it as kohya or comfy"
        )
    is_norm = module.form == NORM and format.name != "comfy"
    if leaf == "bias":
        return {f"{unit.stem}.{'b_norm' if is_norm else 'diff_b'}": rows.reshape(-1)}
    if module.form == NORM:
        path = f"{unit.stem}.{module.leaf}" if format.name == "comfy" and module.leaf != "weight" else unit.stem
        return {f"{path}.{'w_norm' if is_norm else 'diff'}": rows.reshape(-1)}
    columns = rows.shape[1] // module.taps
    return {f"{unit.stem}.diff": rows.reshape(rows.shape[0], columns, *module.kernel())}


_ROLES: Final = {
    "lora": {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight"},
    "loha": {role: f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {role: f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": {"diff": "diff"},
    "replacement": {"diff": "set_weight"},
    "ia3": {"weight": "weight"},
    "glora": {role: f"{role}.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
    "oft": {"blocks": "oft_blocks", "rescale": "rescale"},
    "boft": {"blocks": "oft_blocks", "rescale": "rescale"},
}
_RANKED: Final = {"lora": ("up", 1), "loha": ("w1_b", 0), "glora": ("a1", 1)}  # whose dimension the rank is


def keeps_kind(format: Format, change: Change) -> bool:
    """Whether the format can hold a change of all of a unit's rows as it is, instead of what it comes to."""
    if change.leaf == "bias" or change.kind not in _ROLES:
        return False
    if "magnitude" in change.factors:
        rows_only = not change.flags["magnitude_of_columns"] and change.kind == "lora" and "mid" not in change.factors
        return rows_only if format.peft else True
    if change.kind == "lora":
        return "mid" in change.factors and not format.peft
    return format.lycoris and change.kind != "replacement"


def kept_tensors(format: Format, unit: Unit, change: Change, weight: float) -> dict[str, Floats]:
    """A change of any kind under its own roles, multiplied by `weight`.

    Raises:
        Unsupported: The kind is not linear, and the weight is not 1.
    """
    scale, factors = change.scale, dict(change.factors)
    magnitude = factors.pop("magnitude", None)
    swaps = (unit.part is not None and unit.part.swaps) != change.swaps
    if swaps:
        raise Unsupported(f"{unit.stem}: a {change.kind} cannot exchange the halves of its rows; give a rank")
    if weight != 1:
        if magnitude is not None or change.kind in ("oft", "boft"):
            kind = "DoRA" if magnitude is not None else change.kind.upper()
            raise Unsupported(
                f"{unit.stem}: {kind} cannot be scaled by {weight:g} alone; name the model and give a rank"
            )
        if change.kind in ("diff", "ia3"):
            role = "diff" if change.kind == "diff" else "weight"
            factors[role] = factors[role] * np.float32(weight)
        else:
            scale *= weight
    out: dict[str, Floats] = {}
    if change.kind == "lokr":
        rank = next((factors[role].shape[0] for role in ("w2_b", "w1_b") if role in factors), None)
        if rank is None and scale != 1:  # no rank to divide an alpha by
            factors["w1"] = factors["w1"] * np.float32(scale)
        if rank is not None:
            out["alpha"] = np.array(scale * rank, np.float32)
    elif change.kind in _RANKED:
        role, axis = _RANKED[change.kind]
        out["alpha"] = np.array(scale * factors[role].shape[axis], np.float32)
    if change.kind == "ia3":
        out["on_input"] = np.array(float(change.flags["on_input"]), np.float32)
    constraint = change.flags["constraint"]
    if change.kind in ("oft", "boft"):
        out["alpha"] = np.array((constraint or 0.0) / change.rows, np.float32)
    ones = (1,) * len(change.module.kernel())
    for role, values in factors.items():
        if role in ("up", "rescale") or (role == "down" and "mid" in factors):
            values = values.reshape(*values.shape[:2], *ones) if role != "rescale" else values.reshape(-1, 1, *ones)
        elif role == "weight":
            values = values.reshape(1, -1, *ones) if ones else values
        out[_ROLES[change.kind][role]] = _with_kernel(role, values, change.module)
    if magnitude is not None:
        shape = (1, -1) if change.flags["magnitude_of_columns"] else (-1, 1)
        out["dora_scale"] = magnitude.reshape(*shape, *ones)
    if format.peft and magnitude is not None:
        up = factors["up"] * np.float32(scale)
        out = {
            "lora_A.weight": _with_kernel("down", factors["down"], change.module),
            "lora_B.weight": up.reshape(*up.shape[:2], *ones),
            "lora_magnitude_vector": magnitude.reshape(1, -1, *ones) if ones else magnitude.reshape(-1),
        }
    return {f"{unit.stem}.{role}": values for role, values in out.items()}


def _with_kernel(role: str, values: Floats, module: Module) -> Floats:
    """With the dimensions of a kernel of 1x1, which the engine leaves out."""
    if role == "down" and module.form == 1 and values.ndim == 2:
        return values.reshape(*values.shape, 1, 1)
    return values


# ---- metadata --------------------------------------------------------------------------------------------

_NETWORK: Final = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_BASE_VERSION: Final = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3_m", "flux": "flux1"}
_ARCHITECTURE: Final = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
    "sd3": "stable-diffusion-3-medium/lora",
    "flux": "flux-1-dev/lora",
}


def metadata(
    format: Format, family: str, told: Iterable[Mapping[str, str]], ranks: Iterable[int], kinds: Iterable[str]
) -> dict[str, str]:
    """What a written file says of itself: what all sources agree on, and what is true of it now."""
    sources = list(told)
    first = sources[0] if sources else {}
    same = {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in sources[1:]) and not key.startswith(_STALE)
    }
    all_ranks, all_kinds = set(ranks), set(kinds)
    out = {"modelspec.architecture": _ARCHITECTURE[family], **same, "format": "pt"}
    if not format.peft:
        rank = str(all_ranks.pop()) if len(all_ranks) == 1 else "Dynamic"
        module = "lycoris.kohya" if all_kinds - {"lora"} else _NETWORK.get(family, "networks.lora")
        out |= {"ss_network_module": module, "ss_network_dim": rank, "ss_network_alpha": rank}
        out.setdefault("ss_base_model_version", _BASE_VERSION[family])
    return out


# Of a file, not of what is in it.
_STALE: Final = ("ss_network_", "sshs_", "lora_adapter_metadata", "format", "modelspec.hash")
