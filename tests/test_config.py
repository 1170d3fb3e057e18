import dataclasses

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from dlc_jax import expect
from dlc_jax.config import Config, default_config, describe, known_keys


def demo_values(**changes) -> ConfigDict:
    config = default_config()
    config.dataset.train = "demo:caltech15/train"
    config.encoder.weights = "demo:resnet18"
    config.update_from_flattened_dict(changes)
    return config


def test_defaults_are_the_papers_and_resolved_by_mode():
    config = Config.of(demo_values())
    assert (config.probe.schedule, config.probe.step, config.probe.num_probes) == (
        "linear",
        0.02,
        50,
    )
    assert Config.of(demo_values(mode="official")).probe.schedule == "geometric"
    explicit = demo_values(mode="official", **{"probe.schedule": "linear"})
    assert Config.of(explicit).probe.schedule == "linear"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("probe.chunk", "4", 4),
        ("probe.chunk", "auto", "auto"),
        ("encoder.mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("encoder.pooling", "None", None),
        ("probe.max_sparsity", 1, 1.0),
        ("selection.keep_fractions", (0.25,), (0.25,)),
    ],
)
def test_text_and_values_become_the_declared_type(key, text, value):
    changes = {key: text}
    if key == "encoder.mean":
        changes["encoder.std"] = "(1, 1, 1)"
    section, name = key.split(".")
    found = getattr(getattr(Config.of(demo_values(**changes)), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mode", "offical", "official"),
        ("stages", ("scor",), "score, tune, select"),
        ("seed", -1, "seed"),
        ("dataset.train", "", "dataset.train"),
        ("dataset.on_corrupt", "ignore", "error, skip"),
        ("encoder.name", "resnet19", "resnet18"),
        ("encoder.weights", "", "encoder.weights"),
        ("encoder.image_size", 0, "encoder.image_size"),
        ("encoder.pooling", "max", "encoder.pooling"),
        ("encoder.mean", "(1, 2, 3)", "both or neither"),
        ("encoder.pooling", "cls", "of resnet18: unknown value 'cls'"),
        ("probe.schedule", "cubic", "linear, geometric"),
        ("probe.num_probes", 0, "probe.num_probes"),
        ("probe.num_probes", 51, "at most 50"),
        ("probe.placement", "middle", "midpoint"),
        ("probe.max_sparsity", 0.0, "probe.max_sparsity"),
        ("probe.step", 1.5, "probe.step"),
        ("probe.masking", "l2", "l1, random"),
        ("probe.batch_size", 0, "probe.batch_size"),
        ("probe.chunk", "many", "probe.chunk"),
        ("probe.chunk", 0, "probe.chunk"),
        ("probe.dtype", "float16", "bfloat16"),
        ("selection.methods", ("flexrandom",), "flexrand"),
        ("selection.methods", (), "selection.methods"),
        ("selection.keep_fractions", (30.0,), "Did you mean 0.3"),
        ("selection.keep_fractions", (0.0,), "selection.keep_fractions"),
        ("selection.keep_fractions", (1.0,), "selection.keep_fractions"),
        ("selection.splits", (1.0,), "selection.splits"),
        ("selection.splits", (-0.5,), "selection.splits"),
        ("selection.seeds", (1, 1), "different"),
        ("selection.seeds", (-1,), "selection.seeds"),
    ],
)
def test_values_out_of_range_are_refused_with_key_and_choices(key, value, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Config.of(demo_values(**{"encoder.name": "resnet18", key: value}))


def test_a_path_is_checked_by_the_schedule_that_the_mode_decides():
    """A geometric path never reaches full sparsity, whatever its step."""
    changes = {"mode": "official", "probe.step": 0.05}
    assert Config.of(demo_values(**changes)).probe.schedule == "geometric"
    for others in ({"mode": "default"}, {"probe.schedule": "linear"}):
        with pytest.raises(ValueError, match="50 probes at step 0.05 run past full sparsity"):
            Config.of(demo_values(**changes | others))


def test_official_mode_refuses_cells_off_its_grid():
    changes = {"mode": "official", "selection.splits": (0.33,)}
    with pytest.raises(ValueError, match=r"0\.05, 0\.10"):
        Config.of(demo_values(**changes))


RELEASED = {
    "mode": "official",
    "encoder.name": "decoder",
    "encoder.weights": "demo:tiny-llama",
    "dataset.train": "demo:dolly/train",
    "dataset.test": None,
    "stages": ("score", "select"),
    "selection.keep_fractions": (0.5,),
    "selection.splits": (0.25,),
    "probe.num_probes": 50,
}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("dataset.template", "chat", "dataset.template: mode 'official' of instructions has 'rel"),
        ("dataset.turns", "all", "dataset.turns: mode 'official' of instructions has 'first' only"),
        ("dataset.category", "kind", "dataset.category: .* has None only, got 'kind'"),
        ("probe.num_probes", 3, "probe.num_probes: .* defaults, --config.probe.num_probes=50"),
        ("probe.masking", "random", "probe.masking: .* the defaults, --config.probe.masking=l1"),
        ("selection.score", "ifd", "selection.score: .* has 'dlc' only"),
        ("selection.splits", (0.5,), r"split: mode 'official' has 0\.25, 0\.75 only, got 0\.5"),
        ("selection.keep_fractions", (0.3,), r"keep_fraction: mode 'official' has 0\.5 only"),
        ("stages", ("finetune",), "lora.loss_on: mode 'official' of instructions has 'text' only"),
    ],
)
def test_the_released_code_of_instructions_has_few_settings(key, value, says):
    config = Config.of(demo_values(**RELEASED))
    assert (config.dataset.template, config.dataset.turns) == ("released", "first")
    with pytest.raises(ValueError, match=says):
        Config.of(demo_values(**RELEASED | {key: value}))


