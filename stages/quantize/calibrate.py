"""The text that GPTQ's Hessians are collected on.

Legend: B rows, T tokens, V vocabulary.

Source: PR #1172 and #1855 (training text), PR #1019 (text that the network wrote). Ours: rows are drawn at random from
all shards, by the seed, so that neither paths nor ranks decide; a text file; validation text, to show what that buys.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.gpt import GPT, MATRICES
from stages.adapt.network import load_network
from stages.errors import UserError
from stages.params import Gptq, Params
from stages.progress import Progress
from stages.quantize.classes import tensor_class
from stages.quantize.hessian import collect_hessians
from stages.tokenize.shards import shard_paths
from stages.tokenize.tokenizer import Tokenizer
from stages.train.loader import Tokens

# PR #1019's temperature of self-generated text.
TEMPERATURE = 0.8


def calibrate(
    params: Params, weights: dict[str, Tensor], path: Path, tokens: Path, *, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Hessians, float32 (C, C) on `device`, of the weights that quantize.gptq wants rounded; none where it is null.

    `path` is where the weights come from, `tokens` the token folder. Raises UserError if the weights do not fit
    params.model or the text is missing or too short.
    """
    settings = params.quantize.gptq
    if settings is None:
        return {}
    model = load_network(params.model, weights, path, device).eval()
    with Progress("calibrate", settings.batches, unit="batches") as progress:
        batches_BT = _batches(settings, model, tokens, seed)
        return collect_hessians(model, _counted(batches_BT, progress), calibrated_names(weights, settings))


def calibrated_names(weights: dict[str, Tensor], settings: Gptq) -> list[str]:
    """The projections of the layers, and the token table as output head. Other tables are looked up, not multiplied."""
    return [
        name
        for name in weights
        if tensor_class(name) in settings.classes and (name.endswith(MATRICES) or name == "embed.token")
    ]


def _counted(batches_BT: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    for tokens_BT in batches_BT:
        yield tokens_BT
        progress.update()


def _batches(settings: Gptq, model: GPT, tokens: Path, seed: int) -> Iterator[Tensor]:
    """Batches (batch_rows, T) int64."""
    shape = settings.batches, settings.batch_rows, model.config.seq_len
    if settings.calibration == "generated":
        return generate_text(model, shape, seed=seed)
    if settings.path is not None:
        ids = _text_tokens(Path(settings.path), tokens / "tokenizer.model")
        return random_rows(lambda start, count: ids[start : start + count], len(ids), shape, seed=seed)
    paths = shard_paths(tokens, "train" if settings.calibration == "train" else "val")
    shards = Tokens(paths, vocab_size=model.config.vocab_size)
    return random_rows(shards.read, shards.total, shape, seed=seed)


def random_rows(
    read: Callable[[int, int], np.ndarray], total: int, shape: tuple[int, int, int], *, seed: int
) -> Iterator[Tensor]:
    """`shape` (batches, rows, T) of a text of `total` tokens, at random multiples of T, none twice if there are enough.

    `read(start, count)` gives tokens (count,) int64. Raises UserError on a text shorter than one row.
    """
    batches, rows, length = shape
    if total < length:
        raise UserError(
            f"params.yaml: quantize.gptq.calibration: {total} tokens, expected at least {length} (model.seq_len)"
        )
    chosen = np.random.default_rng(seed).choice(
        total // length, batches * rows, replace=batches * rows > total // length
    )
    for starts in np.split(chosen * length, batches):
        yield torch.from_numpy(np.stack([read(int(start), length) for start in starts]))


def _text_tokens(path: Path, tokenizer: Path) -> np.ndarray:
    """A text file as tokens (n,) int64."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"params.yaml: quantize.gptq.path: {path}: expected a file of UTF-8 text") from None
    return np.array(Tokenizer(tokenizer).encode(text), dtype=np.int64)


def generate_text(model: GPT, shape: tuple[int, int, int], *, seed: int) -> Iterator[Tensor]:
    """`shape` (batches, rows, T) of text that the network writes: first token uniform, then softmax(logits / 0.8).

    The calibration that needs no data at all. The prefix is evaluated anew for each token.
    """
    batches, rows, length = shape
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    for _ in range(batches):
        tokens_BT = torch.randint(model.config.vocab_size, (rows, 1), generator=random, device=device)
        while tokens_BT.size(1) < length:
            with torch.no_grad():
                logits_BV = model.logits(model.hidden(tokens_BT)[:, -1])
            chosen_B1 = torch.multinomial((logits_BV / TEMPERATURE).softmax(-1), 1, generator=random)
            tokens_BT = torch.cat([tokens_BT, chosen_B1], dim=1)
        yield tokens_BT
