"""Settings: round trips, overrides, and errors that name the key."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from latentrevise.config import config_hash, from_dict, load_config, to_dict
from latentrevise.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    steps: int = 10
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    limit: int | None = None
    flag: bool = False
    parts: tuple[str, ...] = ("p", "q")
    grid: tuple[float, ...] = (0.1, 0.2)
    inner: Inner = field(default_factory=lambda: Inner(steps=7))


def test_round_trip_through_yaml(tmp_path):
    config = Outer(limit=3, flag=True, parts=("r",), inner=Inner(2, 0.5, "b"))
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(Outer, path) == config
    assert from_dict(Outer, to_dict(config)) == config
    assert from_dict(Outer, {}) == Outer()


def test_overrides_win_and_keep_the_fields_own_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: from-file\ninner:\n  rate: 1e-4\n")
    config = load_config(Outer, path, ["inner.mode=b", "limit=null", "flag=true", "parts=[u, v]", "grid=[1, 2]"])
    assert config == Outer("from-file", None, True, ("u", "v"), (1.0, 2.0), Inner(7, 1e-4, "b"))
    assert load_config(Outer, None, ["parts=u, v"]).parts == ("u", "v")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("inner.step=3", r"inner\.step; did you mean inner\.steps"),
        ("zzz=1", "known: name, limit"),
        ("inner.steps=many", r"inner\.steps = 'many': it must be of type int"),
        ("inner.steps=true", "must be of type int"),
        ("inner.rate=fast", "must be of type float"),
        ("inner.mode=c", "choose one of a, b"),
        ("grid=3", "give a list"),
        ("grid=[1, x]", r"grid\[1\]"),
        ("inner=3", "mapping of Inner fields"),
        ("name.first=3", "unknown|type str"),
        ("name", "key=value"),
        ("inner.rate=[", "not YAML"),
    ],
)
def test_bad_overrides_name_the_key(override, match):
    with pytest.raises(ConfigError, match=match):
        load_config(Outer, None, [override])


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(Outer, tmp_path / "absent.yaml")
    path = tmp_path / "c.yaml"
    for text, match in [("- 1", "must be a mapping"), ("a: [", "not valid YAML")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            load_config(Outer, path)
    path.write_text("")
    assert load_config(Outer, path) == Outer()


def test_hash_sees_every_field_and_nothing_else():
    base = config_hash(Outer())
    assert base == config_hash(Outer(inner=Inner(steps=7)))
    for change in ({"name": "y"}, {"inner": Inner(8)}, {"grid": (0.1,)}):
        assert config_hash(dataclasses.replace(Outer(), **change)) != base
