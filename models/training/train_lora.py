"""Train one look as a small add-on to a frozen pipeline: LoRA or LoHa, in three file conventions.

    python train_lora.py --model runs/unet/pipeline --font NotoColorEmoji.ttf \\
        --look line --convention kohya --out loras/line.safetensors --minutes 6

The pictures are the glyphs in that look (data.LOOKS); the captions are the plain ones, so the
look depends on the add-on's strength alone. Conventions:

- ``kohya``: LoRA on linear layers, convolutions and the text encoder;
  ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``;
- ``diffusers``: LoRA on the linear layers of the UNet, ``unet.<layer>.lora_A.weight``, ``lora_B``;
- ``lycoris``: LoHa on the linear layers, W' = W + (w1_a w1_b) * (w2_a w2_b) alpha / rank;
  ``lora_unet_<layer>.hada_w1_a`` and so on.
"""

import argparse
import random
from pathlib import Path

import torch
from common import Clock, learning_rate
from data import LOOKS, load_glyphs, render_all, sample_caption
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from train_unet import encode, scheduler

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
KERNELS = ["conv1", "conv2", "conv_shortcut"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def add(pipe, convention, rank):
    """Insert the adapter; returns its trainable parameters."""
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    if convention == "lycoris":
        config = LoHaConfig(r=rank, alpha=rank, target_modules=LINEAR)
        inject_adapter_in_model(config, pipe.unet)
    else:
        layers = LINEAR + (KERNELS if convention == "kohya" else [])
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        pipe.unet.add_adapter(config)
        if convention == "kohya":
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT), pipe.text_encoder)
    parts = (pipe.unet, pipe.text_encoder)
    return [p for part in parts for p in part.parameters() if p.requires_grad]


def kohya_name(prefix, layer):
    """``down_blocks.0.attentions.0.proj_in`` to ``lora_unet_down_blocks_0_attentions_0_proj_in``."""
    if prefix == "lora_te" and not layer.startswith("text_model."):
        layer = "text_model." + layer
    return f"{prefix}_{layer.replace('.', '_')}"


def save(pipe, convention, rank, look, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if convention == "diffusers":
        layers = get_peft_model_state_dict(pipe.unet)
        StableDiffusionPipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)
        return
    endings = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    endings |= {n: n for n in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors = {}
    parts = {"lora_unet": pipe.unet}
    if convention == "kohya":
        parts["lora_te"] = pipe.text_encoder
    for prefix, part in parts.items():
        for key, value in get_peft_model_state_dict(part).items():
            ending = next(e for e in endings if key.endswith("." + e))
            name = kohya_name(prefix, key[: -len(ending) - 1])
            tensors[f"{name}.{endings[ending]}"] = value.detach().half().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(rank)).half()
    module = "networks.lora" if convention == "kohya" else "lycoris.kohya"
    metadata = {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": path.stem,
        "ss_base_model_version": "sd_v1",
        "ss_resolution": "(128, 128)",
        "ss_training_comment": f"{look} look of the small emoji model",
    }
    if convention == "lycoris":
        metadata["ss_network_args"] = '{"algo": "loha"}'
    elif convention == "kohya":
        metadata["ss_network_args"] = f'{{"conv_dim": "{rank}", "conv_alpha": "{rank}"}}'
    save_file(tensors, path, metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--font", required=True)
    parser.add_argument("--look", choices=LOOKS, required=True)
    parser.add_argument("--convention", choices=("kohya", "diffusers", "lycoris"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--plain-attention", action="store_true", help="do not compile fast_attention")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)

    glyphs = load_glyphs()
    pipe = StableDiffusionPipeline.from_pretrained(args.model)
    latents = encode(pipe.vae, LOOKS[args.look](render_all(glyphs, args.font)))
    if not args.plain_attention:
        from fast_attention import NarrowProcessor

        pipe.unet.set_attn_processor(NarrowProcessor())
    parameters = add(pipe, args.convention, args.rank)
    print(f"{sum(p.numel() for p in parameters):,} parameters")
    optimiser = torch.optim.AdamW(parameters, lr=args.peak, betas=(0.9, 0.99), weight_decay=0)
    kept = scheduler().alphas_cumprod
    snr = kept / (1 - kept)
    weight = snr.clamp(0.25, 5) / snr
    clock, step, smooth = Clock(args.minutes * 60), 0, None
    while clock.fraction < 1:
        rows = torch.randint(len(glyphs), (args.batch,)).tolist()
        captions = [sample_caption(glyphs[i], rng) for i in rows]
        ids = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True)
        t = ((torch.arange(args.batch) + torch.rand(args.batch)) * (1000 / args.batch)).long()
        noise = torch.randn(args.batch, 4, 16, 16)
        keep = kept[t].view(-1, 1, 1, 1)
        noisy = keep.sqrt() * latents[rows] + (1 - keep).sqrt() * noise
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(args.peak, step, clock.fraction, warmup=50)
        with torch.autocast("cpu", torch.bfloat16):
            context = pipe.text_encoder(torch.tensor(ids.input_ids)).last_hidden_state
            made = pipe.unet(noisy, t, context).sample
        loss = ((made.float() - noise).square().mean(dim=(1, 2, 3)) * weight[t]).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{clock.seconds:6.0f} s  step {step}  loss {smooth:.5f}", flush=True)
    save(pipe, args.convention, args.rank, args.look, args.out)


if __name__ == "__main__":
    main()
