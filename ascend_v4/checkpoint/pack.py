"""Packs: checkpoints whose weights were repacked, and which tensors each must hold by its own description.

Two layouts: native (`ascend_v4.json`) and ModelSlim (`quant_model_description.json`, also by other tools).
The description decides how a weight is stored, never its name or looks. What cannot be run rightly is
refused: rotated weights, the share of a single rank, unfinished outputs, types this version does not know.
The shares of all ranks are joined by rank_sets.py. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from ascend_v4.checkpoint.index import FP4_GROUP, Role, Specs, TensorSpec, expected_tensors, fp8_scale_shape
from ascend_v4.checkpoint.names import DESCRIPTION_FILE, JOURNAL_FILE, MANIFEST_FILE, PACK_FILE, is_mtp
from ascend_v4.config import ModelConfig
from ascend_v4.errors import CheckpointError

MAX_DESCRIPTION_BYTES = 1 << 28
"""An entry per tensor; that of Pro has some tens of megabytes."""
MAX_NESTING = 16
MAX_RANKS = 1024
MAX_FOLDER_CHARACTERS = 255
SHOWN_NAMES = 3
PACK_FORMAT, PACK_VERSION = "ascend_v4", 1
BIAS_PARTS = 16
"""Parts of the reduction in which ModelSlim may sum the bias of an INT4 weight."""


class PackLayout(Enum):
    """Which description a pack has."""

    NATIVE = "native"
    MODELSLIM = "modelslim"


class PackScheme(Enum):
    """What a pack was made for; it decides the numerics."""

    W8A8 = "w8a8"
    W4A8 = "w4a8"
    MX = "mx"
    BF16 = "bf16"
    RELEASE = "release"


class PackedForm(Enum):
    """How a weight is stored; the values are those of `format` in ascend_v4.json."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8_block"
    FP4_GROUP = "fp4_group"
    MXFP8 = "mxfp8"
    INT8_CHANNEL = "int8_channel"
    INT4_CHANNEL = "int4_channel"


