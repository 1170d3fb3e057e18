"""Files of rows: lines, lists and tables, compressed or not, and repositories that hold them."""

import gzip
import json
import resource
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.datasets import row_sources
from dlc_jax.datasets.instructions import instructions

ROWS = [
    {"instruction": f"Name river {i}.", "input": "", "output": "The Nile\u2028, 🦙."}
    for i in range(7)
]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_lines(rows: list[dict]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def as_list(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def unchanged(content: bytes) -> bytes:
    return content


CODECS: dict[str, Callable[[bytes], bytes]] = {"": unchanged, ".gz": gzip.compress, ".zst": zstd}
KINDS = {"jsonl": as_lines, "ndjson": as_lines, "json": as_list}
FORMS = [f"{kind}{codec}" for kind in KINDS for codec in CODECS]


def content_of(form: str, rows: list[dict]) -> bytes:
    kind, dot, codec = form.partition(".")
    return CODECS[dot + codec](KINDS[kind](rows))


def scheme_of(form: str) -> str:
    return "json" if form.startswith("json.") or form == "json" else "jsonl"


def refused(source: str, *says: str) -> None:
    with pytest.raises(dlc.InputError) as error:
        dlc.load_instructions(source)
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


def same(source: str, rows: list[dict] = ROWS) -> None:
    data, plain = dlc.load_instructions(source), instructions(rows)
    assert data.rows == tuple(rows)
    assert data.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(data.ids, plain.ids)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(tmp_path, form):
    """As one file, in capitals, as shards of a folder and of a glob, in sorted order."""
    scheme = scheme_of(form)
    (tmp_path / "one").mkdir()
    (tmp_path / f"one/a.{form.upper()}").write_bytes(content_of(form, ROWS))
    same(f"{scheme}:{tmp_path}/one/a.{form.upper()}")
    same(f"{scheme}:{tmp_path}/one")
    (tmp_path / "shards").mkdir()
    for i in (2, 0, 1):  # dotted names, which differ only there
        some = ROWS[3 * i : 3 * i + 3]
        (tmp_path / f"shards/v1.2.part{i}.{form}").write_bytes(content_of(form, some))
    (tmp_path / "shards/notes.txt").write_text("no rows")
    same(f"{scheme}:{tmp_path}/shards")
    same(f"{scheme}:{tmp_path}/shards/v1.2.*.{form}")
    same(f"{scheme}:{tmp_path}/**/v1.2.part?.*")


def test_tables_by_glob(tmp_path):
    for i in (2, 0, 1):
        some = pa.Table.from_pylist(ROWS[3 * i : 3 * i + 3])
        pq.write_table(some, tmp_path / f"v1.2.part{i}.parquet")
    same(f"parquet:{tmp_path}/v1.2.*.parquet")
    same(f"parquet:{tmp_path}")


@pytest.mark.parametrize("scheme", ["jsonl", "json", "parquet"])
def test_a_glob_of_nothing_is_named(tmp_path, scheme):
    refused(f"{scheme}:{tmp_path}/part*.{scheme}", f"{tmp_path}/part*.{scheme}: no such file")


def test_a_folder_of_both_forms_is_read_by_scheme(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(content_of("jsonl.gz", ROWS[:4]))
    (tmp_path / "b.json").write_bytes(content_of("json", ROWS[4:]))
    same(f"jsonl:{tmp_path}", ROWS[:4])
    same(f"json:{tmp_path}", ROWS[4:])


@pytest.mark.parametrize(
    ("one", "two"),
    [("jsonl", "jsonl.gz"), ("jsonl.gz", "jsonl.zst"), ("json", "json.zst"), ("jsonl", "ndjson")],
)
def test_one_shard_in_two_forms_is_refused(tmp_path, one, two):
    for form in (one, two):
        (tmp_path / f"train.{form}").write_bytes(content_of(form, ROWS))
    says = f"train.{one} and ", f"train.{two} are one file in two forms"
    refused(f"{scheme_of(one)}:{tmp_path}", *says)
    refused(f"{scheme_of(one)}:{tmp_path}/train*", *says)
    refused(f"hf:{tmp_path}/train", *says)


@pytest.mark.parametrize("form", [form for form in FORMS if "." in form])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole, plain: whole[:-3],
        lambda whole, plain: whole[:7],
        lambda whole, plain: whole + b"rest of another file",
        lambda whole, plain: plain,
        lambda whole, plain: b"",
    ],
    ids=["truncated", "begun", "trailing", "plain", "empty"],
)
def test_what_does_not_fit_its_suffix_is_refused(tmp_path, form, damage):
    kind, _, codec = form.partition(".")
    file = tmp_path / f"a.{form}"
    file.write_bytes(damage(content_of(form, ROWS), KINDS[kind](ROWS)))
    names = {"gz": "gzip", "zst": "zstd"}
    refused(f"{scheme_of(form)}:{file}", f"{file}: cannot be read as {names[codec]}")
    refused(f"{scheme_of(form)}:{tmp_path}", f"{file}: cannot be read as {names[codec]}")


@pytest.mark.parametrize("form", ["jsonl.gz", "json.gz"])
def test_a_changed_byte_is_found_by_the_checksum(tmp_path, form):
    whole = bytearray(content_of(form, ROWS))
    whole[-8] ^= 1
    (tmp_path / f"a.{form}").write_bytes(whole)
    refused(f"{scheme_of(form)}:{tmp_path}", f"a.{form}: cannot be read as gzip: ", "data check")


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_what_is_compressed_and_not_called_so_is_refused(tmp_path, form, codec):
    (tmp_path / f"a.{form}").write_bytes(content_of(f"{form}{codec}", ROWS))
    refused(f"{form}:{tmp_path}/a.{form}", f"a.{form}", "UnicodeDecodeError")


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_files_that_were_joined_are_read_whole(tmp_path, codec):
    parts = [CODECS[codec]("\ufeff".encode() + as_lines(rows)) for rows in (ROWS[:3], ROWS[3:])]
    (tmp_path / f"a.jsonl{codec}").write_bytes(b"".join(parts))
    same(f"jsonl:{tmp_path}/a.jsonl{codec}")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("indent", [None, 1])
def test_the_other_scheme_is_named(tmp_path, codec, indent):
    listed, lines = tmp_path / f"a.json{codec}", tmp_path / f"a.jsonl{codec}"
    listed.write_bytes(CODECS[codec](json.dumps(ROWS, indent=indent).encode()))
    refused(f"jsonl:{listed}", str(listed), "line 1", "a list of objects is read as json:")
    for rows in (ROWS, ROWS[:1]):
        lines.write_bytes(CODECS[codec](as_lines(rows)))
        refused(f"json:{lines}", str(lines), "lines of objects are read as jsonl:")


@pytest.mark.parametrize("codec", CODECS)
def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(row_sources, "_MOST_IN_LINE", 1000)
    long = CODECS[codec](as_lines(ROWS) + b" " * 1001 + b"\n")
    (tmp_path / f"a.jsonl{codec}").write_bytes(long)
    refused(f"jsonl:{tmp_path}", f"a.jsonl{codec}, line 8: has more than 1000 characters")


def test_a_list_that_is_decompressed_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(row_sources, "_MOST_IN_LIST", 1000)
    for codec, compressed in CODECS.items():
        (tmp_path / f"a.json{codec}").write_bytes(
            compressed(b"\xef\xbb\xbf" + as_list(ROWS) + b" " * 1000)
        )
        if codec:
            refused(f"json:{tmp_path}/a.json{codec}", f"a.json{codec}: has 1000 characters or more")
    same(f"json:{tmp_path}/a.json")


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_a_short_list_takes_little_memory(tmp_path, codec):
    """Of the address space, too: a process that has reserved gigabytes can no longer fork."""
    (tmp_path / f"a.json{codec}").write_bytes(CODECS[codec](as_list(ROWS)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        same(f"json:{tmp_path}/a.json{codec}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_lines_are_decompressed_as_they_are_read(tmp_path, monkeypatch, codec):
    """A damaged end is met after the rows before it, so that the whole was never held."""
    seen = []
    monkeypatch.setattr(row_sources, "_object", lambda row, *_: seen.append(row) or row)
    noise = np.random.default_rng(1).bytes(300_000).hex()
    rows = [{**ROWS[0], "n": noise[i : i + 60]} for i in range(0, len(noise), 60)]
    (tmp_path / f"a.jsonl{codec}").write_bytes(CODECS[codec](as_lines(rows))[:-1000])
    refused(f"jsonl:{tmp_path}", f"a.jsonl{codec}: cannot be read as")
    assert 5000 < len(seen) < len(rows)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
TEXTS = st.text(min_size=1).filter(str.strip)
RANDOM = st.lists(
    st.fixed_dictionaries({"prompt": st.text(), "response": TEXTS, "more": VALUES}), min_size=1
)


@settings(max_examples=12)  # of every form: files are written and read
@given(rows=RANDOM)
def test_random_rows_come_back_from_every_form(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        (folder / f"{form}.{form}").write_bytes(content_of(form, rows))
        same(f"{scheme_of(form)}:{folder}/{form}.{form}", rows)


SPLITS = {
    "one file": ("train.{}",),
    "shards": ("data/train-00000-of-00002.{}", "data/train-00001-of-00002.{}"),
    "folder": ("train/part1.{}", "train/part2.{}"),
    "configuration": ("main/train_1.{}", "main/train_2.{}"),
    "no name": ("alpaca_data_cleaned.{}",),
    "no names": ("data/b.{}", "data/c.v1.{}"),
}


def repository(folder: Path, names: tuple[str, ...], form: str) -> list[str]:
    """Writes the rows into these files, and beside them what is no data of the split."""
    half = -(-len(ROWS) // len(names))
    files = {
        name.format(form): content_of(form, ROWS[i * half : (i + 1) * half])
        for i, name in enumerate(names)
    }
    files |= {name: b"{}" for name in ("README.md", "dataset_infos.json", ".hidden/train.json")}
    if "train" in names[0]:
        other = names[0].replace("train", "test").format(form)
        files[other] = content_of(form, ROWS[:1])
        files["extra.jsonl"] = b"no rows"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return list(files)


class Hub:
    """A hub of one repository, with or without a revision that it converted to Parquet."""

    def __init__(self, monkeypatch, folder: Path, names: list[str], converted: list[str] | None):
        self.folder, self.files = folder, {None: names, "refs/convert/parquet": converted}
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def list_repo_files(self, repository, *, repo_type, revision):
        assert (repository, repo_type) == ("owner/name", "dataset")
        if self.files[revision] is None:
            error = huggingface_hub.errors.RevisionNotFoundError
            raise error.__new__(error)
        return self.files[revision]

    def hf_hub_download(self, repository, name, *, repo_type, revision):
        assert name in self.files[revision]
        return str(self.folder / name)


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_repositories_of_json_are_read(tmp_path, monkeypatch, form, names):
    found = repository(tmp_path, names, form)
    same(f"hf:{tmp_path}/train")
    Hub(monkeypatch, tmp_path, found, None)
    same("hf:owner/name/train")
    Hub(monkeypatch, tmp_path, found, ["default/partial-train/0000.parquet"])
    same("hf:owner/name/train")


def test_splits_of_both_kinds_are_joined(tmp_path):
    repository(tmp_path, SPLITS["shards"], "jsonl.zst")
    same(f"hf:{tmp_path}/train+test", ROWS + ROWS[:1])


def test_lines_called_json_are_read_of_a_repository(tmp_path):
    """As many call them there."""
    for name, codec in (("train.json", ""), ("test.json.gz", ".gz")):
        (tmp_path / name).write_bytes(CODECS[codec](b"\xef\xbb\xbf\n" + as_lines(ROWS)))
    same(f"hf:{tmp_path}/train")
    same(f"hf:{tmp_path}/test")
    (tmp_path / "dev.jsonl").write_bytes(as_list(ROWS))
    same(f"hf:{tmp_path}/dev")


def test_parquet_wins_in_repositories(tmp_path, monkeypatch):
    names = repository(tmp_path, ("train.{}",), "jsonl")
    (tmp_path / "default/train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "default/train/0000.parquet")
    same(f"hf:{tmp_path}/train", ROWS[:5])
    converted = ["default/train/0000.parquet"]
    Hub(monkeypatch, tmp_path, names + converted, None)
    same("hf:owner/name/train", ROWS[:5])
    Hub(monkeypatch, tmp_path, names, converted)
    same("hf:owner/name/train", ROWS[:5])


@pytest.mark.parametrize(
    ("names", "split", "says"),
    [
        (["a.jsonl", "b.jsonl"], "test", "no Parquet or JSON file of split 'test'"),
        (["a.jsonl", "test.jsonl"], "train", "no Parquet or JSON file of split 'train'"),
        (["a.jsonl", "val/b.parquet"], "train", "no Parquet or JSON file of split 'train'"),
        (["config.json", ".a.jsonl"], "train", "no Parquet or JSON file of split 'train'"),
        (["main/a.jsonl", "socratic/a.jsonl"], "train", "several folders ('main', 'socratic')"),
        (["main/train.json", "more/train.jsonl"], "train", "several folders ('main', 'more')"),
    ],
)
def test_files_of_no_split_or_of_several_are_refused(tmp_path, monkeypatch, names, split, says):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(as_lines(ROWS))
    refused(f"hf:{tmp_path}/{split}", says)
    Hub(monkeypatch, tmp_path, names, None)
    refused(f"hf:owner/name/{split}", says)


def test_damaged_files_of_a_repository_are_refused(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(content_of("jsonl.gz", ROWS)[:-9])
    refused(f"hf:{tmp_path}/train", f"{tmp_path}/train.jsonl.gz: cannot be read as gzip")
    (tmp_path / "test.json").write_bytes(b"\xff\xfe")
    refused(f"hf:{tmp_path}/test", f"{tmp_path}/test.json: not JSON")
    (tmp_path / "dev.json").write_bytes(as_list(ROWS)[:-9])
    refused(f"hf:{tmp_path}/dev", f"{tmp_path}/dev.json: not JSON")


def test_images_are_read_of_parquet_alone(tmp_path, monkeypatch):
    names = repository(tmp_path, ("train.{}",), "jsonl")
    Hub(monkeypatch, tmp_path, names, None)
    for place in (tmp_path, "owner/name"):
        with pytest.raises(dlc.InputError, match="no Parquet file of split 'train'"):
            dlc.load_dataset(f"hf:{place}/train")
