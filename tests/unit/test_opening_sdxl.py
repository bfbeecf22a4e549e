"""Opening SD 2.x and SDXL: single files, components apart, relatives that are refused, and the autoencoder's range."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sdxl
from cases import NETWORKS, SD2, SDXL
from closeness import assert_close
from safetensors.numpy import load_file, save_file
from tiny_sdxl import KOALA, SSD_1B

from sdcpp_py import BadArgument, BadFile, SDContext, Unsupported, _native

Tensors = dict[str, np.ndarray]
DECODE = next(case for case in NETWORKS if case.name == "sdxl-decode")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.TinySD1], Path]:
    """A tiny model in one file under the original names."""
    folder = tmp_path_factory.mktemp("single")

    def path(model: tiny.TinySD1) -> Path:
        file = folder / f"{'sdxl' if model.text_2_width else 'sd2'}.safetensors"
        return file if file.exists() else tiny_sdxl.write_single(model, file)

    return path


def edited(path: Path, to: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, to)
    return to


def keep(*prefixes: str, without: str = "") -> Callable[[Tensors], None]:
    """Only the tensors that begin so, without the first of these prefixes if asked for."""

    def change(tensors: Tensors) -> None:
        kept = {n.removeprefix(without): v for n, v in tensors.items() if n.startswith(prefixes)}
        tensors.clear()
        tensors.update(kept)

    return change


@pytest.mark.parametrize("model", [SD2, SDXL], ids=["sd2", "sdxl"])
def test_a_folder_and_a_single_file_are_the_same_model(
    model: tiny.TinySD1, single: Callable[..., Path], tiny_folder: Callable[..., Path]
) -> None:
    """Projections that the folder has apart are resident in one piece, and its last matrix the same way round."""
    with SDContext(tiny_folder(model)) as folder, SDContext(single(model)) as file:
        assert folder.info.family == ("sdxl" if model is SDXL else "sd2")
        assert folder.fingerprint() == file.fingerprint()


def test_sizes_that_models_were_trained_at(single: Callable[..., Path], tiny_folder: Callable[..., Path]) -> None:
    with SDContext(single(SDXL)) as context:
        assert context.info.native_size == 1024
    with SDContext(single(SD2)) as context:
        assert (context.info.native_size, context.info.prediction) == (512, "eps")
    with SDContext(single(SD2), prediction="v") as context:
        assert (context.info.native_size, context.info.prediction) == (768, "v")
    with SDContext(tiny_folder(SDXL)) as context:
        assert context.info.native_size == 64  # as its config says


@pytest.mark.parametrize("apart", ["folder", "original", "bare"])
def test_components_of_sdxl_given_apart(
    apart: str, single: Callable[..., Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """From a diffusers folder, from another checkpoint, and by the names of one encoder's own file."""
    only_unet = edited(single(SDXL), tmp_path / "unet.safetensors", keep("model.diffusion_model."))
    with pytest.raises(BadFile, match="clip_l="):
        SDContext(only_unet)
    folder = tiny_folder(SDXL)
    files = {"vae": folder / "vae", "clip_l": folder / "text_encoder", "clip_g": folder / "text_encoder_2"}
    if apart == "original":
        files = dict.fromkeys(files, single(SDXL))
    if apart == "bare":
        prefix = "conditioner.embedders.1.model."
        files["clip_g"] = edited(single(SDXL), tmp_path / "g.safetensors", keep(prefix, without=prefix))
    with pytest.raises(BadFile, match="clip_g="):
        SDContext(only_unet, vae=files["vae"], clip_l=files["clip_l"])
    with SDContext(only_unet, **files) as context, SDContext(single(SDXL)) as whole:
        assert context.fingerprint() == whole.fingerprint()


