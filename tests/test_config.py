"""Settings: round trips, overrides, and errors that name the key."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from latentrevise.config import from_dict, load_config, to_dict
from latentrevise.data.storage import stable_hash
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
    def hashed(config):
        return stable_hash(to_dict(config))

    base = hashed(Outer())
    assert base == hashed(Outer(inner=Inner(steps=7)))
    for change in ({"name": "y"}, {"inner": Inner(8)}, {"grid": (0.1,)}):
        assert hashed(dataclasses.replace(Outer(), **change)) != base


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=End with #### and the number", "End with #### and the number"),
        ("name=# of eggs", "# of eggs"),
        ("name=Answer: ...", "Answer: ..."),
        ("name=2024", "2024"),
        ("name=true", "true"),
        ("name=null", "null"),
        ("name=", ""),
        ("name= a ", " a "),
        ("name=[a", "[a"),
        ("name=a=b", "a=b"),
        ("name={x}", "{x}"),
        ("name=it's", "it's"),
        (r"name=put it in \boxed{}.", r"put it in \boxed{}."),
        (r"name=\n", "\n"),
        (r"name=\n\n", "\n\n"),
        (r"name=Think.\nThen answer.\t", "Think.\nThen answer.\t"),
        (r"name=\text{a} \nu \times \neq", r"\text{a} \nu \times \neq"),  # LaTeX
        (r"name=(?m)^\\n\d+[ab]$", r"(?m)^\\n\d+[ab]$"),  # a regular expression: a backslash, then n
        (r'name="a\nb"', "a\nb"),
        (r"name='a\n'", r"a\n"),
        ("name='a' or 'b'", "'a' or 'b'"),
        (r"parts=\n", ("\n",)),
        (r"parts=\n\n,####", ("\n\n", "####")),
        (r"parts=[\n, 'a,b']", ("\n", "a,b")),
        ('parts="a, b"', ("a, b",)),
        ("parts='a',b", ("a", "b")),
        ("parts=2024", ("2024",)),
        ("parts=", ()),
        ("maybe=null", None),
        ("maybe=", None),
        ("maybe=#", "#"),
        (r"maybe=\n", "\n"),
        ("free.a.b=no", {"a": {"b": False}}),
        ("free={a: 1}", {"a": 1}),
    ],
)
def test_a_text_is_taken_as_it_stands(override, value):
    @dataclass(frozen=True)
    class Texts:
        name: str = "x"
        maybe: str | None = "x"
        parts: tuple[str, ...] = ("x",)
        free: dict = field(default_factory=dict)

    config = load_config(Texts, None, [override])
    assert getattr(config, override.split("=")[0].split(".")[0]) == value


def test_what_a_comment_would_cut_off_is_refused():
    for override in ("free.run_name=a #1", "limit=3 # three", "free.x=#"):
        with pytest.raises(ConfigError, match="begins a comment in YAML"):
            load_config(Free, None, [override])
    assert load_config(Free, None, ["free.run_name='a #1'"]).free == {"run_name": "a #1"}


@dataclass(frozen=True)
class Free:
    limit: int = 0
    free: dict = field(default_factory=dict)


def test_numbers_are_numbers(tmp_path):
    for value in (".nan", "nan"):
        with pytest.raises(ConfigError, match=r"inner\.rate = nan: it is no number"):
            load_config(Outer, None, [f"inner.rate={value}"])
    (tmp_path / "c.yaml").write_text("name: 2024")
    with pytest.raises(ConfigError, match="of type str; put it in quotation marks"):
        load_config(Outer, tmp_path / "c.yaml")
