"""Our class in lm_eval against lm_eval's own on the same weights, and MMLU against its task."""

import csv
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, require_shared, slow_but
from small_llama import make_llama, make_writer

from dlc_jax.encoders.language_model import load_language_model
from dlc_jax.evaluation import SUBJECTS, evaluate_mmlu, load_mmlu

COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
SIZES = {"anatomy": 9, "virology": 4, "high_school_us_history": 5, "astronomy": 3}


@pytest.fixture(scope="module")
def place(timm, tmp_path_factory):
    """Two small models, and MMLU files of random letters."""
    folder = tmp_path_factory.mktemp("harness")
    make_llama(folder / "model", max_length=384)
    make_llama(folder / "split", max_length=480, joins_letters=False, seed=1)
    make_llama(folder / "converted", max_length=384, family="Phi3")
    generator = np.random.default_rng(0)

    def words(num):
        return " ".join(
            "".join(chr(97 + c) for c in generator.integers(0, 26, 3)) for _ in range(num)
        )

    def write(file, num):
        file.parent.mkdir(exist_ok=True, parents=True)
        with open(file, "w", newline="") as lines:
            table = csv.writer(lines)
            table.writerow(COLUMNS)
            for _ in range(num):
                choices = [words(1), "None", f"{words(1)} ", words(2)]
                table.writerow(
                    [f" {words(generator.integers(2, 9))}?\n", *choices, generator.integers(4)]
                )

    for subject, num in SIZES.items():
        write(folder / "mmlu" / "test" / f"{subject}_test.csv", num)
        write(folder / "mmlu" / "dev" / f"{subject}_dev.csv", 5)
    texts = [words(num) for num in (3, 40, 1, 600)]
    with open(folder / "texts.jsonl", "w") as lines:
        for text in texts:
            row = {"text": text, "ends": [text[-9:], " so it is", " no"], "answer": len(text) % 3}
            lines.write(f"{json.dumps(row)}\n")
    return folder


def mmlu_task(folder, subject):
    """lm_eval's own task for MMLU, over local files."""
    import datasets
    import lm_eval.tasks
    import yaml

    own = os.path.join(os.path.dirname(lm_eval.tasks.__file__), "mmlu", "default")
    with open(os.path.join(own, "_default_template_yaml")) as text:
        task = yaml.safe_load(text)
    with open(os.path.join(own, f"mmlu_{subject}.yaml")) as text:
        task |= {key: value for key, value in yaml.safe_load(text).items() if key == "description"}
    text_columns = {name: datasets.Value("string") for name in COLUMNS[:5]}

    def with_choices(rows):
        return rows.map(lambda row: {"choices": [row[name] for name in COLUMNS[1:5]]})

    return task | {
        "task": f"local_{subject}",
        "dataset_path": "csv",
        "process_docs": with_choices,
        "fewshot_config": {"sampler": "first_n", "process_docs": with_choices},
        "dataset_kwargs": {
            "data_files": {
                part: str(folder / part / f"{subject}_{part}.csv") for part in ("test", "dev")
            },
            "features": datasets.Features({**text_columns, "answer": datasets.Value("int64")}),
            "keep_default_na": False,
        },
    }


def text_tasks(folder):
    """Tasks of all kinds of log-likelihoods; one text is longer than the models' limit."""
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    kinds = {
        "multiple_choice": {"doc_to_choice": "{{ends}}", "doc_to_target": "answer"},
        "loglikelihood": {"doc_to_target": "{{ends[1]}}"},
        "loglikelihood_rolling": {"doc_to_target": "{{text}}", "doc_to_text": ""},
    }
    return [common | {"task": kind, "output_type": kind} | how for kind, how in kinds.items()]


def both(folder, **options):
    """Returns lm_eval's model and ours of a checkpoint, in float32."""
    from lm_eval.models.huggingface import HFLM

    from dlc_jax.evaluation.harness import JaxLM

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, **options)
    return theirs, JaxLM(str(folder), dtype="float32", **options)


