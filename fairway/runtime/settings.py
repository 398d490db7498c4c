"""A typed section of a settings file, the one function that reads such a file, and the limits that are no settings."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from fairway.runtime.errors import UserError

# The track of the challenge that records are made for: its name, as accepted submissions write it, the GPUs of its
# machine, H100, and what it limits. The limits are those of the challenge's rules, seconds those of that machine. They
# are no settings, because no run can choose them; a run can only set itself a lower cap
# (size_check.cap_bytes of params.yaml).
TRACK, TRACK_GPUS = "10min_16mb", 8
# Bytes of code and compressed model together.
CAP_BYTES = 16_000_000
# Seconds of training, with everything else that reads training text; and seconds of one evaluation.
TRAIN_S = EVAL_S = 600.0


class Section(BaseModel):
    """A strict, frozen section of params.yaml: unknown keys and wrong types are errors that name the key.

    Fields have no defaults. A value that stood in the code alone would escape DVC, which compares params.yaml: with a
    changed default every stage would still be "up to date". In the file, null says that a mechanism is absent.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def load_section(path: Path, kind: type[SectionT]) -> SectionT:
    """Read a YAML file as the section `kind`.

    Raises UserError (one line: file, key, what was expected) on any fault, a key that occurs twice among them.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return parse_section(read_mapping(content, str(path)), kind, path)


def read_mapping(content: bytes, name: str) -> dict[str, Any]:
    """The sections in the content of a settings file, which messages call `name`.

    It is read by the library that DVC reads params.yaml with, as YAML 1.2, so that both see the same values: PyYAML
    reads 010 as 8, 1:30 as 90 and 1e-3 as text. Raises UserError, with the line at fault, unless it is a mapping.
    """
    try:
        raw = YAML(typ="safe").load(content.decode("utf-8"))
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{name}: not valid YAML: {where}{error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name}: expected a mapping of sections, found {type(raw).__name__}")
    return raw


def parse_section(raw: dict[str, Any], kind: type[SectionT], path: Path) -> SectionT:
    """What was read from the file `path` as the section `kind`. Raises UserError as load_section."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    """The first fault as `key.path: what is wrong (found value)`; the number of further ones behind it.

    Unknown keys go first: where one is misspelt, the right one is missing too.
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = _key(fault)
    message = {
        "extra_forbidden": "unknown key",
        "missing": "missing key",
        "union_tag_not_found": "missing key",
    }.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    found = fault.get("input")
    if fault["type"] == "union_tag_invalid":
        message, found = f"expected one of {fault['ctx']['expected_tags']}", fault["ctx"]["tag"]
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) or found is None else ""
    if fault["type"] in ("missing", "value_error"):
        shown = ""
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"


def _key(fault: ErrorDetails) -> str:
    """The key that a fault is about, with those that it lies in, as they stand in the file: `train.loader.bucket`."""
    place = fault["loc"]
    # Of a section that comes in kinds, pydantic names the kind behind the section: not a key of the file.
    kinds = {("fetch", 1), ("loader", 2)}
    parts = [str(part) for i, part in enumerate(place) if ((place[i - 1] if i else ""), i) not in kinds]
    if fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
        # What is missing or wrong is the key that names the kind; pydantic puts it in quotes, and not in the path.
        parts.append(fault["ctx"]["discriminator"].strip("'"))
    return ".".join(parts)
