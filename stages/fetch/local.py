"""Documents from a local file: JSON lines are checked and passed on unchanged, a Parquet column becomes JSON lines."""

import json
import shutil
from pathlib import Path

import zstandard

from stages.errors import UserError
from stages.fetch.documents import read_texts

# Documents held in memory at a time while reading Parquet.
PARQUET_ROWS = 1024


def fetch_file(source: Path, folder: Path) -> int:
    """Write the documents of a .jsonl, .jsonl.zst or .parquet file to folder/docs.jsonl[.zst], in their order.

    Returns their number. Raises UserError naming the file, and the line where there is one, if it holds anything but
    documents, or none.
    """
    if source.suffix == ".parquet":
        documents = _convert_parquet(source, folder / "docs.jsonl.zst")
    elif suffix := next((suffix for suffix in (".jsonl", ".jsonl.zst") if source.name.endswith(suffix)), None):
        documents = sum(1 for _ in read_texts(source))
        shutil.copyfile(source, folder / f"docs{suffix}")
    else:
        raise UserError(f"{source}: expected a .jsonl, .jsonl.zst or .parquet file (fetch.path)")
    if not documents:
        raise UserError(f"{source}: no documents (fetch.path)")
    return documents


def _convert_parquet(source: Path, target: Path) -> int:
    """Copy the column `text`, a few rows at a time; returns the number of rows."""
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError:
        raise UserError(f"{source}: reading Parquet needs the package pyarrow (pip install pyarrow)") from None
    if not source.is_file():
        raise UserError(f"{source}: no such file (fetch.path)")
    rows = 0
    try:
        with parquet.ParquetFile(source) as file, zstandard.open(target, "wt", encoding="utf-8", newline="\n") as out:
            kind = file.schema_arrow.field("text").type if "text" in file.schema_arrow.names else None
            if kind is None or not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(f"{source}: expected a column `text` of strings, found {kind or 'none'}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    if text is None:
                        raise UserError(f"{source}, row {rows}: `text` is null, expected a string")
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    return rows
