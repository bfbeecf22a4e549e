"""Tags and loras= to one list of uses, block weights, and reports."""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdcpp_py.errors import BadArgument, Internal, Unsupported
from sdcpp_py.lora.blocks import PRESETS, read_blocks
from sdcpp_py.lora.library import LoraLibrary
from sdcpp_py.lora.report import LoraReport
from sdcpp_py.lora.uses import LoraUse, lora_tags, multipliers, read_uses
from sdcpp_py.prompt import LoraTag, parse


@pytest.fixture
def library(tmp_path: Path) -> LoraLibrary:
    root = tmp_path / "loras"
    (root / "sub").mkdir(parents=True)
    for name in ("x.safetensors", "y.gguf", "sub/z.safetensors"):
        (root / name).write_bytes(b"x")
    (root / "same.safetensors").symlink_to(root / "x.safetensors")
    return LoraLibrary(root)


def of_prompt(library: LoraLibrary, prompt: str, **options: Any) -> list[tuple[str, float, float]]:
    uses = read_uses(library, tags=parse(prompt).loras, **options)
    return [(library.name_of(use.path), use.te, use.unet) for use in uses]


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a cat", []),
        ("<lora:x>", [("x", 1.0, 1.0)]),
        ("<lora:x:0.8>", [("x", 0.8, 0.8)]),
        ("<lora:x:0.5:1>", [("x", 0.5, 1.0)]),
        ("<lora:x:te=0.5:unet=1>", [("x", 0.5, 1.0)]),
        ("<lyco:y:-0.5>", [("y", -0.5, -0.5)]),
        ("<lora:x:0>", []),
        ("<lora:x:0:1>", [("x", 0.0, 1.0)]),
        ("<lora:y:1> and <lora:x:0.5>", [("x", 0.5, 0.5), ("y", 1.0, 1.0)]),
        ("<lora:x:0.25:1> <lora:x:0.5:-2>", [("x", 0.75, -1.0)]),
        ("<lora:x:0.25> <lora:same:0.5>", [("x", 0.75, 0.75)]),
        ("<lora:x:0.5> <lora:x:-0.5>", []),
        ("<lora:z:1> <lora:sub/z:1>", [("sub/z", 2.0, 2.0)]),
    ],
)
def test_tags_become_uses(library: LoraLibrary, prompt: str, want: list[tuple[str, float, float]]) -> None:
    assert of_prompt(library, prompt) == want


ENCODERS: list[tuple[str, str, dict[str, Any]]] = [
    ("sdxl", "<lora:x:te=0.5:te2=0.75:unet=1>", {"te": 0.5, "te2": 0.75, "unet": 1.0}),
    ("sdxl", "<lora:x:0.5:te2=0.5>", {"te": 0.5, "unet": 0.5}),
    ("sdxl", "<lora:x:0:te2=1>", {"te": 0.0, "te2": 1.0, "unet": 0.0}),
    ("sd3", "<lora:x:0.5:te3=0>", {"te": 0.5, "te3": 0.0, "unet": 0.5}),
    ("sd3", "<lora:x:0.5:te2=1:te3=0.25>", {"te": 0.5, "te2": 1.0, "te3": 0.25, "unet": 0.5}),
    ("flux", "<lora:x:0.5:te3=1>", {"te": 0.5, "te3": 1.0, "unet": 0.5}),
    # The same twice is the sum for each encoder; what is not said follows te.
    ("sdxl", "<lora:x:0.25> <lora:x:0.5:te2=1>", {"te": 0.75, "te2": 1.25, "unet": 0.75}),
    ("sdxl", "<lora:x:0.25:te2=0.5> <lora:x:0.5:te2=0.25>", {"te": 0.75, "unet": 0.75}),
]


@pytest.mark.parametrize(("family", "prompt", "want"), ENCODERS)
def test_text_encoders_by_themselves(library: LoraLibrary, family: str, prompt: str, want: dict[str, Any]) -> None:
    uses = read_uses(library, tags=parse(prompt).loras, family=family)
    assert multipliers(library, uses) == {"x": want}
    by_argument = read_uses(library, loras={"x": want}, family=family)
    assert by_argument == uses
    (tag,) = parse("".join(lora_tags(library, {"x": want}))).loras
    assert read_uses(library, tags=[tag], family=family) == uses
    both = {"te2": want["te"], "te3": want["te"], **want}
    assert {key: uses[0].native()[key] for key in both} == both


