"""Bytes per token: the published tables' golden vectors, without the published models.

tests/golden/bpb_bytes.json holds texts, ids and pieces of three vocabularies. Each test model holds exactly those
pieces at exactly those ids, so the table's rules are checked against every published count.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from fairway.runtime.errors import UserError
from fairway.tokens.tokenizer import ByteTable, byte_table

GOLDEN = json.loads((Path(__file__).parent / "golden" / "bpb_bytes.json").read_text(encoding="utf-8"))
# Pieces that only the multi-document streams use, read from the published models.
STREAM_PIECES = {
    "sp1024": {272: "nd", 310: "▁e", 293: "▁d"},
    "sp1024_lab_no_byte_fallback": {772: "▁end", 37: "▁d"},
    "sp8192_lab": {1028: "▁end", 293: "▁d"},
}
Type = proto.ModelProto.SentencePiece


def write_model(path: Path, pieces: dict[int, str], vocab_size: int, *, lossless: bool = False) -> Path:
    """A SentencePiece model with these pieces at these ids; ids 0 to 3 are special and the others unused."""
    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 3, 1, 2
    model.trainer_spec.byte_fallback = "<0x00>" in pieces.values()
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = not lossless
    for text in ("<pad>", "<s>", "</s>"):
        model.pieces.add(piece=text, type=Type.CONTROL)
    model.pieces.add(piece="<unk>", type=Type.UNKNOWN)
    for i in range(4, vocab_size):
        text = pieces.get(i, f"unused{i}")
        kind = Type.BYTE if text.startswith("<0x") else Type.NORMAL if i in pieces else Type.UNUSED
        model.pieces.add(piece=text, score=-float(i), type=kind)
    path.write_bytes(model.SerializeToString())
    return path


def byte_pieces(first: int) -> dict[int, str]:
    return {first + value: f"<0x{value:02X}>" for value in range(256)}


@pytest.fixture(params=STREAM_PIECES)
def vocabulary(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"extra": STREAM_PIECES[request.param], **GOLDEN[request.param]}


@pytest.fixture
def table(vocabulary: dict[str, Any], tmp_path: Path) -> ByteTable:
    pieces = dict(vocabulary["extra"])
    for case in vocabulary["cases"]:
        pieces |= zip(case["target_ids"], case["pieces"], strict=True)
    if "<0xF0>" in pieces.values():
        pieces |= byte_pieces(4)
    model = write_model(tmp_path / "tokenizer.model", pieces, vocabulary["vocab_size"])
    return byte_table(model, vocabulary["vocab_size"])


def test_every_golden_text_counts_its_published_bytes(vocabulary: dict[str, Any], table: ByteTable) -> None:
    for case in vocabulary["cases"]:
        stream = np.array(case["stream"], dtype=np.uint16)
        counted = table.count(stream[:-1], stream[1:])
        assert counted.tolist() == case["target_bytes"], case["text"]
        assert counted.sum() == case["total_bytes"]
        assert table.base[stream[1:]].tolist() == case["base_bytes"]
        assert table.lead[stream[1:]].tolist() == case["leading_space"]
        assert table.boundary[stream[:-1]].tolist() == case["prev_is_boundary"]


def test_documents_in_one_stream_count_as_published(vocabulary: dict[str, Any], table: ByteTable) -> None:
    for case in vocabulary["streams"]:
        stream = np.array(case["stream"], dtype=np.uint16)
        assert table.count(stream[:-1], stream[1:]).tolist() == case["target_bytes"]


def test_only_one_leading_space_is_taken_off(tmp_path: Path) -> None:
    table = byte_table(write_model(tmp_path / "m.model", {4: "▁", 5: "▁▁", 6: "▁a", 7: "é"}, 8), 8)
    assert table.base.tolist() == [0, 0, 0, 0, 0, 3, 1, 2]
    assert table.lead.tolist() == [False] * 4 + [True] * 3 + [False]
    assert table.boundary.tolist() == [True] * 4 + [False] * 4


def test_a_tokenizer_that_keeps_whitespace_counts_every_space_as_one_byte(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.model", {4: "▁a", 5: "▁", 6: "▁▁▁", 7: "a"}, 8, lossless=True)
    bos, current = np.array([1, 1, 1, 1]), np.array([4, 5, 6, 7])
    assert byte_table(model, 8).count(bos, current).tolist() == [2, 1, 3, 1]


def test_ids_beyond_the_pieces_count_nothing(tmp_path: Path) -> None:
    table = byte_table(write_model(tmp_path / "m.model", {4: "ab"}, 5), 7)
    assert table.base.tolist() == [0, 0, 0, 0, 2, 0, 0]
    assert table.boundary.tolist() == [True] * 4 + [False, True, True]


def test_a_model_with_more_pieces_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.model", {4: "ab"}, 9)
    with pytest.raises(UserError, match=r"m\.model: 9 pieces, expected at most tokenize\.vocab_size = 8"):
        byte_table(path, 8)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        byte_table(tmp_path / "absent.model", 8)
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        byte_table(tmp_path / "text.model", 8)
