"""Parquet and Hugging Face folders: paths for images, parts of a split, and memory."""

import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc
from dlc_jax.datasets import tables
from dlc_jax.types import file_of

FILES = [encoded(image) for image in random_images(6, 12)]
NAMES = [f"{i}.png" for i in range(6)]


def rows(where=slice(None), **columns) -> pa.Table:
    images = [{"bytes": d, "path": n} for d, n in zip(FILES[where], NAMES[where], strict=True)]
    labels = ["a", "b", "a", "b", "a", "b"][where]
    return pa.table({"image": images, "label": labels, **columns})


def write(path, table: pa.Table, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return f"parquet:{path}"


@pytest.mark.parametrize("form", ["path column", "text column", "paths in structs", "absolute"])
def test_images_may_be_paths_as_in_csv(tmp_path, form):
    for name, image in zip(NAMES, FILES, strict=True):
        (tmp_path / name).write_bytes(image)
    names = [f"{tmp_path}/{name}" for name in NAMES] if form == "absolute" else NAMES
    if form == "path column":
        columns = {"path": names}
    elif form == "text column":
        columns = {"image": pa.array(names, pa.large_string())}
    else:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"image": pa.array([{"bytes": None, "path": name} for name in names], kind)}
    dataset = dlc.load_dataset(write(tmp_path / "x.parquet", pa.table({**columns, "label": names})))
    assert dataset.ids.tolist() == names
    assert [dataset[i].image for i in range(6)] == FILES
    assert file_of(dataset.images, 4) == tmp_path / "4.png"


def test_paths_that_are_none_are_refused(tmp_path):
    for paths in (["a.png", None], ["a.png", ""], ["a.png", "b\0"]):
        source = write(tmp_path / "x.parquet", pa.table({"path": paths, "label": ["a", "b"]}))
        with pytest.raises(ValueError, match=r"x\.parquet: column path, row 1: expected a path"):
            dlc.load_dataset(source)
    images = [{"bytes": FILES[0], "path": "a"}, {"bytes": None, "path": "b"}]
    for options in ({}, {"write_statistics": False}):
        table = pa.table({"image": images, "label": ["a", "b"]})
        source = write(tmp_path / "x.parquet", table, **options)
        with pytest.raises(ValueError, match=r"1 rows have no image bytes, first row 1 .path 'b'"):
            dlc.load_dataset(source)


def test_files_of_differing_types_are_read_together(tmp_path):
    columns = [
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"]),
    ]
    kinds = (pa.binary(), pa.large_binary(), pa.binary_view())
    for i, (label, kind) in enumerate(zip(columns, kinds, strict=True)):
        images = pa.array(FILES[2 * i : 2 * i + 2], kind)
        write(tmp_path / "deep" / f"{i}.PARQUET", pa.table({"image": images, "label": label}))
    (tmp_path / "deep" / "y.parquet").mkdir()
    for where in ("deep", "**/*.PARQUET", "dee*/*"):
        dataset = dlc.load_dataset(f"parquet:{tmp_path}/{where}")
        assert dataset.labels.tolist() == [0, 1] * 3
        assert [dataset[i].image for i in range(6)] == FILES
    for i, kind in enumerate((pa.int32(), pa.int64())):
        table = pa.table({"image": FILES[:2], "label": pa.array([0, 1], kind)})
        write(tmp_path / "numbers" / f"{i}.parquet", table)
    assert dlc.load_dataset(f"parquet:{tmp_path}/numbers").labels.tolist() == [0, 1, 0, 1]


def test_files_that_name_their_classes_differently_are_refused(tmp_path):
    for i, names in enumerate((["p", "q"], ["q", "p"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({"image": FILES[:2], "label": [0, 1]})
        write(tmp_path / f"{i}.parquet", table.replace_schema_metadata(metadata))
    with pytest.raises(
        ValueError, match=r"differ in class names: .*1\.parquet declares 'q', 'p', "
    ):
        dlc.load_dataset(f"parquet:{tmp_path}")
    write(tmp_path / "1.parquet", pa.table({"img": FILES[:2], "label": [0, 1]}))
    with pytest.raises(ValueError, match=r"differ in columns: .*1\.parquet has img, label"):
        dlc.load_dataset(f"parquet:{tmp_path}")


def test_images_are_read_by_row_group_and_few_are_kept(tmp_path, monkeypatch):
    """Loading reads no image; in order, each group is read once, whatever the threads."""
    write(tmp_path / "0.parquet", rows(slice(0, 4)), row_group_size=2)
    write(tmp_path / "1.parquet", rows(slice(4, 6)), row_group_size=2)
    reads = []
    read = tables.ParquetTable._read

    def counted(table, groups, column):
        if column == ("image", "bytes"):
            reads.append((table.file.name, *groups))
        return read(table, groups, column)

    monkeypatch.setattr(tables.ParquetTable, "_read", counted)
    monkeypatch.setattr(tables, "_MOST_KEPT", 1)
    dataset = dlc.load_dataset(f"parquet:{tmp_path}")
    assert reads == []
    found = {}
    for pair in ((0, 1), (2, 3), (4, 5)):
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: dataset[i].image})) for i in pair
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(6)] == FILES
    assert reads == [("0.parquet", 0), ("0.parquet", 1), ("1.parquet", 0)]
    assert dataset[0].image == FILES[0]
    assert reads[3:] == [("0.parquet", 0)]
    monkeypatch.setattr(tables, "_MOST_KEPT", 2**20)
    backwards = dlc.load_dataset(f"parquet:{tmp_path}")
    assert [backwards[i].image for i in (5, 0, 3, 2, 1, 4)] == [
        FILES[i] for i in (5, 0, 3, 2, 1, 4)
    ]
    assert len(reads) == 7


