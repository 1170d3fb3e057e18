"""What MMLU asks, from local CSV files, and the prompt of lm_eval's task `mmlu`.

Sources: Hendrycks et al. 2021, arXiv 2009.03300; Gao et al., lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
from importlib import resources
from pathlib import Path

from dlc_jax import checks
from dlc_jax.datasets.files import regular

# Which group lm_eval counts a subject in.
_SUBJECTS = {
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
SUBJECTS = {name: group for group, names in _SUBJECTS.items() for name in names.split()}
LETTERS = "ABCD"
_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
_ANSWERS = {written: i for i, letter in enumerate(LETTERS) for written in (str(i), letter)}
_SAMPLE = "instructions_sample/mmlu"
_DEV, _TEST = "dev/{}_dev.csv", "test/{}_test.csv"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with four choices; `answer` is the place of the right one, 0 to 3."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def shown(self) -> str:
        """Returns it as a prompt, up to where the letter is to follow."""
        lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question.strip(), *lettered, "Answer:"])


@dataclasses.dataclass(frozen=True)
class Subject:
    """Questions of one subject.

    Attributes:
      name: In `SUBJECTS`.
      questions: To be answered.
      shots: Solved ones for the prompt; None: there is no file of them.
    """

    name: str
    questions: tuple[Question, ...] = dataclasses.field(repr=False)
    shots: tuple[Question, ...] | None = dataclasses.field(repr=False)

    def prompt(self, question: Question, num_shots: int) -> str:
        """Returns what the model reads before it gives a letter."""
        topic = self.name.replace("_", " ")
        task = f"The following are multiple choice questions (with answers) about {topic}."
        shots = (self.shots or ())[:num_shots]
        solved = [f"{shot.shown()} {LETTERS[shot.answer]}" for shot in shots]
        return "\n\n".join([task, *solved, question.shown()])


@dataclasses.dataclass(frozen=True, eq=False)
class Mmlu:
    """Subjects, sorted by name, of the source called `name`."""

    subjects: tuple[Subject, ...]
    name: str

    def check_shots(self, num_shots: int) -> None:
        """Raises ValueError where a subject has fewer solved questions."""
        for subject in self.subjects:
            found = "no such file" if subject.shots is None else f"{len(subject.shots)} rows"
            if num_shots > len(subject.shots or ()):
                raise checks.InputError(
                    f"{self.name}, {_DEV.format(subject.name)}: found {found}, expected at least "
                    f"{num_shots} rows, for num_shots {num_shots}."
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every subject, question, choice and answer."""
        content = [dataclasses.asdict(subject) for subject in self.subjects]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_mmlu(source: str) -> Mmlu:
    """Loads MMLU.

    Args:
      source: `mmlu:<folder>`, of `dev/<subject>_dev.csv` and `test/<subject>_test.csv`, or
        `demo:mmlu`, the bundled sample. A file has the columns question, choice0 to choice3 and
        answer; without such a header, these six in this order. Answers are 0 to 3 or A to D.
    Raises:
      ValueError: no such folder or no test file in it, a subject that MMLU does not have, a file
        that is no table, and rows with columns missing, empty or out of range, by file and line.
    Example:
      >>> mmlu = dlc.load_mmlu("demo:mmlu")
      >>> question = mmlu.subjects[0].questions[0]
      >>> len(mmlu.subjects), question.choices[question.answer]
      (8, '7 N')
    """
    scheme, _, where = source.partition(":")
    if source == "demo:mmlu":
        folder = Path(str(resources.files("dlc_jax.datasets"))) / _SAMPLE
    elif scheme == "mmlu" and where:
        folder = Path(where).expanduser()
    else:
        raise checks.InputError(f"{source!r}: expected mmlu:<folder> or demo:mmlu.")
    files = sorted(folder.glob(_TEST.format("*")))
    if not files:
        raise checks.InputError(
            f"{source}: found no {folder / _TEST.format('<subject>')}; expected one per subject."
        )
    end = _TEST.rpartition("{}")[2]
    return Mmlu(tuple(_subject(folder, file.name.removesuffix(end)) for file in files), source)


def _subject(folder: Path, name: str) -> Subject:
    test, dev = folder / _TEST.format(name), folder / _DEV.format(name)
    checks.one_of(f"subject of {test}", name, sorted(SUBJECTS))
    return Subject(name, _questions(test), _questions(dev) if dev.exists() else None)


def _questions(file: Path) -> tuple[Question, ...]:
    rows = _rows(file)
    header = [name.strip() for name in rows[0][1]]
    if "question" in header or "answer" in header:
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            raise checks.InputError(
                f"{file}, line {rows[0][0]}: has no column {', '.join(missing)}; expected "
                f"{', '.join(_COLUMNS)}, found {checks.listed(header)}."
            )
        rows = rows[1:]
    else:
        header = list(_COLUMNS)
    if not rows:
        raise checks.InputError(f"{file}: has a header only, expected questions.")
    return tuple(_question(f"{file}, line {line}", row, header) for line, row in rows)


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """Returns the rows that are not empty, and in which line each begins, counted from 1."""
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise checks.InputError(f"{file}: cannot be read: {checks.first_line(error)}.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise checks.InputError(f"{file}, line {line}: {error}.") from error
    if not rows:
        raise checks.InputError(f"{file}: is empty, expected questions.")
    return rows


def _question(where: str, row: list[str], header: list[str]) -> Question:
    if len(row) != len(header):
        raise checks.InputError(
            f"{where}: has {len(row)} values, expected {len(header)}, among them "
            f"{', '.join(_COLUMNS)}."
        )
    values = {name: row[header.index(name)] for name in _COLUMNS}
    written = values.pop("answer").strip()
    if written not in _ANSWERS:
        raise checks.InputError(f"{where}: the answer is {written!r}, expected 0 to 3 or A to D.")
    for column, value in values.items():
        if not value.strip():
            raise checks.InputError(f"{where}: {column} is empty, expected text.")
    question, *choices = values.values()
    return Question(question, tuple(choices), _ANSWERS[written])
