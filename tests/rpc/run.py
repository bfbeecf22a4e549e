"""Builds a ggml with its RPC backend beside the installed one, and runs the tests of tests/rpc on it.

    python tests/rpc/run.py [FOLDER] [pytest's arguments]

FOLDER (default: build/ggml-rpc) keeps the build, which takes a minute or two, for the next time. Nothing that
is installed changes: the other libraries of the same version are put before ours on the loader's path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "libggml-python"
LOADER_PATH = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"


def build(folder: Path) -> Path:
    """The folder of the libraries."""
    version = metadata.version(PACKAGE)
    done = folder / f"{version}.done"
    if not done.exists():
        # Without the cache, where pip keeps what it once built with other CMAKE_ARGS.
        options = ["--no-cache-dir", "--no-deps", "--upgrade", "--target", folder, "--no-binary", PACKAGE]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, f"{PACKAGE}=={version}"],
            env={**os.environ, "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} -DGGML_RPC=ON"},
            check=True,
        )
        done.touch()
    return next(path.parent for path in sorted((folder / "libggml").glob("lib*/libggml-rpc.*")))


def main(arguments: list[str]) -> int:
    folder = ROOT / "build" / "ggml-rpc"
    if arguments and not arguments[0].startswith("-"):
        folder = Path(arguments.pop(0)).resolve()
    first = [str(build(folder)), *filter(None, [os.environ.get(LOADER_PATH)])]
    environment = {**os.environ, LOADER_PATH: os.pathsep.join(first)}
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-m", "rpc", *arguments]
    # From here, not from the root, where -m would find the package's sources before the installed one.
    return subprocess.run(tests, env=environment, cwd=Path(__file__).parent).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
