"""Mode official of instructions against a re-implementation of the released score.py in torch."""

import copy
import dataclasses
import json

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.datasets.released_prompts import trained_as_released
from dlc_jax.masking import masked_by_layer
from dlc_jax.types import by_path

SENTENCE = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
BLANKS = "            "
ALPACA_TEXT = f"""{SENTENCE}
{BLANKS}
{BLANKS}### Instruction:
{BLANKS}Add them.
{BLANKS}
{BLANKS}### Input:
{BLANKS}1 and 2
{BLANKS}
{BLANKS}### Response:

{BLANKS}"""
SHORT_TEXT = f"""{SENTENCE}
{BLANKS}
{BLANKS}### Instruction:
{BLANKS}Add them.
{BLANKS}
{BLANKS}### Response:
{BLANKS}"""


def prompt_of(row):
    """The released code's prompt, written apart from ours."""
    given = row.get("input", "")
    text = ALPACA_TEXT.replace("1 and 2", given) if len(given) >= 2 else SHORT_TEXT
    return text.replace("Add them.", row["instruction"])


@pytest.fixture(scope="module")
def rows():
    """Twenty rows in Alpaca's columns: with an input, with one character of it, without."""
    data = dlc.load_instructions("demo:dolly/train")
    inputs = ["Be brief.", "", "x"]
    texts = zip(data.rows[:20], range(20), strict=True)
    return [
        {
            "id": f"sample {i}",
            "instruction": row["prompt"].split("### Instruction:")[-1][:120],
            "input": inputs[i % 3],
            "output": row["response"][:120],
        }
        for row, i in texts
    ]


