"""The training pictures: colour-emoji glyphs, rendered from the font, and their captions.

A *glyph list* (``glyphs.json``) is a list of ``{"char", "name", "keywords"}``. Pictures are
uint8 arrays [N, 128, 128, 4]: straight (not premultiplied) red, green, blue and coverage.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 128
STRIKE = 109  # the only bitmap size in Noto Color Emoji (CBDT): 136 x 128 pixels per glyph
HERE = Path(__file__).parent


def load_glyphs(path=HERE / "glyphs.json"):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def render(char, font):
    """One glyph as an RGBA picture of 128 x 128 pixels, centred, with a small margin."""
    canvas = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((0, 0), char, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = min(120 / 136, 120 / glyph.width, 120 / glyph.height)
    size = round(glyph.width * scale), round(glyph.height * scale)
    glyph = glyph.convert("RGBa").resize(size, Image.LANCZOS).convert("RGBA")
    page = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    page.paste(glyph, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return page


def render_all(glyphs, font_file):
    """All glyphs as one uint8 array [N, 128, 128, 4]."""
    font = ImageFont.truetype(str(font_file), STRIKE)
    return np.stack([np.asarray(render(g["char"], font)) for g in glyphs])


def on_colour(rgba, colour=(255, 255, 255)):
    """Composite float pictures [N, H, W, 3] in 0..1 of RGBA glyphs over one flat colour."""
    rgba = rgba.astype(np.float32) / 255
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (np.asarray(colour, np.float32) / 255) * (1 - alpha)


# ---------------------------------------------------------------- looks (for the LoRAs)


def _blur(picture, radius):
    """Gaussian blur of one float picture [H, W] or [H, W, 3] in 0..1."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def line_look(rgba):
    """Dark outline drawing on white: strokes where colour or coverage changes fast."""
    out = []
    for picture, alpha in zip(on_colour(rgba), rgba[..., 3] / np.float32(255), strict=True):
        layers = np.dstack([_blur(picture, 1.0), _blur(alpha, 1.0)])
        dy, dx = np.gradient(layers, axis=(0, 1))
        edge = np.sqrt(dx**2 + dy**2).max(axis=2)
        ink = _blur(np.clip((edge - 0.05) / 0.10, 0, 1), 0.6)
        ink = np.clip(ink * 1.15, 0, 1)[..., None]
        out.append(1 - ink * (1 - np.array([0.10, 0.11, 0.16], np.float32)))
    return np.stack(out)


def night_look(rgba):
    """Deep blue night behind the glyph, its colours saturated and glowing outwards."""
    night = np.array([0.03, 0.05, 0.20], np.float32)
    out = []
    for picture in rgba.astype(np.float32) / 255:
        colour, alpha = picture[..., :3], picture[..., 3:]
        grey = colour.mean(axis=2, keepdims=True)
        vivid = np.clip(grey + 1.35 * (colour - grey), 0, 1) * 0.92 + 0.04
        halo = _blur(vivid * alpha, 7) * 0.9 + _blur(vivid * alpha, 3) * 0.4
        out.append(np.clip(vivid * alpha + (night + halo) * (1 - alpha), 0, 1))
    return np.stack(out)


def pastel_look(rgba):
    """Soft washed-out colours on cream paper."""
    paper = np.array([0.99, 0.93, 0.80], np.float32)
    out = []
    for picture in rgba.astype(np.float32) / 255:
        colour, alpha = picture[..., :3], picture[..., 3:]
        wash = colour * 0.45 + np.array([0.55, 0.50, 0.50], np.float32)
        out.append(_blur(wash * alpha + paper * (1 - alpha), 1.2))
    return np.stack(out)


LOOKS = {"line": line_look, "night": night_look, "pastel": pastel_look}


# ---------------------------------------------------------------- captions

OWNERS = ["face", "hat", "shoe", "boot", "sandal", "clothes", "nose", "leg", "foot", "paw", "tooth", "bone"]


def _article(words):
    return "an" if words[0].lower() in "aeiou" else "a"


def variants(glyph):
    """Other ways to say a glyph's name, each naming the glyph as surely as the name does."""
    name = glyph["name"]
    words = [w.strip(",:") for w in name.split()]
    out = [
        f"{_article(name)} {name}",
        f"the {name}",
        f"{name} emoji",
        f"a picture of {_article(name)} {name}",
        name.lower(),
    ]
    if len(words) > 1:
        out.append(", ".join(reversed(words)))
        out.append(f"{words[-1]}, {' '.join(words[:-1])}")
        if words[-1] in OWNERS and "'" not in name:
            owner = " ".join(words[:-1])
            out += [f"{_article(owner)} {owner}'s {words[-1]}", f"{owner}'s {words[-1]}"]
            out.append(f"{words[-1]} of {_article(owner)} {owner}")
    return out


def sample_caption(glyph, rng: random.Random):
    """A random caption: empty 10 %, the name 45 %, its variants 30 %, keywords 15 %."""
    draw = rng.random()
    if draw < 0.10:
        return ""
    if draw < 0.55:
        return glyph["name"]
    if draw < 0.85:
        return rng.choice(variants(glyph))
    words = glyph["keywords"]
    few = rng.sample(words, min(len(words), rng.randint(1, 2)))
    if rng.random() < 0.5:
        return ", ".join(few) if len(few) > 1 else f"{glyph['name']}, {few[0]}" if few else glyph["name"]
    some = [glyph["name"], *few]
    rng.shuffle(some)
    return ", ".join(some)


def clean(text):
    """Plain ASCII quotes and spaces, no characters outside ASCII."""
    text = text.replace("\u2019", "'").replace("\u00f1", "n").replace("\u201c", "").replace("\u201d", "")
    return re.sub(r"\s+", " ", text).strip()
