"""How long phased LoRA TTT takes, by its phases, and what the challenge's stream would take eight GPUs.

Documents of very different lengths cannot be scaled by their number of targets: a target costs 1 GFLOP in a document
of 500 tokens and 14 in one of 10,000, and a batch runs as long as its longest document. So the time of a chunk, all
that lies between two phases, is fitted as

    seconds = step_s · steps of its batches + token_s · tokens in the windows of its documents

and what the challenge takes is added up from its own batches, lane by lane. Between two phases lanes do not wait for
each other, so that the slowest lane of each chunk counts; steps of global SGD come on top, of one lane's share each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.document_lengths import CHALLENGE_DOCUMENTS, document_stream, document_targets, documents_for
from fairway.evaluation.collect import collect
from fairway.evaluation.document_batches import Document, by_length, lanes_of, phase_ends
from fairway.evaluation.lora_ttt import LoraTttEvaluator, LoraTttPass, LoraTttSettings
from fairway.evaluation.passes import Pass, Prediction, State
from fairway.model.gpt import GPT
from fairway.runtime.distributed import World

# Chunks of targets of each document of the stream that warms up, and global steps that are timed.
BRIEF_CHUNKS, GLOBAL_STEPS = 4, 5


@dataclass(frozen=True)
class Work:
    """Batch steps, and tokens in the windows of all documents that have not ended."""

    steps: int
    window_tokens: int


@dataclass(frozen=True)
class Rates:
    """Seconds of a batch step, of a token in a window, and of a step of global SGD on one lane's share."""

    step_s: float
    token_s: float
    global_step_s: float

    def seconds(self, work: Work) -> float:
        """What scoring and fitting take."""
        return self.step_s * work.steps + self.token_s * work.window_tokens


@dataclass(frozen=True)
class PhasedTimes:
    """Seconds of every chunk (scoring and fitting) and of the phase of global SGD behind it, and what it all gives."""

    cold_s: float
    targets: int
    chunk_s: list[float]
    global_s: list[float]
    rates: Rates
    # The challenge's stream on as many GPUs as there are lanes: the slowest lane of each chunk with its phase.
    challenge_s: list[float]

    @property
    def warm_s(self) -> float:
        """The whole evaluation."""
        return sum(self.chunk_s) + sum(self.global_s)

    def summary(self) -> str:
        """One line: where the seconds went, the fitted rates and the projection."""
        *before, rest = self.chunk_s
        parts = {"longest documents": sum(before), "rest": rest, "global SGD": sum(self.global_s)}
        shares = ", ".join(f"{name} {s:.1f} s ({s / self.warm_s:.0%})" for name, s in parts.items())
        r = self.rates
        return (
            f"lora_ttt: {self.targets} targets: {shares}; {r.step_s * 1e3:.2f} ms a batch step and "
            f"{r.token_s * 1e6:.3f} us a window token, {r.global_step_s * 1e3:.1f} ms a global step; "
            f"{CHALLENGE_DOCUMENTS} documents, slowest GPU by phase: "
            f"{' + '.join(f'{s:.0f}' for s in self.challenge_s)} = {sum(self.challenge_s):.0f} s"
        )


class TimedPass(Pass):
    """A pass that notes how long each of its chunks takes, what is done with the predictions included."""

    def __init__(self, timed: Pass, world: World) -> None:
        self.timed, self.world, self.chunks = timed, world, timed.chunks
        self.predict_s: list[float] = []
        self.learn_s: list[float] = []

    def predict(self, chunk: int, wanted: Tensor | None = None) -> Iterator[Prediction]:
        """The pass's own predictions."""
        started_at = perf_counter()
        yield from self.timed.predict(chunk, wanted)
        self.predict_s.append(self._since(started_at))

    def learn(self, chunk: int) -> None:
        """What the pass learns."""
        started_at = perf_counter()
        self.timed.learn(chunk)
        self.learn_s.append(self._since(started_at))

    def _since(self, started_at: float) -> float:
        self.world.synchronize()
        return perf_counter() - started_at

    def state(self) -> State:
        """The pass's own."""
        return self.timed.state()

    def restore(self, state: State) -> None:
        """To the pass."""
        self.timed.restore(state)


