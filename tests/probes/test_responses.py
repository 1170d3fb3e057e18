"""Response losses against torch, unmasked and under torch's own global L1 masks."""

import dataclasses
import fnmatch
import json

import huggingface_hub
import jax
import numpy as np
import pytest
from conftest import require_shared, slow_but

from dlc_jax.datasets.instructions import instructions, load_instructions
from dlc_jax.encoders.decoder import Architecture
from dlc_jax.encoders.language_model import load_language_model, load_tokenizer, stored_names
from dlc_jax.masking import PathSpec, exact_thresholds, masked, prunable_paths
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.probes.responses import (
    _changes,
    _Ending,
    _losses_and_features,
    measure_responses,
    response_features,
)
from dlc_jax.probes.text import probe_responses, response_losses
from dlc_jax.scores import score
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.tuner import finetune_lora
from dlc_jax.types import by_path


@pytest.fixture(scope="module")
def models(timm, tmp_path_factory):
    """A random small Llama, as ours and as torch's."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return load_language_model(str(folder), dtype="float32"), theirs


def samples(vocab_size, lengths, num_prompt):
    generator = np.random.default_rng(0)
    rows = tuple(generator.integers(0, vocab_size, n).astype(np.int32) for n in lengths)
    return Tokenised(
        rows,
        np.array(num_prompt, np.int32),
        np.zeros(len(rows), bool),
        np.arange(len(rows)).astype(np.str_),
    )


DATA = samples(97, (5, 40, 41, 200, 3, 130), (1, 39, 20, 7, 2, 128))


def torch_losses(model, data):
    import torch

    found = []
    for row, num_prompt in zip(data.tokens, data.num_prompt.tolist(), strict=True):
        ids = torch.asarray(row.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        found.append(
            torch.nn.functional.cross_entropy(logits[num_prompt - 1 : -1], ids[num_prompt:]).item()
        )
    return np.array(found)


@pytest.mark.parametrize("tokens_per_batch", [pytest.param(1, marks=pytest.mark.slow), 300, 8192])
def test_losses_are_those_of_torch(models, tokens_per_batch):
    ours = response_losses(models[0], DATA, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(ours, torch_losses(models[1], DATA), atol=1e-5)


@pytest.mark.parametrize("tokens_per_batch", slow_but([8192], [300, 8192]))
def test_features_are_weighted_means_of_the_last_layer_of_torch(models, tmp_path, tokens_per_batch):
    """Also where several samples share a row, and for the pass that gives losses as well."""
    import torch

    found = response_features(models[0], DATA, tokens_per_batch=tokens_per_batch)
    expected = []
    for row in DATA.tokens:
        with torch.no_grad():
            output = models[1](torch.asarray(row.astype(np.int64))[None], output_hidden_states=True)
        weights = torch.arange(1, len(row) + 1)
        expected.append((output.hidden_states[-1][0] * weights[:, None]).sum(0) / weights.sum())
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-5)
    words(tmp_path, with_begin=True)
    model = dataclasses.replace(models[0], folder=tmp_path)
    rows = [{"prompt": f"w{i} w7 ", "response": "w8 " * i} for i in range(2, 12)]
    data = instructions(rows)
    tokens = tokenise(data, model.tokenizer, 9)
    both = measure_responses(model, data, max_length=9, with_features=True)
    assert measure_responses(model, data, max_length=9).features is None
    np.testing.assert_allclose(both.features, response_features(model, tokens), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("with_begin", [True, False])
def test_changes_of_tokens_are_those_of_torch(models, tmp_path, with_begin):
    import torch

    words(tmp_path, with_begin)
    model = dataclasses.replace(models[0], folder=tmp_path)
    rows = [{"prompt": f"w{i} w7 ", "response": f"w{20 + i} w8 w{30 - i}"} for i in range(2, 12)]
    rows.append({"prompt": "w10 " * 30, "response": "w20 w21 w22 w23 w24"})
    found = measure_responses(model, instructions(rows), max_length=33 + with_begin)
    begin = [0] if with_begin else []

    def of_tokens(before, response):
        ids = torch.tensor([begin + before + response])
        with torch.no_grad():
            logits = models[1](ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        return losses[-len(response) :] if begin + before else losses

    for row, changes in zip(rows, found.changes, strict=True):
        prompt, response = ([int(w[1:]) for w in row[k].split()] for k in ("prompt", "response"))
        response = response[:3] if len(prompt) == 30 else [*response, 1]
        given, alone = of_tokens(prompt, response), of_tokens([], response)
        expected = given[-len(alone) :] - alone
        np.testing.assert_allclose(changes, expected, atol=1e-5)
    sums = np.array([some.sum() for some in found.changes])
    if with_begin:
        means = sums / found.num_tokens
        np.testing.assert_allclose(means, found.losses - found.alone, atol=1e-5)


def test_what_a_tokenizer_joins_with_the_prompt_has_no_change():
    """Nor does it move what is cut off: both then end at other tokens of the response."""

    def ending(ids, losses, was_cut):
        return _Ending(np.array(ids[::-1]), np.array(losses[::-1], np.float32), was_cut)

    whole = ending([9, 4, 5, 6], [1, 2, 3, 4], False)
    alone = ending([7, 8, 4, 5, 6], [9, 9, 1, 1, 1], False)
    assert _changes(whole, alone).tolist() == [1, 2, 3]
    given = ending([9, 4, 5, 6], [1, 2, 3, 4], True)
    cut = ending([7, 8, 4, 5], [9, 9, 1, 1], True)
    assert _changes(given, cut).tolist() == [1, 2]
    assert _changes(cut, given).tolist() == [-1, -2]
    assert _changes(whole, ending([1, 2], [1, 1], False)).tolist() == []


def test_turns_of_others_do_not_count(models):
    """In losses, under probes and in training, packed or not, as in torch."""
    import torch

    others = ([3, 4], [], [25, 26, 30], [8, 9, 199], [], [128])
    data = dataclasses.replace(DATA, others=tuple(np.array(some, np.int64) for some in others))
    assert data.fingerprint != DATA.fingerprint
    assert data.num_response.tolist() == [2, 1, 18, 190, 1, 1]
    expected = []
    for row, first, some in zip(data.tokens, data.num_prompt.tolist(), others, strict=True):
        ids = torch.asarray(row.astype(np.int64))
        places = [place for place in range(first, len(row)) if place not in some]
        with torch.no_grad():
            of_token = torch.nn.functional.cross_entropy(
                models[1](ids[None]).logits[0][:-1], ids[1:], reduction="none"
            )
        expected.append(of_token[[place - 1 for place in places]].numpy())
    means = [losses.mean() for losses in expected]
    np.testing.assert_allclose(response_losses(models[0], data), means, atol=1e-5)
    unmasked = probe_responses(models[0], data, path=PathSpec(num_probes=1))
    np.testing.assert_allclose(unmasked.losses[0], means, atol=1e-5)
    for packing in (False, True):
        settings = LoraConfig(batch_size=len(data), warmup_steps=0, packing=packing)
        (epoch,) = finetune_lora(models[0], data, epochs=1, settings=settings).history
        assert epoch["train_loss"] == pytest.approx(np.concatenate(expected).mean(), abs=1e-5)
    cut = data.cut(np.array([4, 40, 30, 200, 3, 130]))
    assert [counts.sum() for counts in map(cut.counts, range(6))] == [2, 1, 8, 190, 1, 1]


def test_several_turns_have_no_loss_alone(models, tmp_path):
    """So their scores are those without such a comparison."""
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "u", "a", *"bcdefgh"])}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} "
        "{% if m['role'][0] == 'a' %}</s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}",
    )
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f"))
    ]
    for saved in (models[1], tokenizer):
        saved.save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path), dtype="float32")
    data = instructions([{"messages": talk}], tokenizer=tokenizer, turns="all")
    tokens = tokenise(data, tokenizer, 100)
    assert tokenizer.decode(tokens.tokens[0]) == "u b a c d </s> u e a f </s>"
    assert tokens.counts(0).astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    found = measure_responses(model, data, max_length=100)
    assert (found.alone, found.after_prefix, found.num_tokens.tolist()) == (None, None, [5])
    np.testing.assert_array_equal(found.losses, response_losses(model, tokens))
    assert score(found, method="length").tolist() == [5]
    for variant in ("published", "superfiltering", "cherry"):
        with pytest.raises(
            ValueError, match="ifd: compares .*expected dataset.turns last or first"
        ):
            score(found, method="ifd", variant=variant)


def test_losses_under_every_probe_are_those_under_the_masks_of_torch(models):
    """Masks of torch.nn.utils.prune over all linear layers of the blocks together."""
    import copy

    import torch
    from torch.nn.utils import prune

    model, theirs = models
    found = probe_responses(model, DATA, num_probes=5)
    assert found.losses.shape == (5, len(DATA))
    for losses, sparsity in zip(found.losses, found.sparsity, strict=True):
        pruned = copy.deepcopy(theirs)
        layers = [
            (module, "weight")
            for name, module in pruned.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        ]
        num = sum(module.weight.numel() for module, _ in layers)
        amount = round(float(sparsity) * num)
        prune.global_unstructured(layers, prune.L1Unstructured, amount=amount)
        np.testing.assert_allclose(losses, torch_losses(pruned, DATA), atol=2e-5)
    np.testing.assert_allclose(found.sparsity, [0.1, 0.3, 0.5, 0.7, 0.9], atol=1e-4)


@pytest.mark.slow
def test_probes_of_the_grid_start_unmasked(models):
    found = probe_responses(models[0], DATA, path=PathSpec(num_probes=2))
    np.testing.assert_allclose(found.losses[0], response_losses(models[0], DATA), atol=1e-6)


def test_crops_of_instructions_are_refused(models):
    with pytest.raises(ValueError, match=r"probe\.augment: instructions have no crops"):
        probe_responses(models[0], DATA, path=PathSpec(augment=True))


@pytest.mark.slow
def test_masks_of_a_real_model_zero_as_many_weights_as_they_should(timm):
    """The half-precision model has thousands of weights that tie at a threshold."""
    model = load_language_model(str(require_shared("lm/tiny-llama")))
    prunable = prunable_paths(model.params, model.is_prunable)
    assert len(prunable) == 6 * 7
    leaves = by_path(model.params)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16"}
    num = sum(leaves[path].size for path in prunable)
    counts = PathSpec("linear", num_probes=5, placement="midpoint").counts(num).chosen
    thresholds = exact_thresholds(model.params, prunable, None, counts)
    for k, count in enumerate(counts):
        one = jax.tree.map(lambda part, k=k: part[k], thresholds)
        copy = by_path(masked(model.params, prunable, None, one))
        zeros = sum(int((np.asarray(copy[path]) == 0).sum()) for path in prunable)
        assert zeros == count
        kept = max(
            float(np.abs(np.asarray(leaves[p], np.float32))[np.asarray(copy[p]) == 0].max())
            for p in prunable
        )
        assert kept <= float(np.asarray(one.value).view(np.float32))


@pytest.mark.slow
def test_a_real_model_on_real_text(timm):
    import torch
    import transformers

    folder = require_shared("lm/tiny-llama")
    model = load_language_model(str(folder), dtype="float32")
    data = load_instructions(f"jsonl:{require_shared('instructions/dolly_hhrlhf_1000.jsonl')}")
    tokens = tokenise(data, model.tokenizer, 1024, on_corrupt="skip")
    some = Tokenised(
        tokens.tokens[:12], tokens.num_prompt[:12], tokens.truncated[:12], tokens.ids[:12]
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(response_losses(model, some), torch_losses(theirs, some), atol=1e-5)


def words(folder, with_begin):
    """Saves a tokenizer of one token per word, `w5` being 5."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 97)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if with_begin else None, eos_token="</s>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("with_begin", [True, False])