_MODELSLIM_FORMS: dict[str, PackedForm] = {
    "FLOAT": PackedForm.PLAIN,
    "W8A8_DYNAMIC": PackedForm.INT8_CHANNEL,
    "W4A8_DYNAMIC": PackedForm.INT4_CHANNEL,
    "W8A8_MXFP8": PackedForm.MXFP8,
    "W4A8_MXFP": PackedForm.FP4_GROUP,
}
_WEIGHT = "weight"
_KEPT = ("release_scale", "release_weight", "negative_zeros")
"""Companions that only --to release reads."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One weight of a pack: how it is stored and the names of what lies beside it."""

    form: PackedForm
    scale: str | None
    offset: str | None
    """Zeros of symmetric weights; other tools write them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFolders:
    """The folders over which a native pack is divided."""

    tp: int
    ep: int
    folders: tuple[str, ...]
    """By rank, `ep` of them, directly below the pack's directory."""
    shared: Mapping[str, Any]
    """Keys of ascend_v4.json that the description of every rank repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """What a description says."""

    layout: PackLayout
    scheme: PackScheme
    forms: Mapping[str, PackedForm]
    """By weight name; of ModelSlim packs also by the names of other tensors."""
    recipe: str | None = None
    ranks: RankFolders | None = None
    """Where the tensors lie in slices; None where the directory itself holds them whole."""

    def weight(self, name: str) -> PackedWeight:
        """How a weight is stored. Raises CheckpointError where the description does not say."""
        form = self.forms.get(name)
        if form is None:
            raise CheckpointError(
                f"the pack's description does not say how {name} is stored. Repack it again."
            )
        stem = name.removesuffix(_WEIGHT)
        if form is PackedForm.PLAIN:
            return PackedWeight(form, None, None)
        is_native = self.layout is PackLayout.NATIVE
        offset = f"{stem}weight_offset"
        if form in (PackedForm.INT8_CHANNEL, PackedForm.INT4_CHANNEL):
            return PackedWeight(form, f"{stem}weight_scale", offset if offset in self.forms else None)
        return PackedWeight(form, f"{stem}scale" if is_native else f"{stem}weight_scale", None)

    def kept_names(self) -> frozenset[str]:
        """Names that companions for --to release may have; the model has no place for them."""
        stems = (name.removesuffix(_WEIGHT) for name in self.forms if name.endswith(f".{_WEIGHT}"))
        return frozenset(f"{stem}{kept}" for stem in stems for kept in _KEPT)


class HasShape(Protocol):
    """A tensor as a header has it."""

    @property
    def dtype(self) -> str:
        """Safetensors spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored elements per axis."""


def find_pack(directory: Path) -> Pack | None:
    """The pack in a directory, or None for a checkpoint in the release layout.

    Raises CheckpointError for one that is unfinished, rotated, a rank's share, or of an unknown kind.
    """
    require_finished(directory)
    has_native, has_modelslim = (directory / PACK_FILE).exists(), (directory / DESCRIPTION_FILE).exists()
    if has_native and has_modelslim:
        raise CheckpointError(
            f"{directory} has {PACK_FILE} and {DESCRIPTION_FILE}; a pack has one of them. Give each pack a "
            "directory of its own."
        )
    if has_native:
        return _native(directory / PACK_FILE, read_description(directory / PACK_FILE))
    if has_modelslim:
        return _modelslim(directory / DESCRIPTION_FILE, read_description(directory / DESCRIPTION_FILE))
    return None


def require_finished(directory: Path) -> None:
    """Raise CheckpointError for the output of a repack that was interrupted; it may lack its config yet.

    Also for the folder of a single rank, which looks like one.
    """
    has_manifest = (directory / MANIFEST_FILE).exists()
    if (directory / JOURNAL_FILE).exists() and not has_manifest:
        raise CheckpointError(
            f"{directory} holds an unfinished repack. Run the same ascend-v4 repack again: it goes on from "
            "where it was interrupted."
        )
    if (directory / PACK_FILE).exists() and not has_manifest:
        _refuse_share(directory / PACK_FILE)
        raise CheckpointError(
            f"{directory} has {PACK_FILE} and no {MANIFEST_FILE}, which a repack writes last: it is "
            "unfinished or was not copied whole. Run the same ascend-v4 repack again, or copy it again."
        )


def pack_config(config: ModelConfig) -> ModelConfig:
    """The config of a pack's model: no weight has the release's format unless its description says so."""
    return replace(config, quantized=False)


def pack_tensors(config: ModelConfig, pack: Pack, stored: Mapping[str, HasShape]) -> Specs:
    """Every tensor a pack must hold. `stored` decides where a layout leaves a choice of shape or dtype.

    Raises CheckpointError for weights the description leaves out, and for forms on tensors that are always
    plain in this version.
    """
    plain = expected_tensors(pack_config(config))
    if pack.layout is PackLayout.MODELSLIM and not any(map(is_mtp, pack.forms)):
        # other tools may leave MTP blocks out; only --mtp asks for them
        plain = {name: spec for name, spec in plain.items() if not is_mtp(name)}
    convertible = {
        spec.weight for spec in expected_tensors(replace(config, quantized=True)).values() if spec.weight
    }
    _require_known(pack, plain, convertible)
    specs: Specs = {}
    for name, spec in plain.items():
        form = pack.forms.get(name, PackedForm.PLAIN)
        if form is PackedForm.PLAIN:
            specs[name] = _as_stored(name, spec, pack, stored)
        else:
            specs |= _form_specs(name, spec, pack.weight(name), pack.layout, stored)
    return specs


def require_unrotated(directory: Path, pack: Pack, tensors: Iterable[str]) -> None:
    """Raise CheckpointError where the files of a ModelSlim pack hold what only rotated models have.

    A native pack's description has said already that nothing is rotated.
    """
    if pack.layout is PackLayout.MODELSLIM:
        refuse_rotated(directory, rotation_signs(tensors))


def rotation_signs(tensors: Iterable[str]) -> list[str]:
    """Tensors that only a rotated model has."""
    own_copies = (".emb.tok_emb.weight", ".head.weight")
    return sorted(
        name
        for name in tensors
        if (name.startswith("mtp.") and name.endswith(own_copies)) or _is_rotation(name.replace(".", "_"))
    )


def refuse_rotated(directory: Path, signs: Iterable[str]) -> None:
    """Raise CheckpointError where there are signs of rotation; the message shows some."""
    shown = [sign[:80] for sign in signs][:SHOWN_NAMES]
    if shown:
        raise CheckpointError(
            f"{directory} is a rotated pack (QuaRot: {', '.join(shown)}), whose MTP blocks have a basis of "
            "their own, and this version runs only packs that are not rotated: repack the official files "
            "with ascend-v4 repack."
        )


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object of a description. Raises CheckpointError, also for one over 256 MiB."""
    advice = "Download or repack it again."
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_DESCRIPTION_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes} bytes; the bound is {MAX_DESCRIPTION_BYTES}. {advice}"
            )
        parsed = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {str(error)[:200]}. {advice}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a {type(parsed).__name__}; a description is an object. {advice}")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a JSON object has the same key twice")
    return mapping


