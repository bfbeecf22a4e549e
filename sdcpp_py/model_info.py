"""What a context tells of its model: what it is, and what a picture takes of memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """What a context holds.

    Attributes:
        family: Such as "sd1".
        prediction: What the denoiser predicts: "eps", "v", or "flow" as SD3 and FLUX.
        backend: The device that it runs on.
        threads: Of the CPU.
        kernels: Of the CPU: "amx", "avx512", "avx2", "plain", or "reference" for ggml's own operations.
        precision: Of products: "f32" or "bf16".
        size_multiple: Width and height of a picture are multiples of it, in pixels.
        native_size: The side of the pictures that the model was trained on, in pixels.
        latent_channels: Of the latent.
        latent_cell: Side of a latent's cell in pixels.
        input_channels: Of the denoiser: latent_channels, and what it sees beside the latent.
        weight_bytes: Of all weights, in the form in which they are used.
        n_weights: How many tensors.
        zero_snr: Whether the highest noise level is noise alone.
        redux_size: Side of the picture that FLUX.1 Redux looks at, in pixels; 0: it was not opened.
    """

    family: str
    prediction: str
    backend: str
    threads: int
    kernels: str
    precision: str
    size_multiple: int
    native_size: int
    latent_channels: int
    latent_cell: int
    input_channels: int
    weight_bytes: int
    n_weights: int
    zero_snr: bool
    redux_size: int


@dataclass(frozen=True)
class NetworkMemory:
    """What a network takes of the device's memory, in bytes."""

    name: str
    weights: int
    activations: int


@dataclass(frozen=True)
class MemoryEstimate:
    """What a picture takes of the device's memory.

    Attributes:
        width: Of the picture.
        height: Likewise.
        peak: Bytes of weights and activations at a time, at the most. What the process itself takes comes on top:
            Python and its packages, some 100 MB.
        networks: In the order in which they run.
    """

    width: int
    height: int
    peak: int
    networks: list[NetworkMemory]
