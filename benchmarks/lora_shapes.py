"""What a step of phased LoRA TTT takes for every shape that groups of documents have, and what the challenge's take so.

Reads:  records/<record>.yaml, and with --lengths a text file of whole numbers
Prints: milliseconds to score a group of documents and to fit its adapters, by rows and tokens of a window; the seconds
        that the challenge's 50,000 documents take a GPU for each lane, slowest lane by phase, added up step by step,
        with one recording of every shape and the steps of global SGD; with --lengths also the seconds that an
        evaluation of random documents of these lengths takes this process, all lanes one after the other.
Method: random weights and tokens; recorded graphs, the fastest of three runs, in deterministic mode. In a long run the
        GPU is slower, because its power is limited: 50 s of steps by the table took 60 s in a row.
Usage:  python -m benchmarks.lora_shapes r1958-lora-ttt --lengths lengths.txt --prefix 40
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.document_lengths import CHALLENGE_DOCUMENTS, document_stream, document_targets
from benchmarks.evaluate import random_network
from benchmarks.phased_ttt import TimedPass, global_steps, time_global_step
from fairway.evaluation.adapter_steps import AdamW, AdapterSets, AdapterSteps
from fairway.evaluation.collect import collect
from fairway.evaluation.document_batches import (
    Cut,
    Document,
    by_length,
    lanes_of,
    phase_ends,
    row_groups,
    window_length,
)
from fairway.evaluation.lora_adapters import numbers_of_a_set
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttSettings
from fairway.model.gpt import GPT
from fairway.params import load_params
from fairway.runtime.distributed import World, make_deterministic, start_world

# Rows of a group and tokens of a window.
Shape = tuple[int, int]


class Step(NamedTuple):
    """Seconds to score a group, to fit its adapters, and what the first two meetings with its shape take longer."""

    score_s: float
    fit_s: float
    first_s: float


def main() -> None:
    """Print all of it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("record", help="name of a file in records/ with a section lora_ttt")
    arguments.add_argument("--lengths", type=Path, help="targets of documents to evaluate, one number a line")
    arguments.add_argument("--prefix", type=int, help="lora_ttt.prefix_documents of that evaluation")
    chosen = arguments.parse_args()
    params = load_params(Path(f"records/{chosen.record}.yaml"))
    settings = params.evaluator_settings("lora_ttt")
    assert isinstance(settings, LoraTttSettings)
    make_deterministic()
    with start_world() as world:
        model = random_network(params.model).to_device(world.device)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, 1 process")
        if chosen.lengths:
            prefix = chosen.prefix or settings.prefix_documents
            lengths = [int(line) for line in chosen.lengths.read_text().split()]
            evaluate(model, settings.model_copy(update={"prefix_documents": prefix}), lengths, world)
        challenge(model, settings, world)


def evaluate(model: GPT, settings: LoraTttSettings, lengths: list[int], world: World) -> None:
    """Print how long an evaluation of documents of these lengths takes, chunk by chunk."""
    tokens_N1 = document_stream(lengths, vocab_size=model.config.vocab_size, seed=1).to(world.device)
    started_at = perf_counter()
    timed = TimedPass(LoraTttEvaluator(settings).begin(model, tokens_N1, world), world)
    scores = collect(timed, tokens_N1, world, scored=lambda positions, nats: None)
    seconds, peak = perf_counter() - started_at, torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{len(lengths)} documents, {len(tokens_N1) - 1} targets: {seconds:.1f} s, scoring and fitting "
        f"{_added(timed.predict_s)}, global SGD {_added(timed.learn_s)}; {peak:.1f} GiB; "
        f"{float(scores.nats_N.mean()):.4f} nats a target",
        flush=True,
    )


