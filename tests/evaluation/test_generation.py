"""Greedy answers against transformers, with and without a cache, and what ends them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from small_llama import make_writer

import dlc_jax as dlc
from dlc_jax.encoders.causal_model import Adapter, CausalModel
from dlc_jax.encoders.decoder import Architecture, DecoderConfig
from dlc_jax.encoders.rotations import RopeScaling, YarnScaling
from dlc_jax.evaluation import generation
from dlc_jax.evaluation.generation import Ending, Greedy, answers

SIZES = {
    "vocab_size": 61,
    "width": 48,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "mlp_width": 80,
    "windows": (None, None),
    "max_length": 64,
    "norm_epsilon": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "attention_scale": 0.3,
}
SWITCHES = {
    "llama": {
        "windows": (7, 7),
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32),
        "biases": ("q_proj", "k_proj", "v_proj"),
    },
    "gemma2": {
        "windows": (7, None),
        "attention_cap": 5.0,
        "final_cap": 3.0,
        "activation": "gelu_pytorch_tanh",
        "sandwich": True,
        "offset_norm": True,
        "scale_embedding": True,
        "tied": True,
    },
    "gemma3": {
        "windows": (7, None),
        "norms_heads": True,
        "window_rope_theta": 50.0,
        "rope_scaling": YarnScaling(4.0, 4.0, 1.0, 64, 0.9),
    },
}
LENGTH, NUM = 40, 12  # tokens of prompts, and those that are read one by one


def read_in_parts(kind, architecture, params):
    """Returns logits after left-padded prompts, and after each of the tokens that follow."""
    tokens = np.random.default_rng(1).integers(2, SIZES["vocab_size"], (3, LENGTH + NUM))
    segments = jnp.asarray(np.arange(LENGTH) >= np.array([[0], [5], [23]]), int)

    @jax.jit
    def run(params, tokens):
        def after(reading, new):
            last, reading = kind.read_next(architecture, params, new, reading)
            return reading, architecture.logits(params, last)

        prompts = tokens[:, :LENGTH] * segments
        last, reading = kind.read(architecture, params, prompts, segments, NUM)
        _, logits = jax.lax.scan(after, reading, tokens[:, LENGTH:].T)
        return jnp.concatenate([architecture.logits(params, last)[None], logits])

    return np.asarray(run(params, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", slow_but(["gemma2"], SWITCHES))
def test_what_is_kept_changes_nothing(name):
    """Against the base class, which computes all tokens again; with an adapter."""
    config = DecoderConfig(**(SIZES | SWITCHES[name]))
    architecture = Architecture(config, "float32", Adapter(2, 4.0, ("q_proj", "v_proj")))
    leaves, tree = jax.tree.flatten(architecture.abstract_params())
    generator = np.random.default_rng(0)
    drawn = [jnp.asarray(0.3 * generator.normal(size=x.shape), jnp.float32) for x in leaves]
    params = jax.tree.unflatten(tree, drawn)
    found = read_in_parts(Architecture, architecture, params)
    expected = read_in_parts(CausalModel, architecture, params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    likeliest = expected.argmax(axis=-1)
    np.testing.assert_array_equal(found.argmax(axis=-1), likeliest)
    assert len(np.unique(likeliest)) > 3


class Ids(Ending):
    """Ends with tokens alone, and shows the tokens."""

    def text_of(self, answer):
        return " ".join(map(str, answer))


FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"attn_logit_softcapping": 5.0},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"]},
}
OF_GEMMA = {"sliding_window": 7, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}


def of_torch(model, prompts, num, **options):
    """Returns what transformers generates after each prompt, all of them in one batch."""
    import torch

    length = max(map(len, prompts))
    tokens, is_token = np.zeros((2, len(prompts), length), int)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], is_token[row, length - len(prompt) :] = prompt, 1
    found = model.generate(
        input_ids=torch.asarray(tokens),
        attention_mask=torch.asarray(is_token),
        max_new_tokens=num,
        do_sample=False,
        **options,
    )
    return found[:, length:].tolist()


def until(row, ends):
    """Returns a row up to the first token that ends it."""
    places = [place for place, token in enumerate(row) if token in ends]
    return row[: places[0] + 1] if places else row


@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        pytest.param("Qwen3", marks=pytest.mark.slow),
        pytest.param("Gemma2", marks=pytest.mark.slow),
        "Gemma3Text",
    ],
)
def test_tokens_are_those_of_torch(timm, tmp_path, family):
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=[1, 7],
        **FAMILIES[family],
        **(OF_GEMMA if "Gemma" in family else {}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ours = dlc.load_language_model(str(tmp_path), dtype="float32")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 61, num).tolist() for num in (3, 40, 1, 17, 9, 30)]
    settings = generation.generation_settings(ours)
    assert settings["eos_token_id"] == [1, 7]
    expected = [until(row, (1, 7)) for row in of_torch(model, prompts, 24)]
    ending = Ids(None, Greedy((1, 7)), ())
    sizes = {"longest": 40, "max_new_tokens": 24, "tokens_per_batch": 4096, "progress": False}
    found = answers(ours, prompts, ending, **sizes)
    assert found == [" ".join(map(str, row)) for row in expected]
    assert len({token for row in expected for token in row}) > 15


@pytest.fixture(scope="module")
def writer(timm, tmp_path_factory):
    """A small Llama that answers in letters, as ours and as torch's."""
    import torch
    import transformers

    folder = make_writer(tmp_path_factory.mktemp("writer"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return dlc.load_language_model(str(folder), dtype="float32"), theirs


def random_texts(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [
        "".join(" " if c > 25 else chr(97 + c) for c in generator.integers(0, 30, num))
        for num in lengths
    ]


PROMPTS = random_texts(5, 40, 80, 100, 30, 12, 33, 64)
NEW = {"max_new_tokens": 40}  # everywhere, since each number is a program to compile


def test_texts_are_those_of_torch(writer):
    """Some end by an end of sequence, some by their number of tokens."""
    model, theirs = writer
    tokenizer = model.tokenizer
    rows = of_torch(theirs, [tokenizer(text)["input_ids"] for text in PROMPTS], 40)
    expected = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert dlc.generate(model, PROMPTS, **NEW) == expected
    assert len(set(expected)) == len(PROMPTS)
    have_ended = [tokenizer.eos_token_id in row for row in rows]
    assert any(have_ended)
    assert not all(have_ended)


def test_a_prompt_is_answered_alike_in_any_company(writer):
    model, _ = writer
    expected = dlc.generate(model, PROMPTS, **NEW)
    assert dlc.generate(model, PROMPTS[::-1], **NEW) == expected[::-1]
    assert dlc.generate(model, PROMPTS[3:4], **NEW) == expected[3:4]
    (first,) = dlc.generate(model, PROMPTS[3:4], max_new_tokens=1)
    assert first
    assert expected[3].startswith(first)
    assert dlc.generate(model, [], **NEW) == ()


def test_an_answer_ends_before_a_stop_string(writer):
    model, _ = writer
    plain = dlc.generate(model, PROMPTS, **NEW)
    stop = [text[place : place + 2] for text, place in zip(plain, (9, 6, 5, 4), strict=False)]
    encoded = [model.tokenizer.encode(text, add_special_tokens=False) for text in stop]
    assert max(map(len, encoded)) == 2
    expected = [min((text.split(part)[0] for part in stop), key=len) for text in plain]
    found = dlc.generate(model, PROMPTS, **NEW, stop=stop)
    assert found == tuple(expected)
    assert sum(a != b for a, b in zip(found, plain, strict=True)) >= 4
    # what is in a prompt does not count
    assert dlc.generate(model, PROMPTS, **NEW, stop=[text[-4:] for text in PROMPTS]) == plain


def test_the_device_stops_when_all_have_ended(writer, monkeypatch):
    model, _ = writer
    plain = dlc.generate(model, PROMPTS, **NEW)
    calls = []
    real = generation._continued
    monkeypatch.setattr(generation, "_continued", lambda *args: calls.append(1) or real(*args))
    dlc.generate(model, PROMPTS, **NEW)
    assert len(calls) == 3  # of 16, 16 and 7 tokens
    dlc.generate(model, PROMPTS, **NEW, stop=[text[3:5] for text in plain])
    assert len(calls) == 4


def test_few_programs_serve_many_prompts(writer):
    model, _ = writer
    programs = (generation._begun, generation._continued)
    before = [program._cache_size() for program in programs]
    lengths = np.random.default_rng(0).integers(1, 200, 60).tolist()
    dlc.generate(model, random_texts(*lengths), **NEW, tokens_per_batch=2048)
    new = [program._cache_size() - size for program, size in zip(programs, before, strict=True)]
    assert 1 < max(new) <= 4


def with_settings(model, folder, **settings):
    """Returns the model of a folder that has other settings for generation."""
    for file in model.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return dlc.load_language_model(str(folder), dtype="float32")


def test_settings_beside_the_model_are_those_of_torch(writer, tmp_path):
    """Several ends of sequence, and a penalty on tokens that are there."""
    model, theirs = writer
    rows = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    rows = of_torch(theirs, rows, 40, repetition_penalty=1.3)
    ends = [model.tokenizer.eos_token_id, rows[2][7]]
    changed = with_settings(model, tmp_path, eos_token_id=ends, repetition_penalty=1.3)
    cut = [until(row, ends) for row in rows]
    assert len(cut[2]) <= 8
    expected = tuple(model.tokenizer.decode(row, skip_special_tokens=True) for row in cut)
    found = dlc.generate(changed, PROMPTS, **NEW)
    assert found == expected != dlc.generate(model, PROMPTS, **NEW)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3 changes greedy answers"),
        ({"suppress_tokens": [5]}, r"suppress_tokens \[5\] changes greedy answers"),
        ({"min_new_tokens": 4}, "min_new_tokens 4 changes .* expected 0 or None"),
        ({"num_beams": 2}, "num_beams 2 changes"),
    ],
)
def test_settings_that_are_not_known_are_refused(writer, tmp_path, settings, says):
    changed = with_settings(writer[0], tmp_path, **settings)
    with pytest.raises(ValueError, match=f"generation_config.json: {says}"):
        dlc.generate(changed, PROMPTS, **NEW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be >= 1"),
        ({"max_new_tokens": 256}, "max_new_tokens, of max_length 256: must be <= 255"),
        ({"max_length": 257}, "max_length, of .* must be <= 256, got 257"),
        ({"stop": ["a", ""]}, "stop: got an empty text"),
        ({"stop": "\n"}, "stop: got '.n', expected a list"),
        (
            {"max_length": 60, "max_new_tokens": 20},
            "prompt 2: has 80 tokens, 40 too many; expected at most 40, .* 60 less .* 20",
        ),
    ],
)
def test_what_cannot_be_is_refused(writer, options, says):
    with pytest.raises(ValueError, match=says):
        dlc.generate(writer[0], [PROMPTS[0], PROMPTS[5], PROMPTS[2]], **(NEW | options))


