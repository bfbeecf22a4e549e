"""LoRA files of every trainer for the tiny SD1 model, and models that hold the same change in their weights.

An update is a dict: a module's path as diffusers spells it ("unet.down_blocks.0....", "text_encoder.text_model....")
to factors by role, as reference_lora makes them. A spelling writes it as one trainer or tool would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import reference_lora
import tiny
from cases import SD1
from reference_lora import Factors

Update = dict[str, Factors]
Tensors = dict[str, "np.ndarray | Stored"]


# ---- the model's side ----------------------------------------------------------------------------------


@cache
def base(model: tiny.TinySD1 = SD1) -> dict[str, np.ndarray]:
    """All weights of the tiny model that LoRAs may change, by diffusers' names: float32."""
    parts = tiny.component_shapes(model)
    drawn = ((part, tiny.weights(part, shapes)) for part, shapes in parts.items() if part != "vae")
    return {f"{part}.{name}": values for part, weights in drawn for name, values in weights.items()}


def modules(kinds: str = "linear conv norm", parts: str = "unet text_encoder", model: tiny.TinySD1 = SD1) -> list[str]:
    """Paths of the modules of these kinds in these components; of tables of embeddings none."""
    dims = {"linear": 2, "conv": 4, "norm": 1}
    wanted = {dims[kind] for kind in kinds.split()}
    return [
        name.removesuffix(".weight")
        for name, values in base(model).items()
        if name.endswith(".weight")
        and values.ndim in wanted
        and not name.endswith(("token_embedding.weight", "position_embedding.weight"))
        and name.partition(".")[0] in parts.split()
    ]


def attention(parts: str = "unet text_encoder") -> list[str]:
    """The modules that every trainer knows: projections of attention."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
    return [path for path in modules("linear", parts) if path.endswith(ends)]


def random_update(
    paths: Iterable[str],
    make: reference_lora.Makes = reference_lora.lora,
    seed: int = 0,
    model: tiny.TinySD1 = SD1,
) -> Update:
    """An adapter of one kind on these modules; a difference of the bias only where there is one."""
    rng = np.random.default_rng(seed)
    update = {path: make(rng, base(model)[f"{path}.weight"]) for path in paths}
    for path, factors in update.items():
        if f"{path}.bias" not in base(model):
            factors.pop("diff_b", None)
    return update


def merged(
    *updates: tuple[Update, float], model: tiny.TinySD1 = SD1, weights: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """W + the sum of all changes, each from the pristine W: changed weights only, float32 rounded once."""
    weights = base(model) if weights is None else weights
    sums: dict[str, np.ndarray] = {}
    for update, multiplier in updates:
        for path, factors in update.items():
            for name, change in _changes(path, factors, multiplier, weights):
                sums[name] = sums.get(name, np.zeros(change.shape)) + change
    return {name: (weights[name].astype(np.float64) + change).astype(np.float32) for name, change in sums.items()}


def _changes(
    path: str, factors: Factors, multiplier: float, weights: Mapping[str, np.ndarray]
) -> Iterable[tuple[str, np.ndarray]]:
    weight = weights[f"{path}.weight"].astype(np.float64)
    yield f"{path}.weight", reference_lora.changed(weight, factors, multiplier) - weight
    bias = weights.get(f"{path}.bias")
    if bias is not None:
        yield f"{path}.bias", reference_lora.changed_bias(bias, factors, multiplier) - bias.astype(np.float64)


def write_model(folder: Path, like: Path, changed: Mapping[str, np.ndarray], model: tiny.TinySD1 = SD1) -> Path:
    """A diffusers folder as `like`, with some weights changed; what is the same is a link."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for entry in like.iterdir():
        part = entry.name
        mine = {name: values for name, values in changed.items() if name.startswith(f"{part}.")}
        if not mine:
            (folder / part).symlink_to(entry)
            continue
        (folder / part).mkdir()
        (folder / part / "config.json").symlink_to(entry / "config.json")
        (file,) = entry.glob("*.safetensors")
        all_of_it = {name: values for name, values in {**base(model), **mine}.items() if name.startswith(f"{part}.")}
        save_file(
            {name.removeprefix(f"{part}."): values for name, values in all_of_it.items()}, folder / part / file.name
        )
    return folder


