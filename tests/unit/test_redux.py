"""FLUX.1 Redux: a picture's tokens behind the text's, against diffusers' stored answers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dit
import tiny_redux
from cases_dit import FLUX, PICTURE, REDUX, SD3
from closeness import assert_close

from sdcpp_py import BadArgument, BadFile, SDContext, Unsupported, _native

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dit.npz")
SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 2, "seed": 1}

Opens = Callable[..., SDContext]


@pytest.fixture(scope="module")
def redux(dit: Opens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SDContext]:
    files = tiny_redux.write(FLUX.context, tmp_path_factory.mktemp("redux"))
    with SDContext(dit(FLUX)._path, **files, threads=1, precision="f32") as context:
        yield context


def latent(context: SDContext, **request: Any) -> np.ndarray:
    context.generate(**{**SMALL, "prompt": "a heart", **request})
    return _native.probe_latent(context._native)


def test_a_run_matches_diffusers_stored_latent(redux: SDContext) -> None:
    """From a picture of another size by way of both networks to the latent."""
    assert redux.info.redux_size == tiny_redux.SIDE
    redux.generate(**REDUX.request())
    assert_close(_native.probe_latent(redux._native), GOLDEN["run-flux-redux"], tolerance=1e-4)


def test_strength_scales_the_pictures_tokens(redux: SDContext) -> None:
    """And differs from no picture even at 0: there are tokens to look at."""
    plain, whole, none = (
        latent(redux),
        latent(redux, redux_image=PICTURE),
        latent(redux, redux_image=PICTURE, redux_strength=0),
    )
    assert np.any(plain != whole)
    assert np.any(whole != none)
    other = PICTURE[::-1].copy()
    np.testing.assert_array_equal(none, latent(redux, redux_image=other, redux_strength=0))
    assert np.any(whole != latent(redux, redux_image=other))
    np.testing.assert_array_equal(latent(redux), plain)


def test_a_batch_varies_one_picture(redux: SDContext) -> None:
    """Guided, so that each is denoised twice."""
    request = {**SMALL, "redux_image": PICTURE, "cfg_scale": 2.0, "negative_prompt": "blue"}
    both = redux.generate("a heart", batch_size=2, **request)
    alone = redux.generate("a heart", **{**request, "seed": 2})
    assert np.abs(np.asarray(both[1]).astype(int) - np.asarray(alone).astype(int)).max() <= 1


def test_the_parameters_name_picture_and_files(redux: SDContext) -> None:
    parameters = redux.generate("a heart", redux_image=PICTURE, redux_strength=0.5, **SMALL).parameters
    assert (parameters.redux, parameters.clip_vision, parameters.redux_strength) == ("redux", "clip_vision", 0.5)
    assert all((parameters.redux_image_hash, parameters.redux_hash, parameters.clip_vision_hash))


@pytest.mark.parametrize("left", ["redux", "clip_vision"])
def test_one_file_of_the_two_is_not_enough(left: str, dit: Opens, tmp_path: Path) -> None:
    files = tiny_redux.write(FLUX.context, tmp_path)
    del files[left]
    with pytest.raises(BadFile, match=f"Redux needs two files, and one is missing; give .* as {left}="):
        SDContext(dit(FLUX)._path, **files)


def test_files_that_do_not_belong_together(dit: Opens, tmp_path: Path) -> None:
    files = tiny_redux.write(2 * FLUX.context, tmp_path)
    with pytest.raises(Unsupported, match="writes tokens of 64 features, but the transformer reads 32"):
        SDContext(dit(FLUX)._path, **files)
    with pytest.raises(BadFile, match="holds no image embedder of FLUX"):
        SDContext(dit(FLUX)._path, redux=files["clip_vision"], clip_vision=files["clip_vision"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings.position_embedding.weight": (8, 144)}, "8 positions of 14 pixels are no image tower"),
        ({"encoder.layers.1.mlp.fc2.weight": None}, "1 of .* weights are missing"),
        ({"embeddings.position_embedding.weight": None}, "embeddings.position_embedding is missing"),
    ],
    ids=["positions", "layer", "incomplete"],
)
def test_a_damaged_image_tower(
    change: dict[str, tuple[int, ...] | None], message: str, dit: Opens, tmp_path: Path
) -> None:
    files = tiny_redux.write(FLUX.context, tmp_path)
    tensors = dict(tiny_redux.vision())
    for name, shape in change.items():
        del tensors[f"vision_model.{name}"]
        if shape:
            tensors[f"vision_model.{name}"] = np.ones(shape, np.float32)
    tiny_dit.save(tensors, files["clip_vision"])
    with pytest.raises((BadFile, Unsupported), match=message):
        SDContext(dit(FLUX)._path, **files)


def test_what_cannot_be_varied_is_a_sentence(dit: Opens, redux: SDContext) -> None:
    for model in (FLUX, SD3):
        with pytest.raises(BadArgument, match="there is no Redux to look at it; open a FLUX"):
            dit(model).generate("a heart", redux_image=PICTURE, **SMALL)
    with pytest.raises(BadArgument, match="how much redux_image counts, which is missing"):
        redux.generate("a heart", redux_strength=0.5, **SMALL)
    with pytest.raises(BadArgument, match="redux_strength nan: must be a finite number"):
        redux.generate("a heart", redux_image=PICTURE, redux_strength=float("nan"), **SMALL)


def test_layouts_of_both_files_are_the_same(dit: Opens, redux: SDContext, tmp_path: Path) -> None:
    """As folders of diffusers and names inside of larger files have them."""
    files = {
        "clip_vision": tiny_dit.save(
            {name.removeprefix("vision_model."): values for name, values in tiny_redux.vision().items()},
            tmp_path / "bare.safetensors",
        ),
        "redux": tiny_dit.save(
            {f"image_embedder.{name}": values for name, values in tiny_redux.embedder(FLUX.context).items()},
            tmp_path / "embedder.safetensors",
        ),
    }
    with SDContext(dit(FLUX)._path, **files, threads=1, precision="f32") as context:
        assert context.fingerprint() == redux.fingerprint()