def test_components_of_sd2_given_apart(
    single: Callable[..., Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    only_unet = edited(single(SD2), tmp_path / "unet.safetensors", keep("model.diffusion_model."))
    with pytest.raises(BadFile, match="clip_h="):
        SDContext(only_unet)
    folder = tiny_folder(SD2)
    with SDContext(single(SD2)) as whole:
        for clip in (folder / "text_encoder", single(SD2)):
            with SDContext(only_unet, vae=folder / "vae", clip_h=clip) as context:
                assert context.fingerprint() == whole.fingerprint()


def test_a_folder_in_shards(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As diffusers and transformers save what is larger than their limit: an index and its files."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_folder(SDXL), folder)
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        whole = folder / component / f"{stem}.safetensors"
        tensors = load_file(whole)
        names = sorted(tensors)
        whole.unlink()
        places: dict[str, str] = {}
        for i in range(3):
            file = f"{stem}-{i + 1:05}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names[i::3]}, folder / component / file)
            places |= dict.fromkeys(names[i::3], file)
        index = {"metadata": {}, "weight_map": places}
        (folder / component / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with SDContext(folder) as context, SDContext(tiny_folder(SDXL)) as want:
        assert context.fingerprint() == want.fingerprint()


def test_the_refiner_is_refused_by_its_name(single: Callable[..., Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        text = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        label = "model.diffusion_model.label_emb.0.0.weight"
        tensors[text] = tensors[text][:, :128].copy()
        tensors[label] = np.zeros((len(tensors[label]), 128 + 5 * 256), np.float32)

    with pytest.raises(Unsupported, match="refiner"):
        SDContext(edited(single(SDXL), tmp_path / "refiner.safetensors", change))


@pytest.mark.parametrize("model", [SSD_1B, KOALA], ids=["ssd-1b", "koala"])
def test_sdxl_with_blocks_removed(model: tiny.TinySD1, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """SSD-1B, Segmind Vega and KOALA are SDXL: from a folder, a single file, and a UNet alone under bare names."""
    single = tiny_sdxl.write_single(model, tmp_path / "single.safetensors")
    prefix = "model.diffusion_model."
    bare = edited(single, tmp_path / "bare.safetensors", keep(prefix, without=prefix))
    folder = tiny_folder(model)
    files = {"vae": folder / "vae", "clip_l": folder / "text_encoder", "clip_g": folder / "text_encoder_2"}
    with SDContext(folder, threads=1) as want:
        assert want.info.family == "sdxl"
        for path, parts in ((single, {}), (bare, files)):
            with SDContext(path, threads=1, **parts) as context:
                assert context.fingerprint() == want.fingerprint()


@pytest.mark.parametrize("part", ["0.in_layers.2", "0.", "1.", "1.norm", "1.transformer_blocks.0.attn2", "2."])
def test_half_a_middle_is_a_damaged_file(part: str, single: Callable[..., Path], tmp_path: Path) -> None:
    """And no model with blocks removed."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"model.diffusion_model.middle_block.{part}")]:
            del tensors[name]

    with pytest.raises(BadFile, match=r"weights (are|is) missing, first .*middle_block"):
        SDContext(edited(single(SDXL), tmp_path / "half.safetensors", change))


def test_small_sd1_models_have_no_middle(tmp_path: Path) -> None:
    """As BK-SDM-Small."""
    model = tiny.TinySD1(unet_middle="none")
    with SDContext(tiny_sdxl.write_single(model, tmp_path / "small.safetensors"), threads=1) as context:
        assert context.info.family == "sd1"
        context.generate("a cat", width=32, height=32, steps=1)


Q_PROJ = "text_model.encoder.layers.1.self_attn.q_proj"


def changed_folder(folder: Path, to: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy whose second text encoder is another."""
    shutil.copytree(folder, to)
    file = to / "text_encoder_2" / "model.safetensors"
    edited(file, file, change)
    return to


def test_parts_of_a_fused_weight_may_differ_in_type(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Then it is held in float32, in which all of them are exact."""

    def change(tensors: Tensors) -> None:
        name = f"{Q_PROJ}.weight"
        tensors[name] = tensors[name].astype(np.float16)

    case = next(case for case in NETWORKS if case.name == "sdxl-text")
    with SDContext(tiny_folder(SDXL)) as context:
        want = _native.probe_run(context._native, "text", **case.inputs)
    with SDContext(changed_folder(tiny_folder(SDXL), tmp_path / "mixed", change)) as context:
        types = {w["name"]: w["type"] for w in _native.probe_weights(context._native)}
        assert types["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"] == "f32"
        assert_close(_native.probe_run(context._native, "text", **case.inputs), want, tolerance=1e-3)


def test_a_part_of_a_fused_weight_is_missing_or_misshapen(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, name = tiny_folder(SDXL), f"{Q_PROJ}.weight"
    with pytest.raises(BadFile, match=r"1 of \d+ weights are missing, first .*resblocks\.1\.attn\.in_proj_bias"):
        SDContext(changed_folder(folder, tmp_path / "missing", lambda t: t.pop(f"{Q_PROJ}.bias")))
    with pytest.raises(BadFile, match=r"q_proj\.weight is 100x128 here, 128x128 in this architecture"):
        SDContext(changed_folder(folder, tmp_path / "misshapen", lambda t: t.update({name: t[name][:100].copy()})))


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_models_of_other_noise_are_refused(mark: str, single: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="EDM"):
        SDContext(edited(single(SDXL), tmp_path / "edm.safetensors", lambda t: t.update({mark: np.ones(1)})))


def test_a_file_may_say_that_it_predicts_v(single: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(single(SDXL)) | {"v_pred": np.zeros(0, np.float32)}
    save_file(tensors, tmp_path / "v.safetensors")
    with SDContext(tmp_path / "v.safetensors") as context:
        assert context.info.prediction == "v"


def test_sd2_for_768_pixels_is_told_by_one_bias(tmp_path: Path) -> None:
    """Of four levels, as only the real network has, with a layer's bias as wide as that network's."""
    model = tiny.TinySD1(
        unet_widths=(64, 64, 64, 64),
        unet_attends=(True, True, True, False),
        unet_blocks=2,
        head_size=64,
        open_clip=True,
    )
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = tiny_sdxl.single_tensors(model)
    for size, prediction in ((0.2, "v"), (0.02, "eps")):
        tensors[bias] = np.tile(np.float32([-size, size]), 32)
        save_file({name: np.ascontiguousarray(v) for name, v in tensors.items()}, tmp_path / "model.safetensors")
        with SDContext(tmp_path / "model.safetensors") as context:
            assert context.info.prediction == prediction


def test_clip_skip_counts_from_the_last_layer(tiny_folder: Callable[..., Path]) -> None:
    request: dict[str, Any] = {"width": 32, "height": 32, "steps": 1}
    for model, refused in ((SD2, (1, 4)), (SDXL, (3,))):
        with SDContext(tiny_folder(model)) as context:
            assert context.generate("a cat", **request).parameters.clip_skip == 2
            for skip in refused:
                with pytest.raises(BadArgument, match=f"clip_skip {skip}"):
                    context.generate("a cat", clip_skip=skip, **request)


def large_vae(model: tiny.TinySD1, folder: Path, dtype: str, *, force_upcast: bool) -> Path:
    """A folder whose autoencoder has activations of some 10^5, as SDXL's has; f16 ends at 65504."""
    tiny.write_folder(model, folder, dtype=dtype)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "decoder.conv_in.weight"
    tensors[name] = (tensors[name].astype(np.float16) * np.float16(2**17 / 4)).astype(dtype)
    if dtype == "float32":  # the same numbers as in f16
        tensors = {name: values.astype(np.float16).astype(np.float32) for name, values in tensors.items()}
    save_file(tensors, file)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": force_upcast}))
    return folder


@pytest.mark.parametrize("name", ["", "reference"], ids=["ours", "ggml's"])
def test_the_autoencoder_may_leave_the_range_of_f16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml's products with f16 weights, which other devices use, round what they multiply to f16."""
    monkeypatch.setenv("SDCPP_KERNELS", name)

    def decode(context: SDContext) -> np.ndarray:
        return _native.probe_run(context._native, DECODE.network, **DECODE.inputs)

    with SDContext(large_vae(SDXL, tmp_path / "f32", "float32", force_upcast=True)) as context:
        want = decode(context)
    with SDContext(large_vae(SDXL, tmp_path / "f16", "float16", force_upcast=True)) as context:
        assert_close(decode(context), want, tolerance=1e-6)
    # That of the folder which says that its autoencoder needs no care shows what would happen without it.
    with SDContext(large_vae(SDXL, tmp_path / "f16-as-told", "float16", force_upcast=False)) as context:
        assert np.isfinite(decode(context)).all() == (name != "reference")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("sdxl.safetensors", (30, 6.0, "dpm++2m", "karras", 1024)),
        ("sdxl_lightning_4step.safetensors", (4, 1.0, "euler", "simple", 1024)),
        ("SDXL-Lightning 8-step.safetensors", (8, 1.0, "euler", "simple", 1024)),
        ("Hyper-SDXL-1step.safetensors", (1, 1.0, "euler", "simple", 1024)),
        ("dreamshaperXL_turbo.safetensors", (4, 1.0, "euler_a", "simple", 1024)),
        ("sd_xl_turbo_1.0_fp16.safetensors", (4, 1.0, "euler_a", "simple", 512)),
        ("lcm-sdxl.safetensors", (4, 1.0, "lcm", "simple", 1024)),
        ("hyperrealism XL.safetensors", (30, 6.0, "dpm++2m", "karras", 1024)),
        ("20000steps.safetensors", (30, 6.0, "dpm++2m", "karras", 1024)),
    ],
)
def test_names_of_distilled_models_set_the_defaults(
    name: str, want: tuple[Any, ...], single: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(single(SDXL))
    with SDContext(tmp_path / name) as context:
        defaults = context._native.defaults()
        got = tuple(defaults[key] for key in ("steps", "cfg_scale", "sampler", "scheduler"))
        assert (*got, context.info.native_size) == want


def test_a_matrix_that_is_turned_may_be_quantised(single: Callable[..., Path], tmp_path: Path) -> None:
    """As it is in SDXL files of fewer bits: it means what its blocks do along the file's rows."""
    from sdcpp_py.weights import convert

    small, plain = tmp_path / "small.gguf", tmp_path / "plain.gguf"
    convert(single(SDXL), small, tensor_types=[(r"1\.model\.text_projection$", "q8_0")])
    convert(small, plain, tensor_types=[(r"1\.model\.text_projection$", "f32")])
    latents = []
    for path in (small, plain):
        with SDContext(path, threads=1) as context:
            (weight,) = [
                of for of in _native.probe_weights(context._native) if of["name"].endswith("1.model.text_projection")
            ]
            assert (weight["type"], weight["file_type"]) == ("f32", "q8_0" if path == small else "f32")
            context.generate("a cat", steps=1, width=64, height=64, seed=1)
            latents.append(_native.probe_latent(context._native))
    np.testing.assert_array_equal(*latents)
