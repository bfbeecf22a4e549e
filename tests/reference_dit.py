"""The independent truth for FLUX.1 and SD3: diffusers and transformers on the same tiny weights, in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cases_dit
import diffusers
import lora_dit
import numpy as np
import torch
import transformers

from sdcpp_py import _native
from sdcpp_py.files import data_dir

ENCODERS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}


def clip_row(text: str, pad: int) -> Any:
    ids = [49406, *_native.probe_clip_tokens(str(data_dir() / "clip_merges.txt"), text).tolist(), 49407]
    return torch.tensor([ids + [pad] * (77 - len(ids))])


def t5_row(text: str, length: int) -> Any:
    ids = [*_native.probe_t5_tokens(str(data_dir() / "t5_spiece.model"), text).tolist(), 1]
    return torch.tensor([ids + [0] * (length - len(ids))])


def tensor_of(rgb: np.ndarray) -> Any:
    """(height, width, 3) of 0..255 as (1, 3, height, width) of -1..1."""
    return torch.from_numpy(rgb.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)


class Truth:
    """A tiny model opened by diffusers."""

    def __init__(self, model: cases_dit.Model, folder: Path) -> None:
        self.model = model
        self.folder = lora_dit.family(model).write_folder(model, folder)
        self.is_flux = isinstance(model, cases_dit.TinyFlux)
        kind = diffusers.FluxTransformer2DModel if self.is_flux else diffusers.SD3Transformer2DModel
        self.transformer = kind.from_pretrained(self.folder / "transformer")
        self.vae = diffusers.AutoencoderKL.from_pretrained(self.folder / "vae")
        kinds = ENCODERS if not self.is_flux else {**ENCODERS, "text_encoder_2": "T5EncoderModel"}
        if not self.is_flux:
            kinds = {**kinds, "text_encoder": "CLIPTextModelWithProjection"}
        self.texts = {
            name: getattr(transformers, kind).from_pretrained(self.folder / name)
            for name, kind in kinds.items()
            if (self.folder / name).is_dir()
        }

    # ---- networks

    @torch.no_grad()
    def network(self, case: cases_dit.Case) -> np.ndarray:
        """What the probe should give for this case, in its shape."""
        given = {name: torch.from_numpy(values) for name, values in case.inputs.items()}
        if case.network == "vae_decode":
            return self.vae.decode(given["latent"]).sample.numpy()
        if case.network == "vae_encode":
            return self.vae.encode(given["image"]).latent_dist.parameters.numpy()
        if case.network in ("text", "pooled"):
            ids = given.get("ids", given.get("ids_2")).long()
            out = self.texts["text_encoder_2" if "ids_2" in given else "text_encoder"](ids, output_hidden_states=True)
            pooled = out.pooler_output if self.is_flux else out.text_embeds
            states = out.hidden_states[-int(given["clip_skip"][0])]
            return (pooled if case.network == "pooled" else states[None]).numpy()
        if not self.is_flux:
            return self.transformer(given["latent"], given["text"], given["pooled"], given["time"]).sample.numpy()
        pipe, x = diffusers.FluxPipeline, given["latent"]
        n, channels, height, width = x.shape
        out = self.transformer(
            pipe._pack_latents(x, n, channels, height, width),
            given["text"],
            given["pooled"],
            given["time"] / 1000,
            pipe._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32),
            torch.zeros(given["text"].shape[1], 3),
            given.get("guidance"),
        ).sample
        return pipe._unpack_latents(out, height * 8, width * 8, 8).numpy()

    # ---- whole runs

    @torch.no_grad()
    def states(self, text: str) -> tuple[Any, Any]:
        """Tokens and one vector."""
        if self.is_flux:
            pooled = self.texts["text_encoder"](clip_row(text, 49407)).pooler_output
            return self.texts["text_encoder_2"](t5_row(text, 512 if self.model.guidance else 256))[0], pooled
        clips = [
            self.texts[name](clip_row(text, pad), output_hidden_states=True)
            for name, pad in (("text_encoder", 49407), ("text_encoder_2", 0))
        ]
        tokens = torch.cat([out.hidden_states[-2] for out in clips], -1)
        tokens = torch.nn.functional.pad(tokens, (0, self.model.context - tokens.shape[-1]))
        t5 = self.texts.get("text_encoder_3")
        of_t5 = t5(t5_row(text, 256))[0] if t5 else torch.zeros(1, 256, self.model.context)
        return torch.cat([tokens, of_t5], 1), torch.cat([out.text_embeds for out in clips], -1)

    @torch.no_grad()
    def latent(self, rgb: Any) -> Any:
        """The mean of a picture's latent, as the transformer scales it."""
        config = self.vae.config
        return (self.vae.encode(rgb).latent_dist.mode() - config.shift_factor) * config.scaling_factor

    def pipe(self, name: str, scheduler: Any) -> Any:
        """diffusers' pipeline of that name; prompts come to it as states."""
        parts = dict(self.texts, transformer=self.transformer, vae=self.vae, scheduler=scheduler)
        encoders = ("text_encoder", "text_encoder_2") if self.is_flux else tuple(ENCODERS)
        parts |= {encoder: None for encoder in encoders if encoder not in parts}
        parts |= {encoder.replace("text_encoder", "tokenizer"): None for encoder in encoders}
        return getattr(diffusers, name)(**parts)

    def run(self, run: cases_dit.Run) -> np.ndarray:
        """The latent that diffusers' pipeline ends with."""
        request = run.request()
        width, height = request["width"], request["height"]
        noise = torch.randn((1, 16, height // 8, width // 8), generator=torch.Generator().manual_seed(request["seed"]))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder / "scheduler")
        if "shift" in request:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=request["shift"])
        pipe = self.pipe(run.pipeline, scheduler)
        pipe.set_progress_bar_config(disable=True)

        tokens, pooled = self.states(request["prompt"])
        if "redux_image" in request:
            import reference_redux

            tokens = reference_redux.with_picture(tokens, pooled, request["redux_image"], request["redux_strength"])
        arguments: dict[str, Any] = {
            "prompt_embeds": tokens,
            "pooled_prompt_embeds": pooled,
            "num_inference_steps": request["steps"],
            "width": width,
            "height": height,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(request["seed"]),
        }
        defaults = {"FluxFillPipeline": 30.0, "FluxControlPipeline": 10.0}
        arguments["guidance_scale"] = request.get("guidance", defaults.get(run.pipeline, 3.5))
        if not self.is_flux:
            other, other_pooled = self.states(request["negative_prompt"])
            arguments |= {"negative_prompt_embeds": other, "negative_pooled_prompt_embeds": other_pooled}
            arguments["guidance_scale"] = request["cfg_scale"]
        pack = getattr(pipe, "_pack_latents", None)
        if "Img2Img" in run.pipeline:
            arguments |= {"image": self.latent(tensor_of(request["init_image"])), "strength": request["strength"]}
        elif self.is_flux:
            arguments["latents"] = pack(noise, 1, 16, height // 8, width // 8)
        else:
            arguments["latents"] = noise
        if "Kontext" in run.pipeline:  # which takes the latent of a picture as well
            arguments |= {"image": self.latent(tensor_of(request["reference_image"])), "max_area": width * height}
        if "Fill" in run.pipeline:
            mask = torch.from_numpy((request["mask"] >= 128).astype(np.float32))[None, None]
            arguments |= {
                "image": (tensor_of(request["init_image"]) + 1) / 2,
                "mask_image": mask,
                "strength": request["strength"],
            }
        if "Control" in run.pipeline:
            pipe.prepare_image = lambda image, **_: image
            arguments["control_image"] = tensor_of(request["control_image"])
        encode = self.vae.encode  # of which these pipelines draw from the spread

        def mean_only(image: Any) -> Any:
            out = encode(image)
            out.latent_dist.sample = lambda *_, **__: out.latent_dist.mode()
            return out

        pipe.vae.encode = mean_only
        try:
            out = pipe(**arguments).images
        finally:
            self.vae.__dict__.pop("encode", None)
        return (pipe._unpack_latents(out, height, width, 8) if self.is_flux else out).numpy()


@cache
def truth(model: cases_dit.Model, folder: Path) -> Truth:
    return Truth(model, folder / f"{abs(hash(model)):x}")