def evaluated(model, tasks, **options):
    """Returns per task what lm_eval finds, its prompts, and the log-likelihoods it was given."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    options["task_manager"] = TaskManager(include_defaults=False)  # thousands of files otherwise
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, **options)
    metrics = {
        task: {name: value for name, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }
    prompts, logs = {}, {}
    for task, samples in found["samples"].items():
        prompts[task] = [sample["arguments"][0][0] for sample in samples]
        logs[task] = np.array([sample["filtered_resps"] for sample in samples], float)
    return metrics, prompts, logs


@pytest.fixture(autouse=True)
def _versions_are_not_collected(timm, monkeypatch):
    """It takes lm_eval seconds for every evaluation."""
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)


def assert_same(theirs, ours):
    """Metrics equal, log-likelihoods within 1e-3."""
    (their_metrics, their_prompts, their_logs), (metrics, prompts, logs) = theirs, ours
    assert prompts == their_prompts
    assert logs.keys() == their_logs.keys()
    for task in logs:
        np.testing.assert_allclose(logs[task], their_logs[task], rtol=2e-6, atol=1e-3)
        for name, value in their_metrics[task].items():
            np.testing.assert_allclose(metrics[task][name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", slow_but(["split"], ["model", "split", "converted"]))
def test_mmlu_is_that_of_lm_eval(place, name):
    """Prompts, log-likelihoods, scores of subjects, groups and all; also of letters in pieces."""
    from lm_eval.api.metrics import aggregate_subtask_metrics

    theirs, ours = both(place / name)
    tasks = [mmlu_task(place / "mmlu", subject) for subject in sorted(SIZES)]
    expected = evaluated(theirs, tasks, num_fewshot=5)
    assert_same(expected, evaluated(ours, tasks, num_fewshot=5))
    metrics, prompts, _ = expected
    mmlu = load_mmlu(f"mmlu:{place / 'mmlu'}")
    for subject in mmlu.subjects:
        shown = [subject.prompt(question, 5) for question in subject.questions]
        assert shown == prompts[f"local_{subject.name}"]
    found = evaluate_mmlu(ours.model, mmlu)
    right = {subject: metrics[f"local_{subject}"]["acc,none"] for subject in SIZES}
    assert found.by_subject == pytest.approx({s: 100 * share for s, share in right.items()})
    groups = {SUBJECTS[subject] for subject in SIZES}
    assert groups == found.by_group.keys() == {"stem", "humanities", "other"}
    for group in groups:
        inside = [subject for subject in SIZES if SUBJECTS[subject] == group]
        share = aggregate_subtask_metrics([right[s] for s in inside], [SIZES[s] for s in inside])
        assert found.by_group[group] == pytest.approx(100 * share)
    share = aggregate_subtask_metrics(list(right.values()), [SIZES[s] for s in right])
    assert found.accuracy == pytest.approx(100 * share)
    assert found.num_questions == sum(SIZES.values())
    assert 0 < found.num_truncated < found.num_questions


def test_fewer_shots_and_questions(place):
    theirs, ours = both(place / "model")
    tasks = [mmlu_task(place / "mmlu", subject) for subject in ("anatomy", "virology")]
    metrics, _, _ = evaluated(theirs, tasks, num_fewshot=1, limit=6)
    mmlu = load_mmlu(f"mmlu:{place / 'mmlu'}")
    found = evaluate_mmlu(ours.model, mmlu, num_shots=1, limit=6)
    assert found.num_questions == 6 + 4 + 5 + 3
    assert found.num_truncated == 0
    for subject in ("anatomy", "virology"):
        assert found.by_subject[subject] == 100 * metrics[f"local_{subject}"]["acc,none"]
    with pytest.raises(ValueError, match=r"dev/anatomy_dev.csv: found 5 rows, expected at least 6"):
        evaluate_mmlu(ours.model, mmlu, num_shots=6)


def test_shots_that_are_not_there_are_missed_only_if_needed(place, tmp_path):
    model = load_language_model(str(place / "model"), dtype="float32")
    (tmp_path / "test").mkdir()
    text = (place / "mmlu" / "test" / "astronomy_test.csv").read_text()
    (tmp_path / "test" / "astronomy_test.csv").write_text(text)
    mmlu = load_mmlu(f"mmlu:{tmp_path}")
    assert evaluate_mmlu(model, mmlu, num_shots=0).num_questions == 3
    with pytest.raises(ValueError, match=r"dev/astronomy_dev.csv: found no such file, expected at"):
        evaluate_mmlu(model, mmlu)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"add_bos_token": False, "max_length": 100}])
def test_every_kind_of_log_likelihood_is_that_of_lm_eval(place, options):
    theirs, ours = both(place / "model", **options)
    tasks = text_tasks(place)
    expected = evaluated(theirs, tasks)
    assert {task: logs.shape[1:] for task, logs in expected[2].items()} == {
        "multiple_choice": (3, 2),
        "loglikelihood": (1, 2),
        "loglikelihood_rolling": (1,),
    }
    assert_same(expected, evaluated(ours, tasks))


@pytest.mark.slow
def test_a_real_model_on_real_questions(timm):
    folder = require_shared("mmlu")
    theirs, ours = both(require_shared("lm/tiny-llama"))
    tasks = [mmlu_task(folder, subject) for subject in ("astronomy", "high_school_statistics")]
    expected = evaluated(theirs, tasks, num_fewshot=5, limit=3)
    lengths = [len(ours.tok_encode(prompt)) for part in expected[1].values() for prompt in part]
    assert min(lengths) < 800
    assert max(lengths) > ours.max_length
    assert_same(expected, evaluated(ours, tasks, num_fewshot=5, limit=3))


@pytest.mark.slow
def test_an_adapter_is_applied_as_by_lm_eval(place, tmp_path):
    import peft
    import torch
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(place / "model")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    theirs, ours = both(place / "model", peft=str(tmp_path))
    tasks = text_tasks(place)[:1]
    expected = evaluated(theirs, tasks)
    assert_same(expected, evaluated(ours, tasks))
    _, plain = both(place / "model")
    _, _, without = evaluated(plain, tasks)
    assert np.abs(without["multiple_choice"] - expected[2]["multiple_choice"]).max() > 0.1


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_texts_are_encoded_as_by_lm_eval(place, tmp_path, begins, add_bos_token):
    """Also by a tokenizer that by itself puts nothing before a text."""
    for file in (place / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if not begins:
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    theirs, ours = both(tmp_path, add_bos_token=add_bos_token)
    assert (ours.tok_encode("x")[0] == 0) == (begins if add_bos_token is None else add_bos_token)
    for text in ("Answer: A", "<s>Answer: A", " x", "", "</s>"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    for name in ("eot_token_id", "prefix_token_id", "max_length"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_answers_are_cached(place):
    from lm_eval.api.instance import Instance

    class Hook:
        def __init__(self):
            self.kept = {}

        def add_partial(self, kind, request, answer):
            self.kept[kind, request] = answer

    _, ours = both(place / "model")
    ours.set_cache_hook(Hook())
    one = [Instance("loglikelihood", {}, ("Answer:", " A"), 0)]
    text = [Instance("loglikelihood_rolling", {}, ("Answer: A",), 0)]
    answers = ours.loglikelihood(one, disable_tqdm=True)
    totals = ours.loglikelihood_rolling(text, disable_tqdm=True)
    assert ours.cache_hook.kept == {
        ("loglikelihood", ("Answer:", " A")): answers[0],
        ("loglikelihood_rolling", ("Answer: A",)): totals[0],
    }


def test_a_loaded_model_is_taken_as_it_is(place):
    from dlc_jax.evaluation.harness import JaxLM

    model = load_language_model(str(place / "model"), dtype="float32")
    assert JaxLM(model).model is model
    with pytest.raises(ValueError, match="dtype: got 'bfloat16' for a loaded model, .* float32"):
        JaxLM(model, dtype="bfloat16")
    with pytest.raises(ValueError, match="max_length, of .* must be <= 384, got 385"):
        JaxLM(model, max_length=385)


@pytest.fixture(scope="module")
def writers(timm, tmp_path_factory):
    """Small models that answer in letters, and questions, one longer than the models' limit."""
    folder = tmp_path_factory.mktemp("writers")
    template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for family, ends in (("Llama", 1.3), ("Qwen3", 2.2)):
        make_writer(folder / family, max_length=320, family=family, ends=ends)
        (folder / family / "chat_template.jinja").write_text(template)
    generator = np.random.default_rng(0)
    with open(folder / "questions.jsonl", "w") as lines:
        for num in (5, 40, 80, 300, 100, 30, 12, 33, 64):
            text = "".join(chr(97 + c) for c in generator.integers(0, 26, num))
            lines.write(f"{json.dumps({'question': text, 'answer': '#### 1'})}\n")
    return folder


