"""Files of torch: what they hold is read, and nothing that they ask for is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import archive, call, dictionary, number, numbers, program, tensor, text

from sdcpp_py import BadFile, SdcppError, Unsupported
from sdcpp_py.weights import convert, open_source
from sdcpp_py.weights.torch_pickle import Machine

VALUES = np.arange(12, dtype=np.float32)


def one(path: Path, body: bytes, raw: bytes = VALUES.tobytes()) -> Path:
    """A file whose only tensor "x" is made by `body`."""
    return archive(path, program(dictionary({"x": body})), {"0": raw})


def read(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as source:
        return {one.name: one.array() for one in source.tensors}


def test_tensors_of_every_type(tmp_path: Path) -> None:
    kinds = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")
    tensors = {kind: np.array([[0, 1, 2], [3, 4, 5]]).astype(kind) for kind in kinds}
    tensors["scalar"] = np.float32(3.5).reshape(())
    tensors["empty"] = np.zeros((0, 4), np.float32)
    with open_source(torch_files.save(tmp_path / "a.ckpt", tensors)) as source:
        assert [one.name for one in source.tensors] == list(tensors)
        for found in source.tensors:
            assert found.shape == tensors[found.name].shape
            np.testing.assert_array_equal(found.array(), tensors[found.name].astype(np.float32))


def test_without_a_state_dict_all_dictionaries_count(tmp_path: Path) -> None:
    body = dictionary({"a": dictionary({"b": torch_files.array("0", VALUES)}), "n": number(3)})
    assert list(read(archive(tmp_path / "a.bin", program(body), {"0": VALUES.tobytes()}))) == ["a.b"]


def test_what_a_training_program_leaves_besides_is_told(tmp_path: Path) -> None:
    x = torch_files.array("0", VALUES)
    body = dictionary({"state_dict": dictionary({"w": x}), "optimizer_states": dictionary({"a": x, "b": x})})
    with open_source(archive(tmp_path / "a.ckpt", program(body), {"0": VALUES.tobytes()})) as source:
        assert [tensor.name for tensor in source.tensors] == ["w"]
        assert source.left_out == ["optimizer_states (2 tensors)"]


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "want"),
    [
        ((3, 4), (4, 1), 0, VALUES.reshape(3, 4)),
        ((4, 3), (1, 4), 0, VALUES.reshape(3, 4).T),
        ((2, 2), (6, 2), 1, np.array([[1, 3], [7, 9]])),
        ((4,), (1,), 8, VALUES[8:]),
        ((1, 4), (99, 1), 8, VALUES[None, 8:]),
    ],
)
def test_any_strides(shape: tuple, strides: tuple, offset: int, want: np.ndarray, tmp_path: Path) -> None:
    path = one(tmp_path / "a.pt", tensor("0", "FloatStorage", 12, shape, strides, offset))
    np.testing.assert_array_equal(read(path)["x"], want)


def test_objects_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    """numpy scalars, sets and classes that are only named, as Lightning leaves them in checkpoints."""
    dtype = call("numpy.dtype", b"(" + text("f8") + b"\x89\x88t")
    scalar = call("numpy.core.multiarray.scalar", b"(" + dtype + b"C\x08" + bytes(8) + b"t")
    named = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    parameters = b"ctorch.nn.modules.container\nParameterDict\n)\x81" + dictionary(
        {"_parameters": dictionary({"w": torch_files.array("0", VALUES)})}
    )
    body = dictionary({"best": scalar, "callbacks": b"}" + named + number(1) + b"s", "all": parameters + b"b"})
    assert list(read(archive(tmp_path / "a.ckpt", program(body), {"0": VALUES.tobytes()}))) == ["all.w"]


# ---- hostile files -------------------------------------------------------------------------------------


def attacks(command: str) -> dict[str, bytes]:
    """Programs that run a command in Python's own unpickler."""
    argument = b"(" + text(command) + b"t"
    system = b"c" + os.system.__module__.encode() + b"\nsystem\n"
    stacked = text(os.system.__module__) + text("system") + b"\x93"
    return {
        "reduce": system + argument + b"R",
        "stack-global": stacked + argument + b"R",
        "in-a-tensor": dictionary({"x": system + argument + b"R"}),
        "memo": system + b"q\x010" + b"h\x01" + argument + b"R",
        "inst": b"(" + text(command) + b"i" + os.system.__module__.encode() + b"\nsystem\n",
        "obj": b"(" + system + text(command) + b"o",
        "eval": call("builtins.eval", b"(" + text(f"__import__('os').system({command!r})") + b"t"),
        "getattr": call("builtins.getattr", b"(" + b"cos\nsystem\n" + text("__call__") + b"t"),
        "as-a-hook": call("torch._utils._rebuild_parameter", b"(" + system + argument + b"R" + b"t"),
        "partial": call("functools.partial", b"(" + system + text(command) + b"t"),
        "load": call("torch.load", b"(" + text("other.pt") + b"t"),
    }


