"""Train the autoencoder: 128 x 128 pictures to 4 x 16 x 16 latents and back.

    python train_autoencoder.py --font NotoColorEmoji.ttf --out runs/vae --minutes 35

or on two cores ``OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_autoencoder.py ...``.
Resumes from ``<out>/state.pt``. Ends by writing ``<out>/vae``, a diffusers AutoencoderKL whose
latents have zero mean and unit deviation per channel after SD 1.x's fixed factor 0.18215.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Average, Clock, Workers, append_row, learning_rate, save_atomically
from data import LOOKS, load_glyphs, on_colour, render_all
from diffusers import AutoencoderKL
from muon import optimisers

SCALING = 0.18215
WIDTHS = (16, 32, 64, 96)


def build():
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=WIDTHS[0] // 4,  # as SD 1.x: 128 / 4 = 32; one channel a group would lose colours
        sample_size=128,
        scaling_factor=SCALING,
    )


def load_pictures(font):
    """Glyphs on white, then each look: uint8 tensors [N, 3, 128, 128]."""
    rgba = render_all(load_glyphs(), font)
    sets = [on_colour(rgba)] + [look(rgba) for look in LOOKS.values()]
    return [torch.from_numpy((s * 255).round().astype(np.uint8)).permute(0, 3, 1, 2) for s in sets]


def draw(sets, side, rng):
    """A random square crop [3, side, side]: 70 % glyphs on white, 30 % one of the looks, so that
    what the LoRAs paint can be decoded too."""
    chosen = sets[0] if rng.random() < 0.7 else sets[rng.integers(1, len(sets))]
    y, x = rng.integers(0, 129 - side, 2)
    return chosen[rng.integers(len(chosen))][:, y : y + side, x : x + side]


def differences(x):
    """Horizontal and vertical neighbour differences, [B, C, H, W-1] and [B, C, H-1, W]."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def picture_loss(made, wanted):
    """L1 + 2 L2 on the pixels (range -1..1), L1 at half and quarter size, L1 of the edges."""
    loss = F.l1_loss(made, wanted) + 2 * F.mse_loss(made, wanted)
    for factor in (2, 4):
        loss = loss + 0.5 * F.l1_loss(F.avg_pool2d(made, factor), F.avg_pool2d(wanted, factor))
    for a, b in zip(differences(made), differences(wanted), strict=True):
        loss = loss + 0.5 * F.l1_loss(a, b)
    return loss


def psnr(vae, pictures, batch=32):
    """Mean over pictures of 10 log10(1 / mean squared error), values in 0..1, clipped."""
    values = []
    with torch.no_grad():
        for part in pictures.split(batch):
            wanted = part.float() / 255
            made = vae.decode(vae.encode(wanted * 2 - 1).latent_dist.mean).sample
            error = ((made.clamp(-1, 1) / 2 + 0.5) - wanted).square().mean(dim=(1, 2, 3))
            values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


def standardise(vae, pictures):
    """Fold a per-channel shift and scale into quant_conv and post_quant_conv.

    With m, s the mean and deviation of latent channel c over the data, the new encoder gives
    (z - m) / (s * SCALING), so that latent * SCALING has mean 0 and deviation 1; the new
    decoder undoes it: its first 1 x 1 convolution takes W * (s * SCALING) and b + W m.
    """
    with torch.no_grad():
        z = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(32)])
        mean, scale = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3)) * SCALING
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:4] /= scale[:, None, None, None]
        quant.bias[:4] = (quant.bias[:4] - mean) / scale
        quant.bias[4:] -= 2 * scale.log()  # the log-variances move along
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= scale[None, :, None, None]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crops", type=float, default=0.6, help="share of the time on crops")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--kl", type=float, default=1e-4)
    args = parser.parse_args()
    workers = Workers()
    first = workers.rank == 0
    torch.manual_seed(0)  # the same first weights in every process

    sets = load_pictures(args.font)
    vae = build()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
    average = Average(vae)
    opts = optimisers(vae, args.peak)
    state_file, step, already = args.out / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        vae.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        average.shadow, average.updates = state["average"], state["updates"]
        step, already = state["step"], state["seconds"]
    torch.manual_seed(1000 * step + workers.rank)
    rng = np.random.default_rng((step, workers.rank))
    clock = Clock(args.minutes * 60, already)
    args.out.mkdir(parents=True, exist_ok=True)

    def losses(x):
        posterior = vae.encode(x).latent_dist
        made = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return picture_loss(made.float(), x) + args.kl * kl.float()

    last_save, smooth, fraction = clock.seconds, None, clock.fraction
    while fraction < 1:
        # quarter-size crops first, twice as many a step at half the cost; whole pictures later
        crops = fraction < args.crops
        count, side = (2 * args.batch, 64) if crops else (args.batch, 128)
        x = torch.stack([draw(sets, side, rng) for _ in range(count)]).float() / 127.5 - 1
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(x)
        loss.backward()
        fraction = workers.agree(vae.parameters(), clock.fraction)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(args.peak, step, fraction)
            opt.step()
        average.update(vae)
        step += 1
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0 and first:
            print(f"{clock.seconds:6.0f} s  step {step}  loss {smooth:.4f}", flush=True)
        if first and (clock.seconds - last_save > 120 or fraction >= 1):
            last_save = clock.seconds
            state = {"model": vae.state_dict(), "optimisers": [o.state_dict() for o in opts], "step": step}
            state |= {"average": average.shadow, "updates": average.updates, "seconds": clock.seconds}
            save_atomically(state, state_file)
            probe = build()
            probe.load_state_dict(average.shadow)
            quality = psnr(probe, sets[0][::12])
            append_row(args.out / "curve.csv", clock.seconds, step, smooth, quality)
            print(f"PSNR of averaged weights {quality:.2f} dB", flush=True)

    if not first:
        return
    vae.load_state_dict(average.shadow)
    standardise(vae, sets[0])
    vae.save_pretrained(args.out / "vae")
    print(
        f"glyphs {psnr(vae, sets[0]):.2f} dB",
        *(f"{n} {psnr(vae, s):.2f} dB" for n, s in zip(LOOKS, sets[1:], strict=True)),
    )


if __name__ == "__main__":
    main()
