"""Damaged and hostile inputs: one clear error each, and nothing is lost without a word."""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.preprocess.images import load_images
from dlc_jax.probes.shards import Parts

FILES = [encoded(image) for image in random_images(6, 12)]


def refused(source: str, says: str) -> None:
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_dataset(source)


def shard(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def six() -> dict[str, bytes]:
    members = {}
    for i, image in enumerate(FILES):
        members |= {f"s{i}.jpg": image, f"s{i}.cls": b"ab"[i % 2 : i % 2 + 1]}
    return members


def table(path: Path, name: str = "table.csv", text: str | bytes = "") -> str:
    for i, image in enumerate(FILES[:3]):
        (path / f"{i}.png").write_bytes(image)
    content = text if isinstance(text, bytes) else text.encode()
    (path / name).write_bytes(content)
    return f"csv:{path}/{name}"


@pytest.mark.parametrize("damage", ["header", "cut before a header", "cut in a header", "no end"])
def test_shards_that_are_damaged_or_cut_short_are_not_taken_for_shorter_ones(tmp_path, damage):
    source = shard(tmp_path / "x.tar", six())
    content = bytearray((tmp_path / "x.tar").read_bytes())
    start = content.find(b"s3.jpg")
    if damage == "header":
        content[start + 100] ^= 1
    elif damage == "cut before a header":
        del content[start:]
    elif damage == "cut in a header":
        del content[start + 100 :]
    else:
        start = len(bytes(content).rstrip(b"\0")) // 512 * 512 + 512
        del content[start:]
    (tmp_path / "x.tar").write_bytes(content)
    refused(source, "x.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padded", [True, False])
def test_whole_shards_of_every_kind_are_read(tmp_path, form, padded):
    source = shard(tmp_path / "x.tar", six(), form)
    if not padded:
        content = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
        whole = -(-len(content) // 512) * 512 + 1024
        (tmp_path / "x.tar").write_bytes(content.ljust(whole, b"\0"))
    dataset = dlc.load_dataset(source)
    assert [dataset[i].image for i in range(6)] == FILES


def test_shards_of_the_tar_command_are_read(tmp_path):
    for name, content in six().items():
        (tmp_path / name).write_bytes(content)
    subprocess.run(["tar", "-cf", "x.tar", *six()], cwd=tmp_path, check=True)
    assert len(dlc.load_dataset(f"tar:{tmp_path}/x.tar")) == 6


def test_names_and_labels_that_are_no_text_are_refused(tmp_path):
    image = FILES[0]
    broken = {"a\udcff.jpg": image, "a\udcff.cls": b"0"}
    source = shard(tmp_path / "x.tar", broken, tarfile.GNU_FORMAT)
    refused(source, r"id 'a\\udcff' is not valid UTF-8")
    source = shard(tmp_path / "y.tar", {"a.jpg": image, "a.json": b'{"label": "\\ud800"}'})
    refused(source, r"class name '\\ud800' is not valid UTF-8")
    for nested in (b"[" * 200_000, b'{"label": 1' + b"0" * 30 + b"}"):
        source = shard(tmp_path / "z.tar", {"a.jpg": image, "a.json": nested})
        refused(source, r"label cannot be read|has label 10+, expected an integer of 64 bits")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1_0", "10"], ["10", "1_0"]),
        (["01", "1"], ["01", "1"]),
        (["-1", "+1"], ["+1", "-1"]),
        (["99999999999999999999", "1"], ["1", "99999999999999999999"]),
        (["-3", "10"], ["-3", "10"]),
    ],
)
def test_only_plain_integers_are_read_as_integers(tmp_path, labels, names):
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    source = table(tmp_path, text="path,label\n" + rows)
    members = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.jpg": FILES[i], f"{i}.cls": label.encode()}
    for where in (source, shard(tmp_path / "x.tar", members)):
        assert list(dlc.load_dataset(where).class_names) == names


def test_integers_beyond_64_bits_are_refused(tmp_path):
    labels = pa.array([1, 2**63], pa.uint64())
    pq.write_table(pa.table({"image": FILES[:2], "label": labels}), tmp_path / "x.parquet")
    refused(f"parquet:{tmp_path}/x.parquet", "row 1 has label 9223372036854775808")
    images = random_images(2, 8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([1, 2**63], np.uint64))
    refused(f"npz:{tmp_path}/x.npz", "row 1 has label 9223372036854775808")


def test_tables_of_values_with_unusual_characters_and_headers(tmp_path):
    source = table(tmp_path, text="Path,LABEL\n0.png,a\u2028b\n1.png,c\x0bd\u0085e\n")
    assert dlc.load_dataset(source).class_names == ("a\u2028b", "c\x0bd\u0085e")
    source = table(tmp_path, "x.TSV", b"file\tclass\r\n0.png\ta\r\n1.png\tb\r\n")
    assert dlc.load_dataset(source).class_names == ("a", "b")