def written(rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"jsonl:{path}"


def tied_llama(folder):
    """A random model in bfloat16, whose embedding is its head, with the bundled tokenizer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def demo_folder():
    return dlc.load_language_model("demo:tiny-llama", dtype="float32").folder


def pruned(model):
    """What the released code does to a model after each pass over the data."""
    import torch
    from torch.nn.utils import prune

    for _, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            prune.global_unstructured(
                [(module, "weight")], pruning_method=prune.L1Unstructured, amount=0.2
            )
            prune.remove(module, "weight")


def released_losses(model, tokenizer, rows):
    """Losses [3, n] of a model whose weights are in half precision, which is pruned on the way."""
    import torch

    found = []
    for _ in range(3):
        single, losses = copy.deepcopy(model).float(), []
        for row in rows:
            prompt = prompt_of(row)
            ids = tokenizer.encode(prompt + row["output"], return_tensors="pt")
            start = len(tokenizer.encode(prompt))
            with torch.no_grad():
                logits = single(ids).logits[0, start - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]).item())
        found.append(losses)
        pruned(model)
    return np.array(found)


def released_indices(scores, seed):
    """What the released code keeps, by split, in the order in which it draws."""
    generator, found = np.random.RandomState(seed), {}
    for split, easy, hard in ((0.25, 0.25, 0.25), (0.75, 0.25, 0.25)):
        order, pool = np.argsort(scores), round(len(scores) * split)
        found[split] = [
            *generator.choice(order[:pool], round(len(scores) * easy), replace=False),
            *generator.choice(order[pool:], round(len(scores) * hard), replace=False),
        ]
    return found


@pytest.mark.parametrize(
    "kind",
    ["demo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tied", "converted"))],
)
def test_losses_masks_and_kept_sets_are_those_of_the_released_code(timm, tmp_path, rows, kind):
    import torch
    import transformers

    folder = demo_folder() if kind == "demo" else tied_llama(tmp_path)
    rows = rows if kind == "demo" else rows[:6]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = released_losses(theirs.eval(), tokenizer, rows)

    model = dlc.load_language_model(str(folder), dtype="float32", converted=kind == "converted")
    data = dlc.load_instructions(written(rows, tmp_path), "released")
    tokens = dlc.tokenise(data, model.tokenizer, 1024, mode="official")
    probes = dlc.probe_responses(model, tokens, mode="official")
    np.testing.assert_allclose(probes.losses, expected, atol=1e-5, rtol=0)
    assert np.abs(expected[1] - expected[0]).max() > 1e-3  # the masks do something
    np.testing.assert_allclose(probes.sparsity, [0, 0.2, 0.2], atol=1e-3)

    masked = masked_by_layer(model.params, model.architecture.is_linear, 0.2).params
    state, leaves = theirs.state_dict(), by_path(masked)
    linear = [path for path in leaves if model.architecture.is_linear(path)]
    names = model.stored_names(linear)
    modules = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == len(modules)
    for path in linear:
        torchs = state[names[path].name].float().numpy()
        ours = np.asarray(leaves[path])
        np.testing.assert_array_equal(ours.T if path.endswith("/kernel") else ours, torchs)
        magnitudes = np.sort(np.abs(np.asarray(by_path(model.params)[path])), axis=None)
        cut = round(0.2 * magnitudes.size)
        if kind == "demo":
            assert magnitudes[cut - 1] == magnitudes[cut]  # ties decide

    scores = dlc.score(probes)
    for seed in (0, 1, 7):
        for split, kept in released_indices(scores, seed).items():
            found = dlc.selection.Candidates(scores, probes.labels).select(
                keep_fraction=0.5,
                split=split,
                seed=seed,
                mode="official",
                kind="instructions",
            )
            assert found.indices.tolist() == sorted(kept)


def test_prompts_are_those_of_the_released_code_blank_for_blank(tmp_path):
    row = {"instruction": "Add them.", "output": "3"}
    given = [row | {"input": text} for text in ("1 and 2", "x", "")]
    data = dlc.load_instructions(written([*given, row], tmp_path), "released")
    assert data.prompts == (ALPACA_TEXT, SHORT_TEXT, SHORT_TEXT, SHORT_TEXT)
    assert data.responses == ("3",) * 4
    assert data.summary.endswith("'alpaca', read as text of the authors' released code")
    trained = [
        trained_as_released(*pair) for pair in zip(data.prompts, data.responses, strict=True)
    ]
    assert trained[0][0] == ALPACA_TEXT.replace("Response:\n\n", "Response:\n")
    assert trained[1] == (SHORT_TEXT, f"3\n{BLANKS}")


def test_other_layouts_are_read_as_in_the_released_code(tmp_path):
    turns = [("human", "Add them."), ("gpt", "3"), ("human", "Why?"), ("gpt", "It is so.")]
    talk = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    data = dlc.load_instructions(written([talk], tmp_path), "released", turns="first")
    assert (data.prompts, data.responses) == ((SHORT_TEXT,), ("3",))
    pair = {"prompt": "Add them.", "response": "3"}
    data = dlc.load_instructions(written([pair], tmp_path), "released")
    assert (data.prompts, data.responses) == ((SHORT_TEXT,), ("3",))
    renamed = {"question": "Add them.", "context": "1 and 2", "answer": "3"}
    columns = "instruction=question,input=context,output=answer"
    data = dlc.load_instructions(written([renamed], tmp_path), "released", columns=columns)
    assert data.prompts == (ALPACA_TEXT,)


def test_a_sample_has_the_same_name_in_both_modes(tmp_path, rows):
    source = written([{k: v for k, v in row.items() if k != "id"} for row in rows], tmp_path)
    names = [dlc.load_instructions(source, template).ids for template in (None, "released")]
    np.testing.assert_array_equal(*names)


EMPTY_FIRST = [("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "fit no template; expected those of one .alpaca"),
        ({"instruction": "a", "output": "b", "system": "c"}, "1 have 'system', which template"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "1 have 'history', which"),
        ({"instruction": "a", "output": " "}, "1 have an empty response: row 1"),
        (
            {"conversations": [{"from": w, "value": v} for w, v in EMPTY_FIRST]},
            "1 have an empty response: row 1",
        ),
        (
            {"conversations": [{"from": w, "value": "a"} for w in ("system", "human", "gpt")]},
            "1 do not begin with a question and its answer, .*: row 1",
        ),
    ],
)
def test_rows_that_the_released_code_would_read_otherwise_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        dlc.load_instructions(written([row], tmp_path), "released")


def test_what_mode_official_does_not_have_is_refused(tmp_path, rows):
    model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
    source = written(rows, tmp_path)
    data = dlc.load_instructions(source, "released")
    with pytest.raises(ValueError, match="turns: the released code reads the first two turns"):
        dlc.load_instructions(source, "released", turns="all")
    with pytest.raises(ValueError, match="takes data of the template 'released', got layout 'alp"):
        dlc.tokenise(dlc.load_instructions(source), model.tokenizer, 1024, mode="official")
    with pytest.raises(ValueError, match=r"20 samples do not fit at max_length 8, such as sample"):
        dlc.tokenise(data, model.tokenizer, 8, mode="official")
    tokens = dlc.tokenise(data, model.tokenizer, 1024, mode="official")
    longest = max(map(len, tokens.tokens))
    with pytest.raises(ValueError, match=f"it has {longest} tokens, of at most {longest - 1}"):
        dlc.tokenise(data, model.tokenizer, longest - 1, mode="official")
    fewer = dlc.tokenise(data, model.tokenizer, longest - 1, mode="official", on_corrupt="skip")
    assert len(fewer) + len(fewer.skipped) == 20
    assert not fewer.truncated.any()
    for key, value in (("num_probes", 3), ("path", dlc.PathSpec()), ("masking", "l1")):
        with pytest.raises(ValueError, match=f"{key}: mode 'official' has one path only"):
            dlc.probe_responses(model, tokens, mode="official", **{key: value})
    cell = {"mode": "official", "kind": "instructions"}
    samples = dlc.selection.Candidates(np.arange(20.0), np.zeros(20, int))
    with pytest.raises(ValueError, match=r"keep_fraction: mode 'official' has 0\.5 only, got 0\.3"):
        samples.select(keep_fraction=0.3, split=0.25, **cell)
    with pytest.raises(ValueError, match=r"split: mode 'official' has 0\.25, 0\.75 only, got 0\.5"):
        samples.select(keep_fraction=0.5, **cell)
    with pytest.raises(ValueError, match=r"kind.*pictures"):
        samples.select(keep_fraction=0.5, mode="official", kind="pictures")


def test_a_sample_without_a_token_of_its_own_is_no_nan(tmp_path):
    model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
    data = dlc.load_instructions(
        written([{"prompt": "a", "response": "b"}] * 2, tmp_path), "released"
    )
    empty = dataclasses.replace(data, responses=("b", ""))
    with pytest.raises(ValueError, match=r"its prompt alone has \d+ tokens, of \d+ in all"):
        dlc.tokenise(empty, model.tokenizer, 1024, mode="official")
