"""Train the UNet and the text encoder together on precomputed latents.

    python train_unet.py --font NotoColorEmoji.ttf --vae runs/vae/vae --tokenizer tokenizer \\
        --out runs/unet --minutes 65

or, on two cores, ``OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train_unet.py ...``.
Resumes from ``<out>/state.pt``; writes ``<out>/pipeline`` (a diffusers StableDiffusionPipeline
folder of the averaged weights) every twelve minutes and at the end.

Noise follows SD 1.x: 1000 steps, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012); the UNet
predicts the noise. The loss is weighted by clamp(SNR, 1/4, 5) / SNR: the upper bound is T. Hang
et al., arXiv:2303.09556; the lower one keeps the text's part in the noisiest steps, where the
caption alone says what to paint (in terms of the clean latent the weight is the clamp itself).
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import torch
from common import Average, Clock, Workers, append_row, learning_rate, save_atomically
from data import HERE, load_glyphs, on_colour, render_all, sample_caption
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from evaluate import score
from muon import optimisers
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from vocabulary import Vocabulary, text_config

WIDTHS = (64, 96, 128)
TEXT_WIDTH, TEXT_LAYERS = 128, 2


def build_unet():
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,  # diffusers' name for the number of heads, as in SD 1.x
        use_linear_projection=False,
    )


def scheduler():
    """SD 1.x's noise schedule, with DDIM as the default sampler."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode(vae, pictures):
    """Float pictures [N, 128, 128, 3] in 0..1 to scaled latents [N, 4, 16, 16] (posterior mean)."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    return z * vae.config.scaling_factor


def pipeline(vae, text, tokenizer, unet):
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_folder(pipe, folder):
    """Write beside and rename."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside)
    tokenizer_files = Path(pipe.tokenizer.name_or_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_files / name, beside / "tokenizer" / name)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--batch", type=int, default=24, help="pictures a step in each process")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--plain-attention", action="store_true", help="do not compile fast_attention")
    args = parser.parse_args()
    workers = Workers()
    first = workers.rank == 0
    torch.manual_seed(0)  # the same first weights in every process

    glyphs = load_glyphs()
    pictures = on_colour(render_all(glyphs, args.font))
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    latents = encode(vae, pictures)
    print(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f}")
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    vocabulary = Vocabulary(tokenizer, glyphs)
    prompts = json.loads((HERE / "eval_prompts.json").read_text())

    unet = build_unet()
    text = CLIPTextModel(text_config(len(vocabulary.used), TEXT_WIDTH, TEXT_LAYERS))
    print(f"UNet {sum(p.numel() for p in unet.parameters()):,} parameters;", len(vocabulary.used), "tokens used")
    if not args.plain_attention:
        from fast_attention import NarrowProcessor

        unet.set_attn_processor(NarrowProcessor())
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = Average(model, 0.998)
    opts = optimisers(model, args.peak)

    state_file, step, already = args.out / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        average.shadow, average.updates = state["average"], state["updates"]
        step, already = state["step"], state["seconds"]
    seed = 1000 * step + workers.rank
    rng = random.Random(seed)
    torch.manual_seed(seed)
    clock = Clock(args.minutes * 60, already)
    args.out.mkdir(parents=True, exist_ok=True)

    kept = scheduler().alphas_cumprod  # [1000]: share of the picture's variance left at step t
    snr = kept / (1 - kept)
    weight = snr.clamp(0.25, 5) / snr
    order, last_save, last_look, smooth = [], clock.seconds, clock.seconds, None
    while True:
        # every glyph once per pass, in random order
        while len(order) < args.batch:
            order += torch.randperm(len(glyphs)).tolist()
        rows, order = order[: args.batch], order[args.batch :]
        ids = vocabulary([sample_caption(glyphs[i], rng) for i in rows])
        x0 = latents[rows]
        # one time step from each of ``batch`` equal slices of 0..999
        t = ((torch.arange(args.batch) + torch.rand(args.batch)) * (1000 / args.batch)).long()
        t = t[torch.randperm(args.batch)]
        noise = torch.randn_like(x0)
        keep = kept[t].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * x0 + (1 - keep).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            made = unet(noisy, t, text(ids).last_hidden_state).sample
        loss = ((made.float() - noise).square().mean(dim=(1, 2, 3)) * weight[t]).mean()
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        fraction = workers.agree(model.parameters(), clock.fraction)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(args.peak, step, fraction)
            opt.step()
        average.update(model)
        step += 1
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        done = fraction >= 1
        if done and not first:
            break
        if step % 100 == 0 and first:
            print(f"{clock.seconds:6.0f} s  step {step}  loss {smooth:.5f}", flush=True)
        if first and (clock.seconds - last_save > 120 or done):
            last_save = clock.seconds
            state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts]}
            state |= {"average": average.shadow, "updates": average.updates}
            save_atomically(state | {"step": step, "seconds": clock.seconds}, state_file)
        if first and (clock.seconds - last_look > 720 or done):
            probe = nn.ModuleDict({"unet": build_unet(), "text": CLIPTextModel(text.config)})
            probe.load_state_dict(average.shadow)
            pipe = pipeline(vae, vocabulary.expand(probe["text"]), tokenizer, probe["unet"].eval())
            save_folder(pipe, args.out / "pipeline")
            few = prompts[:40]
            right, sheet = score(pipe, few, glyphs, pictures, steps=20, guidance=5.0)
            sheet.save(args.out / "samples.png")
            append_row(args.out / "curve.csv", clock.seconds, step, smooth, right / len(few))
            print(f"named glyph is nearest in {right} of {len(few)}", flush=True)
            last_look = clock.seconds
        if done:
            break


if __name__ == "__main__":
    main()