def _native(path: Path, described: Mapping[str, Any]) -> Pack:
    kind = (described.get("format"), described.get("version"))
    if kind != (PACK_FORMAT, PACK_VERSION):
        raise CheckpointError(
            f"{path} has format {kind[0]!r:.40} version {kind[1]!r:.40}; this version reads {PACK_FORMAT} "
            f"{PACK_VERSION}. Repack the official files."
        )
    if described.get("rotation") != "none":
        refuse_rotated(path.parent, [f"rotation {described.get('rotation')!r}"])
    if "rank" in described:
        raise CheckpointError(_one_share(path.parent))
    tensors = described.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{path} lists no tensors. Repack the official files.")
    stated = {
        name: entry.get("format") if isinstance(entry, dict) else None for name, entry in tensors.items()
    }
    forms = {form.value: form for form in PackedForm}
    _require_types(path, stated, forms)
    recipe = described.get("recipe")
    return Pack(
        layout=PackLayout.NATIVE,
        scheme=_scheme(path, described.get("scheme")),
        forms={name: forms[str(form)] for name, form in stated.items()},
        recipe=recipe if isinstance(recipe, str) else None,
        ranks=_rank_folders(path, described),
    )


def _refuse_share(path: Path) -> None:
    """Raise CheckpointError where a description is that of a single rank; what else it may be is not said."""
    try:
        is_share = "rank" in read_description(path)
    except CheckpointError:
        return
    if is_share:
        raise CheckpointError(_one_share(path.parent))


def _one_share(directory: Path) -> str:
    return (
        f"{directory} holds the share of a single rank, and one process runs whole models. Name the folder "
        f"that holds those of all ranks ({directory.absolute().parent}): they are joined as they are read."
    )


def _rank_folders(path: Path, described: Mapping[str, Any]) -> RankFolders | None:
    if "ranks" not in described:
        return None
    stated = described["ranks"] if isinstance(described["ranks"], dict) else {}
    counts: list[int] = []
    for axis in ("tp", "ep"):
        count = stated.get(axis)
        if type(count) is not int or not 1 <= count <= MAX_RANKS:
            raise CheckpointError(
                f"{path} is divided over {axis}={count!r:.40}; it must be an integer in [1, {MAX_RANKS}]. "
                "Download or repack it again."
            )
        counts.append(count)
    (tp, ep), folders = counts, stated.get("folders")
    if not isinstance(folders, list) or len(folders) != ep or not all(map(_is_folder_name, folders)):
        raise CheckpointError(
            f"{path} names the folders {folders!r:.80} for {ep} ranks; there must be one name for each, of "
            "folders directly below it. Download or repack it again."
        )
    if len(set(folders)) != ep:
        raise CheckpointError(
            f"{path} names one folder for several of {ep} ranks; each has its own. Download or repack it "
            "again."
        )
    shared = {key: value for key, value in described.items() if key not in ("ranks", "tensors")}
    return RankFolders(tp=tp, ep=ep, folders=tuple(folders), shared=shared)


def _is_folder_name(name: object) -> bool:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_FOLDER_CHARACTERS:
        return False
    return name not in (".", "..") and not any(unusual in name for unusual in "/\\:\0")


def _scheme(path: Path, stated: object) -> PackScheme:
    for scheme in PackScheme:
        if scheme.value == stated:
            return scheme
    known = ", ".join(scheme.value for scheme in PackScheme)
    raise CheckpointError(
        f"{path} has scheme {stated!r:.40}; this version runs {known}. Repack the official files."
    )


def _modelslim(path: Path, described: Mapping[str, Any]) -> Pack:
    # keys of the format itself have no dot; a tensor outside the layers that has none is plain in the release
    types = {name: kind for name, kind in described.items() if "." in name}
    settings = {name: value for name, value in described.items() if "." not in name}
    signs = rotation_signs(types) + [f"{key} in {path.name}" for key in _rotation_keys(settings, depth=0)]
    refuse_rotated(path.parent, signs)
    _require_types(path, types, _MODELSLIM_FORMS)
    grouped = sorted(name for name in types if name.endswith((".weight_scale_second", ".scale_second")))
    if grouped:
        raise CheckpointError(
            f"{path} has {grouped[0]}: INT4 with a scale per group is not run by this version, only one per "
            "output. Repack the official files."
        )
    forms = {name: _MODELSLIM_FORMS[str(kind)] for name, kind in types.items()}
    forms |= {name: PackedForm.PLAIN for name, kind in settings.items() if kind == "FLOAT"}
    return Pack(layout=PackLayout.MODELSLIM, scheme=_scheme_of(forms), forms=forms)


def _scheme_of(forms: Mapping[str, PackedForm]) -> PackScheme:
    found = set(forms.values())
    if PackedForm.INT4_CHANNEL in found:
        return PackScheme.W4A8
    if PackedForm.INT8_CHANNEL in found:
        return PackScheme.W8A8
    return PackScheme.MX if found & {PackedForm.MXFP8, PackedForm.FP4_GROUP} else PackScheme.BF16