def question_task(folder, name, **settings):
    """A task in the style of GSM8K."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "first-letters",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-zA-Z]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "generation_kwargs": settings,
    }


def answered(model, tasks, **options):
    """Returns per task what lm_eval takes for answers, and what a filter makes of them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    options["task_manager"] = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, **options)
    return {
        task: [(row["arguments"], row["resps"], row["filtered_resps"]) for row in samples]
        for task, samples in found["samples"].items()
    }


@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen3", marks=pytest.mark.slow)])
def test_answers_are_those_of_lm_eval(writers, family):
    """As GSM8K asks, with stop strings, and as IFEval, without; contexts are cut alike."""
    theirs, ours = both(writers / family)
    ask = functools.partial(question_task, writers)
    stop = ["Question:", "</s>", "<|im_end|>"]
    plain = ask("plain", until=[], do_sample=False, temperature=0.0, max_gen_toks=100)
    expected = answered(theirs, [plain])
    texts = [answers[0][0] for _, answers, _ in expected["plain"]]
    stop += [text[i : i + 2] for text, i in zip(texts, (20, 14, 9, 7), strict=False) if text[i:]]
    stopped = ask("stopped", until=stop, do_sample=False, max_gen_toks=100)
    expected |= answered(theirs, [stopped])
    assert answered(ours, [plain, stopped]) == expected
    ends = [answers[0][0] for _, answers, _ in expected["stopped"]]
    assert len(set(texts)) >= len(texts) - 1
    assert sum(a != b for a, b in zip(texts, ends, strict=True)) >= 3
    lengths = [len(ours.tok_encode(text)) for text in texts]
    assert min(lengths) < 90 < max(lengths)  # of at most 101


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"add_bos_token": False, "max_length": 300}])
def test_answers_in_a_conversation_are_those_of_lm_eval(writers, options):
    theirs, ours = both(writers / "Llama", **options)
    task = question_task(writers, "chat", until=["\n\n", "e"], repetition_penalty=1.2)
    expected = answered(theirs, [task], apply_chat_template=True)
    assert expected["chat"][0][0][0][0].startswith("<s>user: Question: ")
    assert answered(ours, [task], apply_chat_template=True) == expected


