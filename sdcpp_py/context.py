"""SDContext: a model in memory. Arguments are checked and completed here; the engine does the rest."""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import _native, check, files, request
from .embeddings import Embedding, EmbeddingLibrary, Words, resolve
from .errors import BadArgument, Io
from .files import AnyPath
from .image import PaintedImage, Parameters, format_parameters
from .lora.library import LoraLibrary
from .lora.report import LoraReport
from .lora.uses import Loras, LoraUse, entries, lora_tags, multipliers, read_uses
from .model_info import MemoryEstimate, ModelInfo, NetworkMemory
from .prompt import Prompt, Span, parse, parse_negative
from .request import Pair, Picture, Settings

log = logging.getLogger("sdcpp_py")


class Preview(Protocol):
    """A look at the picture so far, only while ``on_step`` runs: (height / 8, width / 8, 3) bytes."""

    def __call__(self, image: int = 0) -> NDArray[np.uint8]: ...


OnStep = Callable[[int, int, Preview], Any]


class SDContext:
    """A model in memory, ready to paint.

    It may be used from several threads: a second call waits until the first is through. Several contexts run
    side by side.

    Example:
        >>> with SDContext() as sd_ctx:  # doctest: +SKIP
        ...     image = sd_ctx.generate("a red heart", seed=7)
        ...     image.save("heart.png")
    """

    def __init__(
        self,
        model: AnyPath | None = None,
        *,
        vae: AnyPath | None = None,
        clip_l: AnyPath | None = None,
        clip_g: AnyPath | None = None,
        clip_h: AnyPath | None = None,
        t5xxl: AnyPath | None = None,
        redux: AnyPath | None = None,
        clip_vision: AnyPath | None = None,
        backend: str | None = None,
        threads: int | None = None,
        precision: str = "auto",
        prediction: str | None = None,
        zero_snr: bool | None = None,
        lora_dir: AnyPath | None = None,
        embedding_dir: AnyPath | None = None,
        lora_mode: str = "runtime",
        base_copy: str = "file",
        requantise: bool = False,
        strict_loras: bool = False,
        lora_cache: int = 0,
        memory_limit: int = 0,
    ) -> None:
        """Opens a model.

        Args:
            model: A .safetensors or .gguf file or a diffusers folder; None: the small one that ships.
            vae: A file with an autoencoder, to use instead of the model's.
            clip_l: A file with a text encoder, to use instead of the model's: of SD 1.x, and the first of SDXL, SD3 and
                FLUX.
            clip_g: The second one of SDXL and SD3.
            clip_h: That of SD 2.x.
            t5xxl: T5, of SD3 and FLUX.
            redux: The image embedder of FLUX.1 Redux, for a FLUX.1 to vary pictures.
            clip_vision: SigLIP's image tower, which Redux looks with.
            backend: A device's name, see ``sdcpp doctor``; None: the best.
            threads: Of the CPU; None: one per core.
            precision: Of products on the CPU. "f32"; "bf16": factors rounded to bfloat16, sums in float32, for
                processors that multiply it natively, where it is about twice as fast; "auto": "bf16" on those,
                else "f32".
            prediction: "eps" or "v"; None: what the file says, else what the family does.
            zero_snr: Whether the highest noise level is noise alone, as of models trained with zero terminal SNR, which
                predict "v"; None: what the file says.
            lora_dir: Folder of the LoRAs that prompts name; None: no names are known, but for the model that
                ships, whose LoRAs lie beside it.
            embedding_dir: Folder of the textual inversions that prompts name, see embeddings.py; None: there are none.
            lora_mode: How LoRAs act. "runtime": weights are never written, any switch is a matter of
                milliseconds and exact on quantised weights. "restore": touched weights are rebuilt from the base,
                so that a step costs nothing more. "diff": touched weights get the differences added; rounding
                accumulates until ``reset_loras()``.
            base_copy: Where the base's weights lie: "file", mapped, so that opening takes no time or memory; or "ram",
                read whole, so that the file may change or vanish while the context paints on.
            requantise: A quantised weight that "restore" touches goes back to its type; else it is held in f16.
            strict_loras: A LoRA with any key that fits nothing is an error.
            lora_cache: Bytes of read LoRAs to keep though no prompt names them; 0: 2 GB.
            memory_limit: Bytes that weights and activations may take on the device at a time; 0: what it has. Where not
                all has room, text encoders, denoiser and autoencoder come when they are needed and leave in turn.

        Raises:
            BadFile: A file is damaged or no model.
            Unsupported: A model of a family that this version does not know.
            BadArgument: No such device, or components that do not fit.
            Io: A file cannot be read.
            OutOfMemory: The model does not fit.
        """
        self._lock = threading.RLock()
        self._path = files.shipped_model() if model is None else check.path("model", model)
        components = {"vae": vae, "clip_l": clip_l, "clip_g": clip_g, "clip_h": clip_h, "t5xxl": t5xxl}
        components |= {"redux": redux, "clip_vision": clip_vision}
        self._components = {role: check.path(role, path) for role, path in components.items() if path is not None}
        self._prediction, self._zero_snr = prediction, zero_snr
        if lora_dir is None and model is None:
            lora_dir = self._path.parent  # the model that ships has LoRAs beside it
        self._library = LoraLibrary(lora_dir)
        self._embeddings = EmbeddingLibrary(embedding_dir)
        self._learned: list[Embedding] = []
        self._as_opened = {
            role: files.state_of(path) for role, path in {"model": self._path, **self._components}.items()
        }
        self._native = _native.Context(
            os.fsencode(self._path),
            components={role: os.fsencode(path) for role, path in self._components.items()},
            data_dir=os.fsencode(files.data_dir()),
            backend=check.optional(check.text, "backend", backend),
            threads=0 if threads is None else check.whole("threads", threads, 1),
            precision=check.text("precision", precision),
            prediction=check.optional(check.text, "prediction", prediction),
            lora_mode=check.text("lora_mode", lora_mode),
            base_copy=check.text("base_copy", base_copy),
            requantise=check.flag("requantise", requantise),
            strict_loras=check.flag("strict_loras", strict_loras),
            lora_cache=check.whole("lora_cache", lora_cache, 0, check.MOST_BYTES),
            zero_snr=check.optional(check.flag, "zero_snr", zero_snr),
            memory_limit=check.whole("memory_limit", memory_limit, 0, check.MOST_BYTES),
        )

    @property
    def info(self) -> ModelInfo:
        """What this context holds."""
        return ModelInfo(**self._native.info())

    def estimate_memory(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        batch_size: int = 1,
        cfg_scale: float | None = None,
        vae_tile: int | None = None,
    ) -> MemoryEstimate:
        """What a picture will take of the device's memory, with the LoRAs that act now; no weight is read for it.

        Arguments are those of ``generate``.

        Raises:
            BadArgument: No such picture can be painted.
            Busy: Another thread paints.
        """
        vae_tile = 0 if vae_tile is None else check.whole("vae_tile", vae_tile, 1)
        batch_size = check.whole("batch_size", batch_size, 1)
        with self._lock:
            width, height = request.size_of(width, height, None, self._native.info())
            usual = self._native.defaults()["cfg_scale"]
            cfg_scale = usual if cfg_scale is None else check.number("cfg_scale", cfg_scale)
            peak, networks = self._native.estimate_memory(
                width=width, height=height, batch_size=batch_size, cfg_scale=cfg_scale, vae_tile=vae_tile
            )
        return MemoryEstimate(width, height, peak, [NetworkMemory(*network) for network in networks])

    def fingerprint(self) -> str:
        """A hash of all weights as they are in memory: 64 hexadecimal digits."""
        with self._lock:
            return self._native.fingerprint()

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has for the model, without begin and end; a chunk holds 75.

        An embedding that it names counts as many as it has vectors.
        """
        with self._lock:
            (span,), words = resolve([Span(check.text("text", text))], self._embeddings, ())
            self._learn([words])
            return self._native.count_tokens(span.text or "")

    # ---- LoRA ------------------------------------------------------------------------------------------

    def apply_loras(self, loras: Loras) -> None:
        """Makes exactly these LoRAs act: adds, changes, and takes away what is not named.

        ``generate`` does the same with what its prompt names; this is for doing it beforehand, or for looking at
        reports. Where it fails, weights and state are as they were.

        Args:
            loras: Names in ``lora_dir`` or paths, each with a multiplier: ``{"pencil": 0.8}``, or with options:
                ``{"pencil": {"te": 0.5, "unet": 1.0, "lbw": "OUTALL"}}``; a list of pairs does as well. "te" is of all
                text encoders; "te2" (CLIP-G of SDXL and SD3) and "te3" (T5) say otherwise for one.

        Raises:
            BadArgument: An unknown name, or a multiplier that is no finite number.
            BadFile: A damaged file, or one of which nothing fits this model.
            Unsupported: A file that is no LoRA.
        """
        with self._lock:
            uses = read_uses(self._library, loras=loras, family=self._native.info()["family"])
            self._native.apply_loras([use.native() for use in uses])

    def reset_loras(self) -> None:
        """No LoRA acts, and every weight is the base's, bit for bit."""
        with self._lock:
            self._native.reset_loras()

    @property
    def lora_state(self) -> dict[str, dict[str, Any]]:
        """What acts on the first picture, by name: "te" and "unet", and what else says anything.

        That is "te2", "te3" where they differ from "te", and "start", "stop" where it does not act all the time.
        """
        with self._lock:
            state = self._native.lora_state()
        uses = [
            LoraUse(Path(path), start=start, stop=stop).with_multipliers(te, te2, te3, unet)
            for path, te, te2, te3, unet, start, stop in state
        ]
        return multipliers(self._library, uses)

    @property
    def lora_reports(self) -> list[LoraReport]:
        """What became of the keys of each file that acts."""
        with self._lock:
            return [LoraReport.from_json(text) for text in self._native.lora_reports()]

    def inspect_lora(self, lora: AnyPath) -> LoraReport:
        """What would become of the keys of a file, or of a LoRA in ``lora_dir``, with this model."""
        with self._lock:
            path = self._library.locate(lora)
            return LoraReport.from_json(self._native.inspect_lora(os.fsencode(path)))

    @contextlib.contextmanager
    def profiling(self) -> Iterator[Callable[[], list[tuple[str, str, int, float, float]]]]:
        """Measures every operation of the pictures painted inside, which take longer by it.

        Gives a function that returns rows of (network, operation, count, seconds, floating-point operations).
        """
        with self._lock:  # not while another thread paints
            _native.probe_profile(self._native, True)
        try:
            yield lambda: _native.probe_operations(self._native)
        finally:
            with self._lock:
                _native.probe_profile(self._native, False)

    def peak_rate(self) -> float | None:
        """Floating-point operations a second that the CPU's kernels make at best, on all threads together: in products
        that lie in the second-level cache. Takes half a second. None where ggml's own operations run."""
        with self._lock:
            return _native.probe_peak(self._native) or None

    def close(self) -> None:
        """Frees the model; waits for a picture in work. Closing twice does nothing."""
        with self._lock:
            self._native.close()

    def __enter__(self) -> "SDContext":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SDContext({str(self._path)!r}{', closed' if self._native.closed else ''})"

    def generate(
        self,
        prompt: str | None = None,
        negative_prompt: str = "",
        *,
        prompts: Sequence[str] | None = None,
        loras: Loras = (),
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        scheduler: str | None = None,
        batch_size: int = 1,
        clip_skip: int | None = None,
        rng: str = "cpu",
        eta: float | None = None,
        init_image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        control_image: Picture | None = None,
        original_size: Pair | None = None,
        crop_top_left: Pair | None = None,
        target_size: Pair | None = None,
        negative_original_size: Pair | None = None,
        negative_crop_top_left: Pair | None = None,
        negative_target_size: Pair | None = None,
        reference_image: Picture | None = None,
        redux_image: Picture | None = None,
        redux_strength: float | None = None,
        vae_tile: int | None = None,
        on_step: OnStep | None = None,
    ) -> Any:
        """Paints a picture, or several at once.

        What is None follows the model's family; ``info["parameters"]`` of a picture tells what was used.

        Args:
            prompt: May weight words, ``(red:1.3)``, begin a new chunk, ``BREAK``, and name LoRAs of ``lora_dir``,
                ``<lora:pencil:0.8>``; see prompt.py. A LoRA that it no longer names acts no longer.
            negative_prompt: What to keep away from; LoRA tags in it are left out with a warning.
            prompts: Instead of prompt and batch_size: one for each picture of a batch, each with its own LoRAs.
            loras: More LoRAs, for all pictures, on top of those in the prompts; see ``apply_loras``. The same one
                twice acts with the sum.
            width: Pixels, a multiple of ``info.size_multiple``; None: as init_image, else as reference_image is best
                looked at, else the model's own.
            height: Likewise.
            steps: How often the denoiser runs, at least 1.
            cfg_scale: How much more the prompt counts than the negative prompt; 1 turns guidance off.
            guidance_rescale: Share of the guided output that is brought back to the spread of the prompt's own, from
                0 to 1, against the glare that models with zero_snr get from guidance (Lin et al., 2023); None: 0.
            guidance: What models that were distilled for guidance are told, as FLUX.1 dev; others take none.
            shift: Of the noise levels of SD3 and FLUX, towards noise where above 1; FLUX's own grows with the picture.
            seed: Of the noise, from 0 to 2**64 - 1; None or -1: a new one.
            sampler: See ``sdcpp_py.samplers()``.
            scheduler: See ``sdcpp_py.schedulers()``.
            batch_size: How many pictures; picture k is the one of seed + k.
            clip_skip: 1: the last layer of the text encoder, 2: the one before, ….
            rng: Whose noise: "cpu" as torch on a CPU, "cuda" as torch on CUDA.
            eta: Share of fresh noise, for the samplers that add some; None: their own.
            init_image: A picture to start from: a path, a Pillow picture, or bytes (height, width, 3). It is
                scaled to width and height.
            strength: How far to go away from init_image, from 0 to 1; None: 0.75, and 1 for models that fill in what
                a mask hides, as FLUX.1 Fill.
            mask: Where to repaint init_image: white. Likewise; bytes are (height, width).
            control_image: Edges or depths to follow, for FLUX.1 Canny and Depth, and for control LoRAs. Likewise.
            original_size: SDXL is told that the picture was cut out of one that had this width and height before it was
                scaled; a small one gives the look of enlarged pictures. None: width and height.
            crop_top_left: And from where, (top, left) in pixels; None: (0, 0), which centres things.
            target_size: And the width and height that it has now; None: width and height.
            negative_original_size: The same for the negative prompt; None: as for the prompt.
            negative_crop_top_left: Likewise.
            negative_target_size: Likewise.
            reference_image: The picture that the prompt says how to change, for FLUX.1 Kontext, which is any model of
                FLUX.1 dev's structure: nothing in the weights tells the two apart. It is scaled
                to the trained size of nearest proportions, or less for a smaller picture, see sizes.py.
            redux_image: A picture to vary, for a FLUX.1 that was opened with ``redux`` and ``clip_vision``; the prompt
                may say more, or be empty.
            redux_strength: How much that picture counts beside the prompt; None: 1.
            vae_tile: Decode and encode in tiles of so many pixels, to save memory; None: only where needed.
            on_step: Called with (step, steps, preview) after each step, from 1 to steps; ``preview()`` gives
                a small picture of the state. Return False, or raise, to stop.

        Returns:
            A Pillow picture, or a list of them where batch_size is more than 1 or ``prompts`` were given.

        Raises:
            BadArgument: Something here can be mended by the caller.
            BadFile: A LoRA is damaged, or nothing of it fits this model.
            Unsupported: A file that a prompt names is no LoRA.
            Cancelled: ``on_step`` returned False.
            Busy: ``on_step`` paints with the same context.
            OutOfMemory: Too big a picture.
        """
        texts = request.prompts_of(prompt, prompts, batch_size)
        negative_prompt = check.text("negative_prompt", negative_prompt)
        wanted, unwanted = [parse(text) for text in texts], parse_negative(negative_prompt)
        for warning in {warning: None for one in (*wanted, unwanted) for warning in one.warnings}:
            log.warning("%s", warning)
        pictures = request.open_pictures(
            {
                "init_image": init_image,
                "mask": mask,
                "control_image": control_image,
                "reference_image": reference_image,
                "redux_image": redux_image,
            }
        )
        settings = Settings(
            steps=steps,
            cfg_scale=cfg_scale,
            guidance_rescale=guidance_rescale,
            guidance=guidance,
            shift=shift,
            sampler=sampler,
            scheduler=scheduler,
            rng=rng,
            eta=eta,
            strength=strength,
            clip_skip=clip_skip,
            redux_strength=redux_strength,
            vae_tile=vae_tile,
        ).checked()
        if redux_strength is not None and redux_image is None:
            raise BadArgument("redux_strength: says how much redux_image counts, which is missing")
        batch_size = check.whole("batch_size", batch_size, 1) if prompts is None else len(texts)
        seed = request.seed_of(seed, batch_size)
        sizes = request.told_sizes(original_size, crop_top_left, target_size)
        negative_sizes = request.told_sizes(
            negative_original_size, negative_crop_top_left, negative_target_size, "negative_"
        )
        check.callback("on_step", on_step)
        loras = entries(loras)

        with self._lock:
            info = self._native.info()
            width, height = request.size_of(width, height, request.size_to_follow(pictures), info)
            settings = settings.completed(self._native.defaults(), "redux_image" in pictures)
            seen = request.native_pictures(pictures, width, height, info)
            uses = [
                read_uses(self._library, tags=one.loras, loras=loras, family=info["family"], steps=settings.steps)
                for one in wanted
            ]
            spans, words = self._named([*wanted, unwanted], uses)
            self._learn(words)
            # Before it paints: files may be gone afterwards.
            hashes = [self._lora_hashes(of_prompt) for of_prompt in uses]
            added_tags = lora_tags(self._library, loras)
            painted = self._native.generate(
                prompts=spans[:-1],
                loras=[[use.native() for use in of_prompt] for of_prompt in uses],
                negative_prompts=spans[-1:],
                width=width,
                height=height,
                seed=seed,
                batch_size=batch_size,
                init_image=seen.get("init_image"),
                mask=seen.get("mask"),
                control_image=seen.get("control_image"),
                reference_image=seen.get("reference_image"),
                redux_image=seen.get("redux_image"),
                on_step=None if on_step is None else _with_checked_preview(on_step),
                sizes=request.native_sizes(sizes),
                negative_sizes=request.native_sizes(negative_sizes),
                **settings.native(),
            )
        told = replace(
            settings,
            guidance_rescale=settings.guidance_rescale or None,
            strength=settings.strength if "init_image" in seen else None,
        )
        fields: dict[str, Any] = {**asdict(told), **sizes, **negative_sizes, **self._origin()}
        parameters = Parameters(
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            init_image_hash=_hash(seen.get("init_image")),
            mask_hash=_hash(seen.get("mask")),
            control_hash=_hash(seen.get("control_image")),
            reference_hash=_hash(seen.get("reference_image")),
            redux_image_hash=_hash(seen.get("redux_image")),
            backend=info["backend"],
            precision=info["precision"],
            **fields,
        )
        images = []
        for k, rgb in enumerate(painted):
            one = k if len(texts) > 1 else 0
            of_picture = replace(
                parameters,
                seed=seed + k,
                prompt=" ".join([texts[one], *added_tags]),
                lora_hashes=hashes[one],
            )
            images.append(PaintedImage.from_pixels(rgb, format_parameters(of_picture)))
        return images if batch_size > 1 or prompts is not None else images[0]

    def _named(
        self, prompts: Sequence[Prompt], uses: Sequence[Sequence[LoraUse]]
    ) -> tuple[list[list[Span]], list[Words]]:
        """The spans of prompts and the embeddings that they name, with those that their LoRAs bring along."""
        paths = dict.fromkeys(use.path for of_prompt in uses for use in of_prompt)
        bundled = [one for path in paths for one in self._embeddings.bundled(path)]
        resolved = [resolve(one.spans, self._embeddings, bundled) for one in prompts]
        return [spans for spans, _ in resolved], [words for _, words in resolved]

    def _learn(self, words: Sequence[Words]) -> None:
        """Makes the engine know these words. Those that have to fit raise, others are left out with a warning."""
        asked = {one.name.lower(): one for of_prompt in words for one in of_prompt.asked}
        met = {one.name.lower(): one for of_prompt in words for one in of_prompt.met if one.name.lower() not in asked}
        wanted = [*asked.values(), *met.values()]
        if wanted == self._learned:
            return
        family = self._native.info()["family"]
        learned = [(one.name, one.for_family(family)) for one in asked.values()]
        self._native.learn_words(learned)
        for one in met.values():
            try:
                self._native.learn_words([*learned, (one.name, one.for_family(family))])
                learned.append((one.name, one.for_family(family)))
            except BadArgument as error:
                log.warning("%s; the word is read as words are", error)
        self._native.learn_words(learned)
        self._learned = wanted

    def _lora_hashes(self, uses: Sequence[LoraUse]) -> str | None:
        """As webui writes them: "name: hash" of each, separated by commas."""
        hashes = {self._library.name_of(use.path): _hash_of_file(use.path) for use in uses}
        return ", ".join(f"{name}: {digits}" for name, digits in hashes.items() if digits) or None

    def _origin(self) -> dict[str, Any]:
        """The fields of Parameters that tell of the model."""
        fields: dict[str, Any] = {
            "prediction": self._prediction,
            "zero_snr": self._zero_snr,
            "version": f"sdcpp_py {_native.version()}",
        }
        for role, path in {"model": self._path, **self._components}.items():
            whole = files.real_path(path)
            fields[role] = whole.name if os.path.isdir(whole) else whole.stem
            if files.state_of(whole) == self._as_opened[role]:  # else it is not what paints
                fields[f"{role}_hash"] = _hash_of_file(whole)
        return fields


def _with_checked_preview(on_step: OnStep) -> OnStep:
    def call(step: int, steps: int, preview: Preview) -> Any:
        def checked(image: int = 0) -> NDArray[np.uint8]:
            return preview(check.whole("preview: image", image, 0))

        return on_step(step, steps, checked)

    return call


def _hash_of_file(path: Path) -> str | None:
    try:
        return files.model_hash(path)
    except Io as error:  # the picture is worth more than the hash
        log.warning("%s", error)
        return None


def _hash(array: NDArray[np.uint8] | None) -> str | None:
    return None if array is None else hashlib.sha256(array.data).hexdigest()[: files.HASH_DIGITS]
