"""Let params.yaml name text of your own: what `make repro DATA=path COLUMN=body` does before it runs the pipeline.

Reads:  the beginning of every file at the path on the command line, to see that it holds documents
Writes: the section `fetch` of params.yaml; the rest of that file stays as it is, with its comments
Usage:  python -m stages.use_data PATH [COLUMN]     (the key or column of the text: what params.yaml has, or `text`)
"""

import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fairway.params import Params, load_params
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic
from fairway.runtime.settings import parse_section, read_mapping
from fairway.tokens.own_text import FetchFile, check_own_text

# From the line `fetch:` to the last indented line before the next section.
SECTION = re.compile(r"^fetch:.*(?:\n+[ \t].*)*", re.MULTILINE)


def main() -> None:
    """Write the path into params.yaml, once its documents are seen to be there."""
    if len(sys.argv) not in (2, 3):
        raise UserError("usage: python -m stages.use_data <path> [<column>]")
    params, path = Path("params.yaml"), sys.argv[1]
    before = load_params(params).fetch
    section: dict[str, Any] = {"source": "file", "path": path, "column": "text", "shuffle_seed": 1337}
    if isinstance(before, FetchFile):
        # Who uses text of their own already has chosen these two.
        section = before.model_dump() | {"path": path}
    if sys.argv[2:]:
        section["column"] = sys.argv[2]
    raw = read_mapping(params.read_bytes(), str(params)) | {"fetch": section}
    fetch = parse_section(raw, Params, params).fetch
    assert isinstance(fetch, FetchFile)
    files = check_own_text(fetch)
    text = params.read_text(encoding="utf-8")
    written = _yaml({"fetch": section})
    changed, sections = SECTION.subn(lambda _: written, text)
    if sections != 1:
        raise UserError(f"{params}: expected one line that begins with `fetch:`, found {sections}")
    write_atomic(params, changed)
    print(f"use_data: fetch.path in {params} is {path} ({len(files)} files)")


def _yaml(section: dict[str, Any]) -> str:
    """The section as DVC would write it, so that it reads the same again: with quotes around a text such as 1e3."""
    yaml, stream = YAML(), StringIO()
    yaml.width = 10_000
    yaml.dump(section, stream)
    return stream.getvalue().rstrip("\n")


if __name__ == "__main__":
    run_stage(main)
