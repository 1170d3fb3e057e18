import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc

PIXELS = random_images(6, 12)
FILES = [encoded(image) for image in PIXELS]


def write_parquet(path, images, labels, names=None, image_column="image", label_column="label"):
    table = pa.table({image_column: images, label_column: labels})
    if names is not None:
        features = {
            image_column: {"_type": "Image"},
            label_column: {"_type": "ClassLabel", "names": names},
        }
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=2)
    return f"parquet:{path}"


def structs(paths):
    return [{"bytes": data, "path": path} for data, path in zip(FILES, paths, strict=True)]


def test_bundled_sample():
    for split, size in (("train", 50), ("test", 20)):
        dataset = dlc.load_dataset(f"demo:caltech15/{split}")
        assert np.bincount(dataset.labels).tolist() == [size] * 15
        assert dataset.class_names[:2] == ("bonsai", "butterfly")
        image, label, sample_id = dataset[0]
        assert image[:2] == b"\xff\xd8"
        assert (label, sample_id) == (0, str(dataset.ids[0]))
        assert dataset[-1].id == dataset.ids[-1]
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_parquet_with_declared_names_and_paths(tmp_path):
    paths = [f"{i}.png" for i in range(6)]
    source = write_parquet(
        tmp_path / "x.parquet", structs(paths), [2, 0, 1, 1, 0, 2], ["ant", "bee", "cat"]
    )
    dataset = dlc.load_dataset(source)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert dataset.ids.tolist() == paths
    assert dataset.label_table is None
    assert [dataset[i].image for i in range(6)] == FILES


def test_parquet_with_bytes_and_string_labels(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", FILES, ["b", "a", "b", "a", "c", "c"])
    dataset = dlc.load_dataset(source)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.labels.tolist() == [1, 0, 1, 0, 2, 2]


def test_parquet_folder_and_glob_in_sorted_order(tmp_path):
    write_parquet(tmp_path / "b.parquet", FILES[3:], [0, 1, 0])
    write_parquet(tmp_path / "a.parquet", FILES[:3], [1, 0, 1])
    for where in (tmp_path, tmp_path / "*.parquet"):
        dataset = dlc.load_dataset(f"parquet:{where}")
        assert dataset.labels.tolist() == [1, 0, 1, 0, 1, 0]
        assert [dataset[i].image for i in range(6)] == FILES


def test_integer_labels_are_remapped_and_the_table_kept(tmp_path):
    source = write_parquet(tmp_path / "x.parquet", FILES, [40, 7, 7, 40, -3, 7])
    dataset = dlc.load_dataset(source)
    assert dataset.labels.tolist() == [2, 1, 1, 2, 0, 1]
    assert dataset.label_table == {-3: 0, 7: 1, 40: 2}
    assert dataset.class_names == ("-3", "7", "40")


@pytest.mark.parametrize("paths", [[None] * 6, ["same.png"] * 6, ["", "b", "c", "d", "e", "f"]])
def test_ids_without_unique_paths_are_content_hashes_that_survive_reordering(tmp_path, paths):
    source = write_parquet(tmp_path / "x.parquet", structs(paths), [0, 1] * 3)
    dataset = dlc.load_dataset(source)
    again = write_parquet(tmp_path / "y.parquet", structs(paths)[::-1], [1, 0] * 3)
    assert dlc.load_dataset(again).ids.tolist() == dataset.ids.tolist()[::-1]
    assert len(set(dataset.ids)) == 6


def test_equal_images_without_paths_get_different_ids():
    dataset = dlc.array_dataset([FILES[0], FILES[1], FILES[0]], ["a", "b", "a"])
    assert dataset.ids[2] == f"{dataset.ids[0]}-1"


def test_folder(tmp_path):
    for name, data in zip(("b/2.PNG", "a/x/1.png", "a/0.jpg"), FILES, strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    dataset = dlc.load_dataset(f"folder:{tmp_path}")
    assert dataset.ids.tolist() == ["a/0.jpg", "a/x/1.png", "b/2.PNG"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset[2].image == FILES[0]
    assert dataset.left_out == {".txt": 1}


def test_a_folder_of_splits_is_not_taken_for_classes(tmp_path):
    for name in ("train/a/1", "test/a/2"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(random_images(1)[0]))
    with pytest.raises(ValueError, match=r"sub-folders are splits \(test, train\), not classes"):
        dlc.load_dataset(f"folder:{tmp_path}")


def test_folders_skip_hidden_ones_and_survive_links_in_circles(tmp_path):
    for name, data in zip(("a/1.png", "a/.cache/1.png", "b/2.png"), FILES, strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "linked.png").symlink_to(tmp_path / "a" / "1.png")
    dataset = dlc.load_dataset(f"folder:{tmp_path}")
    assert dataset.ids.tolist() == ["a/1.png", "b/2.png", "b/linked.png"]


def test_file_names_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb") as file:
        file.write(FILES[0])
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        dlc.load_dataset(f"folder:{tmp_path}")


def test_string_labels_with_class_names(tmp_path):
    dataset = dlc.array_dataset(PIXELS[:3], ["b", "a", "b"], class_names=["b", "a", "c"])
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.class_names == ("b", "a", "c")
    with pytest.raises(ValueError, match="labels 'x' are not among the 2 class names"):
        dlc.array_dataset(PIXELS[:2], ["a", "x"], class_names=["a", "b"])


@pytest.mark.parametrize("metadata", ["{", '{"info": {"features": null}}', "[]", "{}"])
def test_parquet_metadata_of_other_kinds_is_passed_over(tmp_path, metadata):
    table = pa.table({"image": FILES, "label": [0, 1] * 3})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "x.parquet")
    assert len(dlc.load_dataset(f"parquet:{tmp_path}/x.parquet")) == 6


def test_parquet_with_nested_features_and_list_labels(tmp_path):
    features = {"objects": [{"_type": "Value"}], "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for labels in ([0, 1] * 3, [[0], [1, 2]] * 3):
        table = pa.table({"image": FILES, "label": labels}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "x.parquet")
        if isinstance(labels[0], int):
            assert len(dlc.load_dataset(f"parquet:{tmp_path}/x.parquet")) == 6
        else:
            with pytest.raises(ValueError, match=r"labels must be integers or strings"):
                dlc.load_dataset(f"parquet:{tmp_path}/x.parquet")


def test_tfds_prepared_data_reads_without_tensorflow(tmp_path, monkeypatch):
    import io
    import sys

    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Six images in two splits."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 4), "test": self._generate_examples(4, 6)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                name = f"{i}.png"
                yield i, {"image": io.BytesIO(FILES[i]), "label": i % 2, "file_name": name}

    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    dataset = dlc.load_dataset("tfds:tiny/train+test")
    assert dataset.class_names == ("ant", "bee")
    assert sorted(dataset.ids) == [f"{i}.png" for i in range(6)]
    for position in range(6):
        image, label, sample_id = dataset[position]
        index = int(sample_id[0])
        assert (image, label) == (FILES[index], index % 2)
    half = dlc.load_dataset("tfds:tiny/train[:50%]")
    assert half.ids.tolist() == dataset.ids[:2].tolist()
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="train, test"):
        dlc.load_dataset("tfds:tiny/validation")
    with pytest.raises(ValueError, match="preparing needs TensorFlow"):
        dlc.load_dataset("tfds:mnist/train")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("demo:caltech15/train.parquet", "caltech15/train, caltech15/test"),
        ("caltech15", "parquet, folder, csv, npz, tar, hf, tfds, fgvc_aircraft, demo, split"),
        ("parqet:x", "Did you mean 'parquet'"),
        ("parquet:", "expected <scheme>:<where>"),
        ("parquet:/no/such/file.parquet", "no such file"),
        ("folder:/no/such/folder", "no such folder"),
        ("tfds:no_such_data_set_at_all/train", "no data set"),
        ("tfds:dtd", "expected tfds:<name>/<split>"),
    ],
)
def test_sources_that_are_not_there(source, says):
    with pytest.raises(ValueError, match=says):
        dlc.load_dataset(source)


