"""A typed section of a settings file, and the one function that reads such a file."""

import re
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fairway.runtime.errors import UserError


class Section(BaseModel):
    """A strict, frozen section of params.yaml: unknown keys and wrong types are errors that name the key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats: PyYAML reads `1e-3` as text, DVC as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_section(path: Path, kind: type[SectionT]) -> SectionT:
    """Read a YAML file as the section `kind`, faults as in load_params."""
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


def _first_fault(error: ValidationError) -> str:
    """The first fault as `key.path: what is wrong (found value)`; the number of further ones behind it.

    Unknown keys go first: where one is misspelt, the right one is missing too.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    # Of a section that comes in kinds, pydantic names the kind behind the section: not a key of the file.
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
