"""What the names of a file's tensors tell: its family, its parts, and which weights lose too much by quantisation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .tensor import Tensor

# Prefixes of the parts of a model, as single files and as diffusers folders have them; the longest that fits counts.
PARTS: Final = {
    "denoiser": ("model.diffusion_model.", "unet.", "transformer."),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.",
        "text_encoder.",
    ),
    "clip_g": (
        "conditioner.embedders.0.model.",
        "conditioner.embedders.1.model.",
        "text_encoders.clip_g.transformer.",
        "text_encoders.clip_g.",
        "text_encoder_2.",
    ),
    "clip_h": ("cond_stage_model.model.",),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoder_3."),
    "ema": ("model_ema.",),
}
_T5_OF_FLUX: Final = ("text_encoder_2.shared.", "text_encoder_2.encoder.")


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: As the engine calls it: "sd1".
        architecture: "general.architecture" of GGUF files, as ComfyUI-GGUF knows it.
        mark: Matches the name of a tensor that no family before it in the list has.
        sensitive: Matches names of matrices that stay in 16 bits: a few thousand numbers that act on every pixel.
    """

    name: str
    architecture: str
    mark: str
    sensitive: str

    def is_sensitive(self, name: str) -> bool:
        return re.search(self.sensitive, name) is not None


# Embeddings are rows that are looked up, and position and time have few of them; each error acts on all that follows.
_TEXT: Final = (
    r"token_embedding|position_embedding|positional_embedding|shared\.weight|embed_tokens|relative_attention_bias"
)
_UNET: Final = rf"{_TEXT}|time_embed|label_emb|add_embedding|emb_layers\.|time_emb_proj|first_stage_model\.|^vae\."
_DIT: Final = (
    rf"{_TEXT}|(^|\.)(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|x_embedder|t_embedder|y_embedder|"
    r"context_embedder|time_text_embed|pos_embed|norm_out|proj_out\.weight$)|first_stage_model\.|^vae\."
)

FAMILIES: Final = (
    Family("flux", "flux", r"(^|\.)(double_blocks\.0\.|single_transformer_blocks\.0\.)", _DIT),
    Family("sd3", "sd3", r"(^|\.)(joint_blocks\.0\.|transformer_blocks\.0\.ff_context\.|context_embedder\.)", _DIT),
    Family(
        "sdxl",
        "sdxl",
        r"(^|\.)(label_emb\.0\.0\.weight|add_embedding\.linear_1\.weight|conditioner\.embedders\.1\.)",
        _UNET,
    ),
    Family("sd2", "sd1", r"^cond_stage_model\.model\.", _UNET),
    Family(
        "sd1",
        "sd1",
        r"(^|\.)((input_blocks\.\d+|middle_block)\.1|(down_blocks\.\d+|mid_block)\.attentions\.\d+)\.proj_in\.weight",
        _UNET,
    ),
    Family("t5", "t5", r"encoder\.block\.0\.layer\.0\.SelfAttention\.", _TEXT),
    Family("clip", "clip", r"text_model\.encoder\.layers\.0\.|(^|\.)resblocks\.0\.", _TEXT),
    Family("vae", "vae", r"(^|\.)decoder\.(mid\.block_1|mid_block\.resnets\.0)\.", r""),
)


def recognise(tensors: Sequence[Tensor]) -> Family | None:
    """The first family whose mark one of the names bears; a 2-D proj_in tells SD 2 from SD 1."""
    for family in FAMILIES:
        for tensor in tensors:
            if re.search(family.mark, tensor.name):
                if family.name == "sd1" and len(tensor.shape) == 2:
                    return next(other for other in FAMILIES if other.name == "sd2")
                return family
    return None


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to; "other" where its name tells none."""
    if name.startswith(_T5_OF_FLUX):
        return "t5xxl"
    found = [(len(prefix), part) for part, prefixes in PARTS.items() for prefix in prefixes if name.startswith(prefix)]
    return max(found)[1] if found else "other"


def bare_name(name: str) -> str:
    """As files of the part alone have it."""
    prefixes = [prefix for of_part in PARTS.values() for prefix in of_part if name.startswith(prefix)]
    return name.removeprefix(max(prefixes, key=len, default=""))