def original(path: str, model: tiny.TinySD1 = SD1) -> str:
    """A module's path in single files, behind "model.diffusion_model." or "cond_stage_model.transformer."

    By the rules of the conversion of Stable Diffusion 1.x to XL, for any number of levels and blocks.
    """
    part, _, name = path.partition(".")
    if part.startswith("text_encoder"):
        return name
    levels, blocks = len(model.unet_widths), model.unet_blocks
    words = name.split(".")
    whole = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if name in whole:
        return whole[name]
    if words[0] == "add_embedding":
        return {"linear_1": "label_emb.0.0", "linear_2": "label_emb.0.2"}[words[1]]
    if words[0] == "time_embedding":
        return {"linear_1": "time_embed.0", "linear_2": "time_embed.2"}[words[1]]
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    if words[0] == "mid_block":
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(words[1:3])]
        rest = words[3:]
        return ".".join([f"middle_block.{place}", *([inner[rest[0]]] if words[1] == "resnets" else rest)])
    level, kind, n = int(words[1]), words[2], int(words[3])
    if words[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(blocks + 1) * (level + 1)}.0.op"
        at = f"input_blocks.{(blocks + 1) * level + n + 1}"
    else:
        attends = model.unet_attends[levels - 1 - level]
        if kind == "upsamplers":
            return f"output_blocks.{(blocks + 1) * level + blocks}.{2 if attends else 1}.conv"
        at = f"output_blocks.{(blocks + 1) * level + n}"
    return f"{at}.0.{inner[words[4]]}" if kind == "resnets" else ".".join([f"{at}.1", *words[4:]])


# ---- files ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as bytes, in a type that numpy does not have."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def as_bf16(values: np.ndarray) -> Stored:
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Stored("BF16", values.shape, rounded.astype(np.uint16).tobytes())


