"""How far is each compressor from what the codes must cost?

    python -m benchmarks.compressors [--codecs ans,brotli,...] [artifacts/compress/<seed>/model.bin]

Without a file, on two sets of synthetic codes with the shapes of the records: `floored` as in PR #1172 (steps of 1/31
whatever the row, rows of different size), `sigma` as in PR #1855 (steps in proportion to the row, columns of different
size). For synthetic codes the limit is what they cost if every weight's standard deviation were known; for a file it is
the order-0 entropy of each matrix. Each class of tensors is packed by itself, as in a file, and its bytes are printed
too. Times are of processor, added up over threads and programs; all side information counts.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fairway.codec.codecs import CODECS
from fairway.codec.codes import Quantized, code_histogram, entropy_bits, tensor_class
from fairway.codec.container import unpack

LAYERS, WIDTH, KV_WIDTH = 11, 512, 256
# (name, matrices by class, bits that the limit says)
Dataset = tuple[str, dict[str, list[np.ndarray]], float]


def main() -> None:
    """Print a table for each set of codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", default="ans,brotli,zstd,lzma", help=f"of {', '.join(CODECS)}")
    parser.add_argument("file", type=Path, nargs="?", help="a model.bin, packed by whatever codec")
    arguments = parser.parse_args()
    for name, groups, limit_bits in (
        [trained(arguments.file)] if arguments.file else [floored(), sigma(0.0), sigma(0.2)]
    ):
        weights = sum(matrix.size for matrices in groups.values() for matrix in matrices)
        print(
            f"\n{name}: {weights:,} weights, limit {limit_bits / 8:,.0f} bytes, {limit_bits / weights:.4f} bits/weight"
        )
        print(f"{'codec':16} {'bytes':>12} {'bits/weight':>12} {'above limit':>12} {'encode s':>9} {'decode s':>9}")
        for codec in arguments.codecs.split(","):
            print(f"{codec:16} {_row(codec, groups, weights, limit_bits)}", flush=True)


def _row(codec: str, groups: dict[str, list[np.ndarray]], weights: int, limit_bits: float) -> str:
    packed_bytes, encode_s, decode_s = 0, 0.0, 0.0
    by_class = []
    for kind, matrices in groups.items():
        started_at = _cpu_s()
        packed = CODECS[codec].encode(matrices)
        encoded_at = _cpu_s()
        found = CODECS[codec].decode(packed, [(matrix.shape[0], matrix.shape[1]) for matrix in matrices])
        decode_s += _cpu_s() - encoded_at
        encode_s += encoded_at - started_at
        packed_bytes += len(packed)
        by_class.append(f"{kind} {len(packed):,}")
        assert all(np.array_equal(a, b) for a, b in zip(matrices, found, strict=True)), "not lossless"
    above = 8 * packed_bytes / limit_bits - 1
    figures = f"{packed_bytes:12,} {8 * packed_bytes / weights:12.4f} {above:12.2%} {encode_s:9.1f} {decode_s:9.1f}"
    return f"{figures}  {', '.join(by_class)}"


def _cpu_s() -> float:
    """Seconds of processor that this process and its finished children have had: the same on a busy machine."""
    return sum(os.times()[:4])


def trained(path: Path) -> Dataset:
    """The codes of a run, in the order of its file."""
    groups: dict[str, list[np.ndarray]] = defaultdict(list)
    bits = 0.0
    for name, value in unpack(path.read_bytes())[1].items():
        if isinstance(value, Quantized):
            groups[tensor_class(name)].append(value.codes.numpy())
            bits += value.codes.numel() * entropy_bits(code_histogram(value.codes))
    return str(path), groups, bits


def floored() -> Dataset:
    """Rows ~ N(0, sigma²), sigma = 0.168 with a log spread of 0.15 over matrices and over rows, at steps of 1/31."""
    rng, groups, bits = np.random.default_rng(0), defaultdict(list), 0.0
    for kind, rows, columns in _shapes(hidden=3 * WIDTH):
        spread = 0.15 * rng.standard_normal() + 0.15 * rng.standard_normal((rows, 1)) - 0.0225
        sigma_RC = np.broadcast_to(0.168 * np.exp(spread) * 31, (rows, columns))
        groups[kind].append(_rounded(rng, sigma_RC))
        bits += _gaussian_bits(sigma_RC)
    return "floored", groups, bits


def sigma(spread: float) -> Dataset:
    """Steps of k/31 row deviations, k = 13 (attention), 11.5 (MLP); columns differ by `spread` on the logarithm."""
    rng, groups, bits = np.random.default_rng(0), defaultdict(list), 0.0
    for kind, rows, columns in _shapes(hidden=4 * WIDTH):
        scale = np.exp(spread * rng.standard_normal((1, columns)) - spread**2)
        sigma_RC = np.broadcast_to(31 / {"attn": 13.0, "mlp": 11.5}[kind] * scale, (rows, columns))
        groups[kind].append(_rounded(rng, sigma_RC))
        bits += _gaussian_bits(sigma_RC)
    return f"sigma, column spread {spread}", groups, bits


def _shapes(hidden: int) -> Iterator[tuple[str, int, int]]:
    """Class, rows and columns of each matrix, the same one of all layers together."""
    attention = [(WIDTH, WIDTH), (KV_WIDTH, WIDTH), (KV_WIDTH, WIDTH), (WIDTH, WIDTH)]
    for kind, shapes in (("attn", attention), ("mlp", [(hidden, WIDTH), (WIDTH, hidden)])):
        yield from ((kind, rows, columns) for rows, columns in shapes for _ in range(LAYERS))


def _rounded(rng: np.random.Generator, sigma_RC: np.ndarray) -> np.ndarray:
    return np.rint(sigma_RC * rng.standard_normal(sigma_RC.shape)).clip(-31, 31).astype(np.int8)


def _gaussian_bits(sigma_RC: np.ndarray) -> float:
    """Entropy of rounded Gaussians, ½·log2(2πe(sigma² + 1/12)) each; good to four digits from sigma = 0.5 on."""
    return float(0.5 * np.log2(2 * np.pi * np.e * (sigma_RC**2 + 1 / 12)).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
