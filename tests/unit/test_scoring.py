"""Score inputs are read strictly and within bounds; outputs are written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import stat
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ascend_v4.engine import scoring
from ascend_v4.engine.scoring import (
    ScorePrompt,
    read_prompts,
    require_space,
    require_writable,
    score_shapes,
    write_scores,
)
from ascend_v4.errors import AscendV4Error, ConfigError, RequestError

VOCAB, LONGEST = 100, 64


def read(path, text: str | bytes | dict | list) -> list[ScorePrompt]:
    if not isinstance(text, (str, bytes)):
        text = json.dumps(text)
    path = path / "in.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path, vocab_size=VOCAB, max_tokens=LONGEST)


def test_prompts_are_read_in_order_and_decode_ids_may_be_absent(tmp_path):
    prompts = read(tmp_path, {"prompts": [{"input_ids": [1, 2], "decode_ids": [3]}, {"input_ids": [99]}]})
    assert prompts == [ScorePrompt([1, 2], [3]), ScorePrompt([99], [])]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "must hold"),
        ({"prompts": []}, "must hold"),
        ({"prompts": {"input_ids": [1]}}, "must hold"),
        ({"input_ids": [1]}, "must hold"),
        ({"prompts": [{"input_ids": [1]}, 7]}, "prompt 1 must be an object with input_ids, not int"),
        ({"prompts": [{}]}, "prompt 0: input_ids: there are no token ids"),
        ({"prompts": [{"input_ids": []}]}, "prompt 0: input_ids: there are no token ids"),
        ({"prompts": [{"input_ids": [], "decode_ids": [1]}]}, "input_ids: there are no token ids"),
        ({"prompts": [{"input_ids": "abc"}]}, "input_ids must be a list of integers"),
        ({"prompts": [{"input_ids": None}]}, "input_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [1.0]}]}, "input_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [True]}]}, "input_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [[1]]}]}, "input_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [1], "decode_ids": None}]}, "decode_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [1], "decode_ids": ["2"]}]}, "decode_ids must be a list of integers"),
        ({"prompts": [{"input_ids": [5, 100]}]}, "token id 100 at position 1 is outside the vocabulary"),
        ({"prompts": [{"input_ids": [-1]}]}, "token id -1 at position 0 is outside"),
        ({"prompts": [{"input_ids": [1], "decode_ids": [10**30]}]}, "decode_ids: token id 1000"),
        ({"prompts": [{"input_ids": [1], "decode": [2]}]}, "unknown fields decode; known are input_ids"),
        ({"prompts": [{"input_ids": [1] * 65}]}, "65 tokens, decode_ids included; the model takes 64"),
        ({"prompts": [{"input_ids": [1] * 60, "decode_ids": [1] * 5}]}, "prompt 0 has 65 tokens"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_wrong_document_is_refused_with_its_place(tmp_path, document, message):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, document)
    assert message in str(caught.value)
    assert str(tmp_path / "in.json") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"prompts": [{"input_ids": [1,',
        b"\xff\xfe",
        "[" * 100_000,
        '{"prompts": [{"input_ids": [1' + "0" * 6000 + "]}]}",
    ],
    ids=["empty", "cut short", "not UTF-8", "deeply nested", "number of 6001 digits"],
)
def test_what_is_not_json_is_refused(tmp_path, text):
    with pytest.raises(RequestError, match="is not JSON"):
        read(tmp_path, text)


def test_a_prompt_as_long_as_the_model_is_taken(tmp_path):
    prompts = read(tmp_path, {"prompts": [{"input_ids": [1] * 60, "decode_ids": [1] * 4}]})
    assert len(prompts[0].input_ids) == 60


def test_fields_beside_prompts_are_ignored_and_said_to_be(tmp_path, caplog):
    read(tmp_path, {"prompts": [{"input_ids": [1]}], "chunk": 7, "name": "x"})
    assert "fields beside prompts are ignored: chunk, name" in caplog.text


def test_an_input_beyond_the_bound_is_not_read(tmp_path, monkeypatch):
    document = json.dumps({"prompts": [{"input_ids": [1]}]})
    monkeypatch.setattr(scoring, "MAX_INPUT_BYTES", len(document))
    assert len(read(tmp_path, document)) == 1
    with pytest.raises(RequestError, match=f"more than {len(document)} bytes"):
        read(tmp_path, document + " ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_the_bound_holds_for_inputs_without_a_known_length(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_INPUT_BYTES", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    try:
        os.write(writer, b'{"prompts": [{"input_ids": [1]}]}')
        with pytest.raises(RequestError, match="more than 10 bytes"):
            read_prompts(pipe, vocab_size=VOCAB, max_tokens=LONGEST)
    finally:
        os.close(writer)


def test_an_input_that_cannot_be_opened_is_named_with_the_reason(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.json cannot be read: No such file"):
        read_prompts(tmp_path / "absent.json", vocab_size=VOCAB, max_tokens=LONGEST)
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path, vocab_size=VOCAB, max_tokens=LONGEST)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["prompts", "input_ids", "decode_ids", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(document=json_values | st.fixed_dictionaries({"prompts": json_values}))
def test_any_json_is_read_or_refused_by_our_own_error(tmp_path_factory, document):
    try:
        prompts = read(tmp_path_factory.getbasetemp(), json.dumps(document))
    except AscendV4Error:
        return
    assert all(0 <= token_id < VOCAB for prompt in prompts for token_id in prompt.input_ids)


@settings(max_examples=100)
@given(text=st.text(alphabet=string.printable, max_size=60) | st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_by_our_own_error(tmp_path_factory, text):
    with pytest.raises(RequestError):
        read(tmp_path_factory.getbasetemp(), text)


def test_shapes_follow_the_prompts():
    prompts = [ScorePrompt([1, 2, 3], [4]), ScorePrompt([5], [])]
    assert score_shapes(prompts, VOCAB, mtp=True, logprobs=False) == {
        "p0.prefill_logits": (3, VOCAB),
        "p0.mtp_prefill_logits": (3, VOCAB),
        "p0.decode_logits": (1, VOCAB),
        "p1.prefill_logits": (1, VOCAB),
        "p1.mtp_prefill_logits": (0, VOCAB),
        "p1.decode_logits": (0, VOCAB),
    }
    assert score_shapes(prompts, VOCAB, mtp=False, logprobs=True) == {
        "p0.logprobs": (3,),
        "p1.logprobs": (0,),
    }


SHAPES = {"p0.a": (2, 3), "p0.b": (0, 3), "p1.a": (1, 3)}


def scored_tensors():
    yield {"p0.a": torch.arange(6.0).view(2, 3), "p0.b": torch.empty(0, 3)}
    yield {"p1.a": torch.arange(3.0).flip(0).view(3, 1).t()}


def test_written_scores_are_read_back_by_safetensors(tmp_path):
    path = tmp_path / "out.safetensors"
    write_scores(path, SHAPES, scored_tensors())
    found = load_file(path)
    expected = {name: tensor for part in scored_tensors() for name, tensor in part.items()}
    assert {name: tensor.shape for name, tensor in found.items()} == SHAPES
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_output_is_as_readable_as_any_new_file(tmp_path):
    write_scores(tmp_path / "out.safetensors", SHAPES, scored_tensors())
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out.safetensors", "plain")}
    assert len(modes) == 1


def test_a_failure_on_the_way_keeps_the_old_output_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")

    def failing():
        yield from itertools.islice(scored_tensors(), 1)
        raise RequestError("stopped here")

    with pytest.raises(RequestError, match="stopped here"):
        write_scores(path, SHAPES, failing())
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        write_scores(tmp_path / ("x" * 255), SHAPES, scored_tensors())
    assert list(tmp_path.iterdir()) == []


def test_an_output_path_is_judged_before_any_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "new.safetensors")
    with pytest.raises(ConfigError, match="absent does not exist"):
        require_writable(tmp_path / "absent" / "out.safetensors")
    with pytest.raises(ConfigError, match="is there and is not a file"):
        require_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable"):
        require_writable(tmp_path / "new.safetensors")


def test_logits_larger_than_the_disk_are_refused(tmp_path):
    require_space(tmp_path / "out.safetensors", SHAPES)
    with pytest.raises(ConfigError, match="would take 4000000000000000000 bytes and its disk has"):
        require_space(tmp_path / "out.safetensors", {"p0.prefill_logits": (10**9, 10**9)})
