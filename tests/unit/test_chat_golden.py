"""The official encoder's and parser's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ascend_v4.chat import PROTOCOL, encode_messages, parse_completion, special_tokens

pytestmark = pytest.mark.golden

CHAT = Path(__file__).resolve().parent.parent / "golden" / "chat"
ENCODE = json.loads((CHAT / "encode.json").read_text(encoding="utf-8"))
PARSE = json.loads((CHAT / "parse.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ENCODE, ids=lambda case: str(case["id"]))
def test_prompt_equals_the_official_encoder(case):
    options = dict(case["options"])
    add_bos = options.pop("add_default_bos_token", True)
    assert encode_messages(case["messages"], add_bos=add_bos, **options) == case["prompt"]


@pytest.mark.parametrize("case", PARSE, ids=lambda case: str(case["id"]))
def test_message_equals_the_official_parser(case):
    assert parse_completion(case["completion"], thinking_mode=case["thinking_mode"]) == case["message"]


@pytest.mark.parametrize(
    "text",
    [PROTOCOL.tools_before, PROTOCOL.tools_after, PROTOCOL.response_format_before, PROTOCOL.efforts["max"]],
    ids=["tools_before", "tools_after", "response_format", "effort"],
)
def test_fixed_text_occurs_in_the_golden_prompts(text):
    assert any(text in case["prompt"] for case in ENCODE)


def test_golden_prompts_use_every_kind_of_special_token():
    prompts = "".join(case["prompt"] for case in ENCODE)
    unused = {token for token in special_tokens() if token not in prompts}
    assert unused == {PROTOCOL.tasks["title"], PROTOCOL.tasks["read_url"]}


def test_special_tokens_start_with_bos_and_eos_and_hold_no_doubles():
    tokens = special_tokens()
    assert tokens[:2] == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    assert len(set(tokens)) == len(tokens) == 14
