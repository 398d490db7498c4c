"""The score of quantized weights as training scores its own: rows of one window each, before any evaluator.

Beside training's figure for the weights as they were, it says what quantization alone cost. An evaluator's figure
cannot, since it also gains from windows that overlap and from what it learns on the way.
"""

from pathlib import Path

import torch

from fairway.codec.codes import QuantizedState, dequantize
from fairway.model.config import ModelConfig
from fairway.model.gpt import load_network
from fairway.runtime.distributed import alone
from fairway.tokens.data_orders import document_segmenter
from fairway.tokens.validation import load_validation
from fairway.training.loop import validate
from fairway.training.schedule import TrainSettings


def quantized_rows_bpb(
    config: ModelConfig,
    settings: TrainSettings,
    state: QuantizedState,
    path: Path,
    tokens: Path,
    device: torch.device,
) -> float:
    """Bits per byte of the validation stream in the folder `tokens` by the weights of `state`, row by row.

    `settings` say how training scored its rows: how many tokens at a time, and whether documents were kept apart. Depth
    recurrence is on, as at the end of training. `path` is the file that the weights come from, for the message of the
    UserError that is raised if they are not those of `config`.
    """
    model = load_network(config, dequantize(state), path, device)
    _, bpb = validate(
        model,
        load_validation(tokens, seq_len=config.seq_len, vocab_size=config.vocab_size),
        alone(device),
        row=config.seq_len,
        batch_tokens=settings.micro_batch_tokens,
        looped=True,
        segment=document_segmenter(settings.loader, cut=config.seq_len),
    )
    return bpb