def save(folder, split: str | None, table: pa.Table) -> None:
    """What `datasets.save_to_disk` leaves, with a result that it cached."""
    folder.mkdir(parents=True)
    for name, content in (("data-00000-of-00001", table), ("cache-0123", table)):
        with pa.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as file:
            file.write_table(content)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))


def test_saved_folders_give_their_data_files_and_their_own_split(tmp_path):
    save(tmp_path / "train", "train", rows(slice(0, 4)))
    for where in ("train", "train/train"):
        dataset = dlc.load_dataset(f"hf:{tmp_path}/{where}")
        assert dataset.ids.tolist() == NAMES[:4]
        assert [dataset[i].image for i in range(4)] == FILES[:4]
    with pytest.raises(ValueError, match="holds the split 'train', not 'test'"):
        dlc.load_dataset(f"hf:{tmp_path}/train/test")
    (tmp_path / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow: not a readable Arrow file"):
        dlc.load_dataset(f"hf:{tmp_path}/train")
    for state in ("{}", "[", '{"_data_files": []}', '{"_data_files": [{"filename": "../x"}]}'):
        (tmp_path / "train" / "state.json").write_text(state)
        with pytest.raises(ValueError, match="does not say which Arrow files are the data"):
            dlc.load_dataset(f"hf:{tmp_path}/train")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "has _indices_data_files: "),
        ({"_indices_files": [{"filename": "indices.arrow"}]}, "has _indices_files: "),
        (
            {"_data_files": [{"filename": "data-00000-of-00001.arrow", "skip": 1, "take": 2}]},
            "has skip and take in _data_files: ",
        ),
        ({"_inplace_history": [{"transforms": [["cast_"]]}]}, "has _inplace_history: "),
        ({"_inplace_history": ["x"]}, "does not say which Arrow files are the data"),
        ({"_indices_data_files": [], "_inplace_history": [{"transforms": []}]}, None),
        ({"_indices_data_files": None}, None),
    ],
)
def test_rows_that_datasets_would_select_or_change_are_not_taken_whole(tmp_path, state, says):
    """As `datasets` 1.x saves a data set that `select`, `shuffle` or `cast_` was called of."""
    save(tmp_path / "train", "train", rows(slice(0, 4)))
    path = tmp_path / "train" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | state))
    if says is None:
        assert len(dlc.load_dataset(f"hf:{tmp_path}/train")) == 4
        return
    with pytest.raises(dlc.InputError, match=says) as caught:
        dlc.load_dataset(f"hf:{tmp_path}/train")
    assert str(path) in str(caught.value)


def test_a_split_is_not_mixed_with_others_or_with_other_configurations(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows(slice(0, 3)))
    write(tmp_path / "data" / "train_extra-00000.parquet", rows(slice(3, 6)))
    assert dlc.load_dataset(f"hf:{tmp_path}/train").ids.tolist() == NAMES[:3]
    assert dlc.load_dataset(f"hf:{tmp_path}/train_extra").ids.tolist() == NAMES[3:]
    write(tmp_path / "cropped" / "train" / "0000.parquet", rows(slice(3, 6)))
    with pytest.raises(ValueError, match=r"in several folders \('cropped', 'data'\)"):
        dlc.load_dataset(f"hf:{tmp_path}/train")
    assert dlc.load_dataset(f"hf:{tmp_path}/cropped/train").ids.tolist() == NAMES[3:]


def test_parts_may_have_dots_in_their_names(tmp_path):
    for part in ("v1.0", "v1.1"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"{part}.png").write_bytes(FILES[0])
    dataset = dlc.load_dataset(f"folder:{tmp_path}/v1.0+v1.1")
    np.testing.assert_array_equal(dataset.labels, [0, 1, 0, 1])
