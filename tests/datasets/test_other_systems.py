"""Files as Windows, spreadsheets and other programs write them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, random_images

import dlc_jax as dlc
from dlc_jax.datasets.instructions import load_instructions
from dlc_jax.encoders import read_checkpoint

FILES = [encoded(image) for image in random_images(4, 12)]
BOM = "\ufeff"


def images_below(root) -> None:
    for number, content in enumerate(FILES[:3]):
        path = root / "img" / "cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "img\\dog.png").write_bytes(FILES[3])  # a backslash is a character like others here


@pytest.mark.parametrize("form", ["csv", "text column", "paths in structs"])
def test_paths_with_backslashes_are_read(tmp_path, form):
    images_below(tmp_path)
    names = [*(f"img\\cat\\{i}.png" for i in range(2)), "img/cat/2.png", "img\\dog.png"]
    labels = ["cat", "cat", "cat", "dog"]
    if form == "csv":
        rows = "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
        (tmp_path / "x.csv").write_text(f"path,label\n{rows}")
        source = f"csv:{tmp_path}/x.csv"
    else:
        images = pa.array(names)
        if form == "paths in structs":
            kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            images = pa.array([{"bytes": None, "path": name} for name in names], kind)
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "x.parquet")
        source = f"parquet:{tmp_path}/x.parquet"
    dataset = dlc.load_dataset(source)
    assert [dataset[i].image for i in range(4)] == FILES
    assert dataset.ids.tolist() == [*(f"img/cat/{i}.png" for i in range(3)), "img\\dog.png"]


def test_instructions_with_a_byte_order_mark(tmp_path):
    rows = [{"prompt": f"ask {i}", "response": "answer"} for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    # the second mark is left where two files were joined
    text = f"{BOM}{lines[0]}\n{lines[1]}\n{BOM}{lines[2]}\n"
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "x.json").write_text(BOM + json.dumps(rows), encoding="utf-8")
    for kind in ("jsonl", "json"):
        data = load_instructions(f"{kind}:{tmp_path}/x.{kind}")
        assert data.rows == tuple(rows)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_with_a_byte_order_mark(tmp_path, suffix):
    images_below(tmp_path)
    cells = [["path", "label"], *([f"img/cat/{i}.png", f"{i}"] for i in range(3))]
    text = "\r\n".join(("," if suffix == "csv" else "\t").join(row) for row in cells)
    (tmp_path / f"x.{suffix}").write_text(BOM + text, encoding="utf-8")
    assert dlc.load_dataset(f"csv:{tmp_path}/x.{suffix}").labels.tolist() == [0, 1, 2]


def test_lists_of_classes_with_a_byte_order_mark(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(FILES[i])
    (tmp_path / "variants.txt").write_text(f"{BOM}707\n747\n", encoding="utf-8")
    lines = f"{BOM}0 707\n1 747\n"
    (tmp_path / "images_variant_train.txt").write_text(lines, encoding="utf-8")
    dataset = dlc.load_dataset(f"fgvc_aircraft:{tmp_path}/train")
    assert dataset.class_names == ("707", "747")
    assert dataset.labels.tolist() == [0, 1]


def test_the_configuration_of_a_checkpoint_with_a_byte_order_mark(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(BOM + '{"a": 1}', encoding="utf-8")
    assert read_checkpoint(str(tmp_path))[1] == {"a": 1}


def shard(path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def test_marks_in_labels_of_shards(tmp_path):
    mark = BOM.encode()
    members = [
        *(("0.png", FILES[0]), ("0.cls", mark + b"cat")),
        *(("1.png", FILES[1]), ("1.json", mark + b'{"label": "cat"}')),
    ]
    assert dlc.load_dataset(shard(tmp_path / "x.tar", members)).class_names == ("cat",)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (("a.png", "a.jpg", "a.cls"), r"x\.tar: sample 'a': more than one .* \.png, \.jpg"),
        (("a.png", "a.cls", "a.png"), r"x\.tar: sample 'a' has more than one member '\.png'"),
        (("a.png", "a.cls", "a.CLS"), r"sample 'a' has more than one member '\.cls'.*'a\.CLS'"),
    ],
)
def test_samples_of_shards_with_members_too_many_are_refused(tmp_path, members, says):
    content = {name: FILES[0] if name[2] in "pj" else b"1" for name in members}
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_dataset(shard(tmp_path / "x.tar", [(name, content[name]) for name in members]))


@pytest.mark.parametrize("empty", ["", " "])
def test_classes_without_a_name_are_refused_from_every_source(tmp_path, empty):
    labels = ["a", empty, "a", "b"]
    table = pa.table({"image": FILES, "label": labels})
    pq.write_table(table, tmp_path / "x.parquet")
    np.savez(tmp_path / "x.npz", images=random_images(4, 8), labels=labels)
    for source in (f"parquet:{tmp_path}/x.parquet", f"npz:{tmp_path}/x.npz"):
        with pytest.raises(
            dlc.InputError, match=f"sample .* has the class name '{empty}'.*not empty"
        ):
            dlc.load_dataset(source)
    info = {"label": {"_type": "ClassLabel", "names": ["a", empty]}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": info}})}
    table = pa.table({"image": FILES, "label": [0, 1] * 2}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    members = [("a.png", FILES[0]), ("a.cls", empty.encode())]
    for source in (f"parquet:{tmp_path}/x.parquet", shard(tmp_path / "x.tar", members)):
        with pytest.raises(dlc.InputError, match=r"sample .* has the class name '.?'.*not empty"):
            dlc.load_dataset(source)
    with pytest.raises(dlc.InputError, match="sample b has the class name"):
        dlc.array_dataset(FILES, [0, 1] * 2, ids=list("abcd"), class_names=["a", empty])