def test_parquet_files_that_do_not_fit(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        dlc.load_dataset(f"parquet:{path}")
    for arguments, says in (
        ({"images": FILES, "labels": [0] * 6, "image_column": "photo"}, "no image column.*photo"),
        ({"images": FILES, "labels": [0] * 6, "label_column": "kind"}, "no label column.*kind"),
        ({"images": [*FILES[:5], None], "labels": [0] * 6}, "no image bytes, first row 5"),
        ({"images": FILES, "labels": [0, None, 0, 0, 0, 0]}, "no label, first at row 1"),
        ({"images": FILES, "labels": [0.5] * 6}, "integers or strings"),
        ({"images": FILES, "labels": [0, 1, 2, 0, 1, 2], "names": ["a", "b"]}, "row 2 has label 2"),
        ({"images": [1] * 6, "labels": [0] * 6}, "images are int64"),
    ):
        with pytest.raises(ValueError, match=says):
            dlc.load_dataset(write_parquet(path, **arguments))


def test_arrays_of_ones_own():
    dataset = dlc.array_dataset(PIXELS, np.array([3, 3, 5, 5, 3, 5]), ids=list("abcdef"))
    assert dataset.label_table == {3: 0, 5: 1}
    np.testing.assert_array_equal(dataset[1].image, PIXELS[1])
    with pytest.raises(ValueError, match="ids occur more than once"):
        dlc.array_dataset(PIXELS, [0] * 6, ids=list("abcdea"))
    with pytest.raises(ValueError, match="6 images, 5 labels"):
        dlc.array_dataset(PIXELS, [0] * 5, ids=list("abcdef"))
    with pytest.raises(ValueError, match="holds no sample"):
        dlc.array_dataset([], np.array([], int))
    with pytest.raises(ValueError, match=r"sample f has label 2; expected 0\.\.1"):
        dlc.Dataset(
            FILES, np.array([0, 1, 0, 1, 0, 2], np.int32), np.array(list("abcdef")), ("x", "y")
        )


def test_labels_of_any_integer_type_are_kept_as_int32():
    for kind in (np.uint8, np.int64):
        labels = np.array([0, 1, 0, 1, 0, 1], kind)
        dataset = dlc.Dataset(FILES, labels, np.array(list("abcdef")), ("x", "y"))
        assert dataset.labels.dtype == np.int32
        assert dataset.labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match="labels must be integers"):
        dlc.array_dataset(FILES, [0.0, 1.0] * 3)


def test_fingerprint_is_of_content():
    ids = list("abcdef")
    first = dlc.array_dataset(PIXELS, [0, 1] * 3, ids).fingerprint
    assert dlc.array_dataset(PIXELS.copy(), [0, 1] * 3, ids).fingerprint == first
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    assert dlc.array_dataset(changed, [0, 1] * 3, ids).fingerprint != first
    assert dlc.array_dataset(PIXELS, [0, 1] * 2 + [1, 0], ids).fingerprint != first
    assert dlc.array_dataset(PIXELS, [0, 1] * 3, list("abcdeg")).fingerprint != first
