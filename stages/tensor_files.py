"""Arrays out of files that users download: .npy, .npz, .safetensors and what torch.save writes (.pt, .pth).

Such files are hostile until read. Nothing in them is executed: numpy reads them without pickle, and torch through its
own unpickler of tensors (weights_only), to which DataComp's way of publishing adds numpy arrays: torch.save of an array
(its centroids), or of a dict with the key "image_features" (its features of ImageNet's training images). An array comes
as a call of numpy's `_reconstruct` and the state of a dtype and of an array. Here these names stand for small classes
of ours that check every part, so that not even numpy's own code sees an unchecked state.

torch before 2.6 can be made to execute code although weights_only is set (CVE-2025-32434): it is refused.
"""

from __future__ import annotations

import lzma
import os
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from pipeline.core import storage
from pipeline.core.errors import WinnowError, one_line

KEY = "image_features"  # of the one array that counts in a file of several, as DataComp names it
STATE = "state_dict"  # of the weights in a training's checkpoint, as open_clip names it
WHOLE = ""  # the name of an array that is the whole file
TORCH = (".pt", ".pth", ".bin", ".ckpt")
KINDS = (".npy", ".npz", ".safetensors", *TORCH)
MOST_INFLATED = 100  # times its size that a zip archive may become; vectors stay below 3
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
UNREADABLE = (  # what numpy, safetensors and torch raise for a file that is cut, changed or made to harm
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
    zlib.error,
    lzma.LZMAError,
)


def read_rows(path: str) -> np.ndarray:
    """[n, d] float32, finite: the one array of the file, or that with the key `image_features` where it has several.

    Raises:
        WinnowError: the file is missing or of another kind, has no such array, or numbers that are not finite.
    """
    arrays = read_arrays(path)
    name = next(iter(arrays)) if len(arrays) == 1 else KEY
    if name not in arrays:
        raise WinnowError(f"{path}: arrays {_listed(arrays)}, expected one, or one called {KEY}")
    rows = _as_float32(arrays[name], path, name)
    if rows.ndim != 2 or 0 in rows.shape:
        raise WinnowError(f"{path}: an array of shape {list(rows.shape)}, expected vectors [n, d]")
    if not np.isfinite(rows).all():
        raise WinnowError(f"{path}: NaN or infinite numbers, expected finite ones")
    return rows


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """{name: float32 array} of a model's weights: the file's, or those under its key `state_dict`.

    Raises:
        WinnowError: the file is missing or of another kind, or has no weights.
    """
    found = read_arrays(path, STATE)
    if not found or WHOLE in found:
        raise WinnowError(f"{path}: no names of weights, expected a state dict")
    return {name: _as_float32(array, path, name) for name, array in found.items()}


def read_arrays(path: str, within: str = "") -> dict[str, np.ndarray]:
    """{name: array} of the file as it is; a file of one nameless array has it under the name "".

    Args:
        within: a key whose dict counts instead of the whole, where there is one; for files of torch.save only.

    Raises:
        WinnowError: the file is missing, of another kind, or has no arrays.
    """
    kind = os.path.splitext(storage.name_of(path))[1].lower()
    if kind not in KINDS:
        raise WinnowError(f"{path}: expected a file {', '.join(KINDS)}")
    if not storage.exists(path) or storage.is_folder(path):
        raise WinnowError(f"{path}: no such file")
    try:
        with storage.open_read(path) as file:
            _check_inflation(file, path)
            if kind == ".npy":
                return {WHOLE: np.lib.format.read_array(file, allow_pickle=False)}
            if kind == ".npz":
                with np.load(file, allow_pickle=False) as archive:
                    return {name: archive[name] for name in archive.files}
            if kind == ".safetensors":
                return _of_safetensors(file.read(), path)
            return _of_torch(file, path, within)
    except UNREADABLE as error:
        raise WinnowError(f"{path}: expected {_expected(kind)}: {_cause(error)}") from error


def _expected(kind: str) -> str:
    return "tensors or numpy arrays as torch.save writes them" if kind in TORCH else f"arrays in a {kind} file"


def _cause(error: BaseException) -> str:
    """What is wrong with the file, on one line; without torch's advice to read it unsafely."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it wants {refused[1]}, which is no tensor; nothing of it was executed"
    return one_line(error, 200) if not isinstance(error, pickle.UnpicklingError) else "it can't be read safely"


def _check_inflation(file: BinaryIO, path: str) -> None:
    """None; the file is at its start. Raises WinnowError for a zip archive that grows beyond reason when read."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            packed_bytes = sum(entry.compress_size for entry in archive.infolist())
            whole_bytes = sum(entry.file_size for entry in archive.infolist())
        if whole_bytes > MOST_INFLATED * packed_bytes + (1 << 20):
            raise WinnowError(f"{path}: {packed_bytes:,} bytes that become {whole_bytes:,}, expected an honest archive")
    file.seek(0)


def _of_safetensors(data: bytes, path: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return {name: _of_tensor(tensor) for name, tensor in load(data).items()}
    except SafetensorError as error:
        raise WinnowError(f"{path}: expected {_expected('.safetensors')}: {one_line(error, 200)}") from error


def _of_torch(file: BinaryIO, path: str, within: str) -> dict[str, np.ndarray]:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise WinnowError(f"{path}: torch {torch.__version__} can't read it safely, expected torch 2.6 or newer")
    modules = ("numpy.core", "numpy._core")  # of numpy 1 and 2
    allowed = [(_reconstruct, f"{module}.multiarray._reconstruct") for module in modules]
    allowed += [(_Array, "numpy.ndarray"), (_Dtype, "numpy.dtype")]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle's protocols and sparse tensors, which are judged below
        found = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(found, Mapping) and isinstance(found.get(within), Mapping):
        found = found[within]
    whole = found if isinstance(found, Mapping) else {WHOLE: found}
    arrays: dict[str, np.ndarray] = {}
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            arrays[str(name)] = _of_tensor(value)
        elif isinstance(value, _Array):
            arrays[str(name)] = value.array
    if not arrays:
        raise WinnowError(f"{path}: no tensor or array on its first level, expected some")
    return arrays


def _of_tensor(tensor: Any) -> np.ndarray:
    """The tensor as an array; bfloat16 and other narrow kinds of float as float32. Raises ValueError for a fake one."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}, expected a plain one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} with fewer numbers than that")
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.float()
    return tensor.numpy()


def _as_float32(array: np.ndarray, path: str, name: str) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise WinnowError(f"{path}: {name or 'its array'} is of dtype {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # what becomes infinite is judged by the reader
        return np.ascontiguousarray(array, np.float32)


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(sorted(arrays)[:10]) + (", ..." if len(arrays) > 10 else "")


class _Dtype:
    """Stands for numpy.dtype in a pickle: `dtype("f4", False, True)`, then its state (3, "<", None, ...)."""

    def __init__(self, code: str, *flags: bool):
        if code not in DTYPES:
            raise ValueError(f"an array of dtype {code}, expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a dtype that is not of plain numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray in a pickle: its state is (1, shape, dtype, whether in Fortran's order, bytes)."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, data = state
        if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
            raise ValueError("an array that is not of plain numbers")
        flat = np.frombuffer(data, kind.dtype)
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    """Stands for numpy's function of this name, which makes an empty array for the state that follows."""
    if kind is not _Array:
        raise ValueError("an array of another class than numpy.ndarray")
    return _Array()
