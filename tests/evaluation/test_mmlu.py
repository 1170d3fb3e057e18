"""MMLU files: what is read, and what is refused by file and line. Scores: see test_harness.py."""

import os

import numpy as np
import pytest
from conftest import require_shared

from dlc_jax.encoders.language_model import load_language_model
from dlc_jax.evaluation import SUBJECTS, Question, evaluate_mmlu, load_mmlu

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
ROWS = '"What is\n""it""?",1,"2, or 3",N/A,None,2\n Why? ,a,b,c,d,0\n'
READ = (
    Question('What is\n"it"?', ("1", "2, or 3", "N/A", "None"), 2),
    Question(" Why? ", ("a", "b", "c", "d"), 0),
)


def place(folder, test=HEADER + ROWS, dev=None, subject="anatomy"):
    (folder / "test").mkdir(exist_ok=True)
    (folder / "test" / f"{subject}_test.csv").write_text(test)
    if dev is not None:
        (folder / "dev").mkdir(exist_ok=True)
        (folder / "dev" / f"{subject}_dev.csv").write_text(dev)
    return f"mmlu:{folder}"


@pytest.mark.parametrize(
    "text",
    [
        HEADER + ROWS,
        "\ufeff" + HEADER + "\n" + ROWS,
        ROWS.replace(",2\n", ",C\n").replace(",0\n", ",A\n"),
        "answer,question,subject,choice3,choice2,choice1,choice0\n"
        '2,"What is\n""it""?",x,None,N/A,"2, or 3",1\n0, Why? ,x,d,c,b,a\n',
    ],
    ids=["header", "mark and empty line", "original", "other order"],
)
def test_both_layouts_hold_the_same(tmp_path, text):
    (subject,) = load_mmlu(place(tmp_path, text, dev=text)).subjects
    assert subject.name == "anatomy"
    assert subject.questions == subject.shots == READ


def test_the_prompt_is_this(tmp_path):
    source = place(tmp_path, subject="high_school_us_history", dev=HEADER + ROWS)
    (subject,) = load_mmlu(source).subjects
    assert subject.prompt(READ[1], 1) == (
        "The following are multiple choice questions (with answers) about high school us history."
        '\n\nWhat is\n"it"?\nA. 1\nB. 2, or 3\nC. N/A\nD. None\nAnswer: C\n\n'
        "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


def test_every_content_has_its_fingerprint(tmp_path):
    found = set()
    for i, (test, dev) in enumerate(
        [
            (HEADER + ROWS, None),
            (HEADER + ROWS, HEADER + ROWS),
            (HEADER + ROWS, HEADER + "q,a,b,c,d,1\n"),
            (HEADER + ROWS.replace("Why", "Who"), HEADER + ROWS),
            (HEADER + ROWS.replace(",0\n", ",1\n"), HEADER + ROWS),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        found.add(load_mmlu(place(tmp_path / str(i), test, dev)).fingerprint)
    assert len(found) == 5
    (tmp_path / "again").mkdir()
    assert load_mmlu(place(tmp_path / "again")).fingerprint in found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question,choice0,choice1,choice2,answer\nq,a,b,c,0\n", "line 1: has no column choice3"),
        (HEADER + ROWS + "q,a,b,c,0\n", "line 5: has 5 values, expected 6"),
        (HEADER + ROWS + "q,a,b,c,d,4\n", "line 5: the answer is '4', expected 0 to 3 or A to D"),
        ("q,a,b,c,d,E\n", "line 1: the answer is 'E'"),
        (HEADER + ROWS + "q,a, ,c,d,1\n", "line 5: choice1 is empty"),
        (HEADER + "  ,a,b,c,d,1\n", "line 2: question is empty"),
        (HEADER, "header only"),
        ("", "is empty, expected questions"),
        (HEADER + 'q,"a"b,b,c,d,1\n', "line 2: ',' expected after"),
        ("q,a,b,c,d\n", "line 1: has 5 values, expected 6"),
    ],
)
@pytest.mark.parametrize("part", ["test", "dev"])
def test_bad_rows_are_refused_by_file_and_line(tmp_path, text, says, part):
    source = place(tmp_path, **{"test": HEADER + ROWS, part: text})
    with pytest.raises(ValueError, match=f"anatomy_{part}.csv.*{says}"):
        load_mmlu(source)


def test_what_is_no_text_is_refused(tmp_path):
    source = place(tmp_path)
    (tmp_path / "test" / "anatomy_test.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"anatomy_test.csv: cannot be read: UnicodeDecodeError"):
        load_mmlu(source)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="anatomie.*Did you mean 'anatomy'"):
        load_mmlu(place(tmp_path, subject="anatomie"))
    with pytest.raises(ValueError, match="found no .*test.csv; expected one per subject"):
        load_mmlu(f"mmlu:{tmp_path}/none")
    for source in ("mmlu:", "csv:x", str(tmp_path)):
        with pytest.raises(ValueError, match="expected mmlu:<folder> or demo:mmlu"):
            load_mmlu(source)


def test_the_real_files_are_read_whole():
    mmlu = load_mmlu(f"mmlu:{require_shared('mmlu')}")
    assert [subject.name for subject in mmlu.subjects] == sorted(SUBJECTS)
    assert len(SUBJECTS) == 57
    assert sum(len(subject.questions) for subject in mmlu.subjects) == 14042
    assert {len(subject.shots or ()) for subject in mmlu.subjects} == {5}
    answers = [q.answer for subject in mmlu.subjects for q in subject.questions]
    assert np.bincount(answers).min() > 3000


def test_tokens_without_an_embedding_are_refused_by_question(tmp_path):
    model = load_language_model("demo:tiny-llama", dtype="float32")
    model.tokenizer.add_tokens(["<extra>"])
    mmlu = load_mmlu(place(tmp_path, HEADER + ROWS.replace("Why", "Why <extra>")))
    with pytest.raises(
        ValueError, match=r"anatomy, 'Why <extra>.*token 4096 \('<extra>'\) has no row"
    ):
        evaluate_mmlu(model, mmlu, num_shots=0)


@pytest.mark.parametrize("part", ["test", "dev"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_without_an_end_are_refused(tmp_path, part, kind):
    source = place(tmp_path, dev=HEADER + ROWS)
    file = tmp_path / part / f"anatomy_{part}.csv"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"anatomy_{part}.csv: cannot be read: .*not a regular"):
        load_mmlu(source)
