"""How fast documents become shards, and the memory it takes.

    python -m benchmarks.tokenize_speed CORPUS.jsonl.zst TOKENIZER.model [--transform caseops] [--val-documents N]

Prints one line of JSON: MB of text per second over the whole export (reading, encoding, checking, writing), CPU seconds
of all processes (which, unlike the time, do not depend on what else the machine does), and the peak resident
memory of the largest process and, at most, of all of them together.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from fairway.tokens.export import export, held_out_hashes
from fairway.tokens.tokenizer import RESERVED, Tokenizer, TokenizeSettings, check_tokenizer


def main() -> None:
    """Export a corpus into a temporary folder and time it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--transform", choices=list(RESERVED), default="none")
    parser.add_argument("--val-documents", type=int, default=400)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    settings = TokenizeSettings(
        model=str(arguments.tokenizer),
        trainer="published",
        transform=arguments.transform,
        fused_pairs=0,
        vocab_size=Tokenizer(arguments.tokenizer).model.vocab_size(),
        val_documents=arguments.val_documents,
        val_limit_documents=None,
        shard_tokens=100_000_000,
    )
    check_tokenizer(arguments.tokenizer, vocab_size=settings.vocab_size, operators=RESERVED[settings.transform])
    with tempfile.TemporaryDirectory() as folder:
        started_at = time.perf_counter()
        meta = export(
            arguments.corpus,
            arguments.tokenizer,
            Path(folder),
            settings=settings,
            held_out=held_out_hashes(arguments.corpus, settings),
            workers=arguments.workers,
        )
        elapsed_s = time.perf_counter() - started_at
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own_mb, worker_mb = own.ru_maxrss / 1024, workers.ru_maxrss / 1024
    text_mb = (meta["train_text_bytes"] + meta["val_text_bytes"]) / 1e6
    figures = {
        "tokenizer": arguments.tokenizer.name,
        "workers": arguments.workers,
        "text_mb": round(text_mb, 1),
        "tokens": meta["train_tokens"] + meta["val_tokens"],
        "elapsed_s": round(elapsed_s, 1),
        "cpu_s": round(own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime, 1),
        "mb_per_s": round(text_mb / elapsed_s, 2),
        "peak_mb_largest_process": round(max(own_mb, worker_mb)),
        "peak_mb_at_most": round(own_mb + arguments.workers * worker_mb),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
