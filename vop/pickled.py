"""NumPy's files with Python objects in them (`None`, rows of unequal length), read without running what they ask for.

NumPy writes such arrays as pickles, and a pickle can call any function of any module. This reader gives it a handful of
names, those of which NumPy's own arrays are made, each bound to code of this module that builds plain arrays and checks
what it is given; NumPy's unpickling is never reached. Arrays without objects go through NumPy, after their header was
compared with the bytes that are there. The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np

LARGEST = 8 << 30  # bytes of an unpacked file: what a scene of 30,000 images takes
KIND = re.compile(r"(?P<kind>[biufcSU])(?P<size>\d{1,6})|O8?")
# An object array holds these, besides arrays and numbers of NumPy.
PLAIN = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict)


class PickledError(ValueError):
    """A file that is no NumPy file, is damaged, or asks for more than arrays."""


def read_npy(data: bytes, source: str) -> np.ndarray:
    """The array of an .npy file. `source` names it in errors. Raises `PickledError`."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise PickledError(f"format version {version[0]}.{version[1]}, expected 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.hasobject:
            return _objects(stream, shape, dtype)
        expected, found = math.prod(shape) * max(1, dtype.itemsize), len(data) - stream.tell()
        if expected != found:
            raise PickledError(f"its header promises {expected:,} bytes of {dtype}, {found:,} are there")
        values = np.frombuffer(data, dtype, offset=stream.tell()) if expected else np.empty(math.prod(shape), dtype)
        return values.reshape(shape, order="F" if fortran else "C").copy(order="K")
    except PickledError as error:
        raise PickledError(f"{source} is refused: {error}") from error
    except Exception as error:  # on arbitrary bytes the header's parser and the unpickler raise nearly anything
        raise PickledError(
            f"{source} is not an .npy file, or a damaged one ({type(error).__name__}): fetch it again"
        ) from error


class Npz(Mapping):
    """The arrays of an .npz file by name, each read when it is asked for. No member is ever written to a disk.

    Raises `PickledError` for what is no such file, and for one that unpacks to more than 8 GB.
    """

    def __init__(self, data: bytes, source: str):
        self._source = source
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:
            raise PickledError(f"{source} is not an .npz file, or a damaged one ({error}): fetch it again") from error
        self._members = {entry.filename.removesuffix(".npy"): entry for entry in self._archive.infolist()}
        unpacked = sum(entry.file_size for entry in self._archive.infolist())
        if unpacked > LARGEST:
            raise PickledError(
                f"{source} is refused: it unpacks to {unpacked:,} bytes, more than {LARGEST:,}; if it is what you "
                "expect, divide it into several scenes"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        entry, source = self._members[name], f"{name} of {self._source}"
        try:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise NotImplementedError(f"compression method {entry.compress_type}, which NumPy does not write")
            data = self._archive.read(entry)
        except Exception as error:  # zipfile raises nearly anything on arbitrary bytes
            raise PickledError(f"{source} cannot be read ({error}): fetch the file again") from error
        return read_npy(data, source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def _objects(stream: io.BytesIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "O":
        raise PickledError(f"it holds records with Python objects, {dtype}")
    array = _Unpickler(stream).load()
    array = array.made if isinstance(array, _Array) else array
    if not isinstance(array, np.ndarray) or array.dtype.kind != "O" or array.size != math.prod(shape):
        raise PickledError(f"its content is not the array of shape {shape} that its header promises")
    return array.reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Knows the names that pickled arrays are made of, and refuses every other."""

    def find_class(self, module: str, name: str) -> object:
        """What a name stands for here."""
        known = KNOWN.get((module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name))
        if known is None:
            raise PickledError(
                f"it asks for {module}.{name}, which no array of numbers and texts needs, and loading such a pickle "
                "can run any code. If you trust it, load it once yourself and save it without Python objects"
            )
        return _Name(known)


class _Name:
    """A name that a pickle may call, and nothing else."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise PickledError("it sets attributes of a function")

    def stands_for(self, call: Callable) -> bool:
        return self._call is call


class _Type:
    """A dtype in the making."""

    __slots__ = ("made",)

    def __init__(self, kind: object):
        if not isinstance(kind, str) or not (found := KIND.fullmatch(kind)) or found["kind"] == "O":
            raise PickledError(f"it asks for the type {kind!r}")
        self.made = np.dtype(kind)

    def __setstate__(self, state: tuple) -> None:
        # version, byte order, then what only records have, size, alignment and flags, which follow from the name
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise PickledError(f"it asks for a type with fields: {state!r}")
        self.made = self.made.newbyteorder(state[1]) if state[1] != "|" else self.made


class _Array:
    """An array in the making: its content comes after it."""

    __slots__ = ("made",)

    def __init__(self):
        self.made = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        count, dtype = _count(shape), _dtype(kind)
        if dtype.kind == "O":
            if not isinstance(content, list) or len(content) != count:
                raise PickledError(f"an array of shape {shape} comes without its {count} objects")
            array = np.empty(count, object)
            for place, value in enumerate(content):
                array[place] = _plain(value)
            self.made = array.reshape(shape)  # objects come row by row, whatever the order of the array was
        else:
            array = _numbers(content, dtype, count)
            self.made = array.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


def _plain(value: object) -> object:
    """A value that may stand in an object array."""
    if isinstance(value, _Array):
        if value.made is None:
            raise PickledError("an array holds itself")
        return value.made
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if not isinstance(value, (*PLAIN, np.ndarray, np.generic)):
        raise PickledError(f"an array holds a {type(value).__name__.strip('_')}")
    return value


def _count(shape: object) -> int:
    if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise PickledError(f"it asks for the shape {shape!r}")
    return math.prod(shape)


def _dtype(kind: object) -> np.dtype:
    if not isinstance(kind, _Type):
        raise PickledError(f"it asks for the type {kind!r}")
    return kind.made


def _numbers(content: object, dtype: np.dtype, count: int) -> np.ndarray:
    if (
        not isinstance(content, (bytes, bytearray))
        or dtype.kind == "O"
        or len(content) != count * max(1, dtype.itemsize)
    ):
        raise PickledError(f"{count} values of {dtype} come without their bytes")
    return np.frombuffer(bytes(content), dtype).copy() if content else np.empty(count, dtype)


def _array_type() -> None:
    """Stands for `numpy.ndarray`."""
    raise PickledError("it calls numpy.ndarray")


def _reconstruct(kind: object, shape: object, letter: object) -> _Array:
    if not (isinstance(kind, _Name) and kind.stands_for(_array_type)) or shape != (0,) or letter not in (b"b", "b"):
        raise PickledError(f"it asks for an array as {kind!r} of shape {shape!r}")
    return _Array()


def _type(kind: object, align: object = False, copy: object = True) -> _Type:
    return _Type(kind)


def _scalar(kind: object, content: object = None) -> np.generic:
    return _numbers(content, _dtype(kind), 1)[0]


def _from_buffer(content: object, kind: object, shape: object, order: object) -> np.ndarray:
    if order not in ("C", "F"):
        raise PickledError(f"it asks for the order {order!r}")
    return _numbers(content, _dtype(kind), _count(shape)).reshape(shape, order=order)


def _encode(text: object, encoding: object) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickledError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin-1")


def _nothing() -> bytes:
    """How protocol 2 writes no bytes."""
    return b""


KNOWN: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _nothing,
}
