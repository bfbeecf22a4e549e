"""What the engine offers: samplers, schedulers, noise, devices."""

from . import _native, check


def samplers() -> list[str]:
    """Names for ``generate(sampler=…)``."""
    return _native.samplers()


def schedulers() -> list[str]:
    """Names for ``generate(scheduler=…)``."""
    return _native.schedulers()


def rngs() -> list[str]:
    """Names for ``generate(rng=…)``: whose noise a seed means. The first is the default."""
    return _native.rngs()


def devices() -> list["_native._Device"]:
    """What the installed ggml can run on: "name" for ``SDContext(backend=…)``, "description", "memory_free" and
    "memory_total" in bytes, and "is_cpu"."""
    return _native.devices()


def add_rpc_devices(endpoint: str) -> None:
    """Adds the devices of a server of ggml's RPC backend, where ggml was built with it.

    ggml ends the process where the server goes away later, or is no RPC server.

    Args:
        endpoint: "host:port".

    Raises:
        BadArgument: It is none.
        Unsupported: ggml was built without that backend.
        Io: No server answers there.
    """
    _native.add_rpc_devices(check.text("endpoint", endpoint))
