"""Join the hand-chosen glyph names with CLDR's characters and keywords.

    python select_glyphs.py --cldr <common/annotations/en.xml> --font <NotoColorEmoji.ttf>

Reads ``glyph_names.txt`` (chosen for distinct pictures and names: few faces and people, no
skin tones, flags, clock faces, signs or letters). Writes ``glyphs.json`` and the fixed draw of
200 evaluation prompts, ``eval_prompts.json``. Stops if two pictures are nearly the same.
"""

import argparse
import json
import random
import xml.etree.ElementTree as ET

import numpy as np
from data import HERE, clean, on_colour, render_all

LEAST_DISTANCE = 0.09  # root mean square pixel difference, colours in 0..1
FIRST, LAST = 0x2600, 0x1FAFF  # code points of pictures; below lie arrows and mathematics


def load_cldr(path):
    """English names to (char, keywords), for names of single code points."""
    found = {}
    for node in ET.parse(path).iter("annotation"):
        entry = found.setdefault(node.get("cp"), {})
        entry["name" if node.get("type") == "tts" else "keywords"] = node.text
    names = {}
    for char, entry in found.items():
        if len(char) == 1 and FIRST <= ord(char) <= LAST and "name" in entry:
            name = clean(entry["name"])
            words = [clean(w) for w in entry.get("keywords", "").split("|")]
            words = [w for w in words if w and w.isascii() and w.lower() != name.lower()]
            names[name] = char, words
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cldr", required=True)
    parser.add_argument("--font", required=True)
    args = parser.parse_args()
    names = (HERE / "glyph_names.txt").read_text().splitlines()
    cldr = load_cldr(args.cldr)
    glyphs = [{"char": cldr[n][0], "name": n, "keywords": cldr[n][1]} for n in names]

    flat = on_colour(render_all(glyphs, args.font)).reshape(len(glyphs), -1)
    for n in range(1, len(glyphs)):
        apart = np.sqrt(((flat[:n] - flat[n]) ** 2).mean(axis=1))
        if apart.min() < LEAST_DISTANCE:
            raise SystemExit(f"{names[n]!r} looks like {names[int(apart.argmin())]!r}")

    lines = ",\n".join(json.dumps(g, ensure_ascii=False) for g in glyphs)
    (HERE / "glyphs.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    chosen = random.Random(2024).sample(names, 200)
    (HERE / "eval_prompts.json").write_text(json.dumps(chosen, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
