"""ModelConfig: what config.json says of a DeepSeek-V4 model, validated once, never edited after.

Keyed on fields, never on the names Flash or Pro. Every problem of a file is reported in one error. Standard
library and yaml only, so that planning and inspection need no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ascend_v4.config_file import SHIPPED_CONFIGS, read_config_fields, resolve_config_path, shown
from ascend_v4.errors import ConfigError, UnsupportedModelError

__all__ = [
    "MAX_ROUTED_EXPERTS",
    "SHIPPED_CONFIGS",
    "WINDOW_TOKENS",
    "DraftConfig",
    "ExpertFormat",
    "LayerKind",
    "ModelConfig",
    "YarnConfig",
    "parse_model_config",
    "read_config_fields",
    "resolve_config_path",
]

MAX_ROUTED_EXPERTS = 1 << 20
"""Routed experts of all layers together; Pro has 23,808. It bounds the tensors a config can ask for."""

WINDOW_TOKENS = 128
"""The sliding window of every V4 model, and the unit of the caches."""


class LayerKind(Enum):
    """Which attention a layer runs. The value is the release's compress_ratio."""

    SWA = 0
    CSA = 4
    HCA = 128

    @property
    def ratio(self) -> int:
        """Tokens per compressed entry; 0 where nothing is compressed."""
        return self.value


class ExpertFormat(Enum):
    """How the routed experts are stored in the release layout."""

    FP4 = "fp4"
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN constants of the compressed layers. There is no mscale on cos, sin or the softmax."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    """DSpark draft blocks (0731, 0813): their `mtp.*` tensors are listed and never loaded."""

    fields: tuple[str, ...]
    """The `dspark_*` keys found in config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and constants of one DeepSeek-V4 model, spelled as in the release's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_kinds: tuple[LayerKind, ...]
    """One per layer, without the draft blocks."""
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    num_nextn_predict_layers: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    quantized: bool
    """True for the release (FP8 linears); False without quantization_config (all weights bf16)."""
    expert_format: ExpertFormat
    draft: DraftConfig | None
    unknown_fields: tuple[str, ...] = ()
    """Keys of config.json this code does not know; they are ignored, and said to be."""

    @property
    def nope_head_dim(self) -> int:
        """Head channels without rotary embedding; they come first."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def num_mtp_blocks(self) -> int:
        """MTP blocks that can be run; DSpark drafts cannot."""
        return 0 if self.draft is not None else self.num_nextn_predict_layers

    def is_hash_routed(self, layer_index: int) -> bool:
        """Whether a layer picks its experts by token id."""
        return layer_index < self.num_hash_layers

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Config from a .json or .yaml file, or from the config.json of a checkpoint directory.

        Names of shipped configs are not files: `resolve_config_path` turns them into one.
        """
        return parse_model_config(read_config_fields(path), source=str(path))


def parse_model_config(fields: Mapping[str, Any], *, source: str = "config") -> ModelConfig:
    """ModelConfig from the release's field names.

    Raises ConfigError listing every missing, malformed, contradictory and unsupported field at once;
    UnsupportedModelError when the only problems are things this code cannot run.
    """
    _refuse_other_models(fields, source)
    reader = _FieldReader(fields)
    values = _read_values(reader)
    problems = reader.problems + _failures(_CONTRADICTIONS, values)
    unsupported = _failures(_UNSUPPORTED, values) + _unsupported_fields(fields)
    if problems or unsupported:
        lines = "".join(f"\n  - {line}" for line in problems + unsupported)
        count = len(problems) + len(unsupported)
        kind = ConfigError if problems else UnsupportedModelError
        raise kind(f"{source}: {count} problem{'s' if count > 1 else ''} with the model config:{lines}")
    return _build(values, fields)


_V41_DIFFERENCES = (
    "it nests text_config and vision_config, shares KV and indexer results between layers, has compression "
    "ratios 1, 2 and 20, an Engram n-gram memory, FP8 blocks of 32x32 and no hash-routed layers"
)


def _refuse_other_models(fields: Mapping[str, Any], source: str) -> None:
    model_type = fields.get("model_type")
    if model_type == "deepseek_v41":
        raise UnsupportedModelError(
            f"{source}: model_type deepseek_v41 (DeepSeek-V4.1) is another architecture: {_V41_DIFFERENCES}. "
            "This version runs deepseek_v4 only."
        )
    if model_type != "deepseek_v4":
        found = "missing" if model_type is None else shown(model_type)
        raise UnsupportedModelError(f"{source}: model_type is {found}; this version runs deepseek_v4 only.")


