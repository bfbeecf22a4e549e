"""Importance matrices from calibration runs: what matrices are multiplied with while pictures are painted."""

from collections.abc import Sequence

from . import check
from .context import SDContext
from .errors import BadArgument
from .files import AnyPath, check_target
from .progress import OnProgress, tell
from .request import SEEDS
from .weights.imatrix import write_imatrix


def calibrate(
    model: AnyPath,
    target: AnyPath,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    size: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Paints pictures and writes which columns of the matrices matter for them, for ``convert(imatrix=…)``.

    Args:
        model: The model to be quantised, in a type that it paints well in.
        target: The importance matrix to write: .gguf.
        prompts: What to paint; some dozens that are like what the model will be asked for.
        steps: Of each picture.
        size: Width and height in pixels; None: the model's own.
        seed: Of the first picture; picture k has seed + k.
        threads: Of the CPU; None: one per core.
        on_progress: Called with the steps that are done, all steps, and the prompt; False stops.

    Returns:
        Of how many matrices it is.

    Raises:
        BadArgument: No prompts.
        Cancelled: ``on_progress`` said so.
        SdcppError: As ``SDContext`` and ``generate``.
    """
    if not check.texts("prompts", prompts):
        raise BadArgument("prompts: name at least one picture to paint")
    path = check.path("target", target)
    if path.suffix.lower() != ".gguf":
        raise BadArgument(f"{path}: importance matrices are written as .gguf, not as {path.suffix or 'a folder'!r}")
    check_target(path)
    check.callback("on_progress", on_progress)
    seed = check.whole("seed", seed, 0, SEEDS - len(prompts))
    with SDContext(model, threads=threads) as sd_ctx:
        sd_ctx._native.collect_importance(True)
        for k, prompt in enumerate(prompts):

            def on_step(step: int, of: int, _: object, k: int = k, prompt: str = prompt) -> None:
                tell(on_progress, k * of + step, len(prompts) * of, prompt, f"{target}: stopped; nothing was written")

            sd_ctx.generate(prompt, steps=steps, width=size, height=size, seed=seed + k, on_step=on_step)
        sums = sd_ctx._native.importance()
    write_imatrix(target, sums, len(prompts))
    return len(sums)