def request(settings, text="x"):
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (text, settings), 0, metadata=("gsm8k", 0, 1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.7}, "do_sample None, temperature 0.7 draws answers at random"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample True, temperature 0.0 draws"),
        ({"num_beams": 4}, "num_beams 4 changes greedy answers"),
        ({"max_length": 100}, "max_length is not supported; expected until, max_gen_toks"),
        ({"max_gen_toks": 320}, "max_gen_toks 320 leaves no room .* expected at most 319"),
        ({"max_gen_toks": 0}, "max_gen_toks: .*1.* got 0"),
        ({"max_gen_toks": -3}, "max_gen_toks: .*1.* got -3"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": "x"}, "repetition_penalty"),
    ],
)
def test_settings_of_tasks_that_are_not_greedy_are_refused(writers, monkeypatch, settings, says):
    """Before any other request is answered."""
    _, ours = both(writers / "Llama")
    monkeypatch.setattr(f"{type(ours).__module__}.answers", None)
    with pytest.raises(ValueError, match=f"gsm8k: generation_kwargs: {says}"):
        ours.generate_until([request({}), request(settings)])


def test_settings_that_change_no_greedy_answer_are_taken(writers):
    _, ours = both(writers / "Llama")
    settings = {"do_sample": False, "max_gen_toks": 4}
    others = settings | {"use_cache": True, "pad_token_id": 0, "top_k": 5}
    first, second = ours.generate_until([request(settings), request(others)])
    assert first == second


@pytest.mark.slow
def test_answers_are_cached_in_the_order_of_requests(writers):
    _, ours = both(writers / "Llama")
    kept = {}

    class Hook:
        def add_partial(self, kind, asked, answer):
            kept[kind, asked[0], str(asked[1])] = answer

    ours.set_cache_hook(Hook())
    short = {"do_sample": False, "top_p": 0.9, "max_gen_toks": 4}
    asked = [("x", {}), ("y" * 50, short), ("z", {}), ("x", short)]
    answers = ours.generate_until([request(settings, text) for text, settings in asked])
    assert answers[0].startswith(answers[3])
    assert len(set(answers)) == 4
    expected = [("generate_until", text, str(settings)) for text, settings in asked]
    assert kept == dict(zip(expected, answers, strict=True))
    assert ours.generate_until([]) == []


@pytest.mark.slow
def test_the_command(place, tmp_path):
    """In its own process, over a task in a file."""
    task = text_tasks(place)[0]
    (tmp_path / "task.yaml").write_text(json.dumps(task))  # which YAML reads too
    command = [sys.executable, "-m", "dlc_jax.lm_eval", "--model", "dlc_jax", "--model_args"]
    command += [f"pretrained={place}/model,dtype=float32,tokens_per_batch=2048", "--tasks"]
    command += [str(tmp_path / "task.yaml"), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(
        [*command, "--log_samples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.rglob("out_*.json")
    found = json.loads(file.read_text())["results"]["multiple_choice"]["acc,none"]
    metrics, _, _ = evaluated(both(place / "model")[1], [task])
    assert found == metrics["multiple_choice"]["acc,none"]


@pytest.mark.slow
def test_without_lm_eval_the_extra_is_named():
    code = "import sys; sys.modules['lm_eval'] = None; import dlc_jax.evaluation.harness"
    command = "import sys; sys.modules['lm_eval'] = None; import dlc_jax.lm_eval as l; l.main()"
    for text in (code, command):
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "pip install 'dlc_jax[eval]'" in done.stderr
