"""Sharpen the decoder of a finished autoencoder; the encoder, and so every latent, stays.

    python train_decoder.py --vae runs/vae/vae --font NotoColorEmoji.ttf --out runs/decoder --minutes 40

or on two cores ``OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_decoder.py ...``. Resumes
from ``<out>/state.pt`` and writes ``<out>/vae`` with averaged weights at every save. A UNet
trained on the old autoencoder's latents works with the new one unchanged.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Average, Clock, Workers, append_row, learning_rate, save_atomically
from diffusers import AutoencoderKL
from muon import optimisers
from torch import nn
from train_autoencoder import load_pictures, picture_loss, psnr

JITTER = 0.05  # deviation of the noise on unit-variance latents: what a UNet gets wrong


@torch.no_grad()
def latents_of(vae, pictures):
    """uint8 [N, 3, 128, 128] to unit-variance latents [N, 4, 16, 16]."""
    means = [vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(16)]
    return torch.cat(means) * vae.config.scaling_factor


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--font", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=2, help="pictures a step in each process")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    workers = Workers()
    first = workers.rank == 0

    vae = AutoencoderKL.from_pretrained(args.vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    sets = load_pictures(args.font)
    cache = args.out / "latents.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if not cache.exists() and first:
        save_atomically([latents_of(vae, s) for s in sets], cache)
    workers.wait()
    latents = torch.load(cache)

    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    average = Average(decoder)
    opts = optimisers(decoder, args.peak)
    state_file, step, already = args.out / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        decoder.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        average.shadow, average.updates = state["average"], state["updates"]
        step, already = state["step"], state["seconds"]
    rng = np.random.default_rng((step, workers.rank))
    torch.manual_seed(1000 * step + workers.rank)
    clock = Clock(args.minutes * 60, already)
    probe = AutoencoderKL.from_pretrained(args.vae)
    last_save, smooth, done = clock.seconds, None, False
    while not done:
        # 70 % glyphs on white, 30 % one of the looks
        which = np.where(rng.random(args.batch) < 0.7, 0, rng.integers(1, len(sets), args.batch))
        rows = rng.integers(len(sets[0]), size=args.batch)
        wanted = torch.stack([sets[k][n] for k, n in zip(which, rows, strict=True)]).float() / 127.5 - 1
        z = torch.stack([latents[k][n] for k, n in zip(which, rows, strict=True)])
        z = (z + JITTER * torch.randn_like(z)) / vae.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            made = vae.decode(z).sample
        loss = picture_loss(made.float(), wanted)
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        fraction = workers.agree(decoder.parameters(), clock.fraction)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(args.peak, step, fraction)
            opt.step()
        average.update(decoder)
        step += 1
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        done = fraction >= 1
        if first and (clock.seconds - last_save > 180 or done):
            last_save = clock.seconds
            state = {"model": decoder.state_dict(), "optimisers": [o.state_dict() for o in opts]}
            state |= {"average": average.shadow, "updates": average.updates}
            save_atomically(state | {"step": step, "seconds": clock.seconds}, state_file)
            probe.load_state_dict(average.shadow, strict=False)
            probe.save_pretrained(args.out / "vae")
            quality = psnr(probe, sets[0][::12])
            append_row(args.out / "curve.csv", clock.seconds, step, smooth, quality)
            print(f"{clock.seconds:6.0f} s  step {step}  loss {smooth:.4f}  PSNR {quality:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
