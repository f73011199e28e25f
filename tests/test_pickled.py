"""Foreign .npy and .npz files: what arrays are made of loads as NumPy loads it, everything else is refused unrun."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.pickled import Npz, PickledError, read_npy


def npy(array, protocol=None) -> bytes:
    """An .npy file, its objects pickled by a protocol of choice."""
    stream = io.BytesIO()
    if protocol is None:
        np.save(stream, array, allow_pickle=True)
        return stream.getvalue()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    pickle.dump(array, stream, protocol=protocol)
    return stream.getvalue()


def objects(*values, shape=None) -> np.ndarray:
    array = np.empty(len(values), object)
    for place, value in enumerate(values):
        array[place] = value
    return array if shape is None else array.reshape(shape)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if expected.dtype != object:
            np.testing.assert_array_equal(found, expected)
            return
        found, expected = found.ravel().tolist(), expected.ravel().tolist()
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, dict):
        assert_same(list(found.items()), list(expected.items()))
    else:
        assert found == expected or (found != found and expected != expected)


ARRAYS = {
    "names with none": objects("a/b.jpg", None, "ü.jpg"),
    "rows of unequal length": objects(np.array([1, 2, 3]), np.array([], np.int64), np.array([7])),
    "matrices": objects(np.eye(3), None, np.arange(12.0).reshape(3, 4).T),
    "texts": objects(np.array(["ab", "c"]), np.array([b"x", b"yz"])),
    "types": objects(*(np.ones(2, kind) for kind in ("f2", "f4", ">f8", "i1", ">u2", "i8", "bool", "c8"))),
    "numbers of numpy": objects(np.float32(0.5), np.int64(-3), np.bool_(True), np.str_("x")),
    "pairs as LoFTR has them": objects(((0, 1), 0.25, []), ((2, 3), 0.5, [(1, 2)]), ([np.int64(1), 2], {"a": None}, 1)),
    "nested": objects(objects(np.arange(3), None), objects(objects("deep"))),
    "two axes": objects(1, "b", None, 2.5, np.arange(2), b"raw", shape=(2, 3)),
    "columns first": np.asfortranarray(objects(1, 2, 3, 4, 5, 6, shape=(2, 3))),
    "empty": np.empty(0, object),
    "one": objects("only").reshape(()),
    "plain numbers": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "plain columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "plain texts": np.array(["a", "bcd"]),
    "plain none": np.empty((0, 3)),
    "plain scalar": np.array(3.5),
}


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_load_as_numpy_loads_them(name, protocol):
    array = ARRAYS[name]
    data = npy(array, protocol if array.dtype == object else None)
    assert_same(read_npy(data, "x.npy"), np.load(io.BytesIO(data), allow_pickle=True))


def test_the_same_array_twice_stays_one():
    shared = np.arange(3)
    found = read_npy(npy(objects(shared, shared)), "x.npy")
    assert found[0] is found[1]


def test_names_of_numpy_1_and_2_are_known():
    data = npy(ARRAYS["matrices"], 4)
    new = b"numpy._core.multiarray"
    assert (new in data) != (b"numpy.core.multiarray" in data)
    old = pickle.dumps(ARRAYS["matrices"], 2).replace(b"numpy._core.", b"numpy.core.")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    assert b"numpy.core.multiarray" in old
    assert_same(read_npy(header.getvalue() + old, "x.npy"), ARRAYS["matrices"])


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_loads_as_numpy_loads_it(compressed):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, a=ARRAYS["matrices"], b=np.eye(2), c=objects(None))
    found = Npz(stream.getvalue(), "x.npz")
    expected = np.load(io.BytesIO(stream.getvalue()), allow_pickle=True)
    assert set(found) == set(expected)
    for name in expected:
        assert_same(found[name], expected[name])


# What is refused


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def attacks(folder):
    """Pickles that would leave a file behind, or fill the memory, and what the error says of them."""
    mark = str(folder / "run")
    dtype, multiarray = np.dtype, np.empty(0).__reduce__()[0]
    return {
        "os.system": (Reduced(os.system, (f"touch {mark}",)), r"asks for (posix|nt)\.system"),
        "builtins.eval": (Reduced(eval, (f"open({mark!r}, 'w')",)), r"asks for \w+\.eval"),
        "builtins.open": (Reduced(open, (mark, "w")), r"asks for (io|_io|builtins)\.open"),
        "builtins.getattr": (Reduced(getattr, ("", "upper")), r"asks for \w+\.getattr"),
        "a function of numpy": (Reduced(np.fromfile, (mark,)), "asks for numpy"),
        "pickled in pickled": (Reduced(pickle.loads, (b"cos\nsystem\n.",)), r"asks for _?pickle\.loads"),
        "a huge array": (Reduced(multiarray, (np.ndarray, (10**13,), b"b")), "asks for an array"),
        "an array of another kind": (Reduced(multiarray, (str, (0,), b"b")), r"asks for \w+\.(str|unicode)"),
        "a type with fields": (np.zeros(1, [("a", "i4")]), "asks for the type"),
        "a type of dates": (np.zeros(1, "M8[s]"), "asks for the type"),
        "bytes as objects": (Reduced(np._core.multiarray.scalar, (dtype("O"), b"\1" * 8)), "come without"),
        "a set": ({1, 2}, r"a set|asks for \w+\.set"),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", attacks(Path()))
def test_what_is_no_array_is_refused_and_nothing_runs(name, protocol, tmp_path):
    attack, said = attacks(tmp_path)[name]
    for value in (objects(attack), objects("a", [attack], None), objects(objects(attack))):
        with pytest.raises(PickledError, match=said) as refused:
            read_npy(npy(value, protocol), "scene.npy")
        assert "scene.npy is refused" in str(refused.value)
    stream = io.BytesIO()
    np.savez(stream, image_paths=objects(attack), allow_pickle=True)
    with pytest.raises(PickledError, match=r"image_paths of scene\.npz is refused"):
        dict(Npz(stream.getvalue(), "scene.npz"))
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_that_is_no_array_is_refused(tmp_path):
    header = npy(objects(1, 2), 4).partition(b"\n")[0] + b"\n"
    for content in (["a", "b"], "ab", np.arange(2), objects(1, 2, 3)):
        with pytest.raises(PickledError, match="not the array of shape"):
            read_npy(header + pickle.dumps(content, 4), "x.npy")


@pytest.mark.parametrize("code", [
    b"\x80\x04c_codecs\nencode\n}\x8c\x08__code__K\x01sb.",  # BUILD on a function
    b"\x80\x04cnumpy\ndtype\n\x8c\x02O8\x85R.",  # NEWOBJ and calls with little
    b"\x80\x04cnumpy\nndarray\nK\x05\x85R.",
    b"\x80\x02\x8c\x01a\x95.",
    b"P1\n.",  # a persistent id
    b"\x82\x01.",  # the extension registry
])  # fmt: skip
def test_tricks_of_the_format_are_refused(code):
    header = npy(objects(1), 4).partition(b"\n")[0] + b"\n"
    with pytest.raises(PickledError):
        read_npy(header + code, "x.npy")


def test_headers_that_promise_what_is_not_there_are_refused():
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with pytest.raises(PickledError, match=r"promises 80,000,000,000,000 bytes of float64, 4 are there"):
        read_npy(stream.getvalue() + b"abcd", "x.npy")
    with pytest.raises(PickledError, match="records with Python objects"):
        read_npy(npy(np.zeros(1, [("a", "O")])), "x.npy")
    whole = npy(np.eye(3))
    with pytest.raises(PickledError, match="promises"):
        read_npy(whole[:-1], "x.npy")


def test_archives_that_unpack_to_too_much_are_refused(monkeypatch):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.zeros(1_000_000, np.uint8))
    assert len(stream.getvalue()) < 10_000
    monkeypatch.setattr("vop.pickled.LARGEST", 100_000)
    with pytest.raises(PickledError, match=r"unpacks to 1,000,128 bytes, more than 100,000"):
        Npz(stream.getvalue(), "x.npz")


def test_members_of_an_archive_are_never_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../../outside.npy", npy(np.eye(2)))
    assert [*dict(Npz(stream.getvalue(), "x.npz"))] == ["../../outside"]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100)
@given(st.integers(0), st.binary(min_size=1, max_size=4))
def test_damaged_archives_are_arrays_or_refused(place, replaced):
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(50), b=objects("x", None))
    data = stream.getvalue()
    place %= len(data)
    try:
        dict(Npz(data[:place] + replaced + data[place + len(replaced) :], "x.npz"))
    except PickledError as refused:
        assert "x.npz" in str(refused)


SAMPLES = [npy(array, 4 if array.dtype == object else None) for array in ARRAYS.values()]


@settings(max_examples=300)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0), st.binary(max_size=4)), max_size=4))
def test_damaged_files_are_arrays_or_refused(data, changes):
    for place, replaced in changes:
        place %= len(data) + 1
        data = data[:place] + replaced + data[place + len(replaced) :]
    try:
        assert isinstance(read_npy(data, "x.npy"), np.ndarray)
    except PickledError as refused:
        assert "x.npy" in str(refused)