@pytest.mark.parametrize("attack", sorted(attacks("")))
def test_a_program_that_calls_others_is_refused_and_not_run(attack: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    code = program(attacks(f"touch {proof}")[attack])
    path = archive(tmp_path / "evil.ckpt", code, {"0": VALUES.tobytes()})
    with pytest.raises(Unsupported, match=r"evil\.ckpt: calls .*; it was not run"):
        convert(path, tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["evil.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="the command is a shell's")
@pytest.mark.parametrize("attack", ["reduce", "memo", "inst", "obj", "eval"])
def test_those_programs_would_run_elsewhere(attack: str, tmp_path: Path) -> None:
    """Without this the test above would prove nothing."""
    proof = tmp_path / "proof"
    pickle.loads(program(attacks(f"touch {proof}")[attack]))
    assert proof.exists()


def nested(n: int) -> bytes:
    return b"]" * n + b"a" * (n - 1)


BOMBS = {
    "billion-laughs": b"]"
    + b"".join(b"q" + bytes([k]) + b"0](h" + bytes([k]) + b"h" + bytes([k]) + b"e" for k in range(90)),
    "deep": nested(3000),
    "itself": b"]q\x00h\x00a",
    "memo-index": b"Nr\xff\xff\xff\x7f",
    "extension": b"\x82\x01",
    "buffer-outside": b"\x97",
    "unhashable-key": b"}](" + b"u",
    "long": b"\x8b\xff\xff\xff\x7f",
    "empty-stack": b"R",
    "marks": b"((((",
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_damaged_and_exploding_programs(bomb: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.ckpt", program(BOMBS[bomb]), {"0": VALUES.tobytes()})
    with pytest.raises((BadFile, Unsupported), match=r"^\S*a\.ckpt: "):
        read(path)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (tensor("0", "FloatStorage", 12, (4, 4), (4, 1)), "reaches beyond the 12 elements"),
        (tensor("0", "FloatStorage", 12, (4,), (1,), 9), "reaches beyond"),
        (tensor("0", "FloatStorage", 12, (1 << 40, 1 << 40), (0, 0)), "reaches beyond"),
        (tensor("0", "DoubleStorage", 12, (12,), (1,)), "reaches beyond the 6 elements"),
        (tensor("1", "FloatStorage", 12, (12,), (1,)), "storage '1', which is missing"),
        (tensor("../../x", "FloatStorage", 12, (12,), (1,)), "which is missing"),
        (tensor("0", "FloatStorage", 12, (2,), (-1,)), "its pickle is damaged"),
        (tensor("0", "FloatStorage", 12, (2, 2), (1,)), "its pickle is damaged"),
        (tensor("0", "FloatStorage", 12, (1,) * 5, (1,) * 5), "has 5 dimensions"),
        (tensor("0", "QInt8Storage", 12, (2,), (1,)), "has elements of type torch.QInt8Storage"),
        (number(1), "holds no tensors"),
    ],
)
def test_tensors_that_lie(body: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises((BadFile, Unsupported)) as caught:
        read(one(tmp_path / "a.ckpt", body))
    assert sentence in str(caught.value)


def test_archives_that_are_no_models(tmp_path: Path) -> None:
    good = one(tmp_path / "a.ckpt", torch_files.array("0", VALUES)).read_bytes()
    path = tmp_path / "b.ckpt"
    for size in range(4, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(SdcppError, match=r"b\.ckpt: "):
            read(path)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("word/document.xml", "<xml/>")
    with pytest.raises(BadFile, match=r"without a data\.pkl"):
        read(path)
    code = program(dictionary({"x": torch_files.array("0", VALUES)}))
    with pytest.raises(Unsupported, match="is compressed"):
        read(archive(path, code, {"0": VALUES.tobytes()}, zipfile.ZIP_DEFLATED))


def test_older_formats_are_named(tmp_path: Path) -> None:
    legacy = tmp_path / "a.pt"
    legacy.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2))
    with pytest.raises(Unsupported, match=r"is a bare pickle, the format of torch before 1\.6"):
        read(legacy)
    with tarfile.open(tmp_path / "b.pt", "w") as archive_file:
        archive_file.add(legacy, "pickle")
    with pytest.raises(Unsupported, match=r"is a tar archive, the format of torch before 1\.6"):
        read(tmp_path / "b.pt")


def test_a_safetensors_file_may_begin_as_a_pickle_does(tmp_path: Path) -> None:
    """The length of its header comes first: 640 is 80 02."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(640)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 640) + header + struct.pack("<f", 2.5))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read(path)["w"] == 2.5


OPCODES = st.sampled_from(
    [bytes([code]) for code in b"()0123NRbdaeilostu}]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94Q"]
)
PIECES = st.one_of(
    OPCODES,
    st.binary(max_size=4),
    st.text("ab.", max_size=3).map(text),
    st.integers(-(2**40), 2**40).map(number),
    st.lists(st.integers(-1, 9), max_size=3).map(numbers),
    st.just(torch_files.array("0", VALUES)),
    st.integers(0, 3).map(lambda k: b"q" + struct.pack("B", k)),
    st.integers(0, 3).map(lambda k: b"h" + struct.pack("B", k)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12).map(b"".join))
def test_any_program_makes_something_or_a_sentence(code: bytes) -> None:
    with contextlib.suppress(BadFile, Unsupported):
        Machine(Path("a.ckpt")).run(program(code))
