"""Marian's model files: named weights and the training options, from `.bin` and `.npz`.

A `.bin` holds, all little-endian: uint64 version = 1; uint64 N; N headers of four uint64 (length of the name, type,
number of dimensions, bytes of data); the N names, each ended by NUL; the N shapes as int32; uint64 number of bytes to
skip; the data, in which a tensor takes a multiple of 256 bytes.

Tensors of type intgemm8 are int8 values followed by one float32 `quantMult`: weight = value / quantMult. Their matrices
lie transposed, [out, in], under the shape [in, out]; embeddings do not.
"""

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from numpy.typing import NDArray

_OPTIONS = "special:model.yml"
_ACTIVATION_SCALE = "_QuantMultA"  # ends the names of what only integer arithmetic needs
_UNTRANSPOSED = ("Wemb", "_Wt")  # ends the names of quantised matrices that lie as their shape says

_INT8, _FLOAT16, _FLOAT32, _INTGEMM8 = 0x0101, 0x0402, 0x0404, 0x4101
_TYPES: dict[int, np.dtype[Any]] = {
    _INT8: np.dtype("i1"),
    _FLOAT16: np.dtype("<f2"),
    _FLOAT32: np.dtype("<f4"),
    _INTGEMM8: np.dtype("i1"),
}
_TYPE_NAMES = "0x0101 (int8), 0x0402 (float16), 0x0404 (float32) or 0x4101 (intgemm8)"

_ZIP = b"PK\x03\x04"  # begins an `.npz`
_ALIGNMENT = 256
_LONGEST_NAME = 4096
_MOST_DIMENSIONS = 8
_LONGEST_OPTIONS = 1 << 20


@dataclass(frozen=True)
class MarianModel:
    """What a model file holds.

    Attributes:
        tensors: float32 weights by Marian's names; matrices have the shape (in, out), embeddings (V, D), biases (1, n).
        options: The training options, of which `dim-emb`, `enc-depth` and their like describe the architecture.
    """

    tensors: dict[str, NDArray[np.float32]]
    options: dict[str, Any]


def read_marian_file(path: Path) -> MarianModel:
    """Read a model, dequantised and no longer transposed.

    Nothing larger than the file is allocated before the sizes that it claims are compared with its own.

    Args:
        path: A `.bin` or `.npz` file.

    Raises:
        ValueError: The file is damaged or not Marian's.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        npz = file.read(len(_ZIP)) == _ZIP
    tensors: dict[str, NDArray[np.float32]] = {}
    options = None
    for name, values in _npz_tensors(path) if npz else _binary_tensors(path):
        if name == _OPTIONS:
            options = _parse_options(path, values)
        elif np.isfinite(values).all():
            tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
        else:
            raise _damaged(path, f"{name} has values that are no numbers, expected finite ones")
    if options is None:
        raise _damaged(path, f"it holds no {_OPTIONS}, expected the training options there")
    return MarianModel(tensors, options)


@dataclass(frozen=True)
class _Header:
    """Name, type, shape and bytes of one tensor of a `.bin`."""

    name: str
    type: int
    shape: tuple[int, ...]
    size: int


def _binary_tensors(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    size = path.stat().st_size
    if size < 16:
        raise _damaged(path, f"it has {size} bytes, expected 16 or more")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    headers, position = _headers(path, content)
    for header in headers:
        if not header.name.endswith(_ACTIVATION_SCALE):
            yield header.name, _values(path, header, content[position : position + header.size])
        position += header.size


def _headers(path: Path, content: NDArray[np.uint8]) -> tuple[list[_Header], int]:
    """The headers of all tensors, and where the data of the first begins."""
    cursor = _Cursor(path, content)
    version, count = cursor.unpack("Q", 2, "version and number of tensors")
    if version != 1:
        raise _damaged(path, f"its version is {version}, expected 1")
    fields = cursor.unpack("Q", 4 * count, f"headers of {count} tensors")
    sizes = [fields[start : start + 4] for start in range(0, len(fields), 4)]
    names = []
    for length, kind, dimensions, _ in sizes:
        if not 0 < length <= _LONGEST_NAME:
            raise _damaged(path, f"a name has {length} bytes, expected 1 to {_LONGEST_NAME}")
        name = cursor.take(length, "names").tobytes().rstrip(b"\0").decode("utf-8", errors="replace")
        if name in names:
            raise _damaged(path, f"{name} is there twice, expected each name once")
        if kind not in _TYPES:
            raise _damaged(path, f"{name} is of type {kind:#06x}, expected {_TYPE_NAMES}")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise _damaged(path, f"{name} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
        names.append(name)
    headers = []
    for name, (_, kind, dimensions, length) in zip(names, sizes, strict=True):
        shape = cursor.unpack("i", dimensions, f"the shape of {name}")
        if min(shape) < 1:
            raise _damaged(path, f"{name} has the shape {shape}, expected 1 or more in each dimension")
        headers.append(_Header(name, kind, shape, length))
        _check_size(path, headers[-1])
    (skipped,) = cursor.unpack("Q", 1, "number of bytes to skip")
    cursor.take(skipped, "bytes to skip")
    if (claimed := sum(header.size for header in headers)) != cursor.left:
        raise _damaged(path, f"its tensors claim {claimed} bytes, expected the {cursor.left} that are there")
    return headers, cursor.position


def _check_size(path: Path, header: _Header) -> None:
    size = _elements(header.shape) * _TYPES[header.type].itemsize
    if header.type == _INTGEMM8:
        size += 4  # quantMult
    if not size <= header.size < size + _ALIGNMENT:
        raise _damaged(path, f"{header.name} has {header.size} bytes, expected {size} and up to {_ALIGNMENT - 1} more")


def _values(path: Path, header: _Header, data: NDArray[np.uint8]) -> NDArray[Any]:
    """A tensor's values from its bytes."""
    kind, count = _TYPES[header.type], _elements(header.shape)
    raw = data[: count * kind.itemsize].tobytes()
    values = np.frombuffer(raw, dtype=kind)
    if header.type != _INTGEMM8:
        return values.reshape(header.shape)
    (scale,) = struct.unpack("<f", data[count : count + 4].tobytes())
    if not (np.isfinite(scale) and scale > 0):
        raise _damaged(path, f"{header.name} has the quantMult {scale}, expected a number above 0")
    weights = values.astype(np.float32) / np.float32(scale)
    if len(header.shape) != 2 or header.name.endswith(_UNTRANSPOSED):
        return weights.reshape(header.shape)
    return weights.reshape(header.shape[::-1]).T  # [out, in] -> [in, out]


