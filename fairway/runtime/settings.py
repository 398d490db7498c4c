"""A typed section of a settings file, and the one function that reads such a file."""

import re
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fairway.runtime.errors import UserError


class Section(BaseModel):
    """A section of params.yaml, strict and frozen: an unknown key or a wrong type is an error that names the key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def load_section(path: Path, kind: type[SectionT]) -> SectionT:
    """Read a YAML file as the section `kind`.

    Raises UserError in one line if the file is missing, is no YAML mapping, or does not fit the section; the line then
    names the first key at fault.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's SafeLoader with the floats of YAML 1.2. PyYAML itself reads `1e-3` as text, DVC reads it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def _first_fault(error: ValidationError) -> str:
    """The first fault as `key.path: what is wrong (found value)`, followed by the number of further faults.

    Unknown keys go first: where a key is misspelt, the right one is missing too, and the misspelling explains both.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    # Some sections come in kinds (`fetch.source`, `loader.kind`). pydantic puts the kind's name behind the section's
    # name, where the file has no such key, so it is left out.
    kinds = {("fetch", 1), ("loader", 2)}
    places = zip(range(len(fault["loc"])), ("", *fault["loc"]), fault["loc"], strict=False)
    key = ".".join(str(part) for i, before, part in places if (before, i) not in kinds)
    message = {
        "extra_forbidden": "unknown key",
        "missing": "missing key",
    }.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    found = fault.get("input")
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) or found is None else ""
    if fault["type"] in ("missing", "value_error"):
        shown = ""
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"
