"""What ships, for readers: copies of the files that the program is packed from, with their comments.

The program itself is minified, and its names mean nothing any more. Beside it stand the files of the repository of
which something is left in it, those that prepare its tokens, and the settings that are written into it.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fairway.packing.link import module_file, parents

# The files that make token shards of text, and for CaseOps the byte sidecars: every file of the package.
PREPARATION = "fairway/tokens/*.py"


def write_source(folder: Path, root: Path, modules: Iterable[str], settings: dict[str, Any]) -> None:
    """Copy the files of the modules and their packages under `root`, and PREPARATION, to `folder`.

    The settings, by section, are written beside them as settings.yaml.
    """
    reached = (module_file(root, part) for name in modules for part in (*parents(name), name))
    files = {path for path in reached if path and path.is_file()}
    for path in sorted(files.union(root.glob(PREPARATION))):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    (folder / "settings.yaml").write_text(text, encoding="utf-8")
