"""A thousand switches of the LoRAs that ship, on the model that ships: the exact modes leave not one bit behind."""

from __future__ import annotations

from typing import Any

import pytest
import shipped

from sdcpp_py import SDContext, _native

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_kernels")]

SWITCHES, PAINT_EVERY = 1000, 40
RUN: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "cfg_scale": 3.0, "seed": 5}


def latent(context: SDContext, state: dict[str, float]) -> bytes:
    context.generate("a red heart", loras=state, **RUN)
    return _native.probe_latent(context._native).tobytes()


class Fresh:
    """What a context answers that was asked for one state only."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.fingerprints: dict[frozenset[tuple[str, float]], str] = {}

    def fingerprint(self, state: dict[str, float]) -> str:
        key = frozenset(state.items())
        if key not in self.fingerprints:
            with SDContext(threads=1, lora_mode=self.mode) as context:
                context.apply_loras(state)
                self.fingerprints[key] = context.fingerprint()
        return self.fingerprints[key]

    def latent(self, state: dict[str, float]) -> bytes:
        with SDContext(threads=1, lora_mode=self.mode) as context:
            return latent(context, state)


@pytest.mark.parametrize("mode", ["runtime", "restore"])
def test_no_bit_is_left_behind(mode: str) -> None:
    """The weights are compared after every switch, the picture's latent after every fortieth and the last."""
    fresh = Fresh(mode)
    painted = set()
    with SDContext(threads=1, lora_mode=mode) as context:
        for i, state in enumerate(shipped.switches(SWITCHES), start=1):
            context.apply_loras(state)
            assert context.fingerprint() == fresh.fingerprint(state), f"switch {i}, to {state}"
            if i % PAINT_EVERY == 0:
                picture = latent(context, state)
                assert picture == fresh.latent(state), f"switch {i}, to {state}"
                painted.add(picture)
        assert latent(context, {}) == fresh.latent({})
        assert context.fingerprint() == fresh.fingerprint({})
    assert len(painted) > SWITCHES / PAINT_EVERY / 2  # they act
    assert (len(set(fresh.fingerprints.values())) == 1) == (mode == "runtime")  # which never writes weights