def work_of(batch: list[Document], *, chunk_tokens: int, seq_len: int) -> Work:
    """What a batch of documents asks for."""
    chunks = [-(-document.targets // chunk_tokens) for document in batch]
    tokens = 0
    for document, count in zip(batch, chunks, strict=True):
        growing = min(count - 1, seq_len // chunk_tokens)
        tokens += chunk_tokens * growing * (growing + 1) // 2 + (count - 1 - growing) * seq_len
        tokens += min(document.targets, seq_len)
    return Work(max(chunks), tokens)


def fit_rates(works: list[Work], seconds: list[float]) -> tuple[float, float]:
    """step_s and token_s, neither below zero, by least squares of what they are off by in shares of the seconds."""
    A = torch.tensor([[work.steps / s, work.window_tokens / s] for work, s in zip(works, seconds, strict=True)])
    A, ones = A.double(), torch.ones(len(seconds), dtype=torch.float64)
    if len(seconds) > 1:
        step_s, token_s = torch.linalg.lstsq(A, ones).solution.tolist()
        if step_s >= 0 and token_s >= 0:
            return step_s, token_s
    # The better of the two with one rate alone.
    alone = [(float(a @ ones / (a @ a)), index) for index, a in enumerate(A.T)]
    rate, index = min(alone, key=lambda pair: float((A[:, pair[1]] * pair[0] - 1).square().sum()))
    return (rate, 0.0) if index == 0 else (0.0, rate)


def global_steps(batches: list[list[Document]], end: int, count: int, chunk_tokens: int) -> int:
    """Steps of global SGD on the `count` shortest documents of the first `end` batches; the last chunk is skipped."""
    done = [document for batch in reversed(batches[:end]) for document in batch]
    tokens = sum(document.targets + 1 for document in done[:count])
    return -(-(tokens - 1) // chunk_tokens) - 1


def project(lengths: list[int], settings: LoraTttSettings, rates: Rates, *, seq_len: int) -> list[float]:
    """Seconds of each chunk and the phase behind it where every lane has a GPU of its own; lengths ascend."""
    batches = by_length([Document(0, targets) for targets in lengths], settings.batch_documents)
    ends = phase_ends(batches, settings.prefix_documents, settings.phases, settings.lanes)
    lane_of = lanes_of(batches, settings.lanes, independent=settings.independent, seq_len=seq_len)
    seconds = []
    for begin, end in zip([0, *ends], [*ends, len(batches)], strict=True):
        of_lanes = [0.0] * settings.lanes
        for index in range(begin, end):
            work = work_of(batches[index], chunk_tokens=settings.chunk_tokens, seq_len=seq_len)
            of_lanes[lane_of[index]] += rates.seconds(work)
        seconds.append(max(of_lanes))
    for phase, end in enumerate(ends):
        count = settings.prefix_documents * (phase + 1) // settings.phases
        seconds[phase] += rates.global_step_s * global_steps(batches, end, count, settings.global_chunk_tokens)
    return seconds


def time_phased(model: GPT, settings: LoraTttSettings, world: World, *, targets: int) -> PhasedTimes:
    """Time an evaluation of about so many targets in one lane, its phases as early in the stream as the challenge's."""
    vocab_size, seq_len, count = model.config.vocab_size, model.config.seq_len, documents_for(targets)
    prefix = max(settings.phases, settings.prefix_documents * count // CHALLENGE_DOCUMENTS)
    one_lane = settings.model_copy(update={"lanes": 1, "prefix_documents": prefix})
    cold_s = _cold_seconds(model, one_lane, world)
    tokens_N1 = document_stream(document_targets(count), vocab_size=vocab_size, seed=1).to(world.device)
    evaluation, timed = _timed(model, one_lane, tokens_N1, world)
    works = [
        _total(evaluation.batches[begin:end], chunk_tokens=settings.chunk_tokens, seq_len=seq_len)
        for begin, end in pairwise(evaluation.bounds)
    ]
    rates = Rates(*fit_rates(works, timed.predict_s), global_step_s=time_global_step(model, settings, world))
    challenge_s = project(document_targets(CHALLENGE_DOCUMENTS), settings, rates, seq_len=seq_len)
    return PhasedTimes(cold_s, len(tokens_N1) - 1, timed.predict_s, timed.learn_s, rates, challenge_s)


def _cold_seconds(model: GPT, settings: LoraTttSettings, world: World) -> float:
    """What a batch of short documents takes longer in a process that has not seen one."""
    lengths = [BRIEF_CHUNKS * settings.chunk_tokens] * settings.batch_documents
    tokens_N1 = document_stream(lengths, vocab_size=model.config.vocab_size, seed=1).to(world.device)
    no_phases = settings.model_copy(update={"phases": 0, "prefix_documents": 0})
    first_s, second_s = (sum(_timed(model, no_phases, tokens_N1, world)[1].predict_s) for _ in range(2))
    return max(first_s - second_s, 0.0)


def _timed(model: GPT, settings: LoraTttSettings, tokens_N1: Tensor, world: World) -> tuple[LoraTttPass, TimedPass]:
    """A pass that has been run to its end, and its times."""
    evaluation = LoraTttEvaluator(settings).begin(model, tokens_N1, world)
    assert isinstance(evaluation, LoraTttPass)
    timed = TimedPass(evaluation, world)
    collect(timed, tokens_N1, world, scored=lambda positions, nats: None)
    return evaluation, timed


def _total(batches: list[list[Document]], *, chunk_tokens: int, seq_len: int) -> Work:
    works = [work_of(batch, chunk_tokens=chunk_tokens, seq_len=seq_len) for batch in batches]
    return Work(sum(work.steps for work in works), sum(work.window_tokens for work in works))


def time_global_step(model: GPT, settings: LoraTttSettings, world: World) -> float:
    """Seconds that a step of global SGD takes a GPU which has one lane's share of it to do.

    The processes there are work off all lanes, one after the other; what GPUs send each other is not counted.
    """
    rows, lanes = settings.batch_documents, settings.lanes
    # As many documents of one length make a step as make a batch. A phase comes a batch for each lane later than due.
    lengths = [max(settings.global_chunk_tokens // rows - 1, 1)] * (rows * (GLOBAL_STEPS + 1 + lanes))
    tokens_N1 = document_stream(lengths, vocab_size=model.config.vocab_size, seed=2).to(world.device)
    one_phase = settings.model_copy(update={"phases": 1, "prefix_documents": rows * (GLOBAL_STEPS + 1)})
    timed = TimedPass(LoraTttEvaluator(one_phase).begin(model, tokens_N1, world), world)
    for _ in range(2):
        timed.learn(0)
    return timed.learn_s[-1] / GLOBAL_STEPS / (lanes / world.size)
