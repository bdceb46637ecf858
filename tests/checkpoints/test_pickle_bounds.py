"""Pickles that are damaged or hostile: refused before memory is taken, and NumPy's types never as the file says them."""

import io
import pickle

import numpy as np
import pytest

from mymodels.checkpoints import CheckpointError, open_checkpoint
from mymodels.checkpoints.plain_pickle import load

ARRAYS = [
    np.arange(3, dtype=">f8"), np.array(["ab", "c"]), np.array([b"ab"]), np.array([1 + 2j]), np.array(["2020"], "M8[D]"),
    np.zeros((2, 3), bool, order="F"), np.zeros(2, dtype=[("a", "f4"), ("b", "<i8")]), np.array([{"a": 1}, None]),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_kind(protocol: int) -> None:
    for array in ARRAYS:
        read = load(io.BytesIO(pickle.dumps(array, protocol=protocol)))
        assert np.array_equal(read, array) and read.shape == array.shape


@pytest.mark.parametrize("data", [b"\x80\x04\x95" + b"\xff" * 6 + b"\x00\x00", b"\x80\x04B\xff\xff\xff\x7f.",
                                  b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00."])  # fmt: skip
def test_a_length_beyond_the_end_takes_no_memory(data: bytes, tmp_path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="truncated or damaged"):
        load(io.BytesIO(data))
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "x.pkl")
    assert "\n" not in str(caught.value)


class Changed:
    """A NumPy type with the state that a stranger wants."""

    def __init__(self, code: str, state: tuple):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


@pytest.mark.parametrize(
    "code,state,flags",
    [("f8", (3, "<", None, None, None, -1, -1, 63), 0), ("f8", (3, ">", None, None, None, 2**40, 1, 127), 0)],
)
def test_flags_of_a_numpy_type_are_not_taken_over(code: str, state: tuple, flags: int) -> None:
    read = load(io.BytesIO(pickle.dumps(Changed(code, state))))
    assert read.itemsize == 8 and read.flags == flags and not read.hasobject


@pytest.mark.parametrize(
    "code,state",
    [
        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 4)}, 8, 1, 0)),
        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
        ("U1", (3, "<", None, None, None, 2**40, 4, 8)),
        ("f8", (3, "<", (np.dtype("f4"), (2**40,)), None, None, 8, 1, 0)),
    ],
)
def test_states_that_numpy_never_writes(code: str, state: tuple) -> None:
    with pytest.raises(pickle.UnpicklingError, match="damaged"):
        load(io.BytesIO(pickle.dumps(Changed(code, state))))
