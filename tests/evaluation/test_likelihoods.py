"""Log-likelihoods of continuations against torch."""

import jax
import numpy as np
import pytest
from small_llama import make_llama

from dlc_jax.encoders.decoder import Architecture
from dlc_jax.encoders.language_model import load_language_model
from dlc_jax.evaluation import continuation_log_likelihoods

MAX_LENGTH = 256


@pytest.fixture(scope="module")
def models(timm, tmp_path_factory):
    """The same weights as ours and as torch's."""
    import torch
    import transformers

    folder = make_llama(tmp_path_factory.mktemp("llama"), max_length=MAX_LENGTH)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return load_language_model(str(folder), dtype="float32"), theirs


def random_pairs(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [
        (generator.integers(0, 258, a).tolist(), generator.integers(0, 258, b).tolist())
        for a, b in sizes
    ]


def of_torch(model, context, continuation, max_length=MAX_LENGTH):
    import torch

    whole = [*context, *continuation][-(max_length + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]])).logits[0, -len(continuation) :]
    chosen = torch.tensor(continuation)
    logs = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])
    return logs.sum().item(), bool((logits.argmax(dim=-1) == chosen).all())


def greedy(model, context, num):
    """Returns the continuation that torch likes best."""
    import torch

    ids = list(context)
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


# continuations of one and many tokens, a context of one, and pairs that must be cut
PAIRS = random_pairs((1, 1), (5, 3), (40, 1), (39, 140), (1, 200), (250, 30), (300, 1), (256, 1))


@pytest.mark.parametrize("tokens_per_batch", [pytest.param(1, marks=pytest.mark.slow), 8192])
def test_sums_are_those_of_torch_in_any_batch(models, tokens_per_batch):
    model, theirs = models
    best = [(context, greedy(theirs, context, 4)) for context, _ in PAIRS[:4]]
    pairs = [*PAIRS, *best]
    found = continuation_log_likelihoods(model, pairs, tokens_per_batch=tokens_per_batch)
    expected = [of_torch(theirs, *pair) for pair in pairs]
    np.testing.assert_allclose(found.sums, [log for log, _ in expected], rtol=2e-5)
    assert found.is_greedy.tolist() == [is_greedy for _, is_greedy in expected]
    assert found.is_greedy.tolist()[-4:] == [True] * 4
    assert not found.is_greedy[:8].all()
    assert found.num_cut.tolist() == [0, 0, 0, 0, 0, 23, 44, 0] + [0] * 4


def test_a_continuation_is_greedy_only_if_all_of_it_is(models):
    model, theirs = models
    context = PAIRS[1][0]
    best = greedy(theirs, context, 3)
    other = [(token + 1) % 258 for token in best]
    pairs = [(context, best), (context, [*best[:2], other[2]]), (context, [other[0], *best[1:]])]
    assert continuation_log_likelihoods(model, pairs).is_greedy.tolist() == [True, False, False]


def test_a_lower_limit_cuts_more(models):
    model, theirs = models
    found = continuation_log_likelihoods(model, PAIRS[2:3] + PAIRS[1:2], max_length=16)
    assert found.num_cut.tolist() == [24, 0]
    np.testing.assert_allclose(found.sums[0], of_torch(theirs, *PAIRS[2], 16)[0], rtol=2e-5)
    assert abs(found.sums[0] - of_torch(theirs, *PAIRS[2])[0]) > 0.01


@pytest.mark.slow
def test_choices_of_one_token_share_a_pass(models, monkeypatch):
    """Whatever comes before the last token is read once, wherever the context ends."""
    model, theirs = models
    rows = []
    hidden = Architecture.hidden

    def counting(self, params, tokens, segments):
        rows.append(tokens.shape[0])
        return hidden(self, params, tokens, segments)

    monkeypatch.setattr(Architecture, "hidden", counting)
    contexts = [pair[0] for pair in random_pairs((50, 1), (50, 1), (50, 1), seed=1)]
    pairs = [(context, [letter]) for context in contexts for letter in (65, 66, 67, 68)]
    pairs.append((contexts[0][:48], [*contexts[0][48:], 65]))
    with jax.disable_jit():
        found = continuation_log_likelihoods(model, pairs)
    assert rows == [3]
    expected = [of_torch(theirs, *pair)[0] for pair in pairs]
    np.testing.assert_allclose(found.sums, expected, rtol=2e-5)


def test_nothing_asked_is_nothing_found(models):
    found = continuation_log_likelihoods(models[0], [])
    assert [len(part) for part in found] == [0, 0, 0]


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (([], [1]), "pair 1: its context has no token"),
        (([1], []), "pair 1: its continuation has no token"),
        (
            ([1, 2], [7, 10_000]),
            "pair 1: token 10000 .* has no row in the model's embedding, expected ids of 0 to",
        ),
        (([1], [2] * (MAX_LENGTH + 1)), f"has 257 tokens, expected at most {MAX_LENGTH}"),
    ],
)
def test_pairs_that_cannot_be_judged_are_named(models, pair, says):
    with pytest.raises(ValueError, match=says):
        continuation_log_likelihoods(models[0], [PAIRS[0], pair])


def test_limits_are_checked(models):
    with pytest.raises(ValueError, match="max_length, of .* must be <= 256, got 257"):
        continuation_log_likelihoods(models[0], PAIRS, max_length=257)
