"""Hessians of a network's matrices: what their inputs look like on some text.

Legend: B rows, T tokens, n inputs of a product flattened to rows, C features, X (n, C) the inputs of a matrix.

Source: PR #1172 and #1855: the mean over batches of XᵀX. The first damps it here already, we only in gptq.py.

The text that GPTQ's Hessians are collected on.

Legend: B rows, T tokens, V vocabulary.

Source: PR #1172 and #1855 (training text), PR #1019 (text that the network wrote). Ours: rows are drawn at random from
all shards, by the seed, so that neither paths nor ranks decide; a text file; validation text, to show what that buys.
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


class _Taps(TorchFunctionMode):
    """Sums XᵀX of every product X·Wᵀ with one of the given weights, however often a forward pass visits it.

    Watching the product itself needs no hooks in the network and sees exactly what W is multiplied with. A weight is
    recognised by the cast to the activations' dtype that comes before each product.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.sums: dict[str, Tensor] = {}
        # Query, key and value read the same input: the last one is kept with its product.
        self.last: tuple[Tensor, Tensor] | None = None
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
        if self.last is None or self.last[0] is not x:
            self.last = x, _gram(x.detach().flatten(0, -2))
        product = self.last[1]
        self.sums[name] = self.sums[name] + product if name in self.sums else product


def _gram(x_nC: Tensor) -> Tensor:
    """XᵀX, float32 (C, C). Of bfloat16 on CUDA, products are exact and sums float32: no need to convert first."""
    if x_nC.is_cuda and x_nC.dtype == torch.bfloat16:
        return torch.mm(x_nC.T, x_nC, out_dtype=torch.float32)
    x_nC = x_nC.float()
    return x_nC.T @ x_nC


def collect_hessians(model: GPT, batches_BT: Iterable[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Mean over batches of XᵀX, float32 (C, C) on the model's device, for each named weight of `model`.

    Rows are taken whole, without document masks, with depth recurrence on: layers visited repeatedly count repeatedly.
    The token table's X is the final hidden state, since it is the output head.
    """
    weights = dict(model.named_parameters())
    taps, count = _Taps({name: weights[name] for name in names}), 0
    device = next(model.parameters()).device
    for tokens_BT in batches_BT:
        # Entered anew for each batch: whatever makes the batches may run the network too.
        with torch.no_grad(), plain_products(), taps:
            hidden = model.hidden(tokens_BT.to(device))
            if "embed.token" in names:
                model.logits(hidden)
        count += 1
    assert taps.sums.keys() == set(names), "the network multiplies with each of these weights"
    return {name: total / count for name, total in taps.sums.items()}


# PR #1019's temperature of self-generated text.
TEMPERATURE = 0.8


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
    """Hessians, float32 (C, C) on `device`, of the weights that quantize.gptq wants rounded; none where it is null.

    `path` is where the weights come from, `tokens` the token folder. Raises UserError if the weights do not fit
    `config` or the text is missing or too short.
    """
    if settings is None:
        return {}
    model = load_network(config, weights, path, device).eval()
    with Progress("calibrate", settings.batches, unit="batches") as progress:
        batches_BT = _batches(settings, model, tokens, seed)
        return collect_hessians(model, _counted(batches_BT, progress), calibrated_names(weights, settings))


def calibrated_names(weights: dict[str, Tensor], settings: GptqSettings) -> list[str]:
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


def _batches(settings: GptqSettings, model: GPT, tokens: Path, seed: int) -> Iterator[Tensor]:
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
