"""The configuration is strict, and each fault is one line that says where, what and what was expected."""

from __future__ import annotations

import copy

import pytest
import yaml

from pipeline.core import config
from pipeline.core.errors import ConfigError

GOOD = {
    "root": "runs",
    "pool": {"source": "demo"},
    "models": {"scorer": {"recipe": "demo", "on": "trusted"}},
    "references": {"trusted": {"source": "demo"}},
    "strategies": {"no_filter": {}, "basic": {"where": ["caption_words > 2"]}},
    "compare": ["no_filter", "basic"],
    "train": {"recipe": "demo", "seeds": [0, 1]},
    "eval": {"tasks": ["objects"], "root": "demo"},
    "cluster": {"clip": {"gpus": 0.5}},
}


@pytest.fixture
def load(tmp_path):
    def load(change=None, overrides=()):
        data = copy.deepcopy(GOOD)
        if change:
            change(data)
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(data))
        return config.load(str(path), overrides)

    return load


def test_a_good_file_loads_with_an_absolute_root(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load()
    assert loaded.root == str(tmp_path / "runs")
    assert loaded.resources("clip").gpus == 0.5
    assert loaded.resources("train").cpus == 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("pool.shard_sise=3", r"pool\.shard_sise is an unknown key\. Did you mean shard_size\?"),
        ("pool.shard_size=0", r"pool\.shard_size = 0, expected a number >= 1"),
        ("pool.shard_size=many", r"pool\.shard_size = many, expected a whole number"),
        ("pool.sample=1.5", r"pool\.sample = 1\.5, expected a number <= 1"),
        ("train.seeds=[1, 1]", r"train\.seeds = \[1, 1\], expected different numbers"),
        ("train.budgets=[64, 64]", r"train\.budgets = \[64, 64\], expected different numbers"),
        ("train.budgets=[64, 0]", r"train\.budgets\.1 = 0, expected a number >= 1"),
        ("train.initialisation_seed=-1", r"train\.initialisation_seed = -1, expected a number >= 0"),
        ("train.held_out=trustd", r"train\.held_out = trustd, expected one of the references\. Did you mean trusted"),
        ("train.log_to=[tensorbord]", r"train\.log_to\.0 = tensorbord, expected one of 'tensorboard' or 'wandb'"),
        ("train.log_to=[wandb, wandb]", r"train\.log_to = \['wandb', 'wandb'\], expected different names"),
        ("train.log_to=wandb", r"train\.log_to = wandb, expected a list"),
        ("compare=[no_filter, basik]", r"compare\.1 = basik, expected a strategy\. Did you mean basic\?"),
        (
            "models.scorer.on=trustd",
            r"models\.scorer\.on = trustd, expected a reference or a strategy\. Did you mean trusted",
        ),
        ("models.scorer.recipe=null", r"models\.scorer: expected recipe and on together"),
        ("models.x.architecture=ViT-B-32", r"models\.x\.pretrained is missing"),
        ("cluster.clip.gpu=1", r"cluster\.clip\.gpu is an unknown key\. Did you mean gpus\?"),
        ("root=5", r"root = 5, expected text"),
        ("strategies.Bad-Name={}", r"strategies\.Bad-Name: expected a name"),
        ("baseline=nothing", r"baseline = nothing, expected a compared strategy"),
        ("trane.recipe=x", r"trane is an unknown key\. Did you mean train\?"),
    ],
)
def test_each_fault_names_key_value_and_expectation(load, override, message):
    with pytest.raises(ConfigError, match=r"c\.yaml: " + message) as caught:
        load(overrides=[override])
    assert "\n" not in str(caught.value)


def test_trainings_that_would_be_one_are_refused(load):
    both = ["train.initialisation_seed=4", "train.order_seed=5"]
    with pytest.raises(ConfigError, match=r"c\.yaml: train\.seeds = \[0, 1\], expected one seed: with both"):
        load(overrides=both)
    assert load(overrides=[*both, "train.seeds=[0]"]).train.order_seed == 5
    assert load(overrides=both[:1]).train.seeds == [0, 1]


def test_a_missing_section_is_named(load):
    with pytest.raises(ConfigError, match="c.yaml: train is missing"):
        load(lambda data: data.pop("train"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.recipe", "expected KEY=VALUE"),
        ("train.seeds.7=1", "expected an index below 2"),
        ("root.x=1", "expected a mapping or a list"),
        ("compare=[a", "--set compare:1: .*expected YAML"),
    ],
)
def test_an_override_that_has_no_place_is_named(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(overrides=[override])


def test_overrides_are_yaml_and_apply_in_order(load):
    loaded = load(overrides=["train.seeds=[3]", "train.seeds.0=4", "cluster.train.max_concurrent=2"])
    assert loaded.train.seeds == [4]
    assert loaded.resources("train").max_concurrent == 2


def test_yaml_traps_are_taken_out():
    parsed = config.parse_yaml("a: 5e-4\nb: no\nc: 12:30\nd: true\noff: 1\ne: 007\nf: 1_000\ng: -3\nh: 2026-01-31", "t")
    assert parsed == {
        "a": 5e-4, "b": "no", "c": "12:30", "d": True, "off": 1, "e": "007", "f": 1000, "g": -3, "h": "2026-01-31",
    }  # fmt: skip


def test_a_key_given_twice_and_broken_yaml_name_the_line():
    with pytest.raises(ConfigError, match=r"t\.yaml:2: the key a is there twice"):
        config.parse_yaml("a: 1\na: 2", "t.yaml")
    with pytest.raises(ConfigError, match=r"t\.yaml:1: .*expected YAML"):
        config.parse_yaml("a: [1", "t.yaml")
    with pytest.raises(ConfigError):
        config.parse_yaml("a: !!python/object/apply:os.system ['true']", "t.yaml")


def test_a_relative_root_is_refused_inside_a_job(load, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="root = runs, expected an absolute path or a URL inside a Ray job"):
        load()


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read as a config"):
        config.load(str(tmp_path / "none.yaml"))
