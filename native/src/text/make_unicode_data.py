"""Writes unicode_data.h, the character tables of the tokenizers: python make_unicode_data.py > unicode_data.h

Needs `pip install unicodedata2==16.0.0 tokenizers`. Classes and normal forms are those of Unicode 16.0. Lower
case is asked of `tokenizers`, whose ids ours must equal: it maps each character by itself, and a final sigma
stays one. So are clusters: its normalisation of T5 takes a cluster of at most five bytes for its first character
where it knows that.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import unicodedata2 as unicode
from tokenizers.normalizers import Lowercase, Precompiled

CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
HANGUL = range(0xAC00, 0xD7A4)  # composed by rule


def ranges(values: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbours with the same value: first, last, value."""
    first = last = None
    for c in sorted(values):
        if first is not None and c == last + 1 and values[c] == values[first]:
            last = c
            continue
        if first is not None:
            yield first, last, values[first]
        first = last = c
    if first is not None:
        yield first, last, values[first]


def lower_runs() -> Iterator[tuple[int, int, int, int]]:
    """Runs of capitals one or two apart that go down by the same distance: first, last, step, distance."""
    lower = Lowercase()
    distance = {}
    for c in CHARACTERS:
        small = lower.normalize_str(c)
        if len(small) == 1 and small != c:
            distance[ord(c)] = ord(small) - ord(c)
    left = sorted(distance)
    while left:
        first = left[0]
        step = 1 if distance.get(first + 1) == distance[first] else 2
        run = [first]
        while distance.get(run[-1] + step) == distance[first]:
            run.append(run[-1] + step)
        yield first, run[-1], step, distance[first]
        left = [c for c in left if c not in set(run)]


def decompositions() -> Iterator[tuple[int, int, int]]:
    """Canonical pairs and single substitutes; the top bit marks those that a composition makes again."""
    for c in CHARACTERS:
        parts = unicode.decomposition(c).split()
        if not parts or parts[0].startswith("<") or ord(c) in HANGUL:
            continue
        again = unicode.normalize("NFC", "".join(chr(int(p, 16)) for p in parts)) == c
        first, second = (int(p, 16) for p in [*parts, "0"][:2])
        yield ord(c) | (again << 31), first, second


def t5_normalizer() -> Precompiled:
    """The table of normalisation in T5's vocabulary: bytes with their length, a varint, behind its name."""
    model = (Path(__file__).parents[3] / "sdcpp_py" / "data" / "t5_spiece.model").read_bytes()
    name = b"nmt_nfkc\x12"
    at, size, shift = model.index(name) + len(name), 0, 0
    while True:
        size |= (model[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if model[at - 1] < 0x80:
            return Precompiled(model[at : at + size])


def clusters() -> Iterator[tuple[str, dict[int, int]]]:
    """What joins its neighbours: superscript two becomes a plain one, with a mark in its cluster loses the mark."""
    normal, mark = t5_normalizer().normalize_str, "\u0316"  # of no character's normal form but its own
    yield "joins_previous", {ord(c): 0 for c in CHARACTERS if ord(c) > 0x7F and mark in normal("\u00b2" + mark + c)}
    yield "joins_next", {ord(c): 0 for c in CHARACTERS if ord(c) > 0x7F and mark in normal(c + "\u00b2" + mark)[1:]}
    changed = [c for c in CHARACTERS if len(c.encode()) < 4 and normal(c) != c]
    yield "stands_alone", {ord(c): 0 for c in changed if mark in normal(c + mark)}


def table(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> None:
    print(f"inline constexpr {kind} {name}[] = {{")
    line = "   "
    for row in rows:
        item = " {" + ",".join(f"0x{v:X}" if v > 9 else str(v) for v in row) + "},"
        if len(line + item) > 110:
            print(line)
            line = "   "
        line += item
    print(line)
    print("};\n")


def category(letter: str) -> dict[int, int]:
    return {ord(c): 0 for c in CHARACTERS if unicode.category(c)[0] == letter}


def main() -> None:
    assert unicode.unidata_version == "16.0.0"
    print("// Written by make_unicode_data.py from Unicode 16.0.0; licence: https://www.unicode.org/license.txt")
    print("// clang-format off\n#pragma once\n\n#include <cstdint>\n\nnamespace sd::unicode_data {\n")
    print("struct Range { uint32_t first, last; };")
    print("struct ClassRange { uint32_t first, last, combining_class; };")
    print("struct LowerRun { uint32_t first, last, step; int32_t distance; };")
    print("// The top bit of `character` says that the parts compose to it again.")
    print("struct Decomposition { uint32_t character, first, second; };\n")
    table("Range", "letters", [row[:2] for row in ranges(category("L"))])
    table("Range", "numbers", [row[:2] for row in ranges(category("N"))])
    combining = {ord(c): unicode.combining(c) for c in CHARACTERS if unicode.combining(c)}
    table("ClassRange", "combining", ranges(combining))
    runs = sorted(lower_runs())
    assert all(a[1] < b[0] for a, b in pairwise(runs)), "runs overlap, and are looked up by halving"
    table("LowerRun", "lower", runs)
    table("Decomposition", "decompositions", decompositions())
    for name, characters in clusters():
        table("Range", name, [row[:2] for row in ranges(characters)])
    print("} // namespace sd::unicode_data")


if __name__ == "__main__":
    main()