def test_a_file_that_is_gone_can_be_skipped_where_content_makes_the_ids(tmp_path):
    source = table(tmp_path, text="path,label\n0.png,a\n0.png,b\ngone.png,b\n")
    dataset = dlc.load_dataset(source)
    assert len(set(dataset.ids)) == 3
    with pytest.raises(dlc.InputError, match=r"gone\.png"):
        load_images(dataset, 32)
    assert load_images(dataset, 32, on_corrupt="skip").positions.tolist() == [0, 1]


def test_pipes_and_devices_are_refused_and_do_not_hang(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(FILES[0])
    for name in ("a/pipe.png", "pipe.csv", "pipe.tar", "pipe.npz", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
    for scheme in ("csv", "tar", "npz", "parquet"):
        refused(f"{scheme}:{tmp_path}/pipe.{scheme}", "not a regular file")
    refused("csv:/dev/zero", "not a regular file")
    table(tmp_path, text="path,label\na/pipe.png,a\n0.png,b\n")
    for source in (f"folder:{tmp_path}", f"csv:{tmp_path}/table.csv"):
        dataset = dlc.load_dataset(source)
        assert len(dataset.fingerprint) == 64
        with pytest.raises(dlc.InputError, match="not a regular file"):
            load_images(dataset, 32)


def test_folders_that_may_not_be_read_are_not_passed_over(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/closed/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES[0])
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    refused(f"folder:{tmp_path}", "cannot be read.*Permission denied.*closed")


def archive(path: Path, **arrays: np.ndarray) -> bytearray:
    np.savez(path, **{"images": random_images(2, 8), "labels": [0, 1], **arrays})
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("damage", ["encrypted", "method", "version", "patch", "shape"])
def test_archives_that_are_damaged_are_refused(tmp_path, damage):
    path = tmp_path / "x.npz"
    content = archive(path)
    entry = content.find(b"PK\1\2")  # the directory: version at 6, flags at 8, method at 10
    if damage == "encrypted":
        content[entry + 8] |= 1
        content[6] |= 1
    elif damage == "patch":
        content[entry + 8] |= 0x20
        content[6] |= 0x20
    elif damage == "method":
        content[entry + 10] = 77
    elif damage == "version":
        content[entry + 6] = 255
    if damage == "shape":
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 100, 3), }"
        header = header.ljust(117) + b"\n"
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", array)
    else:
        path.write_bytes(content)
    refused(f"npz:{path}", "cannot be read as arrays")
    assert not Parts(tmp_path).has("x")


def test_archives_that_would_unpack_to_more_than_the_memory_are_refused(tmp_path, monkeypatch):
    images = np.zeros((1000, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.arange(1000) % 2)
    assert len(dlc.load_dataset(f"npz:{tmp_path}/x.npz")) == 1000
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**10, "SC_PAGE_SIZE": 2**10}.get)
    refused(
        f"npz:{tmp_path}/x.npz", "take 0.00287 GiB of memory, expected at most the 0.000977 GiB"
    )


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"ids": np.array([b"\xff", b"a"])}, "ids are bytes that are not ASCII"),
        ({"class_names": np.array([b"\xff", b"a"])}, "class_names are bytes that are not ASCII"),
        ({"ids": np.array([0.5, 1.5])}, "ids are float64, expected text or integers"),
        ({"class_names": np.array([True, False])}, "class_names are bool, expected text"),
        ({"images": np.zeros(2, [("a", "u1")])}, "images are .* expected uint8"),
        ({"labels": np.array(1)}, r"labels have shape \(\), expected \(2,\)"),
        ({"labels": np.array([1, 0.5])}, r"labels must be integers or strings.* 1\.0 in row 0"),
    ],
)
def test_archives_of_other_types_are_refused(tmp_path, arrays, says):
    archive(tmp_path / "x.npz", **arrays)
    refused(f"npz:{tmp_path}/x.npz", says)


