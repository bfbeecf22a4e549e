"""Measure a model: autoencoder PSNR and how many prompts paint the named glyph.

    python evaluate.py --model runs/unet/pipeline --font NotoColorEmoji.ttf [--sheet samples.png]
    python evaluate.py --model ../emoji.gguf --font NotoColorEmoji.ttf

A diffusers folder is painted by diffusers, a file by sdcpp_py.

A prompt counts when, of all training glyphs, the named one has the least mean squared pixel
difference to the painted picture (128 x 128, values 0..1). Prompts and seed are fixed.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from data import HERE, load_glyphs, on_colour, render_all
from PIL import Image
from train_autoencoder import psnr

SEED = 7


def paint(pipe, prompts, steps, guidance, batch=20):
    """Prompts to float pictures [N, 128, 128, 3]; picture n starts from noise of seed SEED + n."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(SEED + start + n) for n in range(len(part))]
        pictures.append(
            pipe(
                part,
                height=128,
                width=128,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=noise,
                output_type="np",
            ).images
        )
    return np.concatenate(pictures)


class Engine:
    """A model file painted by sdcpp_py, in the form of a diffusers pipeline and of its autoencoder."""

    def __init__(self, path):
        from sdcpp_py import SDContext, _native

        self.context, self.native = SDContext(path), _native
        self.vae = self

    def __call__(self, prompts, height, width, num_inference_steps, guidance_scale, generator, output_type):
        pictures = [
            self.context.generate(
                prompt, width=width, height=height, steps=num_inference_steps, cfg_scale=guidance_scale,
                sampler="ddim", scheduler="ddim_uniform", seed=noise.initial_seed(),
            )
            for prompt, noise in zip(prompts, generator, strict=True)
        ]  # fmt: skip
        return SimpleNamespace(images=np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures]))

    def run(self, network, **inputs):
        return torch.from_numpy(self.native.probe_run(self.context._native, network, **inputs))

    def encode(self, pictures):
        moments = self.run("vae_encode", image=pictures.numpy())
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=moments[:, : moments.shape[1] // 2]))

    def decode(self, latent):
        return SimpleNamespace(sample=self.run("vae_decode", latent=latent.numpy()))


def nearest(painted, pictures):
    """Index of the closest training glyph for each painted picture."""
    flat = torch.from_numpy(pictures).flatten(1)
    return torch.cdist(torch.from_numpy(painted).float().flatten(1), flat).argmin(dim=1).tolist()


def contact_sheet(painted, columns=10):
    """One image of all pictures, row by row."""
    rows = -(-len(painted) // columns)
    sheet = np.ones((rows * 128, columns * 128, 3), np.float32)
    for n, picture in enumerate(painted):
        y, x = n // columns * 128, n % columns * 128
        sheet[y : y + 128, x : x + 128] = picture
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


def score(pipe, prompts, glyphs, pictures, steps, guidance):
    """(number of prompts whose glyph is nearest, contact sheet)."""
    painted = paint(pipe, prompts, steps, guidance)
    found = [glyphs[i]["name"] for i in nearest(painted, pictures)]
    for want, got in zip(prompts, found, strict=True):
        if want != got:
            print(f"  {want!r} looks most like {got!r}")
    return sum(a == b for a, b in zip(prompts, found, strict=True)), contact_sheet(painted)


def main():
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--font", required=True)
    parser.add_argument("--sheet")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--first", type=int, default=200, help="use only the first so many prompts")
    args = parser.parse_args()
    glyphs = load_glyphs()
    pictures = on_colour(render_all(glyphs, args.font))
    bytes_ = torch.from_numpy((pictures * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    prompts = json.loads((HERE / "eval_prompts.json").read_text())[: args.first]
    if Path(args.model).is_file():
        pipe = Engine(args.model)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
    print(f"autoencoder: {psnr(pipe.vae, bytes_):.2f} dB")
    right, sheet = score(pipe, prompts, glyphs, pictures, args.steps, args.guidance)
    print(f"named glyph is nearest in {right} of {len(prompts)}")
    if args.sheet:
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
