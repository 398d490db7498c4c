"""Files that appear whole or not at all, the reading of what a stage wrote, and fingerprints of files and of code.

Every artifact is written under a temporary name beside its place, flushed to disk and then renamed, so that a killed
stage leaves either its old output or none. Sets of tensors are safetensors files, figures are JSON objects, and the
scores of single tokens are an array in an .npz file. A file that is missing or damaged is a UserError that names the
command which makes it.

A fingerprint is a SHA-256 of files or of a stage's code. It says whether a result on disk still belongs to the code and
the data at hand.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from fairway.runtime.errors import UserError


def require_file(path: Path, made_by: str) -> Path:
    """Return `path` if it is a file. Otherwise raise UserError, which names `made_by`, the command that makes it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `{made_by}` makes it")
    return path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file (text as UTF-8) so that `path` holds its old content until it holds all of the new one.

    Raises UserError naming the file and its bytes if it cannot be written, as on a full disk.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {len(data)} bytes cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an exception, and is deleted otherwise.

    Temporary folders that killed runs left behind are deleted first. An existing `path` is replaced at the end. A
    UserError about a file in the folder names `path`, since the folder is gone when it is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except shutil.Error as error:
        # What copying a folder raises: the first of its files that failed, as (source, target, reason).
        raise UserError(f"{path}: {error.args[0][0][2]}") from None
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush every file below the folder to disk, so that renaming it cannot outrun its content."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (any dtype and shape, on any device) under their names, as one safetensors file, atomically."""
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read what save_tensors wrote. The tensors are on the CPU.

    Raises UserError naming the command `made_by` if the file is missing or damaged.
    """
    try:
        return load_file(require_file(path, made_by))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); run `{made_by}` again") from None


def read_figures(path: Path, made_by: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the JSON object that a stage wrote, which must have at least these keys.

    Raises UserError naming the command `made_by` if the file is missing or damaged or lacks a key.
    """
    try:
        found = json.loads(require_file(path, made_by).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; run `{made_by}` again")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path}: no {missing[0]}; run `{made_by}` again")
    return found


def read_array(path: Path, name: str, made_by: str) -> np.ndarray:
    """Read the array of that name from the .npz file that a stage wrote.

    Raises UserError naming the command `made_by` if the file is missing or damaged or holds no such array.
    """
    try:
        with require_file(path, made_by).open("rb") as file, np.load(file) as arrays:
            array: np.ndarray = arrays[name]
            return array
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        raise UserError(f"{path}: not an .npz file with an array {name!r}; run `{made_by}` again") from None


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
