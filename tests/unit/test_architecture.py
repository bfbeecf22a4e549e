"""What the documents say, compared with the code: imports, statuses, the stub, environment variables."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sdcpp_py import _native, errors

ROOT = Path(__file__).parents[2]
SOURCES, PACKAGE, DOCS = ROOT / "native" / "src", ROOT / "sdcpp_py", ROOT / "docs"


def picture() -> list[list[list[str]]]:
    """The arrows of docs/architecture.md: each a row of groups of names, every group above the next."""
    drawn = (DOCS / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    rows = [re.sub(r"\(.*?\)|^ (Python|C\+\+) ", "", row) for row in drawn.splitlines() if "◄" not in row]
    arrows = [arrow for row in rows if "─►" in row for arrow in re.split(r"(?<=\w) {6,}(?=\w)", row)]
    return [[re.findall(r"\w+", group) for group in arrow.split("─►")] for arrow in arrows]


def below() -> dict[str, set[str]]:
    """For each layer of the engine, all that lie below it."""
    direct: dict[str, set[str]] = {}
    for upper, lower in (arrow for arrow in picture() if len(arrow) == 2):
        for name in upper:
            direct.setdefault(name, set()).update(lower)

    def reach(name: str) -> set[str]:
        nearest = direct.get(name, set())
        return nearest.union(*map(reach, nearest))

    return {name: reach(name) for name in direct}


def layer_of(file: Path) -> str:
    """The folder; what lies at the top is the context's."""
    parts = file.relative_to(SOURCES).parts
    return parts[0] if len(parts) > 1 else "context" if file.exists() else file.name


def native_includes(brackets: str) -> Iterator[tuple[Path, str]]:
    """Each file of the engine with each name that it includes, in these brackets."""
    pattern = re.compile(rf"^#include {brackets[0]}(.+){brackets[1]}", re.MULTILINE)
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            for name in pattern.findall(path.read_text(encoding="utf-8")):
                yield path, name


def package_imports(path: Path) -> Iterator[str]:
    """The modules and folders of our own package that a module of it imports."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package[: len(package) + 1 - node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield [*parents, *name.split(".")][0]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.startswith("sdcpp_py."):
                    yield name.split(".")[1]


def test_native_includes_go_downwards() -> None:
    allowed = below()
    wrong = [
        f"{path.relative_to(ROOT)} includes {name}"
        for path, name in native_includes('""')
        if layer_of(SOURCES / name) not in {layer_of(path), *allowed.get(layer_of(path), ())}
        and (layer_of(path), name) not in {("c_api", "sdcpp.h"), ("c_api", "sdcpp_probe.h")}
    ]
    assert not wrong
    assert not {"lora", "context"} & (allowed["models"] | allowed["families"] | allowed["nn"])


def test_only_nn_and_kernels_know_ggml() -> None:
    users = {layer_of(path) for path, name in native_includes("<>") if re.match("ggml|gguf", name)}
    assert users <= {"nn", "kernels"}


def test_the_binding_sees_the_c_headers_alone() -> None:
    files = sorted((ROOT / "native" / "bindings").iterdir())
    binding = "".join(path.read_text(encoding="utf-8") for path in files)
    included = set(re.findall(r'#include "(.+)"', binding))
    assert included - {path.name for path in files} == {"sdcpp.h", "sdcpp_probe.h"}
    assert "ggml" not in "".join(re.findall(r"#include <.+>", binding))


def test_python_imports_go_to_the_right_of_the_picture() -> None:
    (row,) = [arrow for arrow in picture() if len(arrow) > 2]
    order = ["__init__", "__main__", *(name for group in row for name in group)]
    place = {name: index for index, name in enumerate(order)}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in package_imports(path):
            if name not in (module, "__version__") and place.get(name, -1) <= place[module]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_status_has_its_exception() -> None:
    header = (ROOT / "native" / "include" / "sdcpp.h").read_text(encoding="utf-8")
    enum = re.search(r"typedef enum sd_status \{(.*?)\}", header, re.DOTALL)[1]
    names = re.findall(r"^\s*SD_(\w+)", enum, re.MULTILINE)
    assert names[0] == "OK"
    classes = ["".join(word.title() for word in name.split("_")) for name in names[1:]]
    assert [kind.__name__ for kind in errors.BY_STATUS[1:]] == classes


def test_the_stub_lists_what_the_extension_offers() -> None:
    stub = ast.parse((PACKAGE / "_native.pyi").read_text(encoding="utf-8"))
    offered = {name for name in dir(_native) if not name.startswith("_")}
    definitions = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {name for name in definitions if not name.startswith("_")} == offered
    for name, node in definitions.items():
        if isinstance(node, ast.ClassDef) and name in offered:
            members = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            own = {member for member in vars(getattr(_native, name)) if not member.startswith("_")}
            assert {member for member in members if not member.startswith("_")} == own


def test_every_environment_variable_is_documented() -> None:
    guide = (DOCS / "development.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(SDCPP_\w+)` \|", guide, re.MULTILINE)
    used: set[str] = set()
    for folder in ("native", "sdcpp_py", "tests", "models"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".cpp", ".h", ".py"):
                text = path.read_text(encoding="utf-8")
                used.update(re.findall(r"""(?:getenv|environ\S*?)[\[(]\s*["'](SDCPP_\w+)""", text))
    assert used == set(table)
