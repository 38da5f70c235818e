"""SIDE: packed SIDs to vectors, as sums of one row per chunk of digits; frozen, or learned from there on.

Frozen, the only tensors are constants that follow from the codec, kept out of checkpoints and gradients.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import word_names, wrong_words
from sidrec_torchrec.errors import DataError, check_share
from sidrec_torchrec.ops.layout import Joined, digit_rows
from sidrec_torchrec.ops.side_decode import side_decode

MODES = ("digits", "decoded")


@dataclass(frozen=True, kw_only=True)
class SIDEConfig:
    """One SIDE "table": some features whose values are SIDs of one codec.

    Args:
        name: unique in its collection, as a table's name is.
        feature_names: features it serves.
        codec: of their SIDs.
        mode: ``digits`` gives the digits themselves as floats (25 trits: 25 numbers of -1, 0, 1), ``decoded`` the vector
            the codec decodes them to.
        learned: whether training changes the map, from there on: see ``LearnedSIDE``.
        digit_dropout: share of the digits that are left out in training, event by event: what reads the vectors then
            learns from the item's likes as well, rather than to know items by their SIDs. Frozen SIDE only.
        fallback: share of the events that are read by the rows training started with, in training: what reads the vectors
            then also learns to do without what tables know of single items. Learned SIDE only.
        pooling: how ``SIDEBagCollection`` pools a bag.

    Raises:
        ValueError: on an unknown mode, without features, or on a share that is not for this kind of SIDE.
    """

    name: str
    feature_names: list[str]
    codec: Codec
    mode: str = "digits"
    learned: bool = False
    digit_dropout: float = 0.0
    fallback: float = 0.0
    pooling: PoolingType = PoolingType.SUM

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"SIDE '{self.name}': mode must be one of {', '.join(MODES)}; got '{self.mode}'")
        check_share(self, "digit_dropout", "fallback")
        if self.fallback and not self.learned:
            raise ValueError(f"SIDE '{self.name}' is not learned: it has no other rows to fall back on")
        if self.learned and self.digit_dropout:
            raise ValueError(
                f"SIDE '{self.name}': learned rows are of several digits each, so that none can be dropped"
            )
        if not self.feature_names:
            raise ValueError(f"SIDE '{self.name}' serves no feature; name at least one in feature_names")

    @property
    def embedding_dim(self) -> int:
        """Floats per event."""
        if self.mode == "decoded":
            return self.codec.dim
        return sum(stage.width for stage in self.codec.spec.stages)

    def embedding_config(self) -> EmbeddingConfig:
        """As TorchRec describes a table; the one "row" stands for no table at all."""
        return EmbeddingConfig(
            name=self.name, embedding_dim=self.embedding_dim, num_embeddings=1, feature_names=self.feature_names
        )

    def embedding_bag_config(self) -> EmbeddingBagConfig:
        """As TorchRec describes a pooled table."""
        return EmbeddingBagConfig(
            name=self.name,
            embedding_dim=self.embedding_dim,
            num_embeddings=1,
            feature_names=self.feature_names,
            pooling=self.pooling,
        )


class OfCodec(nn.Module):
    """What holds constants of a codec: they survive moves and casts, and a checkpoint of another codec is refused.

    A checkpoint keeps the codec's fingerprint alone, as text in a tensor, since the constants follow from the codec.

    Args:
        table: whose codec.
        constants: buffers by name.
        device: a real device.

    Raises:
        ValueError: on the meta device: TorchRec would fill the constants with zeros in silence.
    """

    last_W: Tensor
    fingerprint: Tensor

    def __init__(self, table: SIDEConfig, constants: Mapping[str, Tensor], device: torch.device | None) -> None:
        super().__init__()
        device = torch.device("cpu") if device is None else torch.device(device)
        if device.type == "meta":
            raise ValueError(f"SIDE '{table.name}' cannot be built on the meta device; build it on the real one")
        spec = table.codec.spec
        self._codec = table.codec
        last_W = torch.tensor([limit - 1 for limit in spec.word_limits])
        self._constants = {**constants, "last_W": last_W, "fingerprint": _as_bytes(spec.fingerprint)}
        for name, constant in self._constants.items():
            self.register_buffer(name, constant.to(device, copy=True), persistent=name == "fingerprint")
        self.stages = format_stages(spec.stages)
        self._num_words = spec.num_words

    def read(self, features: KeyedJaggedTensor, feature: str) -> JaggedTensor:
        """A feature's SIDs, int64 [N, W], some perhaps missing; see ``gather_sids``."""
        return gather_sids(features, feature, word_names(feature, self._num_words), self.stages, self.last_W)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OfCodec":
        super()._apply(fn, recurse)
        for name, constant in self._constants.items():  # after to_empty() they would hold whatever was in memory
            getattr(self, name).copy_(constant)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuses a checkpoint of another codec, also one that has been read into this very module's tensors.

        Raises:
            CodecMismatchError: names both fingerprints.
        """
        text = state_dict.pop(prefix + "_extra_state", None)  # what 0.1 kept
        if text is not None:
            state_dict[prefix + "fingerprint"] = _as_bytes(json.loads(text)["fingerprint"])
        if prefix + "rows_VE" in state_dict:  # what 0.1 called it
            state_dict[prefix + "rows"] = state_dict.pop(prefix + "rows_VE")
        if prefix + "fingerprint" in state_dict:
            kept = _as_text(state_dict[prefix + "fingerprint"])
            self.fingerprint.copy_(self._constants["fingerprint"])  # the checkpoint may have been read into it
            if kept != _as_text(self.fingerprint):
                self._codec.check(kept, "checkpoint")
        super()._load_from_state_dict(state_dict, prefix, *others)


_FINGERPRINT_BYTES = 64  # all fingerprints take as many, so that a checkpoint of any codec can be read, and refused


def _as_bytes(fingerprint: str) -> Tensor:
    """uint8 [64]: the fingerprint as a tensor, which is what a state dict should hold."""
    raw = fingerprint.encode()
    if len(raw) > _FINGERPRINT_BYTES:  # a hash stands for the part that is cut off
        raw = raw[:47] + b"~" + hashlib.sha256(raw).hexdigest()[:16].encode()
    return torch.frombuffer(bytearray(raw.ljust(_FINGERPRINT_BYTES, b"\0")), dtype=torch.uint8)


def _as_text(fingerprint: Tensor) -> str:
    return bytes(fingerprint.cpu().flatten().tolist()).rstrip(b"\0").decode(errors="replace")


class FrozenSIDE(OfCodec):
    """Packed SIDs of one codec as vectors, parameter-free; a missing SID is zeros.

    Args:
        table: codec and mode.
        device: a real device.

    Attributes:
        layout: the digits, and ``rows_VE`` a row of each of their values: what a SID's vector is the sum of.
    """

    rows_VE: Tensor
    table_RE: Tensor
    first_L: Tensor
    factor_VK: Tensor
    basis_KE: Tensor

    def __init__(self, table: SIDEConfig, device: torch.device | None = None) -> None:
        rows_VE, joined = _rows(table)
        radices_L = torch.tensor(joined.digits.radices)
        constants = {"rows_VE": rows_VE, "table_RE": joined.expand(rows_VE), "first_L": radices_L.cumsum(0) - radices_L}
        constants["factor_VK"], constants["basis_KE"] = _factors(rows_VE)
        super().__init__(table, constants, device)
        self.layout = joined.digits
        self._radices, self._words = list(joined.chunks.radices), list(joined.chunks.words)
        self._digit_dropout = table.digit_dropout

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is ``rows_VE``, [V, K] and [K, E]: K is its rank, 25 or 26 of 25 trits."""
        return self.factor_VK, self.basis_KE

    def forward(self, words_NW: Tensor) -> Tensor:
        """float [N, embedding_dim] of packed SIDs, int64 [N, W], as ``read`` has checked them."""
        if self.training and self._digit_dropout:
            return self._of_some_digits(words_NW)
        return side_decode(words_NW, self.table_RE, self._radices, self._words)

    def _of_some_digits(self, words_NW: Tensor) -> Tensor:
        """The sum of the rows of a random share of the digits; not scaled, as that of a SID cut short is not.

        The codec's offset goes with the first digit.
        """
        rows_NL = self.layout.values(words_NW) + self.first_L
        drawn_NL = torch.rand_like(rows_NL, dtype=self.rows_VE.dtype)
        kept_NL = (drawn_NL >= self._digit_dropout) & (words_NW[:, :1] >= 0)  # of a missing SID none
        kept_NL = kept_NL.to(self.rows_VE.dtype)
        return functional.embedding_bag(rows_NL, self.rows_VE, per_sample_weights=kept_NL, mode="sum")