class _FieldReader:
    """Reads typed fields and collects every complaint instead of stopping at the first.

    A field that is absent or malformed reads as None.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.problems: list[str] = []

    def integer(self, name: str, *, low: int = 1, high: int = 1 << 20) -> int | None:
        value = self.fields.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            self.problems.append(f"{name} is missing")
        elif isinstance(value, bool) or not isinstance(value, int):
            self.problems.append(f"{name} is {shown(value)}; it must be an integer")
        elif not low <= value <= high:
            self.problems.append(f"{name} is {shown(value)}; it must be in [{low}, {high}]")
        else:
            return value
        return None

    def number(self, name: str, *, above: float, high: float = 1e12) -> float | None:
        value = self.fields.get(name)
        if value is None:
            self.problems.append(f"{name} is missing")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = " (YAML reads 1e-6 as text: write 1.0e-6)" if isinstance(value, str) else ""
            self.problems.append(f"{name} is {shown(value)}; it must be a number{hint}")
        elif isinstance(value, float) and not math.isfinite(value):
            self.problems.append(f"{name} is {value}; it must be finite")
        elif not above < value <= high:
            self.problems.append(f"{name} is {shown(value)}; it must be above {above:g} and at most {high:g}")
        else:
            return float(value)
        return None

    def integers(self, name: str, *, high: int, most: int) -> tuple[int, ...] | None:
        value = self.fields.get(name)
        if value is None:
            self.problems.append(f"{name} is missing")
            return None
        items = value if isinstance(value, list) else [value]
        if not items or len(items) > most:
            self.problems.append(f"{name} has {len(items)} entries; it must have 1 to {most}")
            return None
        bad = [item for item in items if type(item) is not int or not 0 <= item <= high]
        if bad:
            self.problems.append(f"{name} holds {shown(bad[0])}; its entries must be integers in [0, {high}]")
            return None
        return tuple(items)


_BOUNDED: dict[str, tuple[int, int]] = {
    "vocab_size": (2, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "head_dim": (1, 1 << 14),
    "qk_rope_head_dim": (2, 1 << 14),
    "q_lora_rank": (1, 1 << 17),
    "o_groups": (1, 4096),
    "o_lora_rank": (1, 1 << 17),
    "index_n_heads": (1, 4096),
    "index_head_dim": (1, 1 << 14),
    "index_topk": (1, 1 << 20),
    "sliding_window": (1, 1 << 20),
    "n_routed_experts": (1, 1 << 16),
    "n_shared_experts": (0, 1024),
    "num_experts_per_tok": (1, 1024),
    "moe_intermediate_size": (1, 1 << 17),
    "num_hash_layers": (0, 1024),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 1000),
    "max_position_embeddings": (1, 1 << 30),
    "num_nextn_predict_layers": (0, 64),
}
_POSITIVE = ("routed_scaling_factor", "swiglu_limit")
_THETAS = ("rope_theta", "compress_rope_theta")
_FIXED: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1,),
    "hidden_act": ("silu",),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "expert_dtype": ("fp4", "fp8", None),
    "n_group": (1, None),
    "topk_group": (1, None),
}
_IGNORED = {
    "architectures", "attention_dropout", "initializer_range", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "pad_token_id", "model_type", "compress_ratios", "rope_scaling", "quantization_config",
    "bos_token_id", "eos_token_id", "_name_or_path",
}  # fmt: skip


def _read_values(reader: _FieldReader) -> dict[str, Any]:
    """Every field that is there and well formed; what is not stays out, and the reader has the complaint."""
    read: dict[str, Any] = {
        name: reader.integer(name, low=low, high=high) for name, (low, high) in _BOUNDED.items()
    }
    read |= {name: reader.number(name, above=0.0) for name in _POSITIVE}
    # YaRN divides by the logarithm of theta
    read |= {name: reader.number(name, above=1.0) for name in _THETAS}
    read |= {name: reader.number(name, above=0.0, high=0.1) for name in ("hc_eps", "rms_norm_eps")}
    read["compress_ratios"] = reader.integers("compress_ratios", high=1 << 20, most=2048)
    read["bos_token_id"] = reader.integer("bos_token_id", low=0, high=1 << 24)
    read["eos_token_id"] = reader.integers("eos_token_id", high=1 << 24, most=64)
    values = {name: value for name, value in read.items() if value is not None}
    return values | _read_yarn(reader)


def _read_yarn(reader: _FieldReader) -> dict[str, YarnConfig | None]:
    if "rope_scaling" not in reader.fields:
        reader.problems.append("rope_scaling is missing (null means no YaRN)")
        return {}
    scaling = reader.fields["rope_scaling"]
    if scaling is None:
        return {"yarn": None}
    if not isinstance(scaling, Mapping):
        reader.problems.append(f"rope_scaling is {shown(scaling)}; it must be a mapping or null")
        return {}
    inner = _FieldReader(scaling)
    factor = inner.number("factor", above=0.0)
    original = inner.integer("original_max_position_embeddings", high=1 << 30)
    fast = inner.number("beta_fast", above=0.0)
    slow = inner.number("beta_slow", above=0.0)
    reader.problems += [f"rope_scaling.{problem}" for problem in inner.problems]
    if factor is None or original is None or fast is None or slow is None:
        return {}
    if factor < 1:
        reader.problems.append(f"rope_scaling.factor is {factor:g}; it must be at least 1")
    if fast < slow:
        reader.problems.append(f"rope_scaling.beta_fast is {fast:g}; it must be at least beta_slow {slow:g}")
    yarn = YarnConfig(
        factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow
    )
    return {"yarn": yarn}


@dataclass(frozen=True, slots=True)
class _Check:
    """A rule over some fields; it is judged whenever these are there and well formed."""

    needs: str
    """Field names, separated by spaces, in the order `fails` takes them."""
    fails: Callable[..., bool]
    message: str
    """With the fields as format names."""


def _failures(checks: tuple[_Check, ...], values: Mapping[str, Any]) -> list[str]:
    texts = {
        name: shown(list(value) if isinstance(value, tuple) else value) for name, value in values.items()
    }
    return [check.message.format(**texts) for check in checks if _applies_and_fails(check, values)]


def _applies_and_fails(check: _Check, values: Mapping[str, Any]) -> bool:
    needs = check.needs.split()
    return all(name in values for name in needs) and check.fails(*(values[name] for name in needs))


_CONTRADICTIONS = (
    _Check(
        "compress_ratios num_hidden_layers",
        lambda ratios, layers: len(ratios) < layers,
        "compress_ratios is {compress_ratios}: too short for {num_hidden_layers} layers; each needs one",
    ),
    _Check(
        "num_hash_layers num_hidden_layers",
        lambda hashed, layers: hashed > layers,
        "num_hash_layers is {num_hash_layers} of {num_hidden_layers} layers; it must be at most all of them",
    ),
    _Check(
        "num_experts_per_tok n_routed_experts",
        lambda chosen, experts: chosen > experts,
        "num_experts_per_tok is {num_experts_per_tok}; there are only {n_routed_experts} n_routed_experts",
    ),
    _Check(
        "qk_rope_head_dim head_dim",
        lambda rope, head: rope >= head,
        "qk_rope_head_dim is {qk_rope_head_dim}; it must be below head_dim {head_dim}",
    ),
    _Check(
        "qk_rope_head_dim index_head_dim",
        lambda rope, index: rope > index,
        "qk_rope_head_dim is {qk_rope_head_dim}; it must be at most index_head_dim {index_head_dim}",
    ),
    _Check(
        "bos_token_id vocab_size",
        lambda token, vocab: token >= vocab,
        "bos_token_id is {bos_token_id}; the vocabulary has {vocab_size} tokens",
    ),
    _Check(
        "eos_token_id vocab_size",
        lambda tokens, vocab: max(tokens) >= vocab,
        "eos_token_id is {eos_token_id}; the vocabulary has {vocab_size} tokens",
    ),
)
_UNSUPPORTED = (
    _Check(
        "sliding_window",
        lambda window: window != WINDOW_TOKENS,
        f"sliding_window is {{sliding_window}}; only {WINDOW_TOKENS} is supported",
    ),
    _Check(
        "compress_ratios num_hidden_layers",
        lambda ratios, layers: not {0, 4, 128}.issuperset(ratios[:layers]),
        "compress_ratios is {compress_ratios}; only 0 (SWA), 4 (CSA) and 128 (HCA) are supported",
    ),
    _Check(
        "head_dim qk_rope_head_dim",
        lambda head, rope: (head - rope) % 64 != 0,
        "head_dim - qk_rope_head_dim is {head_dim} - {qk_rope_head_dim}; it must be a multiple of 64",
    ),
    _Check(
        "qk_rope_head_dim",
        lambda rope: rope % 2 != 0,
        "qk_rope_head_dim is {qk_rope_head_dim}; it must be even",
    ),
    _Check(
        "index_head_dim",
        lambda index: index < 32 or index & (index - 1) != 0,
        "index_head_dim is {index_head_dim}; it must be a power of two of at least 32",
    ),
    _Check(
        "num_attention_heads o_groups",
        lambda heads, groups: heads % groups != 0,
        "num_attention_heads is {num_attention_heads}; it must be a multiple of o_groups {o_groups}",
    ),
    _Check(
        "n_shared_experts",
        lambda shared: shared != 1,
        "n_shared_experts is {n_shared_experts}; only 1 is supported",
    ),
    _Check(
        "hidden_size",
        lambda width: width % 32 != 0,
        "hidden_size is {hidden_size}; FP4 groups need a multiple of 32",
    ),
    _Check(
        "moe_intermediate_size",
        lambda width: width % 32 != 0,
        "moe_intermediate_size is {moe_intermediate_size}; FP4 groups need a multiple of 32",
    ),
    _Check(
        "num_hidden_layers num_nextn_predict_layers n_routed_experts",
        lambda layers, drafts, experts: (layers + drafts) * experts > MAX_ROUTED_EXPERTS,
        "num_hidden_layers x n_routed_experts is {num_hidden_layers} x {n_routed_experts}; "
        f"at most {MAX_ROUTED_EXPERTS} routed experts are supported",
    ),
)


def _unsupported_fields(fields: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name} is {shown(fields[name])}; only {' or '.join(map(repr, allowed))} is supported"
        for name, allowed in _FIXED.items()
        if name in fields and not _is_one_of(fields[name], allowed)
    ]
    return (
        found + _unsupported_drafts(fields) + _unsupported_scaling(fields) + _unsupported_quantization(fields)
    )


def _is_one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    # 1 == True in Python, and not in a config
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def _unsupported_drafts(fields: Mapping[str, Any]) -> list[str]:
    """MTP blocks run sliding-window attention; the entries of draft blocks that never run may be anything."""
    layers, ratios = fields.get("num_hidden_layers"), fields.get("compress_ratios")
    blocks = fields.get("num_nextn_predict_layers")
    if not isinstance(layers, int) or not isinstance(blocks, int) or not isinstance(ratios, list):
        return []
    extra = ratios[layers : layers + blocks]
    if layers < 0 or blocks < 0 or _dspark_fields(fields) or not any(extra):
        return []
    return [f"compress_ratios of the MTP blocks are {shown(extra)}; only 0 (SWA) is supported there"]


def _dspark_fields(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(str(key) for key in fields if str(key).startswith("dspark_")))


def _unsupported_scaling(fields: Mapping[str, Any]) -> list[str]:
    scaling = fields.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return []
    kinds = {key: scaling[key] for key in ("type", "rope_type") if key in scaling}
    if not kinds:
        return ["rope_scaling.type is missing; only 'yarn' is supported"]
    found = [
        f"rope_scaling.{key} is {shown(kind)}; only 'yarn' is supported"
        for key, kind in kinds.items()
        if kind != "yarn"
    ]
    return found + [
        f"rope_scaling.{key} is {shown(scaling[key])}; the model scales neither cos and sin nor the softmax"
        for key in ("mscale", "mscale_all_dim", "attention_factor")
        if scaling.get(key) not in (None, 1)
    ]


_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def _unsupported_quantization(fields: Mapping[str, Any]) -> list[str]:
    quantization = fields.get("quantization_config")
    if quantization is None:
        return []
    if not isinstance(quantization, Mapping):
        return [f"quantization_config is {shown(quantization)}; it must be a mapping"]
    return [
        f"quantization_config.{key} is {shown(quantization.get(key))}; only {value!r} is supported"
        for key, value in _QUANTIZATION.items()
        if quantization.get(key) != value
    ]


def _build(values: dict[str, Any], fields: Mapping[str, Any]) -> ModelConfig:
    layers = values["num_hidden_layers"]
    ratios = values.pop("compress_ratios")
    eos = values.pop("eos_token_id")
    dspark = _dspark_fields(fields)
    known = values.keys() | _FIXED.keys() | _IGNORED | set(dspark)
    return ModelConfig(
        model_type=fields["model_type"],
        layer_kinds=tuple(LayerKind(ratio) for ratio in ratios[:layers]),
        eos_token_ids=eos,
        quantized=fields.get("quantization_config") is not None,
        expert_format=ExpertFormat(fields.get("expert_dtype") or "fp4"),
        draft=DraftConfig(fields=dspark) if dspark else None,
        unknown_fields=tuple(sorted(str(key) for key in fields if key not in known)),
        **values,
    )
