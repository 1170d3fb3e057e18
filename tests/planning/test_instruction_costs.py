"""Operations of language models, from the shapes of their programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax import presets
from dlc_jax.config import Config, default_config
from dlc_jax.encoders.decoder import Architecture
from dlc_jax.encoders.known_models import KNOWN_MODELS, PAPER_MODELS
from dlc_jax.encoders.language_model import load_tokenizer, model_folder, read_config
from dlc_jax.planning.costs import kept_by_run
from dlc_jax.planning.instruction_plan import InstructionCosts, Lengths, plan_of_instructions
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.programs import count_flops
from dlc_jax.preprocess.token_batches import bucket_length
from dlc_jax.preprocess.tokens import tokenise
from dlc_jax.training.lora.step import Sums, TokenRows, add_rows

LENGTH = 512
ONE = MeshSize(1, 1, 1)


def made(sizes, mesh=ONE, **probe) -> InstructionCosts:
    config = default_config()
    config.stages = ("plan",)
    config.encoder.name, config.encoder.weights = "decoder", "made in the test"
    config.probe.update(probe)
    config.selection.keep_fractions = (0.25,)
    return InstructionCosts(Config.of(config), sizes, mesh, 100, 10, Lengths(LENGTH, 128, ""))


def matrices(sizes) -> int:
    """Returns the weights that tokens are multiplied with: all but the embedding and norms."""
    leaves = Architecture(sizes, "bfloat16").abstract_params()
    num = sum(leaf.size for leaf in jax.tree.leaves(leaves) if leaf.ndim == 2)
    return num if sizes.tied else num - sizes.vocab_size * sizes.width


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_two_for_each_weight_and_token_and_some_attention(name):
    sizes = KNOWN_MODELS[name]
    work = made(sizes, dtype="bfloat16")
    products = 2 * matrices(sizes) * LENGTH
    attention = 4 * LENGTH**2 * sizes.num_heads * sizes.head_dim * sizes.depth  # at most
    assert products < work.forward_flops(LENGTH) <= 1.001 * products + attention
    # forward, forward again, and back to activations alone: the weights are frozen
    assert 2.7 < work.training_flops / work.forward_flops(LENGTH) < 3.1


def test_blocks_are_added_up():
    sizes = PAPER_MODELS["google/gemma-2-9b"]  # every other block has a window
    work = made(sizes)
    some = made(type(sizes)(**{**vars(sizes), "windows": sizes.windows[:3]}))
    architecture = Architecture(some.sizes, "float32")
    tokens = jax.ShapeDtypeStruct((16, LENGTH), jnp.int32)  # 8,192 of a batch

    def losses(params, tokens):
        hidden = architecture.hidden(params, tokens, tokens)
        return architecture.cross_entropies(params, hidden, tokens)

    of_batch = count_flops(losses, architecture.abstract_params(), tokens)
    assert some.forward_flops(LENGTH) == of_batch // 16
    assert some.forward_flops(LENGTH) < work.forward_flops(LENGTH)


def test_training_is_added_up():
    sizes = read_config(model_folder("demo:tiny-llama"))
    work = made(sizes)
    lora = work.config.lora
    whole = Architecture(sizes, lora.dtype).for_training(lora.adapter, lora.rematerialise)
    tokens = jax.ShapeDtypeStruct((lora.rows_at_once, LENGTH), jnp.int32)
    frozen = Architecture(sizes, lora.dtype).abstract_params()
    adapter = whole.abstract_adapter()
    sums = jax.eval_shape(Sums.zero, adapter)

    def operations(architecture):
        def added(params, adapter, tokens, sums):
            return add_rows(
                architecture, params, adapter, TokenRows(tokens, tokens, tokens > 0), sums
            )

        return count_flops(added, frozen, adapter, tokens, sums)

    apart = operations(dataclasses.replace(whole, loops=False))
    assert work.training_flops == apart // lora.rows_at_once
    # a loop has the gradient of what the first block reads, too
    assert apart < operations(whole) < apart * (1 + 0.5 / sizes.depth)


def test_passes_and_devices():
    sizes = read_config(model_folder("demo:tiny-llama"))
    one, four = (
        {cost.name: cost for cost in made(sizes, mesh, num_probes=8).costs()}
        for mesh in (MeshSize(1, 1, 1), MeshSize(2, 1, 2))
    )
    losses = one["losses of 8 probes"]
    assert (losses.passes, losses.num_samples) == (8, 800)
    assert losses.flops == losses.device_flops == 800 * made(sizes).forward_flops(LENGTH)
    assert four["losses of 8 probes"].device_flops == losses.flops // 4
    runs = one["LoRA, 2 runs"]
    assert (runs.passes, runs.num_samples) == (6, 3 * 125)
    assert one["tests, 10 instructions"].num_samples == 20


def test_lengths_of_rows():
    data = dlc.load_instructions("demo:dolly/train")
    tokenizer = load_tokenizer("demo:tiny-llama")
    lengths = Lengths.of(data.subset(np.arange(50)), tokenizer, 512)
    rows = tokenise(data.subset(np.arange(50)), tokenizer, 512, on_corrupt="skip").tokens
    padded = np.mean([bucket_length(len(row), 512) for row in rows])
    assert lengths.whole == round(padded)
    assert lengths.alone < lengths.whole
    guessed = Lengths.of(data, None, 512)
    assert "4 characters a token" in guessed.measured
    assert 0.3 < guessed.whole / lengths.whole < 3


@pytest.mark.slow
def test_the_released_code_takes_two_passes_and_a_whole_masked_copy():
    sizes = PAPER_MODELS["meta-llama/Meta-Llama-3-8B"]
    released = presets.paper_instructions("llama3-8b,official")
    released.dataset.train = "demo:dolly/train"
    config = Config.of(released)
    costs = InstructionCosts(config, sizes, ONE, 10, 0, Lengths(LENGTH, 128, ""))
    names = {cost.name: cost for cost in costs.costs()}
    assert [cost.passes for cost in names.values()] == [2]
    assert kept_by_run(config, np.array([10])) == [10, 2 + 2, 2 + 2, 5]  # halves are rounded apart
    plan = plan_of_instructions(config, sizes, ONE, costs)
    parts = {part.name: part.num_bytes for part in plan.jobs["score"].plan().parts}
    assert parts["masked copy of the weights"] == parts["weights"] > 16e9
    of_block = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    assert parts["copies of the weights of a block"] == 2 * of_block  # in bfloat16, none masked


def test_a_short_last_batch_that_is_left_out_costs_nothing():
    sizes = read_config(model_folder("demo:tiny-llama"))
    usual = made(sizes)
    lora = dataclasses.replace(usual.config.lora, batch_size=10, drop_last=True)
    less = dataclasses.replace(usual, config=dataclasses.replace(usual.config, lora=lora))
    assert [some.trained(25) for some in (usual, less)] == [25, 20]
    kept = {
        cost.num_samples
        for cost in less.costs()
        if cost.stage == "finetune" and "LoRA" in cost.name
    }
    runs = less.config.runs()
    assert kept == {3 * sum(100 if cell.keep_fraction == 1 else 20 for cell in runs)}
    with pytest.raises(dlc.InputError, match=r"lora\.drop_last: True leaves no step of 9 samples"):
        less.trained(9)
