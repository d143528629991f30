"""``latentrevise config``: what it prints is what a command reads, and what the docstrings say of it."""

import dataclasses
import json

import pytest
import yaml
from typer.testing import CliRunner

from latentrevise.cli import app
from latentrevise.cli.settings import GROUPS, commented_yaml, json_schema, meanings, settings_of
from latentrevise.config import load_config, to_dict
from latentrevise.errors import ConfigError
from latentrevise.recovery.settings import RecoverConfig

TRAINERS = {"sft", "rlvr", "groups", "distill"}


@pytest.fixture(params=GROUPS)
def cls(request):
    if request.param in TRAINERS:
        pytest.importorskip("trl", reason="trl is not installed (extra `train`)")
    return settings_of(request.param)


def test_the_file_it_prints_is_the_defaults(cls, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(commented_yaml(cls))
    assert to_dict(load_config(cls, path)) == to_dict(cls())


def test_every_setting_has_its_meaning(cls):
    told = meanings(cls)
    plain = {f.name for f in dataclasses.fields(cls) if f.init and not dataclasses.is_dataclass(f.type)}
    missing = {name for name in plain - set(told) if not dataclasses.is_dataclass(getattr(cls(), name))}
    assert not missing, f"{cls.__name__}: no docstring says what {sorted(missing)} mean"


def test_the_schema_takes_the_defaults_and_nothing_unknown(cls):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json_schema(cls, "x")
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    defaults = json.loads(json.dumps(to_dict(cls())))
    validator.validate(defaults)
    assert not validator.is_valid(defaults | {"no_such_setting": 1})
    name = next(f.name for f in dataclasses.fields(cls) if isinstance(getattr(cls(), f.name), int))
    assert not validator.is_valid(defaults | {name: "text"})


def test_the_command():
    printed = CliRunner().invoke(app, ["config"])
    assert printed.exit_code == 0
    assert yaml.safe_load(printed.stdout)["latent"]["fluency_weight"] == 0.1
    assert "# weight of the gold answer's NLL behind the template" in " ".join(printed.stdout.split())
    schema = json.loads(CliRunner().invoke(app, ["config", "recover", "--schema"]).stdout)
    assert schema["properties"]["rollouts"] == {
        "type": "integer", "default": 16, "description": meanings(RecoverConfig)["rollouts"],
    }  # fmt: skip
    wrong = CliRunner().invoke(app, ["config", "nothing"])
    assert isinstance(wrong.exception, ConfigError)
    assert "choose one of recover, eval" in str(wrong.exception)


def test_unknown_settings_suggest_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown setting latent\.fluency_wieght; did you mean latent\.fluency_weight"
    ):
        load_config(RecoverConfig, None, ["latent.fluency_wieght=1"])
