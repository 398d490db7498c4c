"""Which code a result comes from."""

import hashlib
from pathlib import Path

from stages.tokenize.shards import file_sha256


def sources_sha256(*folders: str) -> str:
    """SHA-256 over the path and the text of every .py file below these folders of the project ("stages/train").

    They are found beside this file, whatever the working directory.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