class LearnedSIDE(OfCodec):
    """The same sum of rows, with rows that training changes: one per chunk of up to 256 values, started frozen.

    A missing SID is zeros, and changes no row.

    A chunk (5 trits: 243 rows) has a row of its own for every combination of its digits, so that training can give
    items what no linear map of the digits can, in a table whose size does not depend on the number of items.

    Args:
        table: codec and mode.
        device: a real device.

    Attributes:
        layout: the chunks, and ``rows_VE`` a row of each of their values: what a SID's vector is the sum of.
    """

    start_VE: Tensor

    def __init__(self, table: SIDEConfig, device: torch.device | None = None) -> None:
        rows_VE, joined = _rows(table)
        super().__init__(table, {"start_VE": joined.expand(rows_VE)} if table.fallback else {}, device)
        self._fallback = table.fallback
        self.layout = joined.chunks
        self._radices, self._words = list(self.layout.radices), list(self.layout.words)
        self.rows = nn.Parameter(joined.expand(rows_VE).to(self.last_W.device))

    factors = None  # rows that are trained have no fixed rank

    @property
    def rows_VE(self) -> Tensor:
        """A row of each value of each chunk, float [V, embedding_dim]; the parameter itself."""
        return self.rows

    def forward(self, words_NW: Tensor) -> Tensor:
        """float [N, embedding_dim] of packed SIDs, int64 [N, W], as ``read`` has checked them."""
        learned_NE = side_decode(words_NW, self.rows, self._radices, self._words)
        if not (self.training and self._fallback):
            return learned_NE
        falls_N1 = torch.rand(words_NW.shape[0], 1, device=words_NW.device) < self._fallback
        return torch.where(falls_N1, side_decode(words_NW, self.start_VE, self._radices, self._words), learned_NE)


