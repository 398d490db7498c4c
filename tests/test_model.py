"""The network's promises that need no golden numbers: sizes, starting point, causality, documents, dtypes."""

import math
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from forks import ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from warm_python import warm_python

from fairway.model.attention import frequencies
from fairway.model.backends import compiled
from fairway.model.causal_attention import attend
from fairway.model.config import ModelConfig, Rope
from fairway.model.embedding import bigram_bucket
from fairway.model.gpt import GPT, param_groups
from fairway.model.precision import rms_norm
from fairway.tokens.tokenizer import BOS

# The published networks (PR #1150, #1172, #1488, #1958), as differences from the first.
R1150: dict[str, Any] = {
    "vocab_size": 1024,
    "layers": 11,
    "width": 512,
    "heads": 8,
    "kv_heads": 4,
    "mlp_hidden": 1536,
    "seq_len": 2048,
    "softcap": 30.0,
    "embed_init_std": 5e-3,
    "table_dtype": "bfloat16",
    "skip_gate_dtype": "float32",
    "qk_gain": 1.5,
    "rope": {"dims": 16, "base": 10000.0, "reference_len": 1024, "bf16_frequencies": False},
    "xsa_last_layers": 4,
    "skip": "plain",
    "smear": {"kind": "static", "window": 0},
    "bigram": {"buckets": 2048, "width": 128, "proj_init": 1.0},
    "value_embedding": {"width": 128, "layers": [9, 10], "proj_init": 1.0},
    "value_residual": False,
    "attn_gate": None,
    "lanes_from": None,
    "loop": None,
}
R1172 = R1150 | {
    "xsa_last_layers": 11,
    "skip": "gated",
    "skip_gate_dtype": "bfloat16",
    "bigram": {"buckets": 2816, "width": 160, "proj_init": 1.0},
}
R1488 = R1150 | {
    "qk_gain": 5.25,
    "xsa_last_layers": 11,
    "bigram": {"buckets": 1024, "width": 128, "proj_init": 22**-0.5},
    "value_embedding": {"width": 128, "layers": [9, 10], "proj_init": 22**-0.5},
    "value_residual": True,
}
R1958 = R1150 | {
    "vocab_size": 8192,
    "mlp_hidden": 2048,
    "softcap": 15.0,
    "qk_gain": 5.0,
    "rope": {"dims": 16, "base": 10000.0, "reference_len": None, "bf16_frequencies": True},
    "xsa_last_layers": 11,
    "skip": "gated",
    "smear": {"kind": "gated", "window": 12},
    "bigram": None,
    "value_embedding": None,
    "attn_gate": {"window": 12, "scale": 0.5},
    "lanes_from": 8,
    "loop": {"first": 3, "last": 5, "repeats": 2},
}
RECORDS = {"r1150": R1150, "r1172": R1172, "r1488": R1488, "r1958": R1958}
# The same mechanisms and depth, small.
SMALL = {"vocab_size": 40, "width": 32, "heads": 4, "kv_heads": 2, "mlp_hidden": 48, "seq_len": 16}
EVERY_RECORD = pytest.mark.parametrize("record", RECORDS)


def small_config(record: str) -> ModelConfig:
    settings = RECORDS[record] | SMALL
    return ModelConfig.model_validate(settings | {"rope": settings["rope"] | {"dims": 8}})


def shallow_config(record: str) -> ModelConfig:
    """small_config with four layers, which still have every mechanism of the record."""
    config = small_config(record).model_dump()
    changes: dict[str, Any] = {"layers": 4, "xsa_last_layers": 2}
    if config["value_embedding"]:
        changes["value_embedding"] = config["value_embedding"] | {"layers": [2, 3]}
    if config["loop"]:
        changes |= {"lanes_from": 3, "loop": {"first": 1, "last": 1, "repeats": 2}}
    return ModelConfig.model_validate(config | changes)


def small_network(record: str, *, started: bool = True, shallow: bool = False) -> GPT:
    """A network with the record's mechanisms; `started` moves every parameter off its initial value."""
    model = GPT(shallow_config(record) if shallow else small_config(record))
    model.init_weights(7)
    generator = torch.Generator().manual_seed(8)
    if started:
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def random_tokens(seed: int, rows: int = 2, length: int = 16) -> Tensor:
    """Tokens of the small vocabulary without document starts."""
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: GPT, tokens: Tensor, **arguments: Any) -> Tensor:
    return model.logits(model.hidden(tokens, **arguments))