def of_bf16(stored: Stored) -> np.ndarray:
    bits = np.frombuffer(stored.data, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(stored.shape)


@cache
def e4m3_values() -> np.ndarray:
    """The 127 values of float8_e4m3fn that are not negative, by their bits (127 would be NaN)."""
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def as_e4m3(values: np.ndarray) -> Stored:
    nearest = np.abs(np.abs(values)[..., None] - e4m3_values()).argmin(axis=-1).astype(np.uint8)
    bits = np.where(values < 0, nearest | 0x80, nearest).astype(np.uint8)
    return Stored("F8_E4M3", values.shape, bits.tobytes())


def of_e4m3(stored: Stored) -> np.ndarray:
    bits = np.frombuffer(stored.data, np.uint8).reshape(stored.shape)
    return np.where(bits & 0x80, -1.0, 1.0) * e4m3_values()[bits & 0x7F]


def save(path: Path, tensors: Mapping[str, np.ndarray | Stored], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = bytearray()
    for name, values in tensors.items():
        if not isinstance(values, Stored):
            whole = np.ascontiguousarray(values) if values.ndim else values
            values = Stored(DTYPES[whole.dtype.name], whole.shape, whole.tobytes())
        header[name] = {
            "dtype": values.dtype,
            "shape": values.shape,
            "data_offsets": [len(data), len(data) + len(values.data)],
        }
        data += values.data
    path.write_bytes(safetensors_bytes(header, bytes(data)))
    return path


def safetensors_bytes(header: Mapping[str, object], data: bytes) -> bytes:
    """A file of any header, lies included."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def save_gguf(path: Path, tensors: Mapping[str, np.ndarray], alpha: float | None = None) -> Path:
    """A GGUF file; with an alpha an adapter as llama.cpp has them."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch="sd1")
    if alpha is not None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(np.atleast_1d(values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- spellings -----------------------------------------------------------------------------------------

Stem = Callable[[str], str]


def flat(path: str) -> str:
    return path.replace(".", "_")


def _inner(path: str) -> str:
    return path.partition(".")[2]


def _is_text(path: str) -> bool:
    return path.startswith("text_encoder")


def kohya(path: str) -> str:
    """F1: lora_unet_ and lora_te_ before diffusers' paths."""
    return ("lora_te_" if _is_text(path) else "lora_unet_") + flat(_inner(path))


def kohya_te1(path: str) -> str:
    return ("lora_te1_" if _is_text(path) else "lora_unet_") + flat(_inner(path))


def kohya_original(path: str) -> str:
    """F2's way: the original paths."""
    return ("lora_te1_" if _is_text(path) else "lora_unet_") + flat(original(path))


def numbered(path: str) -> str:
    """F3: te1 and te2 for SDXL's two encoders."""
    prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "unet": "lora_unet_"}
    return prefix[path.partition(".")[0]] + flat(_inner(path))


def comfy(path: str) -> str:
    """F12."""
    return ("text_encoders.clip_l.transformer." if _is_text(path) else "diffusion_model.") + original(path)


def single_file(path: str) -> str:
    return ("cond_stage_model.transformer." if _is_text(path) else "model.diffusion_model.") + original(path)


def diffusers(path: str) -> str:
    """F7."""
    return path


def wrapped(path: str) -> str:
    return f"base_model.model.{path}"


def lycoris(path: str) -> str:
    """F14: the wrapper's own prefix."""
    return f"lycoris_{flat(_inner(path))}"


def tensors_of(update: Update, stem: Stem = kohya) -> Tensors:
    """Roles behind stems, as kohya's and LyCORIS' trainers write."""
    return {f"{stem(path)}.{role}": values for path, factors in update.items() for role, values in factors.items()}


def _folded(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """down, and up with alpha / rank in it: exact where that is a power of two."""
    s = np.float32(reference_lora.scale_of(factors))
    return factors["lora_down.weight"], factors["lora_up.weight"] * s


def _pairs(update: Update, stem: Stem, down: str, up: str) -> Tensors:
    """Low-rank pairs without an alpha."""
    out: Tensors = {}
    for path, factors in update.items():
        out[stem(path) + down], out[stem(path) + up] = _folded(factors)
    return out


def peft(update: Update, stem: Stem = diffusers, adapter: str = "") -> Tensors:
    """F7: lora_A and lora_B, with an adapter's name between where one is given."""
    infix = f".{adapter}" if adapter else ""
    return _pairs(update, stem, f".lora_A{infix}.weight", f".lora_B{infix}.weight")


def _peft_without_weight(update: Update) -> Tensors:
    return _pairs(update, diffusers, ".lora_A", ".lora_B")


def peft_config(update: Update) -> dict[str, object]:
    """r, lora_alpha and patterns, as peft's LoraConfig has them, for one component."""
    patterns: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for path, factors in update.items():
        rank = factors["lora_down.weight"].shape[0]
        patterns["rank_pattern"][_inner(path)] = rank
        patterns["alpha_pattern"][_inner(path)] = reference_lora.scale_of(factors) * rank
    return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **patterns}


def peft_unfolded(update: Update, stem: Stem = diffusers) -> Tensors:
    """lora_A and lora_B with alpha left to a config."""
    out: Tensors = {}
    for path, factors in update.items():
        out[f"{stem(path)}.lora_A.weight"] = factors["lora_down.weight"]
        out[f"{stem(path)}.lora_B.weight"] = factors["lora_up.weight"]
    return out


def peft_with_alpha(update: Update) -> Tensors:
    """lora_A and lora_B beside kohya's .alpha."""
    return peft_unfolded(update, diffusers) | {f"{path}.alpha": factors["alpha"] for path, factors in update.items()}


def _part(update: Update, text: bool) -> Update:
    return {path: factors for path, factors in update.items() if _is_text(path) == text}


def write_peft_metadata(update: Update, path: Path) -> Path:
    """F7 with alpha and ranks in the file's metadata, prefixed by component as pipelines write them."""
    told = {
        f"{part}.{name}": value
        for part, text in (("unet", False), ("text_encoder", True))
        for name, value in peft_config(_part(update, text)).items()
        if _part(update, text)
    }
    return save(path, peft_unfolded(update, diffusers), {"lora_adapter_metadata": json.dumps(told)})


def write_peft_folder(update: Update, path: Path) -> Path:
    """F16: adapter_model.safetensors beside adapter_config.json; the component is not said."""
    folder = path.with_suffix("")
    save(folder / "adapter_model.safetensors", peft_unfolded(update, lambda p: f"base_model.model.{_inner(p)}"))
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(update)))
    return folder


def _old_diffusers(update: Update) -> Tensors:
    """F8."""
    text = _pairs(_part(update, True), diffusers, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    return text | _pairs(_part(update, False), diffusers, ".lora.down.weight", ".lora.up.weight")


def _processors(update: Update, prefix: str) -> Tensors:
    """F9: attention processors own the pairs; the text encoder's projections are called as the UNet's."""
    out: Tensors = {}
    for path, factors in update.items():
        module, _, projection = path.removesuffix(".0").rpartition(".")
        if _is_text(path):
            stem = f"{module}.to_{projection.removesuffix('_proj')}_lora"
        else:
            stem = f"{prefix}{_inner(module)}.processor.{projection}_lora"
        out[f"{stem}.down.weight"], out[f"{stem}.up.weight"] = _folded(factors)
    return out


def _onetrainer(update: Update) -> Tensors:
    """F13: kohya's keys, and what else OneTrainer puts into its files."""
    extra: Tensors = {
        "bundle_emb.mytoken.string_to_param.*": np.ones((2, 64), np.float32),
        "lora_te._aux.step": np.zeros(1, np.float32),
    }
    return tensors_of(update) | extra


def _llama_adapter(update: Update) -> dict[str, np.ndarray]:
    out = {}
    for path, factors in update.items():
        out[f"{single_file(path)}.weight.lora_a"], out[f"{single_file(path)}.weight.lora_b"] = _folded(factors)
    return out


@dataclass(frozen=True)
class Spelling:
    """How one trainer or tool writes an update, and which modules it can name."""

    write: Callable[[Update, Path], Path]
    convs: bool = True  # modules other than the projections of attention
    unet: bool = True
    text: bool = True

    def covers(self, path: str) -> bool:
        known = self.text if _is_text(path) else self.unet
        return known and (self.convs or path in attention())


def _plain(tensors: Callable[[Update], Tensors]) -> Callable[[Update, Path], Path]:
    return lambda update, path: save(path, tensors(update))


SPELLINGS: dict[str, Spelling] = {
    "kohya": Spelling(_plain(tensors_of)),
    "kohya-te1": Spelling(_plain(lambda update: tensors_of(update, kohya_te1))),
    "kohya-original": Spelling(_plain(lambda update: tensors_of(update, kohya_original))),
    "lycoris": Spelling(_plain(lambda update: tensors_of(update, lycoris))),
    "onetrainer": Spelling(_plain(_onetrainer)),
    "comfy": Spelling(_plain(lambda update: tensors_of(update, comfy))),
    "comfy-peft": Spelling(_plain(lambda update: peft(update, comfy))),
    "single-file": Spelling(_plain(lambda update: tensors_of(update, single_file))),
    "single-file-peft": Spelling(_plain(lambda update: peft(update, single_file))),
    "peft": Spelling(_plain(peft)),
    "peft-adapter-name": Spelling(_plain(lambda update: peft(update, adapter="default"))),
    "peft-other-adapter-name": Spelling(_plain(lambda update: peft(update, adapter="my-style"))),
    "peft-without-weight": Spelling(_plain(_peft_without_weight)),
    "peft-alpha": Spelling(_plain(peft_with_alpha)),
    "peft-metadata": Spelling(write_peft_metadata),
    "peft-wrapped": Spelling(_plain(lambda update: peft(update, wrapped))),
    "peft-bare-unet": Spelling(_plain(lambda update: peft(update, _inner, "default")), text=False),
    "peft-folder-unet": Spelling(write_peft_folder, text=False),
    "peft-folder-text": Spelling(write_peft_folder, unet=False),
    "old-diffusers": Spelling(_plain(_old_diffusers)),
    "processors": Spelling(_plain(lambda update: _processors(update, "unet.")), convs=False),
    "processors-bare": Spelling(_plain(lambda update: _processors(update, "")), convs=False),
    "gguf": Spelling(lambda update, path: save_gguf(path.with_suffix(".gguf"), tensors_of(update))),
    "gguf-peft": Spelling(lambda update, path: save_gguf(path.with_suffix(".gguf"), peft(update))),
    "gguf-llama.cpp": Spelling(
        lambda update, path: save_gguf(path.with_suffix(".gguf"), _llama_adapter(update)), convs=False
    ),
}

# DoRA's magnitudes of rows, by everyone who writes them.
MAGNITUDES: dict[str, str] = {
    "lycoris": "dora_scale",
    "peft": "lora_magnitude_vector",
    "peft-old": "lora_magnitude_vector.weight",
    "ai-toolkit": "magnitude",
}
