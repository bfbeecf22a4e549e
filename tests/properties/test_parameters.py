"""A picture's text keeps everything, whatever the prompt holds."""

from hypothesis import given
from hypothesis import strategies as st

from sdcpp_py import Parameters
from sdcpp_py.image import RNGS, SAMPLERS, SCHEDULERS, format_parameters, parse_parameters

FORM = [
    "Negative prompt:",
    "\n",
    "Steps: 1, Sampler: Euler, Seed: 2",
    ": ",
    ",",
    '"',
    "\\",
    "Exact prompt: ",
    "a",
    " ",
    "\r",
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
prompts = texts | st.lists(st.sampled_from(FORM), max_size=8).map("".join)
sizes = st.integers(1, 99999)
amounts = st.floats(-1e9, 1e9)
pairs = st.tuples(st.integers(0, 99999), st.integers(0, 99999))


@st.composite
def parameters(draw: st.DrawFn) -> Parameters:
    size = draw(st.none() | st.tuples(sizes, sizes))

    def maybe(values):
        return draw(st.none() | values)

    return Parameters(
        prompt=draw(prompts),
        negative_prompt=draw(prompts),
        steps=maybe(sizes),
        sampler=maybe(st.sampled_from(sorted(SAMPLERS))),
        scheduler=maybe(st.sampled_from(sorted(SCHEDULERS))),
        cfg_scale=maybe(amounts),
        guidance_rescale=maybe(amounts),
        zero_snr=maybe(st.booleans()),
        original_size=maybe(pairs),
        crop_top_left=maybe(pairs),
        target_size=maybe(pairs),
        negative_original_size=maybe(pairs),
        negative_crop_top_left=maybe(pairs),
        negative_target_size=maybe(pairs),
        seed=maybe(st.integers(0, (1 << 64) - 1)),
        width=size and size[0],
        height=size and size[1],
        model=maybe(prompts),
        model_hash=maybe(texts),
        strength=maybe(amounts),
        clip_skip=maybe(sizes),
        eta=maybe(amounts),
        rng=maybe(st.sampled_from(sorted(RNGS))),
        version=maybe(texts),
        other=draw(st.dictionaries(st.sampled_from(["Hires upscale", "TI", "x/y-z+w"]), prompts)),
    )


@given(parameters())
def test_round_trip(told):
    assert parse_parameters(format_parameters(told)) == told


@given(prompts)
def test_any_text_can_be_read(text):
    parse_parameters(text)


@given(prompts)
def test_text_without_fields_is_all_prompt(text):
    line = text.replace(":", " ").replace("\n", " ")
    assert parse_parameters(line) == Parameters(prompt=line)
