"""The record as a compressor: any UTF-8 text in as few bits as its score says, and back, byte for byte.

Reads:  a text or a packed text; artifacts/compress/<seed>/model.bin of the first seed in params.yaml, artifacts/tokens
Writes: FILE.fwz, or the text again; another name may be given. A file that is there already is not overwritten.
Method: decoding/packed_text.py
Usage:  python -m fairway.zip pack FILE [OUT], python -m fairway.zip unpack FILE [OUT]
"""

import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fairway.codec.byte_codecs import Brotli
from fairway.decoding.language import Language, load_language
from fairway.decoding.packed_text import Coded, pack, unpack
from fairway.params import load_params
from fairway.runtime.errors import UserError, run_stage
from fairway.runtime.files import write_atomic
from fairway.runtime.progress import Progress
from fairway.tokens.export import ZSTD_LEVEL, compressed_bytes

ENDING = ".fwz"
USAGE = "usage: python -m fairway.zip pack FILE [OUT], or python -m fairway.zip unpack FILE [OUT]"


def main() -> None:
    """Pack or unpack the file on the command line."""
    command, source, target = paths(sys.argv[1:])
    try:
        data = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; expected a file to {command}") from None
    if target.exists():
        raise UserError(f"{target}: already there; name another file behind {source}, or delete this one")
    # How sums are split among threads decides how they round. One thread is had on every machine.
    torch.set_num_threads(1)
    language = load_language(Path("artifacts"), load_params("params.yaml").seeds[0])
    try:
        made = packed(data, language) if command == "pack" else unpacked(data, language)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    write_atomic(target, made)
    print(f"wrote {target}")


def paths(arguments: list[str]) -> tuple[str, Path, Path]:
    """What to do, with which file, and where to write. Raises UserError with a line of usage."""
    if len(arguments) not in (2, 3) or arguments[0] not in ("pack", "unpack") or "" in arguments:
        raise UserError(f"{USAGE}; found: {shlex.join(arguments) or 'nothing'}")
    command, source = arguments[0], Path(arguments[1])
    if len(arguments) == 3:
        return command, source, Path(arguments[2])
    if command == "pack":
        return command, source, source.with_name(source.name + ENDING)
    if source.suffix != ENDING:
        raise UserError(f"{source}: expected a name that ends in {ENDING}, or the name of the text behind it")
    return command, source, source.with_suffix("")


@contextmanager
def clock(name: str) -> Iterator[Coded]:
    """Shows how far the coding is that goes on inside the block, and behind it how fast it was.

    What it gives is to be told of the coding; the count appears once it knows how many tokens there are.
    """
    started_at, shown = time.monotonic(), list[Progress]()
    with ExitStack() as held:

        def coded(more: int, total: int) -> None:
            if not shown:
                shown.append(held.enter_context(Progress(name, total, unit="tokens")))
            shown[0].update(more)

        yield coded
    tokens, elapsed_s = sum(progress.done for progress in shown), time.monotonic() - started_at
    print(f"{tokens:,} tokens in {elapsed_s:.1f} s, {tokens / elapsed_s:,.0f} tokens/s")


def packed(text: bytes, language: Language) -> bytes:
    """The packed text. Prints its size and that of the same text by other compressors."""
    with clock("pack") as coded:
        made = pack(text, language, coded)
    plain = compressed_bytes([text.decode("utf-8")])
    sizes = {"fairway.zip": len(made), "xz -9e": plain["xz"], f"zstd -{ZSTD_LEVEL}": plain["zstd"]}
    sizes["brotli -q 11"] = len(Brotli().encode(text))
    print(f"{len(text):,} bytes of text, SHA-256 {hashlib.sha256(text).hexdigest()}")
    for name, size in sizes.items():
        share = f"{100 * size / len(text):5.1f} %, {8 * size / len(text):.3f} bits per byte" if text else ""
        print(f"{name:>12} {size:>11,} bytes {share}".rstrip())
    return made


def unpacked(data: bytes, language: Language) -> bytes:
    """The text again. Prints its size and SHA-256."""
    with clock("unpack") as coded:
        text = unpack(data, language, coded)
    print(f"{len(text):,} bytes of text, SHA-256 {hashlib.sha256(text).hexdigest()}, the one packed")
    return text


if __name__ == "__main__":
    run_stage(main)