@pytest.mark.parametrize(
    ("family", "key", "told"),
    [("sd1", "te2", "CLIP-G"), ("sd2", "te3", "T5"), ("sdxl", "te3", "T5"), ("flux", "te2", "CLIP-G")],
)
def test_a_text_encoder_that_is_not_there_is_said(
    library: LoraLibrary, family: str, key: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sdcpp_py"):
        uses = read_uses(library, tags=parse(f"<lora:x:0.5:{key}=1>").loras, family=family)
    assert f"{key} is for {told}" in caplog.text
    assert multipliers(library, uses) == {"x": {"te": 0.5, "unet": 0.5}}


def test_case_53_the_same_twice_is_one_with_the_sum(library: LoraLibrary) -> None:
    assert of_prompt(library, "a <lora:x:0.8> b <lora:x:0.3>") == [("x", pytest.approx(1.1), pytest.approx(1.1))]


@pytest.mark.parametrize(
    ("loras", "want"),
    [
        ([("x", 0.5)], [("x", 0.5, 0.5)]),
        ({"x": 0.5, "y": {"te": 0.25, "unet": 1}}, [("x", 0.5, 0.5), ("y", 0.25, 1.0)]),
        (["x"], [("x", 1.0, 1.0)]),
        ([("x", {"te": 0.5})], [("x", 0.5, 0.5)]),
        ([("x", {"unet": 0.5})], [("x", 1.0, 0.5)]),
        ([], []),
        ((), []),
    ],
)
def test_the_argument_loras(library: LoraLibrary, loras: Any, want: list[tuple[str, float, float]]) -> None:
    uses = read_uses(library, loras=loras)
    assert [(library.name_of(use.path), use.te, use.unet) for use in uses] == want


def test_the_argument_adds_to_the_tags(library: LoraLibrary, tmp_path: Path) -> None:
    outside = tmp_path / "w.safetensors"
    outside.write_bytes(b"x")
    uses = read_uses(
        library, tags=parse("<lora:x:0.5>").loras, loras=[("x", 0.25), (outside, 1.0), (str(outside), 0.5)]
    )
    assert [(use.path.name, use.unet) for use in uses] == [("x.safetensors", 0.75), ("w.safetensors", 1.5)]


def test_a_tag_never_is_a_path(library: LoraLibrary, tmp_path: Path) -> None:
    outside = tmp_path / "w.safetensors"
    outside.write_bytes(b"x")
    with pytest.raises(BadArgument, match="path of the whole system"):
        read_uses(library, tags=[LoraTag(str(outside))])
    read_uses(library, loras=[(str(outside), 1)])
    with pytest.raises(BadArgument, match="path of the whole system"):
        read_uses(library, tags=[LoraTag(str(outside))], loras=[(str(outside), 1)])


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("x", "must be a list"),
        (3, "must be a list, .*not int"),
        ([("x", "1")], "'x': the multiplier '1': must be a finite number"),
        ([("x", float("nan"))], "multiplier .*nan.* must be a finite number"),
        ([("x", float("inf"))], "must be a finite number"),
        ([("x", True)], "must be a finite number"),
        ([("x", None)], "must be a finite number"),
        ([("x", 10**400)], "must be a finite number"),
        ([("x", 1, 2)], "is no LoRA; write"),
        ([(3, 1.0)], "named by text or a path, not int"),
        ([("x", {"tee": 1})], "'tee' is not known; there are: te, te2, te3, unet"),
        ([("x", {"te2": "a"})], "must be a finite number"),
        ([("x", {"te": "a"})], "must be a finite number"),
        ([("x", {"lbw": 3})], "lbw must be text"),
        ([("x", {"start": "a"})], "start 'a' must be a step"),
        ([("x", {"start": True})], "must be a step"),
        ([("x", {"start": 1.5})], "share of the steps, 0.0 to 1.0"),
        ([("x", {"stop": float("nan")})], "share of the steps"),
        ([("x", {"start": -1})], "0 or more"),
        ([("x", {"start": 5})], "no run yet"),
        ([("x", {"start": 0.8, "stop": 0.2})], "start 0.8 lies behind stop 0.2"),
        ([("x", 3e38), ("x", 3e38)], "add up to 6e"),
        (["nothing"], "no LoRA named"),
    ],
)
def test_bad_arguments(library: LoraLibrary, loras: Any, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        read_uses(library, loras=loras)


def test_pickles(library: LoraLibrary) -> None:
    assert library.folder is not None
    (library.folder / "old.pt").write_bytes(b"x")
    with pytest.raises(Unsupported, match="pickle"):
        read_uses(library, tags=parse("<lora:old>").loras)


def test_a_great_multiplier_is_worth_a_warning(library: LoraLibrary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdcpp_py"):
        read_uses(library, loras=[("x", 12)])
    assert "far beyond the usual" in caplog.text
    assert parse("<lora:x:12>").warnings


@pytest.mark.parametrize(
    ("times", "steps", "want"),
    [
        ({}, None, (0.0, 1.0)),
        ({"start": 0.2, "stop": 0.8}, None, (0.2, 0.8)),
        ({"start": 1.0}, None, (1.0, 1.0)),
        ({"start": 1}, 20, (0.0, 1.0)),
        ({"start": 0}, 20, (0.0, 1.0)),
        ({"start": 6}, 20, (0.25, 1.0)),
        ({"stop": 10}, 20, (0.0, 0.5)),
        ({"stop": 0}, 20, (0.0, 0.0)),
        ({"start": 5, "stop": 5}, 10, (0.4, 0.5)),
        ({"start": 50}, 20, (1.0, 1.0)),
        ({"stop": 50}, 20, (0.0, 1.0)),
    ],
)
def test_ranges_of_steps(
    library: LoraLibrary, times: dict[str, Any], steps: int | None, want: tuple[float, float]
) -> None:
    (use,) = read_uses(library, loras=[("x", times)], steps=steps)
    assert (use.start, use.stop) == want


def test_ranges_of_a_tag(library: LoraLibrary) -> None:
    (use,) = read_uses(library, tags=parse("<lora:x:1:start=6:stop=10>").loras, steps=20)
    assert (use.start, use.stop) == (0.25, 0.5)


def test_other_times_or_blocks_are_other_uses(library: LoraLibrary) -> None:
    uses = read_uses(
        library, loras=[("x", 1), ("x", {"te": 1, "stop": 0.5}), ("x", {"te": 1, "lbw": "NONE"}), ("x", 1)]
    )
    assert [(use.stop, use.unet, use.blocks != ()) for use in uses] == [(0.5, 1, False), (1, 2, False), (1, 1, True)]
    names = multipliers(library, uses)
    assert list(names) == ["x", "x (2)", "x (3)"]
    assert names["x"] == {"te": 1.0, "unet": 1.0, "start": 0.0, "stop": 0.5}


def test_the_order_of_tags_changes_no_bit(library: LoraLibrary) -> None:
    tags = [LoraTag(random.Random(i).choice("xyz"), i / 7, 1 / (i + 1)) for i in range(60)]
    want = read_uses(library, tags=tags)
    for seed in range(5):
        shuffled = random.Random(seed).sample(tags, len(tags))
        assert read_uses(library, tags=shuffled) == want


def test_ten_thousand_tags_are_quick(library: LoraLibrary) -> None:
    prompt = "".join(f"<lora:{'xyz'[i % 3]}:0.0001>" for i in range(10_000))
    started = time.perf_counter()
    uses = read_uses(library, tags=parse(prompt).loras)
    assert time.perf_counter() - started < 5
    assert [round(use.te, 9) for use in uses] == [0.3333, 0.3334, 0.3333]


def test_what_the_engine_gets(library: LoraLibrary) -> None:
    (use,) = read_uses(library, loras=[("x", {"te": 0.5, "unet": 1, "lbw": "OUTALL"})])
    native = use.native()
    assert native["path"].endswith(b"x.safetensors")
    assert (native["te"], native["unet"], native["start"], native["stop"]) == (0.5, 1.0, 0.0, 1.0)
    assert ("model.diffusion_model.middle_block", 0.0) in native["blocks"]
    assert LoraUse(use.path).native()["blocks"] == []


# ---- block weights -------------------------------------------------------------------------------------

SD1_LAYOUT = "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"


def factor(blocks: tuple[tuple[str, float], ...], weight: str) -> float:
    """The factor of the longest path above the weight, as the engine takes it."""
    fits = [(len(path), value) for path, value in blocks if not path or weight.startswith(f"{path}.")]
    return max(fits)[1] if fits else 1.0


def weight(block: str) -> str:
    if block == "MID":
        return "model.diffusion_model.middle_block.1.proj_in.weight"
    way, n = ("input", int(block[2:])) if block[0] == "I" else ("output", int(block[3:]))
    return f"model.diffusion_model.{way}_blocks.{n}.1.proj_in.weight"


BASE = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_seventeen_numbers(family: str) -> None:
    blocks = read_blocks(",".join(str(i / 10) for i in range(17)), family)
    assert factor(blocks, BASE) == 0.0
    assert factor(blocks, "model.diffusion_model.time_embed.0.weight") == 0.0
    assert [factor(blocks, weight(block)) for block in SD1_LAYOUT.split()] == [i / 10 for i in range(1, 17)]
    # Blocks without attention go with their neighbours.
    assert [factor(blocks, weight(b)) for b in ("IN00", "IN03", "IN06", "IN11", "OUT00")] == [0.1, 0.2, 0.4, 0.6, 0.8]


def test_block_1_is_not_block_11() -> None:
    blocks = read_blocks(",".join(["1"] * 25 + ["0.5"]), "sd1")
    assert blocks == (("model.diffusion_model.output_blocks.11", 0.5),)


def test_twenty_six_numbers() -> None:
    every = [f"IN{i:02}" for i in range(12)] + ["MID"] + [f"OUT{i:02}" for i in range(12)]
    blocks = read_blocks(" , ".join(str(i) for i in range(26)), "sd1")
    assert [factor(blocks, weight(block)) for block in every] == list(range(1, 26))
    assert factor(blocks, BASE) == 0


@pytest.mark.parametrize(
    ("n", "layout"),
    [
        (12, "IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
        (20, " ".join([f"IN{i:02}" for i in range(9)] + ["MID"] + [f"OUT{i:02}" for i in range(9)])),
    ],
)
def test_layouts_of_sdxl(n: int, layout: str) -> None:
    blocks = read_blocks(",".join(str(i) for i in range(n)), "sdxl")
    assert [factor(blocks, weight(block)) for block in layout.split()] == list(range(1, n))


@pytest.mark.parametrize(
    ("preset", "base", "on"),
    [
        ("NONE", 0, ""),
        ("INS", 1, "IN01 IN02 IN04"),
        ("IND", 1, "IN05 IN07 IN08"),
        ("INALL", 1, "IN01 IN02 IN04 IN05 IN07 IN08"),
        ("MIDD", 1, "IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06"),
        ("OUTD", 1, "OUT03 OUT04 OUT05 OUT06"),
        ("OUTS", 1, "OUT07 OUT08 OUT09 OUT10 OUT11"),
        ("outall", 1, "OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
    ],
)
def test_presets(preset: str, base: float, on: str) -> None:
    blocks = read_blocks(preset, "sd1")
    assert factor(blocks, BASE) == base
    assert [b for b in SD1_LAYOUT.split() if factor(blocks, weight(b)) == 1] == on.split()
    assert all(factor(blocks, weight(b)) in (0, 1) for b in SD1_LAYOUT.split())


def test_whole_presets() -> None:
    assert read_blocks("ALL", "sd1") == read_blocks("ALL", "sdxl") == ()
    assert read_blocks("ALL0.5", "sd1") == (("", 0.5),)
    assert read_blocks("NONE", "sdxl") == (("", 0.0),)
    for preset in PRESETS:
        assert read_blocks(preset, "sdxl") is not None


@pytest.mark.parametrize(
    ("text", "family", "message"),
    [
        ("OUTAL", "sd1", "is no preset; there are: NONE, ALL"),
        ("R", "sd1", "is no preset"),
        ("1", "sd1", "is no preset"),
        ("", "sd1", "is no preset"),
        ("1,1,1", "sd1", "has 3 numbers; this model's layouts have 17 or 26"),
        (",".join("1" * 17), "sdxl", "has 17 numbers; this model's layouts have 12 or 20"),
        (",".join(["1"] * 16 + ["R"]), "sd1", "'R' is no finite number"),
        (",".join(["1"] * 16 + ["nan"]), "sd1", "'nan' is no finite number"),
        (",".join(["1"] * 16 + [""]), "sd1", "'' is no finite number"),
        ("INS", "flux", "is no preset; there are: NONE, ALL, DOUBLE, SINGLE, ALL0.5"),
        ("DOUBLE", "sd3", "is no preset; there are: NONE, ALL, ALL0.5"),
        ("1,1,1", "flux", "has 3 numbers; this model's layouts have 57 or 58 or 61"),
        (",".join("1" * 17), "sd3", "has 17 numbers; this model's layouts have 25 or 39"),
        (",".join(["1"] * 60 + ["R"]), "flux", "'R' is no finite number"),
    ],
)
def test_bad_block_weights(text: str, family: str, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        read_blocks(text, family)


IN_FLUX = "model.diffusion_model."
DOUBLE = [f"{IN_FLUX}double_blocks.{i}.img_attn.qkv.weight" for i in range(19)]
SINGLE = [f"{IN_FLUX}single_blocks.{i}.linear1.weight" for i in range(38)]
AROUND = {
    "CLIP": ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"],
    "T5": ["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
    "IN": [f"{IN_FLUX}{name}.weight" for name in (
        "img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer"
    )],
    "OUT": [f"{IN_FLUX}final_layer.linear.weight"],
}  # fmt: skip


def test_layouts_of_flux() -> None:
    """61 as LoRA Block Weight orders them; 58 with one number for what lies around, and 57 with none."""
    blocks = read_blocks(",".join(str(i / 4) for i in range(61)), "flux")
    parts = [AROUND["CLIP"], AROUND["T5"], AROUND["IN"], *([w] for w in DOUBLE + SINGLE), AROUND["OUT"]]
    assert [{factor(blocks, w) for w in part} for part in parts] == [{i / 4} for i in range(61)]
    around = [w for part in AROUND.values() for w in part]
    blocks = read_blocks(",".join(str(i / 4) for i in range(58)), "flux")
    assert {factor(blocks, w) for w in around} == {0.0}
    assert [factor(blocks, w) for w in DOUBLE + SINGLE] == [i / 4 for i in range(1, 58)]
    blocks = read_blocks(",".join(str(i / 4) for i in range(57)), "flux")
    assert {factor(blocks, w) for w in around} == {1.0}
    assert [factor(blocks, w) for w in DOUBLE + SINGLE] == [i / 4 for i in range(57)]


@pytest.mark.parametrize("n", [24, 38])
def test_layouts_of_sd3(n: int) -> None:
    blocks = read_blocks(",".join(str(i / 4) for i in range(n + 1)), "sd3")
    joint = [f"model.diffusion_model.joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(n)]
    assert [factor(blocks, w) for w in joint] == [i / 4 for i in range(1, n + 1)]
    assert factor(blocks, "model.diffusion_model.x_embedder.proj.weight") == 0
    assert factor(blocks, "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight") == 0


def test_presets_of_transformers() -> None:
    for family in ("flux", "sd3"):
        assert read_blocks("all", family) == ()
        assert read_blocks("ALL0.5", family) == (("", 0.5),)
        assert read_blocks("NONE", family) == (("", 0.0),)
    double, single = read_blocks("DOUBLE", "flux"), read_blocks("single", "flux")
    assert {factor(double, w) for w in DOUBLE} == {factor(single, w) for w in SINGLE} == {1.0}
    assert {factor(double, w) for w in SINGLE} == {factor(single, w) for w in DOUBLE} == {0.0}
    assert factor(double, AROUND["IN"][0]) == 1.0


def test_block_weights_of_other_families_have_no_effect(library: LoraLibrary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdcpp_py"):
        (use,) = read_uses(library, tags=parse("<lora:x:1:lbw=INS>").loras, family="chroma")
    assert use.blocks == ()
    assert "lbw has no effect on chroma models" in caplog.text


# ---- reports -------------------------------------------------------------------------------------------

JSON = json.dumps(
    {
        "path": "/loras/pencil.safetensors",
        "base_model": "SD1",
        "settings": "",
        "formats": {"kohya": 264},
        "kinds": {"lora": 260, "loha": 4},
        "ranks": {"4": 4, "16": 260},
        "scale_min": 0.5,
        "scale_max": 1,
        "text_modules": 72,
        "unet_modules": 192,
        "applied": ["lora_te_a", "lora_unet_b"],
        "padded": [],
        "skipped": ["lora_unet_c: is 4x2048, where the weight is 4x768"],
        "unmatched": [f"key {i}" for i in range(9)],
        "absent": [],
        "warnings": ["[bold]not markup[/bold] \u001b[31m"],
        "metadata": {"ss_output_name": "pencil", "ss_tag_frequency": "x" * 10000},
    }
)


def test_a_report_is_read_and_written() -> None:
    report = LoraReport.from_json(JSON)
    assert report.ranks == {4: 4, 16: 260}
    assert report.scale_max == 1
    assert not report.is_complete
    assert LoraReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json(indent=None)) == json.loads(JSON)


def test_a_report_as_a_table() -> None:
    console = Console(width=100, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(LoraReport.from_json(JSON).table())
    text = console.export_text()
    for words in ("pencil.safetensors", "SD1", "192 in the denoiser", "72 in the text", "lora (260)", "0.5 to 1"):
        assert words in text
    for words in ("4x2048", "key 0", "and 4 more", "[bold]not markup[/bold]"):
        assert words in text
    assert "\x1b" not in text
    assert "xxxx" not in text


def test_a_report_of_little() -> None:
    report = LoraReport.from_json('{"path": "x", "scale_min": null, "scale_max": null, "newer": 1}')
    assert report == LoraReport("x")
    assert report.is_complete
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    assert "not said" in console.export_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": "x", "ranks": {"a": 1}}', "null"])
def test_a_report_that_is_none(text: str) -> None:
    with pytest.raises(Internal, match="please report it"):
        LoraReport.from_json(text)