def challenge(model: GPT, settings: LoraTttSettings, world: World) -> None:
    """Print the time of every shape, and of the challenge's documents lane by lane."""
    size, seq_len = settings.chunk_tokens, model.config.seq_len
    targets = document_targets(CHALLENGE_DOCUMENTS)
    batches = by_length([Document(0, count) for count in targets], settings.batch_documents)
    each = [list(group_steps(batch, size, seq_len)) for batch in batches]
    shapes = sorted({shape for steps in each for shape, _ in steps})
    time_step = timer(model, settings, world)
    table = {shape: time_step(shape) for shape in shapes}
    print("| rows | tokens | score, ms | fit, ms | µs a token |\n|---:|---:|---:|---:|---:|")
    for (rows, length), step in table.items():
        both_s = step.score_s + step.fit_s
        figures = (f"{step.score_s * 1e3:.2f}", f"{step.fit_s * 1e3:.2f}", f"{both_s / rows / length * 1e6:.3f}")
        print(f"| {rows} | {length} | {' | '.join(figures)} |")
    global_s = time_global_step(model, settings, world)
    seconds = [sum(table[shape].score_s + fits * table[shape].fit_s for shape, fits in steps) for steps in each]
    ends = phase_ends(batches, settings.prefix_documents, settings.phases, settings.lanes)
    lane_of = lanes_of(batches, settings.lanes, independent=settings.independent, seq_len=seq_len)
    slowest, mean, trained = [], [], []
    for begin, end in pairwise([0, *ends, len(batches)]):
        of_lanes = [sum(seconds[i] for i in range(begin, end) if lane_of[i] == k) for k in range(settings.lanes)]
        slowest.append(max(of_lanes))
        mean.append(sum(of_lanes) / settings.lanes)
    for phase, end in enumerate(ends):
        count = settings.prefix_documents * (phase + 1) // settings.phases
        trained.append(global_s * global_steps(batches, end, count, settings.global_chunk_tokens))
    first_s = sum(step.first_s for step in table.values())
    total_s = sum(slowest) + sum(trained) + first_s
    print(
        f"{CHALLENGE_DOCUMENTS} documents, a GPU for each lane: slowest lane {_added(slowest)} (mean {sum(mean):.0f}), "
        f"global SGD {_added(trained)} ({global_s * 1e3:.1f} ms a step), recording {first_s:.1f}: {total_s:.0f} s"
    )


def _added(seconds: list[float]) -> str:
    return " + ".join(f"{s:.1f}" for s in seconds)


def group_steps(batch: list[Document], size: int, seq_len: int) -> list[tuple[Shape, bool]]:
    """Shapes of all groups that a batch is scored in, and whether any of their documents goes on."""
    steps = []
    for begin in range(0, batch[-1].targets, size):
        length = window_length(batch, begin + size, seq_len)
        for rows in row_groups(batch, begin, length):
            group = batch[rows]
            shape = len(group), window_length(group, begin + size, seq_len)
            steps.append((shape, group[-1].targets > begin + size))
    return steps


def timer(model: GPT, settings: LoraTttSettings, world: World) -> Callable[[Shape], Step]:
    """What times the steps of a shape."""
    most, rank, size, seq_len = settings.batch_documents, settings.rank, settings.chunk_tokens, model.config.seq_len
    tokens_N1 = document_stream([2 * seq_len] * most, vocab_size=model.config.vocab_size, seed=2).to(world.device)
    scoring = random_network(model.config).to_device(world.device).to(model.compute_dtype).requires_grad_(False)
    steps = AdapterSteps(scoring, tokens_N1, most=most, rank=rank, scale=settings.alpha / rank)
    first, numbers = numbers_of_a_set(model.config, rank)
    numbers_BP = 0.02 * torch.randn(most, numbers, device=world.device)
    sets = AdapterSets(numbers_BP, first, AdamW(settings.lr, settings.beta2, settings.weight_decay))

    def seconds(work: Callable[[], object]) -> float:
        world.synchronize()
        started_at = perf_counter()
        work()
        world.synchronize()
        return perf_counter() - started_at

    def time_step(shape: Shape) -> Step:
        count, length = shape
        documents = [Document(row * 2 * seq_len, 2 * seq_len) for row in range(count)]
        cut, rows = Cut(documents, length - size, size, seq_len), slice(0, count)

        def score() -> Tensor:
            return steps.score(cut, sets.numbers_BP[rows])

        def both() -> None:
            score()
            sets.step(rows, steps.gradients(cut), 1)

        early_s = seconds(both) + seconds(both)
        score_s = min(seconds(score) for _ in range(3))
        both_s = min(seconds(both) for _ in range(3))
        return Step(score_s, both_s - score_s, max(early_s - 2 * both_s, 0.0))

    return time_step


if __name__ == "__main__":
    main()
