"""Hessians for GPTQ: what the inputs of a network's matrices look like on a calibration text.

calibrate() runs the network over the text that quantize.gptq.calibration names and sums XᵀX for each matrix, X being
its inputs. The text is drawn from the training or the validation tokens, read from a file, or written by the network
itself.

Legend: B rows, T tokens of a row, V vocabulary, n inputs of a product with all rows joined, C features of an input.

Source: PR #1172 and #1855 calibrate on training text and take the mean over batches of XᵀX, PR #1019 calibrates on text
that the network wrote. PR #1172 damps the Hessian already here; we do that in gptq.py alone (quantize.md 4). Ours: rows
are drawn at random from all shards, by the run's seed, so that neither the shards' paths nor the number of processes
matters; a text file as calibration text; validation text, to show what knowing it is worth.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fairway.codec.codes import tensor_class
from fairway.model.config import ModelConfig
from fairway.model.gpt import GPT, MATRICES, load_network
from fairway.model.kernels import plain_products
from fairway.quantization.gptq import GptqSettings
from fairway.runtime.errors import UserError
from fairway.runtime.progress import Progress
from fairway.tokens.loader import Tokens
from fairway.tokens.shards import shard_paths
from fairway.tokens.tokenizer import Tokenizer


def calibrate(
    config: ModelConfig,
    settings: GptqSettings | None,
    weights: dict[str, Tensor],
    path: Path,
    tokens: Path,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Hessians by name, float32 (C, C) on `device`, of the weights that GPTQ is to round; empty without GPTQ.

    `path` is the file that the weights come from, for the message if they do not fit `config`; `tokens` is the token
    folder. Raises UserError if they do not fit, or if the text is missing or shorter than a row.
    """
    if settings is None:
        return {}
    model = load_network(config, weights, path, device).eval()
    with Progress("calibrate", settings.batches, unit="batches") as progress:
        batches_BT = _batches(settings, model, tokens, seed)
        return collect_hessians(model, _counted(batches_BT, progress), calibrated_names(weights, settings))


def calibrated_names(weights: dict[str, Tensor], settings: GptqSettings) -> list[str]:
    """The names of the weights to collect Hessians for: those of the chosen classes that something is multiplied with.

    These are the projections of the layers, and the token table, which is the output head too. Other tables are only
    looked up.
    """
    return [
        name
        for name in weights
        if tensor_class(name) in settings.classes and (name.endswith(MATRICES) or name == "embed.token")
    ]


