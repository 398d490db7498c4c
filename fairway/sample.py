"""What the record writes when it goes on from a prompt, token by token.

Reads:  artifacts/compress/<seed>/model.bin of the first seed in params.yaml, artifacts/tokens
Prints: the prompt and what follows, up to so many tokens or the end of the document
Method: tokens drawn from softmax(logits / temperature); temperature 0 takes the likeliest
Usage:  python -m fairway.sample "prompt" [--temperature 0.8] [--seed 1] [--tokens 200]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fairway.decoding.lanes import Lanes
from fairway.decoding.language import Language, load_language
from fairway.decoding.spelling import Reader
from fairway.params import load_params
from fairway.runtime.errors import UserError, run_stage
from fairway.tokens.tokenizer import BOS


def main() -> None:
    """Print a continuation."""
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(1)
    language = load_language(Path("artifacts"), load_params("params.yaml").seeds[0])
    print(arguments.prompt, end="", flush=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    for text in continuation(
        language, arguments.prompt, tokens=arguments.tokens, temperature=arguments.temperature, generator=generator
    ):
        print(text, end="", flush=True)
    print()


def parse(words: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError if the prompt is no text or a number is out of range."""
    parser = argparse.ArgumentParser(prog="python -m fairway.sample", description="Continue a prompt.")
    parser.add_argument("prompt", help="the beginning of a document; may be empty")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many (default: 200)")
    arguments = parser.parse_args(words)
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature}: expected 0 or more")
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens}: expected 0 or more")
    try:
        arguments.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("prompt: expected UTF-8 text") from None
    return arguments


def continuation(
    language: Language, prompt: str, *, tokens: int, temperature: float, generator: torch.Generator
) -> Iterator[str]:
    """The text behind a prompt, in pieces, until the network starts a new document or there are so many tokens.

    Tokens that stand for no text there, such as half a character behind a whole one, are never drawn.
    """
    lanes, reader = Lanes(language.model, 1), Reader(language.spelling)
    for token in (known := [BOS, *language.spelling.encode(prompt)]):
        log_probs_V = lanes.step(torch.tensor([token]))[0].clone()
    for token in known[1:]:
        reader.feed(token)
    for _ in range(tokens):
        text, token = None, BOS
        while text is None and (token := _draw(log_probs_V, temperature, generator)) != BOS:
            text = reader.feed(token)
            log_probs_V[token] = -torch.inf
        if text is None:
            return
        yield text
        log_probs_V = lanes.step(torch.tensor([token]))[0].clone()


def _draw(log_probs_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(log_probs_V.argmax())
    return int((log_probs_V.double() / temperature).softmax(0).multinomial(1, generator=generator))


if __name__ == "__main__":
    run_stage(main)
