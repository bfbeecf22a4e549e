"""What a run promises: batches of single pictures, cancelling, masks, tiles, several contexts, several threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcpp_py import Cancelled, SDContext

RUN: dict[str, Any] = {"steps": 3, "cfg_scale": 4.0, "width": 64, "height": 48}


def array(image: Any) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpm++2m_sde"])
def test_picture_k_of_a_batch_is_the_picture_of_seed_plus_k(sd_ctx: SDContext, sampler: str) -> None:
    together = sd_ctx.generate("a cat", seed=5, batch_size=3, sampler=sampler, **RUN)
    alone = [sd_ctx.generate("a cat", seed=5 + k, sampler=sampler, **RUN) for k in range(3)]
    for one, of_batch in zip(alone, together, strict=True):
        # The order of sums in a product may depend on its size: a value on the edge may round the other way.
        assert np.abs(array(one).astype(int) - array(of_batch)).max() <= 1
        assert np.mean(array(one) == array(of_batch)) > 0.999


def test_the_same_request_gives_the_same_picture(sd_ctx: SDContext) -> None:
    first = sd_ctx.generate("a cat", seed=1, sampler="euler_a", **RUN)
    sd_ctx.generate("a dog", seed=2, **RUN)
    again = sd_ctx.generate("a cat", seed=1, sampler="euler_a", **RUN)
    np.testing.assert_array_equal(array(first), array(again))


def test_seed_prompt_and_negative_prompt_matter(sd_ctx: SDContext) -> None:
    base = array(sd_ctx.generate("a cat", seed=1, **RUN))
    for change in ({"seed": 2}, {"prompt": "a dog"}, {"negative_prompt": "a dog"}, {"rng": "cuda"}):
        other = {"prompt": "a cat", "seed": 1, **change}
        assert not np.array_equal(array(sd_ctx.generate(**other, **RUN)), base), change


def test_painting_leaves_the_weights_alone(sd_ctx: SDContext) -> None:
    before = sd_ctx.fingerprint()
    sd_ctx.generate("a cat", seed=1, **RUN)
    assert sd_ctx.fingerprint() == before


def test_on_step_sees_every_step_and_a_preview(sd_ctx: SDContext) -> None:
    seen = []

    def on_step(step: int, steps: int, preview: Any) -> None:
        seen.append((step, steps, preview().shape))

    sd_ctx.generate("a cat", seed=1, on_step=on_step, **RUN)
    assert seen == [(step, 3, (6, 8, 3)) for step in (1, 2, 3)]


def test_returning_false_cancels_and_the_context_stays_usable(sd_ctx: SDContext) -> None:
    want = array(sd_ctx.generate("a cat", seed=1, **RUN))
    with pytest.raises(Cancelled, match="step 2 of 3"):
        sd_ctx.generate("a cat", seed=1, on_step=lambda step, steps, preview: step < 2, **RUN)
    np.testing.assert_array_equal(array(sd_ctx.generate("a cat", seed=1, **RUN)), want)


def test_what_on_step_raises_comes_out(sd_ctx: SDContext) -> None:
    def on_step(step: int, steps: int, preview: Any) -> None:
        raise LookupError("from the callback")

    with pytest.raises(LookupError, match="from the callback"):
        sd_ctx.generate("a cat", seed=1, on_step=on_step, **RUN)


def test_a_mask_keeps_the_pixels_outside_it(sd_ctx: SDContext) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:32, 16:40] = 255
    out = array(sd_ctx.generate("a cat", seed=1, init_image=picture, mask=mask, strength=1.0, **RUN))
    np.testing.assert_array_equal(out[mask == 0], picture[mask == 0])
    assert np.mean(out[mask > 0] != picture[mask > 0]) > 0.5


def test_strength_decides_how_far_a_picture_moves(sd_ctx: SDContext) -> None:
    """Without any strength the picture only goes through the autoencoder."""
    picture = np.full((48, 64, 3), 90, np.uint8)
    run = {**RUN, "steps": 8}
    images = [
        array(sd_ctx.generate("a cat", seed=1, init_image=picture, strength=s, **run)).astype(float)
        for s in (0.0, 0.25, 1.0)
    ]
    moved = [np.abs(image - images[0]).mean() for image in images]
    assert moved[0] == 0 < moved[1] < moved[2]


def test_tiles_paint_nearly_the_same(sd_ctx: SDContext) -> None:
    """Norms see one tile at a time, so tiles are close to the whole and not equal to it."""
    run = {**RUN, "width": 128, "height": 96}
    whole = array(sd_ctx.generate("a cat", seed=1, **run)).astype(float)
    tiled = array(sd_ctx.generate("a cat", seed=1, vae_tile=64, **run)).astype(float)
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < 0.25 * whole.std()
    one = array(sd_ctx.generate("a cat", seed=1, vae_tile=128, **run)).astype(float)
    np.testing.assert_array_equal(one, whole)


def test_two_threads_may_share_a_context(sd_ctx: SDContext) -> None:
    want = {seed: array(sd_ctx.generate("a cat", seed=seed, **RUN)) for seed in (1, 2)}
    got: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda s=seed: got.update({s: array(sd_ctx.generate("a cat", seed=s, **RUN))}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        np.testing.assert_array_equal(got[seed], want[seed])


def test_contexts_live_side_by_side(sd_ctx: SDContext, tiny_sd1: Path) -> None:
    want = array(sd_ctx.generate("a cat", seed=1, **RUN))
    with SDContext(tiny_sd1, threads=1) as other:
        got = array(other.generate("a cat", seed=1, **RUN))
        np.testing.assert_array_equal(array(sd_ctx.generate("a cat", seed=1, **RUN)), want)
    assert np.abs(got.astype(int) - want).max() <= 1


def test_every_sampler_and_scheduler_paints(sd_ctx: SDContext) -> None:
    import sdcpp_py

    small = {**RUN, "width": 16, "height": 16}
    for sampler in sdcpp_py.samplers():
        assert array(sd_ctx.generate("a cat", seed=1, sampler=sampler, **small)).std() > 0, sampler
    for scheduler in sdcpp_py.schedulers():
        assert array(sd_ctx.generate("a cat", seed=1, scheduler=scheduler, **small)).std() > 0, scheduler
