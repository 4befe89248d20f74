"""Arrays of downloaded files: each way they are published in, and files that are made to harm."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.core.errors import WinnowError
from stages.tensor_files import read_rows, read_state_dict

ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """A torch.save archive with a name in its pickle changed; both names are lines of the pickle."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            target.writestr(entry.filename, content)
    return changed.getvalue()


def saved(value, **options) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def write(folder, name: str, data: bytes) -> str:
    """The path of a file with these bytes."""
    (folder / name).write_bytes(data)
    return str(folder / name)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "<i8", "u1"])
def test_an_array_is_read_as_it_was_written(dtype, tmp_path):
    rows = (ROWS * 10).astype(dtype)
    expected = rows.astype(np.float32)
    np.save(tmp_path / "a.npy", rows)
    np.savez_compressed(tmp_path / "a.npz", image_features=rows, other=np.arange(3))
    for path in (
        str(tmp_path / "a.npy"),
        str(tmp_path / "a.npz"),
        write(tmp_path, "array.pt", saved(rows)),
        write(tmp_path, "fortran.pt", saved(np.asfortranarray(rows))),
        write(tmp_path, "dict.pt", saved({"image_features": rows, "names": ["a"], "more": rows[:2]})),
        write(tmp_path, "legacy.pth", saved(rows, _use_new_zipfile_serialization=False)),
    ):
        found = read_rows(path)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert np.array_equal(found, expected), path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_tensor_is_read_as_it_was_written(dtype, tmp_path):
    rows = (torch.from_numpy(ROWS) * 10).to(dtype)
    safetensors.torch.save_file({"anything": rows}, tmp_path / "a.safetensors")
    for path in (
        str(tmp_path / "a.safetensors"),
        write(tmp_path, "tensor.pt", saved(rows)),
        write(tmp_path, "transposed.pt", saved({"image_features": rows.t().contiguous().t(), "b": rows})),
        write(tmp_path, "legacy.pt", saved({"image_features": rows}, _use_new_zipfile_serialization=False)),
    ):
        assert np.array_equal(read_rows(path), rows.float().numpy()), path


def test_both_spellings_of_numpy_are_read(tmp_path):
    data = saved({"image_features": ROWS})
    other = b"numpy.core.multiarray\n" if b"numpy._core" in data else b"numpy._core.multiarray\n"
    own = b"numpy._core.multiarray\n" if b"numpy._core" in data else b"numpy.core.multiarray\n"
    assert np.array_equal(read_rows(write(tmp_path, "own.pt", data)), ROWS)
    assert np.array_equal(read_rows(write(tmp_path, "other.pt", renamed(data, own, other))), ROWS)


def test_weights_are_read_by_name(tmp_path):
    layer = torch.nn.Linear(3, 2)
    expected = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    halved = {name: value.half().numpy().astype(np.float32) for name, value in layer.state_dict().items()}
    safetensors.torch.save_file(dict(layer.half().state_dict()), tmp_path / "half.safetensors")
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in expected.items()})
    layer.float().load_state_dict({name: torch.from_numpy(value) for name, value in expected.items()})
    np.savez(tmp_path / "a.npz", **expected)
    state = collections.OrderedDict(layer.state_dict())
    for path, wanted in (
        (write(tmp_path, "plain.pth", saved(state)), expected),
        (write(tmp_path, "inner.pt", saved({"epoch": 3, "name": "a", "state_dict": state})), expected),
        (write(tmp_path, "arrays.pt", saved(expected)), expected),
        (str(tmp_path / "a.npz"), expected),
        (str(tmp_path / "half.safetensors"), halved),
    ):
        found = read_state_dict(path)
        assert sorted(found) == sorted(wanted)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
        assert all(array.dtype == np.float32 for array in found.values())