def test_members_of_an_archive_that_are_no_arrays_are_not_taken_for_arrays(tmp_path):
    archive(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as file:
        file.writestr("ids", b"no array")
    assert len(dlc.load_dataset(f"npz:{tmp_path}/x.npz")) == 2
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("images", b"no array")
        file.writestr("labels", b"no array")
    refused(
        f"npz:{tmp_path}/x.npz",
        "no image array; expected one named images or image or x, found none",
    )


@pytest.mark.parametrize("names", [("a", "a\0"), ("a\0", "b"), ("a\0b", "c")])
def test_names_with_nul_are_refused_by_every_source(tmp_path, names):
    """NumPy drops a NUL at the end of a text, so that two ids would become one."""
    images, labels = FILES[:2], ["cat", "dog"]
    with pytest.raises(dlc.InputError, match=r"arrays: id .* holds the character NUL"):
        dlc.array_dataset(images, labels, ids=names)
    given = np.array(names, object)
    with pytest.raises(dlc.InputError, match=r"own: id .* holds the character NUL"):
        dlc.Dataset(images, np.arange(2), given, ("cat", "dog"), "own")
    with pytest.raises(dlc.InputError, match=r"ids: id .* holds the character NUL"):
        dlc.select(np.arange(2.0), np.zeros(2, int), keep_fraction=0.5, ids=given)
    with pytest.raises(dlc.InputError, match=r"class name .* holds the character NUL"):
        dlc.Dataset(images, np.arange(2), np.array(["a", "b"]), names, "own")
    cells = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "x.parquet")
    refused(f"parquet:{tmp_path}/x.parquet", r"x\.parquet: id .* holds the character NUL")
    pq.write_table(pa.table({"image": images, "label": names}), tmp_path / "x.parquet")
    refused(f"parquet:{tmp_path}/x.parquet", r"x\.parquet: class name .* holds the character NUL")
    rows = [{"prompt": "p", "response": "r", "id": name, "kind": name} for name in names]
    with pytest.raises(dlc.InputError, match=r"rows: id .* holds the character NUL"):
        instructions(rows)
    for number, row in enumerate(rows):
        row["id"] = str(number)
    with pytest.raises(dlc.InputError, match=r"column 'kind'.* holds the character NUL"):
        instructions(rows).categories("kind")


def test_archives_of_other_shapes_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", random_images(2, 8))
    refused(f"npz:{tmp_path}/x.npy", "holds one array, expected an archive")
    for arrays, says in (
        ({"ids": np.array("a")}, r"ids have shape \(\), expected one dimension"),
        ({"ids": np.array([["a"], ["b"]])}, r"ids have shape \(2, 1\)"),
        ({"class_names": np.array("a")}, r"class_names have shape \(\)"),
        ({"class_names": np.array(["a", "a"])}, "class names must be all different"),
    ):
        archive(tmp_path / "x.npz", **arrays)
        refused(f"npz:{tmp_path}/x.npz", says)


def with_features(path: Path, features: object, labels: list = [0, 1]) -> str:  # noqa: B006
    metadata = json.dumps({"info": {"features": features}})
    rows = pa.table({"image": FILES[:2], "label": labels})
    pq.write_table(rows.replace_schema_metadata({"huggingface": metadata}), path)
    return f"parquet:{path}"


def test_declared_features_of_other_kinds(tmp_path):
    assert len(dlc.load_dataset(with_features(tmp_path / "x.parquet", [1]))) == 2
    rows = pa.table({"image": FILES[:2], "label": [0, 1]})
    rows = rows.replace_schema_metadata({"huggingface": "[" * 200_000})
    pq.write_table(rows, tmp_path / "x.parquet")
    assert len(dlc.load_dataset(f"parquet:{tmp_path}/x.parquet")) == 2
    for names in (5, [["a"], ["b"]], [1, 2]):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        refused(with_features(tmp_path / "x.parquet", features), "to be a list of texts, found")
    features = {"label": {"_type": "ClassLabel", "names": ["a", "a"]}}
    refused(with_features(tmp_path / "x.parquet", features), "must be all different")


def no_text() -> pa.Array:
    """Two texts of which the first is no UTF-8."""
    return pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())


def test_text_that_is_no_utf8_is_refused_by_column(tmp_path):
    images = pa.StructArray.from_arrays([pa.array(FILES[:2]), no_text()], ["bytes", "path"])
    for columns, says in (
        ({"image": FILES[:2], "label": no_text()}, "column label"),
        ({"image": images, "label": ["a", "b"]}, r"column image\.path"),
    ):
        rows = pa.table(columns)
        pq.write_table(rows, tmp_path / "x.parquet")
        refused(f"parquet:{tmp_path}/x.parquet", f"{says} cannot be read.*utf-8")
        with pa.ipc.new_stream(str(tmp_path / "x.arrow"), rows.schema) as file:
            file.write_table(rows)
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
        refused(f"hf:{tmp_path}/train", rf"^\S*x\.arrow: {says} is damaged: .*(?i:utf-?8)")


def test_a_row_group_that_is_damaged_spoils_its_own_images_only(tmp_path):
    """Found when the images are read; the others are unharmed."""
    ids = [f"{i}.png" for i in range(6)]
    images = [{"bytes": data, "path": name} for data, name in zip(FILES, ids, strict=True)]
    path = tmp_path / "x.parquet"
    rows = pa.table({"image": images, "label": [0, 1] * 3})
    pq.write_table(rows, path, row_group_size=2, compression="gzip", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    dataset = dlc.load_dataset(f"parquet:{path}")
    with pytest.raises(dlc.InputError, match=r"sample '2\.png' cannot be read.*row group 1"):
        load_images(dataset, 32)
    loaded = load_images(dataset, 32, on_corrupt="skip")
    assert loaded.positions.tolist() == [0, 1, 4, 5]