def _counted(batches_BT: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    """The same batches; each counts as progress once the next one is asked for."""
    for tokens_BT in batches_BT:
        yield tokens_BT
        progress.update()


def collect_hessians(model: GPT, batches_BT: Iterable[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean over batches of XᵀX, float32 (C, C) on the model's device, for each named weight of `model`.

    Batches are int64 (B, T). A row's documents see each other. Depth recurrence is on, and a layer that runs several
    times counts several times. The token table's X is the final hidden state, since it is the output head.
    """
    weights = dict(model.named_parameters())
    taps, count = _Taps({name: weights[name] for name in names}), 0
    device = next(model.parameters()).device
    for tokens_BT in batches_BT:
        # The taps watch only while the batch runs: generate_text runs the network too, in order to make the next batch.
        with torch.no_grad(), plain_products(), taps:
            hidden = model.hidden(tokens_BT.to(device))
            if "embed.token" in names:
                model.logits(hidden)
        count += 1
    assert taps.sums.keys() == set(names), "the network multiplies with each of these weights"
    return {name: total / count for name, total in taps.sums.items()}


class _Taps(TorchFunctionMode):
    """Inside this context, sums XᵀX over all products X·Wᵀ with one of the given weights W.

    It watches the calls of torch's functions, so that the network needs no hooks and X is exactly what W is multiplied
    with. Before each product the network casts W to the dtype of the activations, and that cast tells which W it is.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.sums: dict[str, Tensor] = {}
        # The latest X and its XᵀX. Query, key and value share their input, so that one product serves all three.
        self.last: tuple[Tensor, Tensor] | None = None
        # The latest cast of a given weight, and the weight's name.
        self.cast: tuple[Tensor | None, str] = None, ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.to and id(args[0]) in self.names:
            self.cast = result, self.names[id(args[0])]
        elif func is F.linear and args[1] is self.cast[0]:
            self._add(self.cast[1], args[0])
        return result

    def _add(self, name: str, x: Tensor) -> None:
        """Add XᵀX to the sum of the weight `name`; x is X before its rows are joined, (..., C)."""
        if self.last is None or self.last[0] is not x:
            self.last = x, _gram(x.detach().flatten(0, -2))
        product = self.last[1]
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def _gram(x_nC: Tensor) -> Tensor:
    """XᵀX, float32 (C, C).

    On CUDA bfloat16 inputs need no conversion: torch multiplies them exactly there and adds the products in float32.
    """
    if x_nC.is_cuda and x_nC.dtype == torch.bfloat16:
        return torch.mm(x_nC.T, x_nC, out_dtype=torch.float32)
    x_nC = x_nC.float()
    return x_nC.T @ x_nC


def _batches(settings: GptqSettings, model: GPT, tokens: Path, seed: int) -> Iterator[Tensor]:
    """The batches of the calibration text, each int64 (batch_rows, T)."""
    shape = settings.batches, settings.batch_rows, model.config.seq_len
    return TEXTS[settings.calibration](settings, model, tokens, shape, seed)


# Batches, rows of a batch, and tokens of a row.
BatchShape = tuple[int, int, int]


def _rows_of_shards(settings: GptqSettings, model: GPT, tokens: Path, shape: BatchShape, seed: int) -> Iterator[Tensor]:
    paths = shard_paths(tokens, "train" if settings.calibration == "train" else "val")
    shards = Tokens(paths, vocab_size=model.config.vocab_size)
    return random_rows(shards.read, shards.total, shape, seed=seed)


def _rows_of_text(settings: GptqSettings, model: GPT, tokens: Path, shape: BatchShape, seed: int) -> Iterator[Tensor]:
    ids = _text_tokens(Path(str(settings.path)), tokens / "tokenizer.model")
    return random_rows(lambda start, count: ids[start : start + count], len(ids), shape, seed=seed)


def _generated_rows(settings: GptqSettings, model: GPT, tokens: Path, shape: BatchShape, seed: int) -> Iterator[Tensor]:
    return generate_text(model, shape, seed=seed)


# Where the calibration text comes from, by the name that quantize.gptq.calibration gives it. A table, so that the
# program that ships carries the one that its record uses.
TEXTS: dict[str, Callable[[GptqSettings, GPT, Path, BatchShape, int], Iterator[Tensor]]] = {
    "train": _rows_of_shards,
    "validation": _rows_of_shards,
    "text": _rows_of_text,
    "generated": _generated_rows,
}


def random_rows(
    read: Callable[[int, int], np.ndarray], total: int, shape: BatchShape, *, seed: int
) -> Iterator[Tensor]:
    """Batches int64 (rows, T) of a text of `total` tokens; `shape` is (batches, rows, T).

    A row begins at a random multiple of T. No row is taken twice if the text has enough of them. `read(start, count)`
    returns the tokens (count,) int64 from a position on. Raises UserError on a text shorter than one row.
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
    """The tokens (n,) int64 of a text file. Raises UserError unless it is a file of UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"params.yaml: quantize.gptq.path: {path}: expected a file of UTF-8 text") from None
    return np.array(Tokenizer(tokenizer).encode(text), dtype=np.int64)


# The temperature at which PR #1019 lets the network write.
TEMPERATURE = 0.8


def generate_text(model: GPT, shape: BatchShape, *, seed: int) -> Iterator[Tensor]:
    """Batches int64 (rows, T) of text that the network writes, so that calibration needs no data at all.

    `shape` is (batches, rows, T). The first token of a row is uniform over the vocabulary, each later one is drawn from
    softmax(logits / 0.8). The network runs over all tokens so far to draw the next one.
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