def test_unknown_keys_and_wrong_types_name_the_key():
    values = demo_values().to_dict()
    values["probe"]["stepp"] = 0.1
    with pytest.raises(ValueError, match=r"probe\.stepp.*probe\.step"):
        Config.of(values)
    values = demo_values().to_dict()
    values["probe"]["num_probes"] = "ten"
    with pytest.raises(
        ValueError, match=r"probe\.num_probes: expected 'auto' or an integer >= 1, got 'ten'"
    ):
        Config.of(values)
    values["probe"] = 3
    with pytest.raises(ValueError, match="probe: expected a group"):
        Config.of(values)


@pytest.mark.parametrize("name", ["demo", "dtd", "custom"])
def test_every_configuration_file_is_valid(name):
    path = ROOT / "configs" / f"{name}.py"
    scope: dict = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    config = Config.of(scope["get_config"]())
    assert config.dataset.train
    assert f"--config=configs/{name}.py" in scope["__doc__"]


def test_values_may_be_set_by_type_in_a_file():
    config = default_config()
    config.dataset.train, config.encoder.weights = "demo:caltech15/train", "demo:resnet18"
    config.probe.chunk = 4
    config.encoder.mean = config.encoder.std = (0.5, 0.5, 0.5)
    config.probe.schedule = "geometric"
    found = Config.of(config)
    assert (found.probe.chunk, found.encoder.mean) == (4, (0.5, 0.5, 0.5))


def test_selection_alone_needs_no_data_or_encoder():
    config = Config.of({"stages": ("select",)})
    assert config.stages == ("select",)


def test_every_key_is_described_and_settable():
    config = default_config()
    for key in known_keys():
        assert f"--config.{key} " in describe()
        section = config
        for part in key.split("."):
            section = section[part]
    assert set(dataclasses.asdict(Config())["probe"]) == set(config.probe.keys())


def test_cells_are_all_combinations_and_splits_only_where_used():
    values = demo_values(
        **{
            "selection.methods": ("flexrand", "random"),
            "selection.keep_fractions": (0.1, 0.2),
            "selection.splits": (0.3, 0.6),
            "selection.seeds": (1, 2),
        }
    )
    cells = Config.of(values).selection.cells()
    assert len(cells) == 2 * 2 * 2 + 2 * 2
    assert ("random", 0.1, None, 1) in cells
    assert ("flexrand", 0.2, 0.6, 2) in cells


def test_a_report_that_would_have_nothing_to_show_is_refused_before_training():
    values = {"encoder": {"name": "decoder", "weights": "x"}, "dataset": {"train": "jsonl:x.jsonl"}}
    stages = ("score", "select", "finetune", "report")
    with pytest.raises(expect.InputError, match=r"^stages: 'report' of instructions .*'evaluate'"):
        Config.of(values | {"stages": stages})
    Config.of(values | {"stages": stages[:-1]})
    Config.of(values | {"stages": ("report",)})  # of runs that were evaluated before
    measured = (*stages[:-1], "evaluate", "report")
    Config.of(values | {"stages": measured, "evaluation": {"mmlu": "demo:mmlu"}})
