"""Configs: everything unknown or of a wrong type raises and says where."""

import pytest
from ml_collections import ConfigDict

from magma_jax.config import ConfigError, apply_overrides, config_name, from_dict, load_config_file, settings
from magma_jax.families import run_config
from magma_jax.models.magma import MagmaConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, r"unknown key config\.widht; MagmaConfig has: lm"),
        ({"lm": {"kind": "gptj", "layers": 2, "head": 3}}, r"unknown key config\.lm\.head"),
        ({"lm": {"kind": "gptj", "layers": "two"}}, r"config\.lm\.layers: expected int, got 'two'"),
        ({"lm": {"kind": "gptj", "layers": True}}, r"config\.lm\.layers: expected int, got True"),
        ({"lm": {"kind": "gptj", "heads": 3}}, r"config\.lm: .*3 heads do not divide the width 4096"),
        ({"lm": {"kind": "bert"}}, r"config\.lm\.kind: 'bert' is not one of gptj, gpt2, gpt_neo, gpt_neox"),
        ({"encoder": {"kind": "vgg"}}, r"config\.encoder\.kind: 'vgg' is not one of clip_resnet, clip_vit"),
        ({"encoder": {"kind": "clip_resnet", "blocks": [1, 2]}}, r"config\.encoder\.blocks: expected 4 values, got 2"),
        ({"mlp_adapter": {"kind": "serial"}}, r"config\.mlp_adapter\.kind: 'serial' is not one of 'normal'"),
        ({"prefix": 3}, r"config\.prefix: expected a mapping"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(MagmaConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"kind": "bert"}}, r"config\.model\.kind: 'bert' is not one of magma, gptj"),
        ({"data": {"kind": "openmoji"}}, r"config\.model\.kind: None is not one of magma, gptj"),
        ({"model": {"kind": "gptj"}, "data": {"kind": "folders"}}, r"'folders' is not one of openmoji, openmoji_text"),
        ({"model": {"kind": "magma"}, "data": {"kind": "codes"}}, r"'codes' is not one of openmoji, folders"),
        (
            {"model": {"kind": "magma"}, "data": {"kind": "openmoji", "classes": ["a"]}},
            r"unknown key .*data\.classes; Open",
        ),
        (
            {"model": {"kind": "magma"}, "data": {"kind": "openmoji"}, "loss": {"share": 1}},
            r"unknown key .*loss\.share; ",
        ),
    ],
)
def test_a_run_of_an_unknown_kind_is_refused(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_config(values)
    assert "\n" not in str(caught.value)


def test_settings_are_shown_as_they_are_set():
    config = run_config({"model": {"kind": "magma", "encoder": {"kind": "nf_resnet"}}, "data": {"kind": "openmoji"}})
    shown = settings(config)
    assert {"steps=1000", "optim.groups.language=frozen", "data.buckets=[]", "base=None"} <= set(shown)
    assert run_config(apply_overrides(ConfigDict(), shown)) == config


def test_whole_numbers_serve_as_floats():
    assert from_dict(MagmaConfig, {"prefix": {"dropout": 0}}).prefix.dropout == 0.0


def test_overrides_reach_nested_keys_and_leave_the_original_alone():
    config = ConfigDict({"optim": {"learning_rate": 1e-3}, "steps": 5})
    changed = apply_overrides(config, ["optim.learning_rate=2e-3", "data.kind=openmoji", "steps=7"])
    assert changed.to_dict() == {"optim": {"learning_rate": 2e-3}, "steps": 7, "data": {"kind": "openmoji"}}
    assert config.steps == 5
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        apply_overrides(config, ["steps"])
    with pytest.raises(ConfigError, match="steps is not a mapping"):
        apply_overrides(config, ["steps.more=1"])


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config_file(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="has no function get_config"):
        load_config_file(tmp_path / "empty.py")


def test_a_run_is_chosen_by_name_or_is_the_default(tmp_path):
    file = tmp_path / "runs.py"
    body = "    return {'a': {'steps': 1}, 'b': {'steps': 2}}[name]\n"
    file.write_text(f"def get_config(name='b'):\n{body}")
    assert load_config_file(file) == {"steps": 2}
    assert load_config_file(f"{file}:a") == {"steps": 1}
    file.write_text(f"def get_config(name):\n    '''runs: a, b'''\n{body}")
    with pytest.raises(ConfigError, match=r"describes several runs; choose one: .*:NAME, runs: a, b"):
        load_config_file(file)


def test_a_config_that_ships_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config_file("magma_v2").batch_size == 256
    assert config_name("magma_v2") == "magma_v2"
    assert config_name("paper_table1:frozen") == "paper_table1-frozen"
    with pytest.raises(ConfigError, match="magma_v9: no such config file; these are known by name: argvlt_base"):
        load_config_file("magma_v9")
    (tmp_path / "magma_v2").write_text("mine")  # a file of that name comes first
    with pytest.raises(ConfigError, match=r"not a Python file; a config is a \.py file"):
        load_config_file("magma_v2")
