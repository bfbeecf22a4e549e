"""Models whose weights torch saved, beside other files: the same as where safetensors hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch_files
from cases import SD1
from safetensors.numpy import load_file, save_file

from sdcpp_py import BadFile, Unsupported
from sdcpp_py.weights import convert, describe, open_source


def same(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values, name)


@pytest.fixture
def pickled(tiny_folder: Callable[[tiny.TinySD1], Path], tmp_path: Path) -> Path:
    """A diffusers folder that holds nothing but .bin files."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder(SD1), folder)
    for file in folder.rglob("*.safetensors"):
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch_files.save(file.with_name(f"{name}.bin"), load_file(file))
        file.unlink()
    return folder


@pytest.fixture
def want(tiny_folder: Callable[[tiny.TinySD1], Path], tmp_path: Path) -> Path:
    """The same model converted from safetensors."""
    convert(tiny_folder(SD1), tmp_path / "want.safetensors")
    return tmp_path / "want.safetensors"


def test_a_folder_of_pickles_becomes_the_same_file(pickled: Path, want: Path, tmp_path: Path) -> None:
    convert(pickled, tmp_path / "got.safetensors")
    same(tmp_path / "got.safetensors", want)
    assert describe(pickled).family == "sd1"
    assert not describe(pickled).paints


def test_some_components_as_pickles(
    pickled: Path, want: Path, tiny_folder: Callable[[tiny.TinySD1], Path], tmp_path: Path
) -> None:
    shutil.rmtree(pickled / "unet")
    shutil.copytree(tiny_folder(SD1) / "unet", pickled / "unet")
    convert(pickled, tmp_path / "got.safetensors")
    same(tmp_path / "got.safetensors", want)


def test_a_component_in_several_files(pickled: Path, want: Path, tmp_path: Path) -> None:
    whole = load_file_of(pickled / "unet" / "diffusion_pytorch_model.bin")
    (pickled / "unet" / "diffusion_pytorch_model.bin").unlink()
    where = {}
    for k in range(2):
        name = f"diffusion_pytorch_model-0000{k + 1}-of-00002.bin"
        part = dict(list(whole.items())[k::2])
        torch_files.save(pickled / "unet" / name, part)
        where |= dict.fromkeys(part, name)
    index = pickled / "unet" / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    convert(pickled, tmp_path / "got.safetensors")
    same(tmp_path / "got.safetensors", want)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../outside.bin"}}))
    with pytest.raises(BadFile, match=r"names the file '../../outside.bin', which is not in its own folder"):
        open_source(pickled)
    index.write_text("[1]")
    with pytest.raises(BadFile, match="no weight_map"):
        open_source(pickled)


def load_file_of(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as source:
        return {tensor.name: tensor.array() for tensor in source.tensors}


@pytest.mark.parametrize("model", ["safetensors", "ckpt"])
@pytest.mark.parametrize("part", ["safetensors", "pt", "folder"])
def test_components_of_any_kind(
    model: str, part: str, tiny_sd1: Path, tiny_folder: Callable[[tiny.TinySD1], Path], tmp_path: Path
) -> None:
    """Another autoencoder in the place of the model's own."""
    weights = load_file(tiny_sd1)
    others = {
        name.removeprefix("first_stage_model."): values * np.float32(0.5)
        for name, values in weights.items()
        if name.startswith("first_stage_model.")
    }
    vae, base = tmp_path / f"vae.{part}", tmp_path / f"base.{model}"
    if part == "folder":
        vae = tmp_path / "vae"
        vae.mkdir()
        halved = {k: v * np.float32(0.5) for k, v in load_file(next((tiny_folder(SD1) / "vae").glob("*.s*"))).items()}
        torch_files.save(vae / "diffusion_pytorch_model.bin", halved)
        shutil.copyfile(tiny_folder(SD1) / "vae" / "config.json", vae / "config.json")
    elif part == "pt":
        torch_files.save(vae, others)
    else:
        save_file(others, vae)
    if model == "ckpt":
        torch_files.save(base, weights)
    else:
        shutil.copyfile(tiny_sd1, base)
    convert(base, tmp_path / "got.safetensors", components={"vae": vae})
    got = load_file(tmp_path / "got.safetensors")
    denoiser = [name for name in weights if name.startswith("model.diffusion_model.")]
    assert denoiser
    for name in denoiser:
        np.testing.assert_array_equal(got[name], weights[name])
    prefix, theirs = ("vae.", halved) if part == "folder" else ("first_stage_model.", others)
    for name, values in theirs.items():
        np.testing.assert_array_equal(got[prefix + name], values)
    if part == "folder":
        assert not [name for name in got if name.startswith("first_stage_model.")]


def test_a_pickle_that_runs_programs_is_refused_by_its_own_name(pickled: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    file = pickled / "vae" / "diffusion_pytorch_model.bin"
    command = torch_files.call("os.system", b"(" + torch_files.text(f"touch {marker}") + b"t")
    torch_files.archive(file, torch_files.program(command), {})
    with pytest.raises(Unsupported, match=r"diffusion_pytorch_model\.bin: calls .*; it was not run"):
        convert(pickled, tmp_path / "got.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "got.safetensors").exists()


def test_what_is_no_autoencoder_is_told_by_the_name_that_was_given(tiny_sd1: Path, tmp_path: Path) -> None:
    torch_files.save(tmp_path / "odd.pt", {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(BadFile, match=r"odd\.pt: holds no .* that we know") as caught:
        convert(tiny_sd1, tmp_path / "got.safetensors", components={"vae": tmp_path / "odd.pt"})
    assert "sdcpp-" not in str(caught.value)
