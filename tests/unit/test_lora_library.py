"""Names of LoRAs to files: what is found, what is refused, and what messages say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdcpp_py.errors import BadArgument, Io, Unsupported
from sdcpp_py.lora.library import LoraLibrary


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some LoRAs in a folder, and one outside of it."""
    root = tmp_path / "loras"
    for name in (
        "pencil.safetensors",
        "ink.gguf",
        "my lora v1.0.safetensors",
        "sub/x.safetensors",
        "süß 墨.safetensors",
    ):
        touch(root / name)
    touch(root / "deep" / "er" / "oil.safetensors")
    touch(tmp_path / "secret.safetensors")
    return root


@pytest.fixture
def library(folder: Path) -> LoraLibrary:
    return LoraLibrary(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pencil", "pencil.safetensors"),
        ("pencil.safetensors", "pencil.safetensors"),
        ("ink", "ink.gguf"),
        ("my lora v1.0", "my lora v1.0.safetensors"),
        ("sub/x", "sub/x.safetensors"),
        ("x", "sub/x.safetensors"),
        ("deep/er/oil", "deep/er/oil.safetensors"),
        ("oil", "deep/er/oil.safetensors"),
        ("süß 墨", "süß 墨.safetensors"),
    ],
)
def test_a_name_finds_its_file(library: LoraLibrary, folder: Path, name: str, file: str) -> None:
    assert library.find(name) == (folder / file).resolve()


def test_the_order_of_spellings(library: LoraLibrary, folder: Path) -> None:
    """.safetensors before .gguf, a file here before one of that stem below."""
    touch(folder / "pencil.gguf")
    touch(folder / "sub" / "pencil.safetensors")
    assert library.find("pencil").name == "pencil.safetensors"
    assert library.find("pencil.gguf").name == "pencil.gguf"
    touch(folder / "deep" / "both.gguf")
    touch(folder / "deep" / "both.safetensors")
    assert library.find("both").name == "both.safetensors"


def test_a_stem_in_several_folders_is_ambiguous(library: LoraLibrary, folder: Path) -> None:
    touch(folder / "a" / "twin.safetensors")
    touch(folder / "b" / "twin.gguf")
    with pytest.raises(BadArgument, match=r"several files, 'a/twin.safetensors', 'b/twin.gguf'; name its folder"):
        library.find("twin")
    assert library.find("b/twin").name == "twin.gguf"


@pytest.mark.parametrize(
    ("name", "near"), [("pencl", "'pencil'"), ("my lora v1", "'my lora v1.0'"), ("subx", "'sub/x'")]
)
def test_an_unknown_name_suggests_the_nearest(library: LoraLibrary, name: str, near: str) -> None:
    with pytest.raises(BadArgument, match=f"no LoRA named .* did you mean .*{near}"):
        library.find(name)


def test_an_unknown_name_like_none_tells_how_many_there_are(library: LoraLibrary) -> None:
    with pytest.raises(BadArgument, match="it holds 6 LoRAs"):
        library.find("zzzzzzzz")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret", "leads out"),
        ("sub/../../secret", "leads out"),
        ("..", "leads out"),
        ("/etc/passwd", "path of the whole system"),
        ("//host/x", "path of the whole system"),
        ("C:\\x", "backslash"),
        ("C:/x", "path of the whole system"),
        ("sub\\x", "backslash"),
        ("..\\secret", "backslash"),
        ("pen\0cil", "NUL"),
        ("sub//x", "empty part"),
        ("./pencil", "empty part"),
        ("sub/", "empty part"),
        ("", "is empty"),
        ("  ", "is empty"),
    ],
)
def test_names_that_could_lead_out_are_refused(library: LoraLibrary, name: str, why: str) -> None:
    with pytest.raises(BadArgument, match=why):
        library.find(name)


def test_links_may_not_leave_the_folder(library: LoraLibrary, folder: Path, tmp_path: Path) -> None:
    (folder / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "away").symlink_to(tmp_path)
    for name in ("out", "out.safetensors", "away/secret"):
        with pytest.raises(BadArgument, match="leads out of"):
            library.find(name)
    assert not {"out", "away/secret"} & set(library.names())
    (folder / "in.safetensors").symlink_to(folder / "pencil.safetensors")
    assert library.find("in") == (folder / "pencil.safetensors").resolve()


def test_circles_of_links_and_broken_links(library: LoraLibrary, folder: Path) -> None:
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "gone.safetensors").symlink_to(folder / "nothing")
    (folder / "round").symlink_to(folder)
    for name in ("loop", "gone"):
        with pytest.raises(BadArgument, match="no LoRA named"):
            library.find(name)
    assert "pencil" in library.names()


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert LoraLibrary(tmp_path / "link").find("pencil") == (folder / "pencil.safetensors").resolve()


