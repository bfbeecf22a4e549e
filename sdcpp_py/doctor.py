"""What `sdcpp doctor` tells: versions, processor, how ggml was built, devices, how to get a faster build."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from . import _native
from .errors import Unsupported

GGML = "libggml-python"

# What ggml has fast code for, as Linux names it.
_FEATURES = {
    *("sse3", "ssse3", "avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
}


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, value)."""
    return [
        ("Versions", _versions()),
        ("Processor", _processor()),
        ("Engine", _engine()),
        ("Devices", _devices()),
    ]


def build_for_cards() -> str:
    """The command that builds the same ggml with another backend."""
    return (
        'CMAKE_ARGS="-DGGML_CUDA=ON" pip install --no-cache-dir --force-reinstall --no-deps '
        f"--no-binary {GGML} {GGML}=={_version(GGML, 'VERSION')}"
    )


def _version(package: str, otherwise: str = "not installed") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return otherwise


def _versions() -> list[tuple[str, str]]:
    packages = ("numpy", "Pillow", GGML)
    own = [("sdcpp_py", _native.version()), ("Python", f"{platform.python_version()} ({sys.executable})")]
    return own + [(package, _version(package)) for package in packages] + [("system", platform.platform())]


def _processor() -> list[tuple[str, str]]:
    name, features = _cpu_info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("name", name or platform.processor() or platform.machine()), ("cores", str(cores))]
    return [*rows, ("features", " ".join(sorted(features & _FEATURES)))] if features else rows


def _cpu_info() -> tuple[str, set[str]]:
    """Name and features of the first core, as far as Linux tells."""
    name, features = "", set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return name, features
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = name or value
        elif key.lower() in ("flags", "features"):
            features = features or set(value.split())
    return name, features


def _engine() -> list[tuple[str, str]]:
    rows = (line.partition(":") for line in _native.build_info().splitlines())
    return [(key.strip(), value.strip()) for key, _, value in rows if key]


def _devices() -> list[tuple[str, str]]:
    rows = []
    try:
        devices = _native.devices()
    except Unsupported as error:
        return [("none", str(error))]
    for device in devices:
        free, total = (size / (1 << 30) for size in (device["memory_free"], device["memory_total"]))
        rows.append((device["name"], f"{device['description']}, {free:.1f} of {total:.1f} GiB free"))
    return rows