class Attack:
    """What a hostile file unpickles to: a call of a function of its author's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_executes_nothing(tmp_path):
    mark = tmp_path / "executed"
    for number, (attack, named) in enumerate(
        [
            (Attack(os.system, f"touch {mark}"), "posix.system"),
            (Attack(exec, f"open({str(mark)!r}, 'w')"), "exec"),
            (Attack(eval, f"open({str(mark)!r}, 'w')"), "eval"),
            (Attack(getattr, "", "join"), "getattr"),
            (Attack(io.open, str(mark), "w"), "io.open|_io.open"),
        ]
    ):
        for value in (attack, {"image_features": ROWS, "extra": attack}):
            for options in ({}, {"_use_new_zipfile_serialization": False}):
                path = write(tmp_path, f"{number}.pt", saved(value, **options))
                for read in (read_rows, read_state_dict):
                    with pytest.raises(WinnowError, match=rf"{number}.pt: expected tensors or numpy arrays") as caught:
                        read(path)
                    assert "\n" not in str(caught.value)
                    assert "weights_only=False" not in str(caught.value)
                    assert any(name in str(caught.value) for name in (*named.split("|"), "safely")), caught.value
        plain = write(tmp_path, "plain.pt", pickle.dumps(attack, protocol=2))
        with pytest.raises(WinnowError, match=r"plain.pt: expected tensors or numpy arrays"):
            read_rows(plain)
        np.save(tmp_path / "object.npy", np.array([attack], object), allow_pickle=True)
        np.savez(tmp_path / "object.npz", image_features=np.array([attack], object))
        for name in ("object.npy", "object.npz"):
            with pytest.raises(WinnowError, match=f"{name}: expected arrays in a"):
                read_rows(str(tmp_path / name))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Attack(exec, f"open({str(mark)!r}, 'w').close()")))  # the attack itself is real
    assert mark.exists()


def test_arrays_that_are_not_of_plain_numbers_are_refused(tmp_path):
    for value in (
        np.array([["a", "b"]]),
        np.array([[{"a": 1}]], object),
        np.zeros(3, "f4,f4"),
        np.array([["2020-01-01"]], "M8[D]"),
        np.ma.masked_array(ROWS),
        np.zeros((2, 2), complex),
    ):
        with pytest.raises(WinnowError, match=r"a.pt: expected tensors or numpy arrays"):
            read_rows(write(tmp_path, "a.pt", saved({"image_features": value})))
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    with pytest.raises(WinnowError, match=r"text.npy: its array is of dtype <U1, expected numbers"):
        read_rows(str(tmp_path / "text.npy"))


def test_what_is_no_set_of_vectors_is_named(tmp_path):
    for value, message in (
        (ROWS[0], r"an array of shape \[5\], expected vectors"),
        (torch.zeros(0, 5), r"an array of shape \[0, 5\], expected vectors"),
        (np.full((2, 2), np.nan), "NaN or infinite"),
        (np.full((2, 2), 1e200), "NaN or infinite"),
        ({"a": ROWS, "b": ROWS}, "arrays a, b, expected one, or one called image_features"),
        ({"a": [1, 2]}, "no tensor or array on its first level"),
        (torch.zeros(1).expand(10**6, 10**6), "with fewer numbers than that"),
        (torch.eye(3).to_sparse(), "expected a plain one"),
    ):
        with pytest.raises(WinnowError, match=message):
            read_rows(write(tmp_path, "a.pt", saved(value)))
    with pytest.raises(WinnowError, match="expected a state dict"):
        read_state_dict(write(tmp_path, "a.pt", saved(ROWS)))
    with pytest.raises(WinnowError, match=r"a.pkl: expected a file .npy, .npz"):
        read_rows(write(tmp_path, "a.pkl", saved(ROWS)))
    with pytest.raises(WinnowError, match=r"none.npy: no such file"):
        read_rows(str(tmp_path / "none.npy"))


def test_an_archive_that_grows_beyond_reason_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", image_features=np.zeros((4000, 1000), np.float32))
    with pytest.raises(WinnowError, match="bytes that become 16,0.*expected an honest archive"):
        read_rows(str(tmp_path / "a.npz"))


def test_damaged_files_give_one_line(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "a.npz", image_features=ROWS)
    np.savez_compressed(tmp_path / "b.npz", image_features=ROWS)
    safetensors.torch.save_file({"a": torch.from_numpy(ROWS)}, tmp_path / "a.safetensors")
    write(tmp_path, "a.pt", saved({"image_features": ROWS}))
    write(tmp_path, "b.pt", saved(ROWS, _use_new_zipfile_serialization=False))
    rng = np.random.default_rng(1)
    refused = 0
    for name in ("a.npy", "a.npz", "b.npz", "a.safetensors", "a.pt", "b.pt"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            if rng.random() < 0.5:
                data = data[: rng.integers(len(data))]
            for at in rng.integers(max(1, len(data)), size=3):
                data[at : at + 1] = bytes([rng.integers(256)])
            path = write(tmp_path, f"damaged{name}", bytes(data))
            message = ""
            try:
                read_rows(path)
            except WinnowError as error:
                message = str(error)
            refused += bool(message)
            assert "\n" not in message
    assert refused > 150
