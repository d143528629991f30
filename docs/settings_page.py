"""The reference of every setting, made from the dataclasses whenever the site is built (a hook of mkdocs)."""

from __future__ import annotations

import dataclasses
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from latentrevise.cli.settings import GROUPS, meanings, settings_of

PAGE = "reference/settings.md"
TEXTS = (
    "",
    "| written | means |",
    "|---|---|",
    "| `--set 'instruction=End with #### and the number'` | the text as it stands |",
    r"| `--set 'stop=\n'` | `\n`, `\t` are newline and tab, unless a lower-case letter follows (`\nu`, `\text`) |",
    r"""| `--set 'instruction="one\ntwo"'` | in quotation marks: YAML's text |""",
    "| `--set strategies=latent,pivot` | several texts; or a YAML list |",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    lines = [
        "# Settings",
        "",
        "Each is given by `--set key=value`, or in a YAML file with `--config FILE`; nested ones as `group.key`.",
        "`latentrevise config` prints them with their defaults. A text is taken as it stands:",
        *TEXTS,
    ]
    told: set[type] = set()
    for command in GROUPS:
        lines += ["", f"## {command}"]
        _tell(settings_of(command), "", told, lines)
    return "\n".join(lines) + "\n"


def _tell(cls: type, prefix: str, told: set[type], lines: list[str]) -> None:
    if cls in told:
        return
    told.add(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    default = {f.name: _default(f) for f in fields}
    lines += ["", f"### {cls.__name__}", "", "| setting | default | |", "|---|---|---|"]
    nested, meaning = [], {name: _cell(text) for name, text in meanings(cls).items()}
    for field in fields:
        value = default[field.name]
        if dataclasses.is_dataclass(value):
            nested.append((type(value), f"{prefix}{field.name}."))
            text = meaning.get(field.name, f"see {type(value).__name__}")
            lines.append(f"| `{prefix}{field.name}.*` | | {text} |")
        else:
            told_default = repr(value).replace("\\n", "\\\\n")
            lines.append(f"| `{prefix}{field.name}` | `{told_default}` | {meaning.get(field.name, '')} |")
    for kind, path in nested:
        _tell(kind, path, told, lines)


def _cell(text: str) -> str:
    """A docstring's text in a table: neither HTML nor another cell, but in its code."""
    pieces = text.replace("``", "`").split("`")
    pieces[::2] = [piece.replace("<", "&lt;").replace("|", "\\|") for piece in pieces[::2]]
    return "`".join(pieces)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "needed"
