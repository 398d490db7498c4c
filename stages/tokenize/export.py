"""A documents file to token shards: the first documents validate, the others train, and the two never share a file."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.fetch.documents import open_lines
from stages.params import Tokenize
from stages.progress import Progress
from stages.tokenize.encode import Batch, DocumentEncoder, Encoded, encode_batch, make_encoder
from stages.tokenize.shards import ShardWriter, Split, file_sha256

# Enough text per message between processes for its cost to vanish.
BATCH_BYTES = 1 << 20


def require_documents(documents: Path, val_documents: int) -> None:
    """Raises UserError unless the file has more documents than validate; reads no further than that."""
    found = 0
    with open_lines(documents) as (lines, _):
        for _ in lines:
            found += 1
            if found > val_documents:
                return
    if not found:
        raise UserError(f"{documents}: no documents")
    raise UserError(f"{documents}: {found} documents, expected more than tokenize.val_documents = {val_documents}")


@dataclass
class Totals:
    """Counts over one split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counted_bytes: int = 0

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Add one batch."""
        self.documents += len(batch.lines)
        self.tokens += len(encoded.tokens)
        self.text_bytes += encoded.text_bytes
        self.counted_bytes += encoded.counted_bytes


def export(documents: Path, tokenizer: Path, folder: Path, *, settings: Tokenize, workers: int) -> dict[str, Any]:
    """Write val_*.bin, train_*.bin and, for CaseOps, val_bytes_*.bin; return what meta.json says of them.

    `workers` processes share the work (fewer if the file is small) and the result does not depend on their number.
    Peak memory is one shard and a few batches per worker. Raises UserError naming the line of a document at fault.
    """
    totals: dict[Split, Totals] = {"val": Totals(), "train": Totals()}
    workers = min(workers, 1 + documents.stat().st_size // BATCH_BYTES)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split, settings.shard_tokens)) for split in totals}
        sidecar = stack.enter_context(ShardWriter(folder, "val_bytes", settings.shard_tokens))
        lines, file = stack.enter_context(open_lines(documents))
        progress = stack.enter_context(Progress("tokenize", documents.stat().st_size, unit="B"))
        batches = _batches(lines, str(documents), settings.val_documents)
        for batch, encoded in _encode_all(batches, (tokenizer, settings.vocab_size, settings.transform), workers):
            totals[batch.split].add(batch, encoded)
            writers[batch.split].append(encoded.tokens)
            if encoded.sidecar is not None:
                sidecar.append(encoded.sidecar)
            progress.update(file.tell() - progress.done)
    return {
        "vocab_size": settings.vocab_size,
        "transform": settings.transform,
        "val_bytes": totals["val"].counted_bytes,
        **{
            f"{split}_{name}": getattr(count, name)
            for split, count in totals.items()
            for name in ("documents", "tokens", "text_bytes")
        },
        "sha256": {path.name: file_sha256(path) for path in [*sorted(folder.glob("*.bin")), tokenizer]},
    }


def _batches(lines: Iterator[bytes], source: str, val_documents: int) -> Iterator[Batch]:
    """Lines in batches of about BATCH_BYTES, none of which holds documents of both splits."""
    held: list[bytes] = []
    first, held_bytes = 1, 0
    for number, line in enumerate(lines, start=1):
        held.append(line)
        held_bytes += len(line)
        if held_bytes >= BATCH_BYTES or number == val_documents:
            yield Batch(source, "val" if first <= val_documents else "train", first, held)
            held, first, held_bytes = [], number + 1, 0
    if held:
        yield Batch(source, "val" if first <= val_documents else "train", first, held)


def _encode_all(
    batches: Iterator[Batch], encoder_arguments: tuple[Any, ...], workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in several processes, a few in flight at a time, and hand them on in order."""
    if workers == 1:
        encoder = make_encoder(*encoder_arguments)
        yield from ((batch, encode_batch(encoder, batch)) for batch in batches)
        return
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    # Fresh processes ("spawn"): forking one that has threads can hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=encoder_arguments) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(pending) > 2 * workers:
                yield _finished(pending)
        while pending:
            yield _finished(pending)


def _finished(pending: deque[tuple[Batch, "Future[Encoded]"]]) -> tuple[Batch, Encoded]:
    batch, future = pending.popleft()
    return batch, future.result()


# Each worker process keeps its own tokenizer from one batch to the next.
_encoder: DocumentEncoder


def _start_worker(*encoder_arguments: Any) -> None:
    global _encoder
    _encoder = make_encoder(*encoder_arguments)


def _encode_in_worker(batch: Batch) -> Encoded:
    return encode_batch(_encoder, batch)