def test_folders_pipes_and_devices_are_no_files(library: LoraLibrary, folder: Path) -> None:
    (folder / "dir.safetensors").mkdir()
    (folder / "plain").mkdir()
    for name in ("dir", "dir.safetensors", "plain", "sub"):
        with pytest.raises(BadArgument, match="no LoRA named"):
            library.find(name)
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(BadArgument, match="device or a pipe"):
        library.find("pipe")
    (folder / "null.safetensors").symlink_to("/dev/null")
    with pytest.raises(BadArgument, match="leads out"):
        library.find("null")


def test_folders_of_adapters_count_as_files(library: LoraLibrary, folder: Path, tmp_path: Path) -> None:
    touch(folder / "peft" / "adapter_config.json")
    touch(folder / "peft" / "adapter_model.safetensors")
    touch(folder / "sub" / "saved" / "pytorch_lora_weights.safetensors")
    assert library.find("peft") == (folder / "peft").resolve()
    assert library.find("saved") == (folder / "sub" / "saved").resolve()
    assert {"peft", "sub/saved"} <= set(library.names())
    assert "peft/adapter_model" not in library.names()
    touch(folder / "bad" / "adapter_config.json")
    (folder / "bad" / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(BadArgument, match=r"its adapter_model.safetensors leads out"):
        library.find("bad")


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused_with_advice(library: LoraLibrary, folder: Path, ending: str) -> None:
    touch(folder / f"old{ending}")
    for name in ("old", f"old{ending}"):
        with pytest.raises(Unsupported, match=r"is a pickle, .* save it as \.safetensors"):
            library.find(name)
    with pytest.raises(Unsupported, match="is a pickle"):
        library.locate(folder / f"old{ending}")
    touch(folder / "old.safetensors")
    assert library.find("old").name == "old.safetensors"


def test_what_changes_on_the_disk_is_noticed(library: LoraLibrary, folder: Path) -> None:
    assert library.find("x").name == "x.safetensors"
    (folder / "sub" / "x.safetensors").rename(folder / "deep" / "x.safetensors")
    assert library.find("x").parent.name == "deep"
    touch(folder / "new" / "er" / "y.safetensors")
    assert library.find("y").parent.name == "er"
    (folder / "new" / "er" / "y.safetensors").unlink()
    with pytest.raises(BadArgument, match="no LoRA named"):
        library.find("y")


def test_names_that_no_file_can_have(library: LoraLibrary) -> None:
    for name in ("a" * 5000, "a/" * 3000 + "a", "\ud800", "x" * 300 + ".safetensors"):
        with pytest.raises(BadArgument, match="no LoRA named"):
            library.find(name)


def test_paths_of_the_callers_own_code_may_lie_anywhere(
    library: LoraLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = (tmp_path / "secret.safetensors").resolve()
    assert library.locate(secret) == secret
    assert library.locate(str(secret)) == secret
    assert library.locate("pencil").name == "pencil.safetensors"
    monkeypatch.chdir(tmp_path)
    assert library.locate("secret.safetensors") == secret
    assert library.locate(Path("secret.safetensors")) == secret
    assert LoraLibrary(None).locate(secret) == secret
    with pytest.raises(BadArgument, match="no LoRA named"):
        library.locate("secret")


def test_paths_that_are_no_files(library: LoraLibrary, tmp_path: Path) -> None:
    with pytest.raises(Io, match=r"nothing\.safetensors"):
        library.locate(tmp_path / "nothing.safetensors")
    with pytest.raises(BadArgument, match="is a folder without"):
        library.locate(tmp_path)
    with pytest.raises(BadArgument, match="device or a pipe"):
        library.locate("/dev/null")
    with pytest.raises(BadArgument, match="is no path"):
        library.locate("")


def test_without_a_folder_no_name_is_known() -> None:
    with pytest.raises(BadArgument, match="give lora_dir"):
        LoraLibrary(None).find("x")
    assert LoraLibrary(None).names() == []


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(Io, match="nothing"):
        LoraLibrary(tmp_path / "nothing")
    with pytest.raises(Io, match="is no folder"):
        LoraLibrary(touch(tmp_path / "file"))


def test_names_for_messages(library: LoraLibrary, folder: Path, tmp_path: Path) -> None:
    assert library.name_of(library.find("x")) == "sub/x"
    assert library.name_of((tmp_path / "secret.safetensors").resolve()) == "secret"
    assert library.names() == ["deep/er/oil", "ink", "my lora v1.0", "pencil", "sub/x", "süß 墨"]
