"""Documents from the documentation folders of PyPI source distributions (sdists).

pip downloads each sdist by name and version and checks its SHA-256. It does so before it runs anything of the sdist,
and it does run something: to read the metadata, pip calls the package's build backend. The documents are read out of
the archive in memory. Nothing is unpacked to disk, so that no file name in an archive can point outside a folder.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from fairway.runtime.errors import UserError
from fairway.runtime.settings import Section


class Sdist(Section):
    """One source distribution on PyPI, and the folder inside it that holds the documents."""

    name: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    folder: str


class FetchSdists(Section):
    """Documents from the documentation folders of PyPI source distributions: the files with these suffixes."""

    source: Literal["sdists"]
    sdists: list[Sdist] = Field(min_length=1)
    suffixes: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Fetched:
    """How many documents were written, their UTF-8 bytes, and how many files were left out since they hold no text."""

    documents: int
    text_bytes: int
    skipped: int


def fetch_sdists(sdists: Sequence[Sdist], suffixes: Sequence[str], folder: Path) -> Fetched:
    """Write the documents of all sdists to folder/docs.jsonl, ordered by the SHA-256 of their path in the archive.

    That order is always the same and has nothing to do with the content. The first documents, which validate, are
    therefore a fair sample of all. Raises UserError naming the package if it cannot be downloaded, has another SHA-256,
    or holds no document.
    """
    texts: dict[str, str] = {}
    skipped = 0
    for sdist in sdists:
        with tempfile.TemporaryDirectory() as temporary:
            files = dict(read_folder(download_sdist(sdist, Path(temporary)), sdist.folder, suffixes))
        found = {path: text for path, data in files.items() if (text := _decode(data)) is not None}
        if not found:
            raise UserError(
                f"{sdist.name} {sdist.version}: no {' or '.join(suffixes)} file with text in {sdist.folder}/"
            )
        skipped += len(files) - len(found)
        texts |= found
    order = sorted(texts, key=lambda path: hashlib.sha256(path.encode("utf-8")).digest())
    with (folder / "docs.jsonl").open("w", encoding="utf-8", newline="\n") as out:
        for path in order:
            out.write(json.dumps({"path": path, "text": texts[path]}, ensure_ascii=False) + "\n")
    return Fetched(len(texts), sum(len(text.encode("utf-8")) for text in texts.values()), skipped)


def download_sdist(sdist: Sdist, folder: Path) -> Path:
    """Let pip download one sdist into an empty folder; return the path of the .tar.gz. Raises UserError on failure."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{sdist.name}=={sdist.version} --hash=sha256:{sdist.sha256}\n", encoding="utf-8")
    # Only this package itself has to come as source. What its build backend needs may come as wheels, so that nothing
    # is compiled.
    options = ["--no-deps", f"--no-binary={sdist.name}", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{sdist.name} {sdist.version}: {_why(done.stderr, sdist)}")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise UserError(f"{sdist.name} {sdist.version}: pip downloaded no .tar.gz source distribution")
    return archives[0]


def _why(stderr: str, sdist: Sdist) -> str:
    """Why the download failed: one line, taken from the many that pip writes."""
    if got := re.search(r"Got\s+([0-9a-f]{64})", stderr):
        return f"the sdist's SHA-256 is {got[1]}, expected {sdist.sha256} (fetch.sdists)"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not download it ({errors[-1] if errors else ' '.join(stderr.split())[-200:]})"


def read_folder(archive: Path, folder: str, suffixes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files whose path is <top>/<folder>/... and ends in one of the suffixes.

    <top> is the single folder at the top of an sdist, whatever its name. Raises UserError on a damaged archive.
    """
    inside = PurePosixPath(folder).parts
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not member.isreg() or ".." in parts or member.name.startswith("/"):
                    continue
                if parts[1 : 1 + len(inside)] != inside or not member.name.endswith(tuple(suffixes)):
                    continue
                content = tar.extractfile(member)
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive.name}: damaged archive ({error})") from None


def _decode(data: bytes) -> str | None:
    """The text of a file, or None if the file is blank or not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None
