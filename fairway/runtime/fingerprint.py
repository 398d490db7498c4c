"""SHA-256 of files and of a stage's code: whether a result on disk still belongs to the code and data at hand."""

import hashlib
from pathlib import Path

import yaml


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_sources_sha256(stage: str) -> str:
    """SHA-256 over the path and content of every .py file that dvc.yaml lists as a dependency of a stage.

    dvc.yaml and the code are those of the repository that holds this file, whatever the working directory is.
    """
    root = Path(__file__).parents[2]
    deps = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    code = [root / dep for dep in deps if dep.split("/")[0] in ("fairway", "stages")]
    digest = hashlib.sha256()
    for path in sorted(path for dep in code for path in (dep.rglob("*.py") if dep.is_dir() else [dep])):
        digest.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