def build_side(table: SIDEConfig, device: torch.device | None = None) -> FrozenSIDE | LearnedSIDE:
    """Frozen or learned, as the table says."""
    return LearnedSIDE(table, device) if table.learned else FrozenSIDE(table, device)


def _rows(table: SIDEConfig) -> tuple[Tensor, Joined]:
    """A row per digit and value, float32 [V, embedding_dim], whose sums are SIDE's vectors; and how digits join."""
    codec, decoded = table.codec, table.mode == "decoded"
    joined = codec.spec.layout.join()
    rows_VE = digit_rows(codec.digit_tables if decoded else codec.value_tables(), joined.digits)
    if decoded:
        rows_VE[: codec.spec.radices[0]] += codec.offset_D  # every SID takes one of these rows
    return rows_VE, joined


def _factors(rows_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of the least rank whose product is ``rows_VE``."""
    u_VK, s_K, basis_KE = torch.linalg.svd(rows_VE.double(), full_matrices=False)
    rank = int((s_K > 1e-6 * s_K.max()).sum())
    return (u_VK * s_K)[:, :rank].float(), basis_KE[:rank].float()


# What follows looks at values, or asks tensors for their device: fx must call it rather than trace it.


@torch.fx.wrap
def gather_sids(
    features: KeyedJaggedTensor, feature: str, keys: list[str], stages: str, last_W: Tensor
) -> JaggedTensor:
    """A feature's SIDs, values int64 [N, W], gathered from the keys of its words and checked; they may be missing.

    Args:
        features: holds the keys.
        feature: its name.
        keys: of its words; see ``word_names``.
        stages: of its SIDs, as text.
        last_W: int64, the greatest value of each word.

    Raises:
        DataError: if a key is missing or, on CPU, a value is no packed SID; names feature and row. On CUDA and in graphs
            an assertion fails instead, without a wait.
    """
    by_key = features.to_dict()
    missing = [key for key in keys if key not in by_key]
    if missing:
        raise DataError(
            f"feature '{feature}': the KeyedJaggedTensor has no key '{missing[0]}'; its keys are {features.keys()}, and "
            f"SIDs of {stages} travel under {keys}"
        )
    words = [by_key[key] for key in keys]
    _check_lengths(feature, keys, words)
    words_NW = torch.stack([word.values() for word in words], dim=1)
    _check_words(feature, stages, words_NW, last_W)
    first = words[0]
    return JaggedTensor(words_NW, weights=first.weights_or_none(), lengths=first.lengths(), offsets=first.offsets())


def _check_lengths(feature: str, keys: list[str], words: list[JaggedTensor]) -> None:
    first, *others = words
    for key, other in zip(keys[1:], others, strict=True):
        message = (
            f"feature '{feature}': keys '{keys[0]}' and '{key}' have different lengths; every SID has a word in each"
        )
        if first.lengths().shape != other.lengths().shape:
            raise DataError(message)
        equal = (first.lengths() == other.lengths()).all()
        if not can_look_at(equal):
            torch._assert_async(equal, message)
        elif not equal:
            raise DataError(message)


def _check_words(feature: str, stages: str, words_NW: Tensor, last_W: Tensor) -> None:
    if words_NW.dtype != torch.int64:
        shape = tuple(words_NW.shape)
        raise DataError(f"feature '{feature}': words have shape {shape} and dtype {words_NW.dtype}, expected int64")
    wrong_NW = wrong_words(words_NW, last_W, may_miss=True)
    if not can_look_at(words_NW):
        torch._assert_async(~wrong_NW.any(), f"feature '{feature}': a word is no packed SID of {stages}")
    elif wrong_NW.any():
        row, word = wrong_NW.nonzero()[0].tolist()
        value = int(words_NW[row, word])
        raise DataError(f"feature '{feature}': row {row}, word {word} is {value}, no packed SID of {stages}")


def can_look_at(values: Tensor) -> bool:
    """Whether a check can read values now; else it must be an assertion: on CUDA, to wait for nothing, and in a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
