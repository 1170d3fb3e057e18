"""MMLU: its questions from local CSV files, and the share that a language model answers rightly.

`likelihoods` has what the answers are judged by, `harness` the model class of lm_eval.

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
from typing import Any

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.files import regular
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation.likelihoods import Pair, continuation_log_likelihoods
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.tokens import tokenising
from dlc_jax.types import setting


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """MMLU, as lm_eval's task of that name asks it.

    Source: Hendrycks et al. 2021, arXiv 2009.03300.
    """

    mmlu: str | None = setting(None, "mmlu:<folder with dev/ and test/ of CSV files> or demo:mmlu")
    num_shots: int = setting(5, "solved questions before each one")
    limit: int | None = setting(None, "only so many questions of each subject; None: all")

    def check(self, where: str = "evaluation.") -> None:
        """Raises ValueError unless all values are in range; `where` is put before their names."""
        expect.integer(f"{where}num_shots", self.num_shots, 0)
        if self.limit is not None:
            expect.integer(f"{where}limit", self.limit, 1)


# Which group lm_eval counts a subject in.
_SUBJECTS = {
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
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
                raise expect.InputError(
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
        folder = Path(str(resources.files("dlc_jax.datasets"))) / "instructions_sample/mmlu"
    elif scheme == "mmlu" and where:
        folder = Path(where).expanduser()
    else:
        raise expect.InputError(f"{source!r}: expected mmlu:<folder> or demo:mmlu.")
    files = sorted(folder.glob(_TEST.format("*")))
    if not files:
        raise expect.InputError(
            f"{source}: found no {folder / _TEST.format('<subject>')}; expected one per subject."
        )
    end = _TEST.rpartition("{}")[2]
    return Mmlu(tuple(_subject(folder, file.name.removesuffix(end)) for file in files), source)


def _subject(folder: Path, name: str) -> Subject:
    test, dev = folder / _TEST.format(name), folder / _DEV.format(name)
    expect.one_of(f"subject of {test}", name, sorted(SUBJECTS))
    return Subject(name, _questions(test), _questions(dev) if dev.exists() else None)


def _questions(file: Path) -> tuple[Question, ...]:
    rows = _rows(file)
    header = [name.strip() for name in rows[0][1]]
    if "question" in header or "answer" in header:
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            raise expect.InputError(
                f"{file}, line {rows[0][0]}: has no column {', '.join(missing)}; expected "
                f"{', '.join(_COLUMNS)}, found {expect.listed(header)}."
            )
        rows = rows[1:]
    else:
        header = list(_COLUMNS)
    if not rows:
        raise expect.InputError(f"{file}: has a header only, expected questions.")
    return tuple(_question(f"{file}, line {line}", row, header) for line, row in rows)


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """Returns the rows that are not empty, and in which line each begins, counted from 1."""
    with expect.refusing(f"{file}: cannot be read", OSError, ValueError, shown=expect.first_line):
        text = regular(file).read_text(encoding="utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise expect.InputError(f"{file}, line {line}: {error}.") from error
    if not rows:
        raise expect.InputError(f"{file}: is empty, expected questions.")
    return rows


def _question(where: str, row: list[str], header: list[str]) -> Question:
    if len(row) != len(header):
        raise expect.InputError(
            f"{where}: has {len(row)} values, expected {len(header)}, among them "
            f"{', '.join(_COLUMNS)}."
        )
    values = {name: row[header.index(name)] for name in _COLUMNS}
    written = values.pop("answer").strip()
    if written not in _ANSWERS:
        raise expect.InputError(f"{where}: the answer is {written!r}, expected 0 to 3 or A to D.")
    for column, value in values.items():
        if not value.strip():
            raise expect.InputError(f"{where}: {column} is empty, expected text.")
    question, *choices = values.values()
    return Question(question, tuple(choices), _ANSWERS[written])


@dataclasses.dataclass(frozen=True)
class MmluResult:
    """Shares of right answers.

    Attributes:
      accuracy: Over all questions, in percent; guessing gives 25.
      by_group: In percent, over all questions of a group that has any.
      by_subject: In percent.
      num_questions: Number of questions that were asked.
      num_truncated: Questions whose prompt had to be cut at its beginning.
    """

    accuracy: float
    by_group: dict[str, float]
    by_subject: dict[str, float]
    num_questions: int
    num_truncated: int


def evaluate_mmlu(
    model: LanguageModel,
    mmlu: Mmlu,
    *,
    num_shots: int = EvaluationConfig.num_shots,
    limit: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> MmluResult:
    """Measures how many questions the model answers rightly, as lm_eval's task `mmlu` does.

    The answer is the likeliest of " A" to " D" after the prompt, the first of equally likely ones.
    Prompts longer than the model's limit lose their beginning.

    Args:
      model: From `load_language_model`.
      mmlu: From `load_mmlu`.
      num_shots: Solved questions in the prompt, the first ones of the subject.
      limit: Only so many questions of each subject, the first ones.
      tokens_per_batch, progress: As for `continuation_log_likelihoods`.
    Raises:
      ValueError: a subject with fewer solved questions than `num_shots`; by question, tokens that
        the model does not have.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> result = dlc.evaluate_mmlu(model, dlc.load_mmlu("demo:mmlu"), num_shots=0, limit=1)
      >>> result.num_questions, result.accuracy
      (8, 12.5)
    """
    EvaluationConfig(num_shots=num_shots, limit=limit).check(where="")
    mmlu.check_shots(num_shots)
    asked = [(s, question) for s in mmlu.subjects for question in s.questions[:limit]]
    prompts = [subject.prompt(question, num_shots) for subject, question in asked]
    pairs = _pairs(prompts, model.tokenizer)
    for number, pair in enumerate(pairs):
        subject, question = asked[number // len(LETTERS)]
        place = f"{mmlu.name}: {subject.name}, {question.question.strip()[:60]!r}"
        model.check_tokens((place, ids) for ids in pair)
    found = continuation_log_likelihoods(
        model,
        pairs,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    given = found.sums.reshape(-1, len(LETTERS)).argmax(axis=1)
    is_right = given == np.array([question.answer for _, question in asked])
    subjects = np.array([subject.name for subject, _ in asked])
    groups = np.array([SUBJECTS[name] for name in subjects])
    return MmluResult(
        accuracy=100 * float(is_right.mean()),
        by_group=_percent(is_right, groups),
        by_subject=_percent(is_right, subjects),
        num_questions=len(asked),
        num_truncated=int((found.num_cut.reshape(-1, len(LETTERS)) > 0).any(axis=1).sum()),
    )


def _pairs(prompts: list[str], tokenizer: Any) -> list[Pair]:
    """Returns ids of each prompt with each letter: what the letter adds to the prompt's own ids."""
    pairs = []
    for prompt in prompts:
        texts = [prompt, *(f"{prompt} {letter}" for letter in LETTERS)]
        with tokenising(f"{prompt[-60:]!r}: the tokenizer cannot read it"):
            context, *wholes = tokenizer(texts, verbose=False)["input_ids"]
        pairs += [(context, whole[len(context) :]) for whole in wholes]
    return pairs


def _percent(is_right: np.ndarray, names: np.ndarray) -> dict[str, float]:
    return {str(name): 100 * float(is_right[names == name].mean()) for name in np.unique(names)}