def test_prompts_that_cannot_be_read_are_named(writer, tmp_path):
    model, _ = writer
    with pytest.raises(ValueError, match="prompts: got 'Hello', expected"):
        dlc.generate(model, "Hello")
    with pytest.raises(ValueError, match="prompt 1: the tokenizer cannot read it"):
        dlc.generate(model, ["Hello", "\ud800"], **NEW)
    # a text that begins with a begin of sequence gets no second one
    begun = [f"<s>{text}" for text in PROMPTS]
    assert dlc.generate(model, begun, **NEW) == dlc.generate(model, PROMPTS, **NEW)
    no_begin = with_settings(model, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 400, "content": "<x>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(ValueError, match="prompt 1: has no token, expected at least one"):
        dlc.generate(no_begin, ["Hello", ""], **NEW)
    with pytest.raises(ValueError, match="prompt 0: token 300 .'<x>'. has no row in the model"):
        dlc.generate(no_begin, ["Hello<x>"], **NEW)


@pytest.mark.slow
def test_a_converted_model_answers_too(timm, tmp_path):
    """Without a cache of its own."""
    import torch
    import transformers

    folder = make_writer(tmp_path, family="Phi3", max_length=192)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = dlc.load_language_model(str(folder), dtype="float32")
    rows = of_torch(theirs, [model.tokenizer(text)["input_ids"] for text in PROMPTS], 40)
    expected = tuple(model.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert dlc.generate(model, PROMPTS, **NEW) == expected


@pytest.mark.slow
def test_weights_may_be_spread(writer):
    """Over the two devices of the tests, if there are two."""
    model, _ = writer
    mesh = dlc.make_mesh(fsdp=jax.device_count())
    spread = dlc.load_language_model(str(model.folder), dtype="float32", mesh=mesh)
    found = dlc.generate(spread, PROMPTS[:3], **NEW)
    assert found == dlc.generate(model, PROMPTS[:3], **NEW)
