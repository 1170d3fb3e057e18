"""Which column of a table holds the image and which the label, in every tabular source."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc
from dlc_jax.config import Config

FILES = [encoded(image) for image in random_images(4, 12)]
GENUS, SPECIES, LABEL = [0, 0, 1, 1], [0, 1, 2, 3], [1, 0, 1, 0]


def features(**kinds: str) -> dict[str, dict]:
    """What `datasets` declares: Image, Value, or ClassLabel with four names."""
    return {
        name: {"_type": kind} | ({"names": list("abcd")} if kind == "ClassLabel" else {})
        for name, kind in kinds.items()
    }


def parquet(folder, columns: dict, declared: dict[str, dict] | None = None) -> str:
    table = pa.table(columns)
    if declared is not None:
        info = json.dumps({"info": {"features": declared}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, folder / "rows.parquet")
    return f"parquet:{folder}/rows.parquet"


def table(folder, columns: dict) -> str:
    for number, data in enumerate(FILES):
        (folder / f"{number}.png").write_bytes(data)
    with open(folder / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return f"csv:{folder}/table.csv"


@pytest.mark.parametrize(
    ("columns", "declared"),
    [
        # the first declared of several, the one called label declared last
        (("genus", "label"), features(genus="ClassLabel", label="ClassLabel", image="Image")),
        # a plain integer label beside a declared split
        (("split", "label"), features(split="ClassLabel", label="Value", image="Image")),
        (("class", "label"), features(**{"class": "ClassLabel", "image": "Image"})),
        (("labels", "label"), None),
    ],
)
def test_label_wins_over_every_other_column(tmp_path, columns, declared):
    rows = {"image": FILES, columns[0]: GENUS, columns[1]: LABEL}
    dataset = dlc.load_dataset(parquet(tmp_path, rows, declared))
    assert dataset.labels.tolist() == LABEL


@pytest.mark.parametrize(
    ("columns", "declared", "listed"),
    [
        (
            {"genus": GENUS, "species": SPECIES},
            features(image="Image", genus="ClassLabel", species="ClassLabel"),
            "genus, species",
        ),
        ({"class": GENUS, "category": SPECIES}, None, "class, category"),
        (
            {"target": GENUS, "species": SPECIES},
            features(image="Image", species="ClassLabel", target="Value"),
            "target, species",
        ),
    ],
)
def test_several_possible_labels_are_refused_and_listed(tmp_path, columns, declared, listed):
    source = parquet(tmp_path, {"image": FILES} | columns, declared)
    with pytest.raises(dlc.InputError, match=f"label.*{listed}.*dataset.label_column"):
        dlc.load_dataset(source)
    for name, values in columns.items():
        assert dlc.load_dataset(source, label_column=name).labels.tolist() == values


def test_a_usual_name_that_is_declared_wins_over_other_declared_ones(tmp_path):
    """As in CIFAR-100."""
    declared = features(img="Image", coarse_label="ClassLabel", fine_label="ClassLabel")
    rows = {"img": FILES, "coarse_label": GENUS, "fine_label": SPECIES}
    dataset = dlc.load_dataset(parquet(tmp_path, rows, declared))
    assert dataset.labels.tolist() == SPECIES


def test_split_alone_is_no_label(tmp_path):
    declared = features(image="Image", split="ClassLabel")
    source = parquet(tmp_path, {"image": FILES, "split": GENUS}, declared)
    with pytest.raises(dlc.InputError, match="no label column.*found image, split"):
        dlc.load_dataset(source)
    assert dlc.load_dataset(source, label_column="split").labels.tolist() == GENUS


def test_several_images_are_refused_and_chosen_between(tmp_path):
    declared = features(left="Image", right="Image", label="ClassLabel")
    rows = {"left": FILES, "right": FILES[::-1], "label": LABEL}
    source = parquet(tmp_path, rows, declared)
    with pytest.raises(dlc.InputError, match=r"image.*left, right.*dataset\.image_column"):
        dlc.load_dataset(source)
    dataset = dlc.load_dataset(source, image_column="right")
    assert [dataset[i].image for i in range(4)] == FILES[::-1]
    # an image column that is declared wins over a text of a usual name
    declared = features(image="Value", photo="Image", label="ClassLabel")
    rows = {"image": list("abcd"), "photo": FILES, "label": LABEL}
    assert dlc.load_dataset(parquet(tmp_path, rows, declared))[2].image == FILES[2]


def test_csv_columns(tmp_path):
    names = [f"{i}.png" for i in range(4)]
    source = table(tmp_path, {"File": names, "genus": GENUS, "species": SPECIES})
    with pytest.raises(dlc.InputError, match="no label column.*found File, genus, species"):
        dlc.load_dataset(source)
    assert dlc.load_dataset(source, label_column="species").labels.tolist() == SPECIES
    with pytest.raises(dlc.InputError, match="no column 'kind'.*found File, genus, species"):
        dlc.load_dataset(source, label_column="kind")
    source = table(tmp_path, {"file": names, "image": names[::-1], "class": GENUS, "target": LABEL})
    with pytest.raises(dlc.InputError, match=r"file, image.*dataset\.image_column"):
        dlc.load_dataset(source)
    with pytest.raises(dlc.InputError, match=r"class, target.*dataset\.label_column"):
        dlc.load_dataset(source, image_column="image")
    dataset = dlc.load_dataset(source, image_column="image", label_column="Target")
    assert dataset.labels.tolist() == LABEL
    assert dataset[0].image == FILES[3]
    source = table(tmp_path, {"path": names, "a": GENUS, "b": LABEL})
    text = (tmp_path / "table.csv").read_text().replace("path,a,b", "path,label,label")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(dlc.InputError, match="label, label"):
        dlc.load_dataset(source)


def test_array_names(tmp_path):
    pixels = random_images(4, 8)
    file = tmp_path / "x.npz"
    np.savez(file, images=pixels, thumbnails=pixels[:, ::2, ::2], genus=GENUS, species=SPECIES)
    with pytest.raises(dlc.InputError, match="no label array.*genus, species"):
        dlc.load_dataset(f"npz:{file}")
    dataset = dlc.load_dataset(f"npz:{file}", image_column="thumbnails", label_column="species")
    assert dataset.labels.tolist() == SPECIES
    assert dataset[0].image.shape == (4, 4, 3)
    with pytest.raises(dlc.InputError, match="no array 'family'.*found images, thumbnails"):
        dlc.load_dataset(f"npz:{file}", label_column="family")


def test_keys_and_members_of_shards(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for i in range(4):
            facts = json.dumps({"class": GENUS[i], "cls": SPECIES[i], "kind": LABEL[i]})
            for name, content in (
                (f"{i}.png", FILES[i]),
                (f"{i}.webp", FILES[3 - i]),
                (f"{i}.json", facts.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    source = f"tar:{tmp_path}/x.tar"
    with pytest.raises(dlc.InputError, match=r"x\.tar: sample '0'.*\.png, \.webp"):
        dlc.load_dataset(source)
    with pytest.raises(dlc.InputError, match=r"sample '0'.*class, cls.*dataset\.label_column"):
        dlc.load_dataset(source, image_column="webp")
    dataset = dlc.load_dataset(source, image_column="webp", label_column="kind")
    assert dataset.labels.tolist() == LABEL
    assert dataset[0].image == FILES[3]
    with pytest.raises(dlc.InputError, match=r"sample '0'.*no key 'genus'.*class, cls, kind"):
        dlc.load_dataset(source, image_column="webp", label_column="genus")


def test_the_label_member_of_shards_can_be_asked_for(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, content in (("0.png", FILES[0]), ("0.cls", b"ant")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    source = f"tar:{tmp_path}/x.tar"
    assert dlc.load_dataset(source, label_column="cls").class_names == ("ant",)
    with pytest.raises(dlc.InputError, match="sample '0' has no label; expected .json with 'kind'"):
        dlc.load_dataset(source, label_column="kind")


def test_features_of_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class TwoLabels(tfds.core.GeneratorBasedBuilder):
        """Four images with a genus, a species, a split and a plain integer."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {"image": tfds.features.Image()}
            for name in ("genus", "species", "split"):
                kinds[name] = tfds.features.ClassLabel(names=list("abcd"))
            kinds["note"] = tfds.features.Text()
            kinds["kind"] = np.int64
            info = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=info, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                row = {"genus": GENUS[i], "species": SPECIES[i], "split": 0, "kind": LABEL[i]}
                yield i, row | {"image": io.BytesIO(FILES[i]), "note": "xy"[LABEL[i]]}

    TwoLabels(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    source = "tfds:two_labels/train"
    with pytest.raises(dlc.InputError, match=r"genus, species.*dataset\.label_column"):
        dlc.load_dataset(source)
    assert dlc.load_dataset(source, label_column="species").labels.tolist() == SPECIES
    assert dlc.load_dataset(source, label_column="kind").labels.tolist() == LABEL
    assert dlc.load_dataset(source, label_column="note").class_names == ("x", "y")
    with pytest.raises(dlc.InputError, match="no feature 'family'.*genus, species"):
        dlc.load_dataset(source, label_column="family")


def test_columns_reach_parts_and_splits_and_are_refused_where_there_are_none(tmp_path):
    declared = features(image="Image", genus="ClassLabel", species="ClassLabel")
    rows = {"image": FILES, "genus": GENUS, "species": SPECIES}
    source = parquet(tmp_path, rows, declared)
    half = dlc.load_dataset(f"split:50/50:train:{source}", label_column="genus")
    assert np.bincount(half.labels).tolist() == [1, 1]
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(FILES[0])
    with pytest.raises(dlc.InputError, match=r"dataset\.label_column.*folder:.*has no columns"):
        dlc.load_dataset(f"folder:{tmp_path}/images", label_column="genus")


def test_settings_choose_the_columns(tmp_path):
    declared = features(image="Image", genus="ClassLabel", species="ClassLabel")
    rows = {"image": FILES, "genus": GENUS, "species": SPECIES}
    source = parquet(tmp_path, rows, declared)
    encoder = {"name": "resnet18", "weights": "demo:resnet18"}
    values = {"dataset": {"train": source, "label_column": "genus"}, "encoder": encoder}
    config = Config.of(values)
    assert config.dataset.load(source).labels.tolist() == GENUS
    with pytest.raises(dlc.InputError, match=r"dataset\.label_column.*instructions"):
        Config.of(values | {"encoder": {"name": "decoder", "weights": "demo:tiny-llama"}})