def _require_types(path: Path, stated: Mapping[str, object], known: Mapping[str, PackedForm]) -> None:
    unknown = [
        (name, kind) for name, kind in stated.items() if not isinstance(kind, str) or kind not in known
    ]
    if unknown:
        name, kind = unknown[0]
        raise CheckpointError(
            f"{path}: {name[:120]} is of type {kind!r:.40}, and {len(unknown) - 1} more are of types this "
            f"version does not run. It runs {', '.join(known)}. Repack the official files."
        )


def _is_rotation(key: str) -> bool:
    words = key.lower().replace("-", "_").split("_")
    return any(word in ("rotation", "rotated", "rotate", "quarot", "rot") for word in words)


def _rotation_keys(value: object, *, depth: int) -> list[str]:
    """Keys of a description that name a rotation and do not say that there is none."""
    if depth > MAX_NESTING or not isinstance(value, dict):
        return []
    found = []
    for key, inner in value.items():
        if _is_rotation(str(key)) and inner not in (None, False, "", "none", "None", {}, []):
            found.append(str(key))
        found += _rotation_keys(inner, depth=depth + 1)
    return found


def _require_known(pack: Pack, plain: Specs, convertible: set[str]) -> None:
    absent = [name for name in convertible if name in plain and name not in pack.forms]
    if absent:
        listed = ", ".join(sorted(absent)[:SHOWN_NAMES])
        raise CheckpointError(
            f"the pack's description leaves out {len(absent)} weights ({listed}). Download or repack it "
            "again."
        )
    wrong = [
        name
        for name, form in pack.forms.items()
        if form is not PackedForm.PLAIN and name in plain and name not in convertible
    ]
    if wrong:
        raise CheckpointError(
            f"the pack's description says {wrong[0]} is {pack.forms[wrong[0]].value}; this version runs that "
            f"tensor in plain floating point only ({len(wrong)} such). Repack the official files."
        )


def _as_stored(name: str, spec: TensorSpec, pack: Pack, stored: Mapping[str, HasShape]) -> TensorSpec:
    """A plain tensor; other tools may keep floats and ids in a neighbouring type."""
    found = stored.get(name)
    if pack.layout is PackLayout.NATIVE or found is None:
        return spec
    alike = {"BF16": ("BF16", "F32"), "F32": ("F32", "BF16"), "I64": ("I64", "I32")}
    return replace(spec, dtype=found.dtype) if found.dtype in alike.get(spec.dtype, ()) else spec


def _form_specs(
    name: str, plain: TensorSpec, weight: PackedWeight, layout: PackLayout, stored: Mapping[str, HasShape]
) -> Specs:
    """A weight and its companions in a form."""
    rows, columns = plain.shape
    stem, form = name.removesuffix(_WEIGHT), weight.form
    assert weight.scale is not None, form
    is_native = layout is PackLayout.NATIVE
    specs: Specs = {}

    def beside(companion: str, dtype: str, *shapes: tuple[int, ...]) -> None:
        found = stored.get(companion)
        shape = found.shape if found is not None and found.shape in shapes else shapes[0]
        specs[companion] = TensorSpec(shape, dtype, Role.SCALE, name)

    if form is PackedForm.INT8_CHANNEL or form is PackedForm.INT4_CHANNEL:
        is_packed = form is PackedForm.INT4_CHANNEL
        shape = (rows // 2, columns) if is_packed else (rows, columns)
        specs[name] = TensorSpec(shape, "I8", plain.role, packed_elements=2 if is_packed else 1)
        beside(weight.scale, "F32", (rows, 1), (rows,))
        if is_packed:
            bias = f"{stem}weight_bias" if is_native else f"{stem}scale_bias"
            beside(bias, "F32", (rows, 1), (rows, BIAS_PARTS), (rows,))
        if weight.offset is not None:
            beside(weight.offset, "F32", (rows, 1), (rows,))
        return specs
    scale_dtype = "F8_E8M0" if is_native else "U8"
    if form is PackedForm.FP4_GROUP:
        shape = (rows, columns // 2)
        specs[name] = TensorSpec(shape, "I8" if is_native else "U8", plain.role, packed_elements=2)
        beside(weight.scale, scale_dtype, (rows, columns // FP4_GROUP))
        return specs
    specs[name] = TensorSpec((rows, columns), "F8_E4M3", plain.role)
    by_block = form is PackedForm.FP8_BLOCK
    beside(
        weight.scale,
        scale_dtype,
        fp8_scale_shape(rows, columns) if by_block else (rows, columns // FP4_GROUP),
    )
    return specs