@pytest.mark.parametrize(
    ("record", "parameters"),
    [("r1150", 26_993_756), ("r1172", 27_201_116), ("r1488", 26_862_694), ("r1958", 35_945_671)],
)
def test_a_record_has_exactly_the_published_number_of_parameters(record: str, parameters: int) -> None:
    """The totals in the records' logs; PR #1150's README says otherwise and is wrong."""
    with torch.device("meta"):
        model = GPT(ModelConfig.model_validate(RECORDS[record]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@EVERY_RECORD
def test_the_groups_hold_every_parameter_once(record: str) -> None:
    model = small_network(record)
    groups = param_groups(model)
    assert sorted(name for group in groups.values() for name, _ in group) == sorted(dict(model.named_parameters()))
    assert len(groups["matrix"]) == 6 * model.config.layers
    assert {parameter.ndim for _, parameter in groups["matrix"]} == {2}


def test_side_matrices_move_from_scalar_to_matrix() -> None:
    model = small_network("r1488")
    plain, moved = param_groups(model), param_groups(model, side_matrices=True)
    assert {name for name, _ in moved["matrix"]} - {name for name, _ in plain["matrix"]} == {"bigram.proj", "ve.proj"}
    assert moved["table"] == plain["table"]


@EVERY_RECORD
@pytest.mark.parametrize("looped", [False, True])
def test_at_the_start_only_the_embedding_speaks(record: str, looped: bool) -> None:
    """Every block starts as the identity, so the stream ends as a multiple of x0, which the final norm removes."""
    model, seen = small_network(record, started=False), []
    model.get_submodule("layer0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = logits(model, random_tokens(0), looped=looped)
    head = rms_norm(seen[0]) @ model.embed.token.float().T
    torch.testing.assert_close(found, model.config.softcap * torch.tanh(head / model.config.softcap))


@pytest.mark.parametrize(("record", "factor"), [("r1150", 6.0), ("r1488", 6.0), ("r1172", 1.0)])
def test_skips_start_as_a_known_multiple_of_the_embedding(record: str, factor: float) -> None:
    model, seen = small_network(record, started=False), []
    model.get_submodule("layer0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.get_submodule("layer10").register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    logits(model, random_tokens(0))
    torch.testing.assert_close(seen[1], factor * seen[0])


@pytest.mark.parametrize("looped", [False, True])
def test_lanes_start_as_known_multiples_of_the_embedding(looped: bool) -> None:
    """Lane weights start at 1.1, stored as the bfloat16 number 1.1015625; lane 0 also takes gated skips (½, ½)."""
    model, seen = small_network("r1958", started=False), []
    assert model.lanes is not None
    model.get_submodule("layer0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.lanes.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    logits(model, random_tokens(0), looped=looped)
    r, (lane0, lane1) = 1.1015625, seen[-1]
    # Layers 8 and 9 merge a skip, looped or not; layer 10 has none left.
    torch.testing.assert_close(lane0, r * r * (r / 2 + 0.5) * seen[0])
    torch.testing.assert_close(lane1, r**3 * seen[0])


@EVERY_RECORD
def test_loss_starts_at_the_uniform_distribution(record: str) -> None:
    model = small_network(record, started=False)
    tokens = random_tokens(1)
    assert model(tokens, tokens.roll(-1)).item() == pytest.approx(math.log(40), abs=0.05)


@EVERY_RECORD
def test_initial_values_follow_the_seed_and_are_bfloat16_numbers(record: str) -> None:
    """The records cast the whole network to bfloat16 before they restore the float32 masters."""
    first, again, other = GPT(small_config(record)), GPT(small_config(record)), GPT(small_config(record))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        model.init_weights(seed)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value.float(), value.bfloat16().float()), name
    assert not torch.equal(first.embed.token, other.embed.token)


def draw_with_threads() -> None:
    """Leave in the current folder, by its rank, the weights that a process with one thread more than its rank draws."""
    wide = {"layers": 2, "xsa_last_layers": 1, "width": 256, "mlp_hidden": 1024, "value_embedding": None}
    model, threads = GPT(ModelConfig.model_validate(small_config("r1488").model_dump() | wide)), int(os.environ["RANK"])
    torch.set_num_threads(threads + 1)
    model.init_weights(1)
    assert torch.get_num_threads() == threads + 1
    torch.save(model.state_dict(), f"{threads}.pt")


def test_initial_weights_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    ranks(draw_with_threads, tmp_path, processes=3)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


def published_initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The random weights of PR #1488: its modules in the order of their making, then in that order drawn anew."""
    assert config.bigram
    assert config.value_embedding
    width, kv_width = config.width, config.kv_heads * config.head_dim
    shapes = {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "o": (width, width)}
    made: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made["embed.token"] = nn.Embedding(config.vocab_size, width)
        made["bigram.table"] = nn.Embedding(config.bigram.buckets, config.bigram.width)
        made["bigram.proj"] = nn.Linear(config.bigram.width, width, bias=False)
        for i in range(config.layers):
            made |= {f"layer{i}.attn.{name}": nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
            made[f"layer{i}.mlp.up"] = nn.Linear(width, config.mlp_hidden, bias=False)
            made[f"layer{i}.mlp.down"] = nn.Linear(config.mlp_hidden, width, bias=False)
        made["ve.table"] = nn.Embedding(config.vocab_size, config.value_embedding.width)
        nn.init.normal_(made["ve.table"].get_parameter("weight"), std=0.01)
        made["ve.proj"] = nn.Linear(config.value_embedding.width, kv_width, bias=False)
        nn.init.normal_(made["embed.token"].get_parameter("weight"), std=config.embed_init_std)
        for name, module in made.items():
            if isinstance(module, nn.Linear) and not name.endswith((".o", ".down")):
                nn.init.orthogonal_(module.weight, gain=22**-0.5 if name.endswith(".proj") else 1.0)
    kept = {name: module.get_parameter("weight") for name, module in made.items()}
    return {
        name: weight.detach() for name, weight in kept.items() if not name.endswith((".o", ".down", "bigram.table"))
    }


def test_a_seed_gives_the_initial_weights_that_pr_1488_has_from_it() -> None:
    model = GPT(small_config("r1488"))
    model.init_weights(42)
    expected = published_initial_weights(model.config, 42)
    assert len(expected) == 4 + 4 * model.config.layers
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name).float(), weight.bfloat16().float()), name


@pytest.mark.parametrize(
    ("name", "scale"),
    [("layer0.attn.q", 1.0), ("layer3.attn.v", 1.0), ("bigram.proj", 22**-0.5), ("ve.proj", 22**-0.5)],
)
def test_projections_start_orthogonal(name: str, scale: float) -> None:
    weight = small_network("r1488", started=False).state_dict()[name]
    short = weight if weight.size(0) <= weight.size(1) else weight.T
    torch.testing.assert_close(short @ short.T, scale**2 * torch.eye(len(short)), rtol=0, atol=1e-2)


@EVERY_RECORD
@settings(max_examples=10, deadline=None)
@given(position=st.integers(0, 15), seed=st.integers(0, 999), looped=st.booleans())
def test_a_future_token_leaves_earlier_logits_unchanged(record: str, position: int, seed: int, looped: bool) -> None:
    model, tokens = small_network(record), random_tokens(seed)
    changed = tokens.clone()
    changed[:, position] = changed[:, position] % 38 + 2
    before, after = logits(model, tokens, looped=looped), logits(model, changed, looped=looped)
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, position], before[:, position], rtol=0, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(start=st.integers(1, 15), seed=st.integers(0, 999), looped=st.booleans())
def test_one_document_never_reaches_the_next(start: int, seed: int, looped: bool) -> None:
    model, tokens = small_network("r1958"), random_tokens(seed, rows=1)
    tokens[:, start] = BOS
    changed = tokens.clone()
    changed[:, :start] = changed[:, :start] % 38 + 2
    segments = torch.tensor([0, start, 16, 16], dtype=torch.int32)
    before, after = (logits(model, row, segments=segments, looped=looped) for row in (tokens, changed))
    torch.testing.assert_close(after[:, start:], before[:, start:], rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(starts=st.sets(st.integers(1, 23)), padding=st.integers(0, 3), seed=st.integers(0, 999))
def test_segmented_attention_is_attention_within_each_segment(starts: set[int], padding: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 12, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = attend(q, k, v, torch.tensor([0, *sorted(starts), *[24] * (padding + 1)], dtype=torch.int32))
    # The row boundary separates like a segment.
    edges = sorted({0, 12, 24} | starts)
    for begin, end in pairwise(edges):
        queries, keys, values = (x.flatten(0, 1)[begin:end][None] for x in (q, k, v))
        expected = attend(queries, keys, values, None)[0]
        torch.testing.assert_close(found.flatten(0, 1)[begin:end], expected, rtol=0, atol=1e-5)


def test_attention_reads_the_key_head_of_its_group() -> None:
    """Against softmax written out, head by head."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = attend(q, k, v, None)
    for head in range(4):
        scores = q[0, :, head] @ k[0, :, head // 2].T / 8**0.5
        weights = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(found[0, :, head], weights @ v[0, :, head // 2])


@EVERY_RECORD
def test_bfloat16_activations_stay_bfloat16_and_near_float32(record: str) -> None:
    """On a GPU activations are bfloat16; nothing on the way may drag them to float32 (the final state shows it)."""
    model, tokens = small_network(record), random_tokens(3)
    exact = model(tokens, tokens.roll(-1))
    model.compute_dtype = torch.bfloat16
    hidden, loss = model.hidden(tokens), model(tokens, tokens.roll(-1))
    assert (hidden.dtype, model.logits(hidden).dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)


@pytest.mark.parametrize(("record", "looped"), [("r1488", False), ("r1958", True)])
def test_the_network_is_one_graph_for_the_compiler(record: str, looped: bool) -> None:
    model, tokens = small_network(record, shallow=True), random_tokens(4)
    segments = torch.tensor([0, 5, 32], dtype=torch.int32) if record == "r1958" else None
    torch.compiler.reset()
    graph = compiled(model, fullgraph=True, backend="eager")
    found = graph(tokens, tokens.roll(-1), segments=segments, looped=looped)
    torch.testing.assert_close(found, model(tokens, tokens.roll(-1), segments=segments, looped=looped))


def test_on_a_cpu_the_compiler_is_not_even_imported() -> None:
    """Its import takes a second, in every stage."""
    code = "import sys, stages.train, stages.certify; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([warm_python(), "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        (2048, [0, 580, 1514, 1082, 977, 1514]),
        (2816, [0, 1856, 2533, 1321, 1331, 1912]),
        (1024, [0, 593, 508, 121, 977, 739]),
    ],
)
def test_bigram_buckets_of_known_pairs(buckets: int, expected: list[int]) -> None:
    """Buckets of the published programs, for (previous, current); a row's first position has the last bucket."""
    pairs = torch.tensor([(0, 0), (1, 0), (0, 1), (5, 7), (1023, 1023), (100, 200)])
    found = bigram_bucket(pairs, buckets)
    assert found[:, 1].tolist() == expected
    assert found[:, 0].unique().tolist() == [buckets - 1]


def test_long_rows_stretch_the_base_and_short_ones_do_not() -> None:
    """PR #1150 at 2048 tokens: base 22081.79, a hard-coded reference length of 1024."""
    rope, cpu = Rope.model_validate(R1150["rope"]), torch.device("cpu")
    assert frequencies(rope, 2048, cpu)[-1].item() == pytest.approx(1.58114e-4, rel=1e-5)
    assert frequencies(rope, 1024, cpu)[-1].item() == pytest.approx(10000.0 ** (-14 / 16), rel=1e-6)


def test_rounded_frequencies_are_those_of_the_record() -> None:
    """PR #1855 keeps them in a buffer that was cast to bfloat16."""
    found = frequencies(Rope.model_validate(R1958["rope"]), 98304, torch.device("cpu"))
    assert found.tolist() == [
        1.0,
        0.31640625,
        0.10009765625,
        0.03173828125,
        0.010009765625,
        0.0031585693359375,
        0.00099945068359375,
        0.000316619873046875,
    ]


def test_looping_repeats_the_middle_layers_on_both_sides() -> None:
    """PR #1855: 17 applications of 11 layers, 8 of them saved for skips."""
    config = ModelConfig.model_validate(R1958)
    assert config.layer_order(looped=False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert config.layer_order(looped=True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert config.skips == 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lanes_from": 5}, r"lanes_from \(5\) not in 6..10"),
        ({"loop": {"first": 5, "last": 3, "repeats": 2}}, r"loop 5..3 must lie in 0..10"),
        ({"smear": {"kind": "gated", "window": 0}}, "smear.window"),
        ({"rope": R1150["rope"] | {"dims": 2}}, "rope.dims must exceed 2"),
        ({"value_embedding": {"width": 8, "layers": [3, 3], "proj_init": 1.0}}, "repeats a layer"),
        ({"value_embedding": {"width": 8, "layers": [11], "proj_init": 1.0}}, r"\[11\] not in 0..10"),
    ],
)
def test_a_contradiction_in_the_config_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ModelConfig.model_validate(R1958 | change)