def test_what_is_cut_off_does_not_count_without_the_prompt_either(models, tmp_path, with_begin):
    """Responses cut to three tokens and to one, one that only loses its end, and a whole one."""
    words(tmp_path, with_begin)
    model = dataclasses.replace(models[0], folder=tmp_path)
    rows = [
        ("w10 w11 w12", "w20 w21 w22 w23 w24"),
        ("w10 w11 w12 w13 w14", "w30 w31 w32"),
        ("w10 w11", "w40 w41 w42 w43"),
        ("w10", "w50 w51"),
    ]
    data = instructions([{"prompt": f"{a} ", "response": b} for a, b in rows])
    begin = [0] if with_begin else []
    found = measure_responses(model, data, max_length=6 + len(begin))
    assert found.num_tokens.tolist() == [3, 1, 4, 3]
    # without a begin of sequence the first token has no loss, so that there have to be two
    lone = [[20, 21, 22], [30] if with_begin else [30, 31], [40, 41, 42, 43], [50, 51, 1]]
    joint = [[10, 11, 12, 20, 21, 22], [10, 11, 12, 13, 14, 30], [10, 11, 40, 41, 42, 43]]
    joint += [[10, 50, 51, 1]]
    behind = [[2, 2, 2, *row] for row in ([20, 21, 22], [30], [40, 41, 42, 43], [50, 51, 1])]
    for losses, sequences, num_prompt in (
        (found.losses, joint, [3, 5, 2, 1]),
        (found.alone, lone, [0 if with_begin else 1] * 4),
        (found.after_prefix, behind, [3] * 4),  # ###, Response and : are unknown words
    ):
        tokens = tuple(np.array(begin + row, np.int32) for row in sequences)
        expected = Tokenised(
            tokens, np.array(num_prompt, np.int32) + len(begin), np.zeros(4, bool), data.ids
        )
        np.testing.assert_allclose(losses, torch_losses(models[1], expected), atol=1e-5)