class _Cursor:
    """Reads a file from front to back and never beyond its end."""

    def __init__(self, path: Path, content: NDArray[np.uint8]) -> None:
        self.path, self.content, self.position = path, content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        if count > self.left:
            raise _damaged(self.path, f"{what}: {count} bytes, expected at most the {self.left} that are left")
        self.position += count
        return self.content[self.position - count : self.position]

    def unpack(self, letter: str, count: int, what: str) -> tuple[int, ...]:
        data = self.take(count * struct.calcsize(f"<{letter}"), what)
        return struct.unpack(f"<{count}{letter}", data.tobytes())


def _npz_tensors(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            claimed, there = sum(member.file_size for member in members), path.stat().st_size
            if claimed > there or any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise _damaged(path, "it is compressed, expected members that are stored, as Marian and numpy.savez do")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if not name.endswith(_ACTIVATION_SCALE):
                    with archive.open(member) as file:
                        yield name, _npy_values(path, name, file, member.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise _damaged(path, str(error)) from error


def _npy_values(path: Path, name: str, file: IO[bytes], size: int) -> NDArray[Any]:
    """One array, read without numpy's own reader, which allocates what the header claims."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, kind = readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError) as error:
        raise _damaged(path, f"{name} is no array that numpy wrote: {error}") from error
    if kind not in (np.dtype("<f4"), np.dtype("<f2"), np.dtype("i1")):
        raise _damaged(path, f"{name} is of type {kind}, expected float32, float16 or int8")
    left = size - file.tell()
    if _elements(shape) * kind.itemsize != left:
        raise _damaged(path, f"{name} has {left} bytes, expected {_elements(shape) * kind.itemsize} for {shape}")
    return np.frombuffer(file.read(), dtype=kind).reshape(shape, order="F" if fortran else "C")


def _parse_options(path: Path, values: NDArray[Any]) -> dict[str, Any]:
    if values.dtype != np.int8 or values.size > _LONGEST_OPTIONS:
        raise _damaged(path, f"{_OPTIONS} has {values.size} values, expected text of at most {_LONGEST_OPTIONS} bytes")
    try:
        options = yaml.safe_load(values.tobytes().rstrip(b"\0").decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, f"{_OPTIONS} is no YAML: {error}") from error
    if not isinstance(options, dict):
        raise _damaged(path, f"{_OPTIONS} is {type(options).__name__}, expected names and values")
    return options


def _elements(shape: tuple[int, ...]) -> int:
    """The number of elements, without numpy's overflow."""
    count = 1
    for length in shape:
        count *= length
    return count


def _damaged(path: Path, words: str) -> ValueError:
    return ValueError(f"{path} is damaged or no model of Marian: {words}")
