"""The codec: all that decodes a SID, under one fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import OneHot
from sidrec_torchrec.codec.packing import SIDSpec, is_missing
from sidrec_torchrec.codec.quantizer import Quantizer, add_tables
from sidrec_torchrec.codec.tensor_file import save_tensors
from sidrec_torchrec.errors import CodecMismatchError, DataError, first_line
from sidrec_torchrec.files import atomic_path, check_is_file, write_json
from sidrec_torchrec.storage.mirror import local

CODEC_FILES = _JSON_FILE, _TENSOR_FILE = "codec.json", "codec.pt"
CODEC_FOLDER = "codec"  # beside SIDs, so that a folder of them decodes by itself
_FORMAT = 1  # of both files together, as docs/sid_format.md describes them


@dataclass(frozen=True, eq=False)
class Codec:
    """How packed SIDs become vectors: ``offset + sum_j digit_tables[j][digit_j]``.

    Args:
        spec: digits, packing and fingerprint.
        offset_D: float32 [D].
        digit_tables: per digit, float32 [radix_j, D].

    Raises:
        ValueError: if the tables are not those of the spec's digits.
    """

    spec: SIDSpec
    offset_D: Tensor
    digit_tables: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(table.shape) for table in self.digit_tables]
        expected = [(radix, self.dim) for radix in self.spec.radices]
        if shapes != expected:
            raise ValueError(f"digit tables have shapes {shapes}, expected {expected}")

    @staticmethod
    def of(quantizer: Quantizer, fingerprint: str) -> "Codec":
        """The codec of a trained quantizer, with a fingerprint of everything that encodes; see ``fingerprint_of``."""
        offset, *tables = (t.detach().cpu().float().clone() for t in (quantizer.offset, *quantizer.digit_tables()))
        return Codec(SIDSpec(quantizer.stages, fingerprint), offset, tuple(tables))

    @property
    def dim(self) -> int:
        """D, the width of decoded vectors."""
        return len(self.offset_D)

    def decode(self, words_NW: Tensor, *, num_digits: int | None = None) -> Tensor:
        """Vectors of packed SIDs.

        Args:
            words_NW: int64 [N, W].
            num_digits: decode only this many first digits; None for all.

        Returns:
            float32 [N, D]; zeros for a missing SID.

        Raises:
            ValueError: on words that are not of this spec (names the row), or a ``num_digits`` outside 0 to L.
        """
        self.spec.check_words(words_NW)
        missing_N1 = is_missing(words_NW).unsqueeze(1)
        digits_NL = self.spec.unpack(words_NW.masked_fill(missing_N1, 0))
        return self.decode_digits(digits_NL, num_digits=num_digits).masked_fill(missing_N1, 0)

    def decode_digits(self, digits_NL: Tensor, *, num_digits: int | None = None) -> Tensor:
        """Vectors of digits, integers [N, L]; as ``decode``."""
        return add_tables(self.offset_D, self.digit_tables, digits_NL, num_digits)

    def value_tables(self) -> tuple[Tensor, ...]:
        """Per digit, the vectors its alphabet stands for, each digit in slots of its own: float32 [radix_j, width].

        Their sum over the digits is the SID as a plain vector: 25 trits give 25 floats of -1, 0 and 1.
        """
        width = sum(stage.width for stage in self.spec.stages)
        tables, first = [], 0
        for stage in self.spec.stages:
            table = torch.zeros(stage.radix, width)
            table[:, first : first + stage.width] = stage.values()
            tables.append(table)
            first += stage.width
        return tuple(tables)

    def with_serial_digit(self, radix: int) -> "Codec":
        """This codec with one more digit, which tells apart items of one SID and adds nothing to their vectors.

        Args:
            radix: its values, 2 to 32,768.

        Returns:
            A codec of L + 1 digits, the last one-hot with a table of zeros, and a fingerprint of its own.
        """
        digit = OneHot(radix)
        fingerprint = fingerprint_of({}, f"{self.spec.fingerprint} and a serial digit {digit}")
        spec = SIDSpec((*self.spec.stages, digit), fingerprint)
        return Codec(spec, self.offset_D, (*self.digit_tables, torch.zeros(radix, self.dim)))

    def decodes_as(self, other: "Codec") -> bool:
        """Whether all digits mean the same in both, up to rounding, whatever the fingerprints."""
        if self.spec.stages != other.spec.stages or self.dim != other.dim:
            return False
        pairs = zip((self.offset_D, *self.digit_tables), (other.offset_D, *other.digit_tables), strict=True)
        return all(torch.allclose(own, its, rtol=1e-5, atol=1e-6 * float(its.abs().max())) for own, its in pairs)

    def check(self, fingerprint: str, where: str) -> None:
        """Refuses SIDs of another codec.

        Args:
            fingerprint: what the SIDs carry.
            where: what carries it, for the message.

        Raises:
            CodecMismatchError: names both fingerprints.
        """
        if fingerprint != self.spec.fingerprint:
            raise CodecMismatchError(
                f"{where}: made with codec {fingerprint}, but this is codec {self.spec.fingerprint}; use the tokenizer "
                "that made them, or encode the corpus again"
            )

    def save(self, folder: str | Path) -> None:
        """Writes the codec as ``folder``, whole or not at all."""
        with atomic_path(Path(folder)) as temporary:
            temporary.mkdir()
            tensors = {"offset": self.offset_D} | {f"digit_{j}": t for j, t in enumerate(self.digit_tables)}
            save_tensors(tensors, temporary / _TENSOR_FILE)
            described = {"format": _FORMAT} | self.spec.to_json()
            write_json(temporary / _JSON_FILE, described | {"checksum": _checksum(described, tensors)})

    @staticmethod
    def load(folder: str | Path) -> "Codec":
        """Reads what ``save`` wrote.

        Args:
            folder: the codec's, or one of SIDs that encode-corpus wrote, which holds it.

        Raises:
            DataError: if a file is missing, broken, not what was saved, or of a newer format than this version reads.
        """
        folder = local(folder)
        if not (folder / _JSON_FILE).exists() and (folder / CODEC_FOLDER).is_dir():
            folder = folder / CODEC_FOLDER
        try:
            for name in (_JSON_FILE, _TENSOR_FILE):
                check_is_file(folder / name)
            described = json.loads((folder / _JSON_FILE).read_text())
            _check_format(described["format"], folder)
            checksum = described.pop("checksum")
            tensors = torch.load(folder / _TENSOR_FILE, weights_only=True, map_location="cpu")
            if _checksum(described, tensors) != checksum:
                raise ValueError(f"{_JSON_FILE} and {_TENSOR_FILE} are not what was saved")
            offset_D = tensors.pop("offset")
            tables = tuple(tensors[f"digit_{j}"] for j in range(len(tensors)))
            return Codec(SIDSpec.from_json(described), offset_D, tables)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: not found; name a folder that holds a codec") from None
        except Exception as error:
            raise DataError(f"{folder}: not a codec, or a broken one ({first_line(error)}); make it again") from error


def _check_format(number: int, folder: Path) -> None:
    if number > _FORMAT:
        raise DataError(
            f"{folder}: a codec of format {number}, but this version of sidrec_torchrec reads formats up to {_FORMAT}; "
            "install a newer one"
        )


def _checksum(described: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return fingerprint_of(tensors, json.dumps(described, sort_keys=True))


def fingerprint_of(tensors: Mapping[str, Tensor], config: str) -> str:
    """16 hex digits of SHA-256 over ``config`` and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