def test_ifd_of_cherry_llm_is_the_ratio_that_torch_gives(timm):
    """With the bundled model; the prompts end with `### Response:` and a newline."""
    import torch
    import transformers

    model = load_language_model("demo:tiny-llama", dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    rows = [
        {"instruction": "Name a colour.", "output": "Red is a colour."},
        {"instruction": "What is 2 + 2?", "input": "2 + 2", "output": "2 + 2 = 4"},
        {"instruction": "Say what I say.", "output": "### Response: zz qq xx 17"},
    ]
    ratios = []
    for row, prompt in zip(rows, instructions(rows).prompts, strict=True):
        assert prompt.endswith("\n### Response:\n")
        losses = []
        for before in (prompt, "### Response:\n"):
            ids = model.tokenizer(before + row["output"], return_offsets_mapping=True)
            ends = [end for _, end in ids["offset_mapping"]]
            num_before = sum(end <= len(before) for end in ends)
            tokens = torch.tensor([[*ids["input_ids"], model.tokenizer.eos_token_id]])
            targets = tokens.clone()
            targets[0, :num_before] = -100
            with torch.no_grad():
                losses.append(float(theirs(tokens, labels=targets).loss))
        ratios.append(losses[0] / losses[1])
    expected = [ratio if ratio <= 1 else 0 for ratio in ratios]
    found = score(measure_responses(model, instructions(rows)), method="ifd", variant="cherry")
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_bundled_model_reads_the_bundled_rows(timm):
    model = load_language_model("demo:tiny-llama", dtype="float32")
    assert load_tokenizer("demo:tiny-llama").vocab_size == model.config.vocab_size
    data = load_instructions("demo:dolly/test")
    tokens = tokenise(data.subset(np.arange(20)), model.tokenizer, 512, on_corrupt="skip")
    _losses_and_features.clear_cache()
    found = measure_responses(model, data.subset(np.arange(20)), max_length=512, tokens=tokens)
    # with their prompts, alone and behind the prefix
    assert _losses_and_features._cache_size() <= 6
    losses = response_losses(model, tokens)
    np.testing.assert_allclose(found.losses, losses, atol=1e-5)
    for position in (0, 7, 17):  # in a row of its own
        alone = Tokenised(
            tokens.tokens[position : position + 1],
            tokens.num_prompt[[position]],
            tokens.truncated[[position]],
            tokens.ids[[position]],
        )
        assert response_losses(model, alone)[0] == pytest.approx(losses[position], abs=1e-5)
    assert 2 < losses.mean() < 6  # log 4096 = 8.3 for one that knows nothing
    with pytest.raises(ValueError, match="Did you mean 'demo:tiny-llama'"):
        load_language_model("demo:tiny_llama")


def test_checkpoints_that_do_not_fit_are_refused(models, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = models[0].folder
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")

    def refused(says, tensors=tensors, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=says):
            load_language_model(str(tmp_path), dtype="float32")

    refused("tensors without a place", model_type="mamba")
    refused(r"tensors that are missing: .*q_proj\.bias", attention_bias=True)
    refused("attention_bias is on", attention_bias=True, model_type="mistral")
    first, *_ = tensors
    refused(f"tensors that are missing: {first}", {k: v for k, v in tensors.items() if k != first})
    refused("without a place: more", {**tensors, "more": tensors[first]})
    refused(
        "another shape: model.norm.weight", {**tensors, "model.norm.weight": np.ones(3, np.float32)}
    )
    bad = tensors["model.norm.weight"].copy()
    bad[0] = np.nan
    refused("NaN or infinity in float32: model.norm.weight", {**tensors, "model.norm.weight": bad})
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_language_model(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        load_language_model("/there/is/none")


def test_sharded_checkpoints_are_the_same(models, tmp_path):
    models[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = load_language_model(str(tmp_path), dtype="float32")
    for path, leaf in by_path(models[0].params).items():
        np.testing.assert_array_equal(by_path(again.params)[path], leaf)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"shards .* are missing"):
        load_language_model(str(tmp_path), dtype="float32")


def test_the_hub_is_asked_for_weights_once(models, monkeypatch):
    asked = []

    def snapshot_download(repository, *, allow_patterns):
        asked.append(repository)
        names = ["config.json", "model.safetensors", "model-00001-of-00003.safetensors"]
        names += ["model.safetensors.index.json", "tokenizer.model", "tokenizer_config.json"]
        assert fnmatch_any(names, allow_patterns) == names
        twice = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"]
        assert fnmatch_any(twice, allow_patterns) == []
        return str(models[0].folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_language_model("owner/name", dtype="float32").fingerprint == models[0].fingerprint
    assert asked == ["owner/name"]


def fnmatch_any(names, patterns):
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def test_every_parameter_has_a_name_of_its_own(models):
    leaves = by_path(models[0].params)
    names = stored_names(models[0].config, leaves)
    assert len({stored.name for stored in names.values()}) == len(leaves) == 2 + 2 * 9 + 1


@pytest.fixture(scope="module")
def extended():
    """A model whose tokenizer has a token more than the embedding, and two rows, one with it."""
    model = load_language_model("demo:tiny-llama", dtype="float32")
    model.tokenizer.add_tokens(["<extra>"])
    rows = [
        {"id": "fine", "prompt": "Name a river.", "response": " The Nile."},
        {"id": "odd", "prompt": "Name a <extra>river.", "response": " The Nile."},
    ]
    return model, instructions(rows)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, data, _: measure_responses(model, data, max_length=64),
        lambda model, _, tokens: response_losses(model, tokens),
        lambda model, _, tokens: probe_responses(model, tokens),
        lambda model, _, tokens: finetune_lora(model, tokens, [0]),
        lambda model, _, tokens: finetune_lora(model, tokens.cut(np.array([2, 2])), test=tokens),
    ],
    ids=["measure", "losses", "probe", "finetune", "test set"],
)
def test_tokens_without_an_embedding_are_refused_before_anything_runs(extended, run, monkeypatch):
    model, data = extended
    tokens = tokenise(data, model.tokenizer, 64)
    for name in ("hidden", "abstract_adapter"):
        monkeypatch.setattr(Architecture, name, None)
    with pytest.raises(ValueError, match=r"sample odd: token 4096 \('<extra>'\) has no row in the"):
        run(model, data, tokens)
