"""The YAML of a run as it stands, with overrides set and nothing validated: what may be asked before the heavy modules are there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossdock import strict_yaml
from crossdock.errors import BadConfig, MissingInput, UsageError
from crossdock.strict_yaml import Document


def shipped_configs() -> Path:
    """Where the runs that come with Crossdock lie: inside an installed package, else in the `configs` of a source checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def run_document(path: Path, overrides: Sequence[str] = ()) -> tuple[Document, str]:
    """The document at `path`, or the shipped one of that bare name, with `overrides` such as `train.steps=100` set; and the run's name.

    Raises `MissingInput`, `BadConfig`, and `UsageError` for an override that is none.
    """
    if not path.exists() and path.parent == Path():
        path = _shipped(path)
    document = strict_yaml.load(path)
    if document.value is None:  # an empty file, or comments alone: all defaults
        document = Document({}, document.name, document.line_of)
    return with_overrides(document, overrides), path.stem


def _shipped(path: Path) -> Path:
    """The file of the shipped run called `path`. Raises `MissingInput` where there is none, with the name that is most alike."""
    known = {found.stem: found for found in sorted(shipped_configs().glob("*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if name not in known:
        alike = strict_yaml.nearest(name, list(known))
        guess = f" (did you mean {alike}?)" if alike else ""
        raise MissingInput(
            f"{path} does not exist, and is no shipped run{guess}; give the path of a YAML file, or one of {', '.join(known)}"
        )
    return known[name]


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document with `a.b=c` set, each after YAML's own rules for scalars and `[lists]`; messages name the override."""
    if not isinstance(document.value, dict):
        return document
    value: dict[str, Any] = _copied(document.value)
    line_of, origin_of = dict(document.line_of), dict(document.origin_of)
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = tuple(key.split("."))
        if not separator or not all(parts):
            raise UsageError(f"override {override!r} is not of the form a.b=c, as in train.steps=100")
        here = value
        for depth, part in enumerate(parts[:-1], start=1):
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise BadConfig(
                    f"override {override}: `{strict_yaml.dotted(parts[:depth])}` is no mapping of keys, so nothing can be set in it"
                )
        here[parts[-1]] = strict_yaml.parse(text, f"override {override}").value
        line_of = {path: line for path, line in line_of.items() if path[: len(parts)] != parts}
        origin_of = {path: origin for path, origin in origin_of.items() if path[: len(parts)] != parts}
        origin_of[parts] = f"override {override}"
    return Document(value, document.name, line_of, origin_of)


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
