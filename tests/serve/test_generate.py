"""`ascend-v4 generate` on a small random checkpoint."""

from __future__ import annotations

import json

import pytest

FAST = ("--max-new-tokens", "6", "--seed", "1")


def test_the_streamed_text_is_the_text_of_the_json(run_cli, checkpoint):
    streamed = run_cli("generate", checkpoint, "--prompt", "Hello", *FAST)
    whole = run_cli("generate", checkpoint, "--prompt", "Hello", *FAST, "--json")
    result = json.loads(whole.stdout)
    assert streamed.exit_code == whole.exit_code == 0
    assert streamed.stdout == result["text"] + "\n"
    assert "tokens/s" in streamed.stderr
    assert result["usage"]["completion_tokens"] <= 6
    assert result["usage"]["total_tokens"] == sum(list(result["usage"].values())[:2])
    assert result["prefill_tokens_per_s"] > 0
    assert result["finish_reason"] in ("stop", "length")


def test_messages_with_tools_are_rendered(run_cli, checkpoint, tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    plain, offered = tmp_path / "plain.json", tmp_path / "offered.json"
    plain.write_text(json.dumps(messages))
    offered.write_text(json.dumps({"messages": messages, "tools": tools}))

    def num_prompt_tokens(*source: object) -> int:
        result = run_cli("generate", checkpoint, *source, *FAST, "--json")
        return json.loads(result.stdout)["usage"]["prompt_tokens"]

    chat = num_prompt_tokens("--prompt", "Hello")
    assert num_prompt_tokens("--messages", plain) == chat
    assert num_prompt_tokens("--messages", offered) > chat
    assert num_prompt_tokens("--prompt", "Hello", "--raw") == len("Hello") < chat


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "Give either --prompt or --messages"),
        (("--prompt", "a", "--messages", "b"), "Give either --prompt or --messages"),
        (("--messages", "b", "--raw"), "--raw goes with --prompt"),
        (("--prompt", "a", "--thinking", "--raw"), "--raw goes with --prompt"),
        (("--prompt", "a", "--temperature", "-1"), "--temperature"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "a", "--max-new-tokens", "5000"), "context holds 4096 tokens"),
        (("--prompt", "", "--raw"), "no tokens"),
        (("--messages", "no-such-file.json"), "no-such-file.json"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(run_cli, checkpoint, flags, words):
    result = run_cli("generate", checkpoint, *flags)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[]", "5", "[" * 100_000, '{"messages": 5}', '[{"role": "wizard"}]', "[5]", "\xff"],
    ids=lambda content: content[:12],
)
def test_a_messages_file_that_holds_none_is_refused(run_cli, checkpoint, tmp_path, content):
    file = tmp_path / "messages.json"
    file.write_bytes(content.encode("latin-1"))
    result = run_cli("generate", checkpoint, "--messages", file)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_a_checkpoint_without_tokenizer_is_refused(run_cli, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    result = run_cli("generate", checkpoint, "--prompt", "a")
    assert result.exit_code == 2
    assert "--tokenizer PATH" in result.stderr


def test_quantising_while_loading_answers_like_the_pack(run_cli, checkpoint, tmp_path):
    arguments = ("--prompt", "Hello", *FAST, "--json")
    on_the_way = run_cli("generate", checkpoint, *arguments, "--quantize", "w8a8")
    kept = run_cli("generate", checkpoint, *arguments, "--quantize", "w8a8", "--cache-dir", tmp_path / "kept")
    pack = run_cli("generate", tmp_path / "kept" / f"{checkpoint.name}-w8a8", *arguments)
    assert on_the_way.exit_code == kept.exit_code == pack.exit_code == 0, pack.stderr
    texts = {json.loads(result.stdout)["text"] for result in (on_the_way, kept, pack)}
    assert len(texts) == 1


def test_a_cache_directory_without_quantize_is_refused(run_cli, checkpoint, tmp_path):
    result = run_cli("generate", checkpoint, "--prompt", "Hello", "--cache-dir", tmp_path)
    assert result.exit_code == 2
    assert "--quantize" in result.stderr
