"""Draw the training curves: autoencoder PSNR, UNet loss, share of prompts painted right.

    python plot_curves.py --vae runs/vae/curve.csv --unet runs/unet/curve.csv --out curves.png

Each csv row is seconds, step, smoothed loss, and PSNR in dB or the share of 40 prompts.
"""

import argparse
import csv

from PIL import Image, ImageDraw

WIDTH, HEIGHT, EDGE = 300, 200, 34


def panel(title, xs, ys):
    """One line chart [HEIGHT, WIDTH] with its extremes written at the axes."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = EDGE, 24, WIDTH - 12, HEIGHT - 24
    low, high, end = min(ys), max(ys), max(xs)
    spread = (high - low) or 1
    points = [
        (left + (right - left) * x / end, bottom - (bottom - top) * (y - low) / spread)
        for x, y in zip(xs, ys, strict=True)
    ]
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="grey")
    draw.line(points, fill="#0055aa", width=2)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#0055aa")
    draw.text((left, 6), title, fill="black")
    draw.text((2, top), f"{high:.3g}", fill="black")
    draw.text((2, bottom - 10), f"{low:.3g}", fill="black")
    draw.text((right - 60, bottom + 6), f"{end / 60:.0f} minutes", fill="black")
    return image


def columns(path):
    with open(path) as file:
        return list(zip(*[[float(v) for v in row] for row in csv.reader(file)], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--unet", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    vae, unet = columns(args.vae), columns(args.unet)
    panels = [
        panel("autoencoder, PSNR in dB", vae[0], vae[3]),
        panel("UNet, weighted loss", unet[0], unet[2]),
        panel("prompts painted right, of 40", unet[0], unet[3]),
    ]
    strip = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for n, image in enumerate(panels):
        strip.paste(image, (n * WIDTH, 0))
    strip.save(args.out)


if __name__ == "__main__":
    main()
