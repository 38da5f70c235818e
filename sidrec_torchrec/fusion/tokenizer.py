"""The tokenizer: a trained VQ Fusion with its codec; encodes items into packed SIDs and decodes them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor

from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec, fingerprint_of
from sidrec_torchrec.codec.packing import word_names
from sidrec_torchrec.codec.tensor_file import save_tensors
from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.data.frames import read_frame, with_columns
from sidrec_torchrec.errors import CodecMismatchError, DataError, first_line
from sidrec_torchrec.files import atomic_path, check_is_file, read_object, sha256_of, write_json
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.encoder import Encoder
from sidrec_torchrec.fusion.item_tensors import ItemStream, check_widths
from sidrec_torchrec.fusion.model import ItemTensors, Standardize, VQFusion
from sidrec_torchrec.names import escape
from sidrec_torchrec.storage.mirror import local

_JSON_FILE, _WEIGHTS_FILE = "tokenizer.json", "tokenizer.pt"
TOKENIZER_FOLDER = "tokenizer"  # where train-tokenizer and tune-tokenizer put it, in their output folder
_ENCODING = ("standardize.", "encoders.", "absent.", "fuse.", "quantizer.")  # what a SID depends on


@dataclass(frozen=True)
class Decoded:
    """What SIDs decode to.

    Args:
        sources: float32 [N, d] by source, on the source's own scale.
        probabilities: float32 [N, C] by target; of one class each, or of every class by itself (multi-label).
    """

    sources: dict[str, Tensor]
    probabilities: dict[str, Tensor]


class Tokenizer:
    """Items to SIDs and back.

    Args:
        model: trained.
        vocabularies: classes by target.
        codec: of the tokenizer that this one refreshes, whose digits it writes; None for one of its own.

    Attributes:
        codec: decodes the SIDs. Its fingerprint says what digits mean: all that reads SIDs depends on it.
        encoding: fingerprint of all that encoding depends on. A codec of its own has the same; tokenizers that refresh one
            another share a codec, and each has an encoding of its own.

    Raises:
        CodecMismatchError: if the model decodes otherwise than ``codec``.
    """

    def __init__(self, model: VQFusion, vocabularies: dict[str, Vocabulary], *, codec: Codec | None = None) -> None:
        self.model = model.eval()
        self._encoder = Encoder(model)
        self.vocabularies = vocabularies
        self.encoding = _fingerprint(model)
        own = Codec.of(model.quantizer, self.encoding)
        if codec is not None and not codec.decodes_as(own):
            raise CodecMismatchError(
                f"the tokenizer decodes digits otherwise than codec {codec.spec.fingerprint}, which it is to refresh: its "
                "quantizer has been trained; it is a codec of its own"
            )
        self.codec = codec or own

    @property
    def device(self) -> torch.device:
        """Where items are encoded."""
        return self._encoder.device

    def to(self, device: torch.device) -> "Tokenizer":
        """Moves the model to ``device``, itself; the codec stays on the CPU."""
        self.model.to(device)
        self._encoder.to(device)
        return self

    def encode(self, items: ItemTensors) -> Tensor:
        """Packed SIDs of items, int64 [N, W], on the CPU; the items may be on any device.

        Raises:
            ValueError: as ``digits``.
        """
        return self.codec.spec.pack(self.digits(items))

    def encode_table(self, items: Any) -> pa.Table:
        """A frame of items with their SIDs: Arrow, which ``polars.from_arrow``, ``duckdb.from_arrow`` and ``to_pandas`` take.

        Args:
            items: a frame, of pandas, Polars, DuckDB, Arrow or Hugging Face (see ``data.frames.read_frame``), with ``item_id`` and the
                sources that the tokenizer reads; a missing vector is null.

        Returns:
            Every column of the frame, in the order of its rows, and ``sid``, int64 (``sid_0``, ``sid_1``, ... if a SID takes
            more words). An index of pandas is left out.

        Raises:
            DataError: on a missing column, one of the wrong type or width, or a bad value; names column and row.
        """
        table = read_frame(items, "items")
        stream = ItemStream.open(table, tuple(self.model.config.read_sources), {})
        check_widths(stream.items, self.model.config.sources)
        words_NW = torch.cat([self.encode(block) for _, block in stream.blocks()]).numpy()
        names = word_names("sid", self.codec.spec.num_words)
        return with_columns(table, dict(zip(names, map(pa.array, words_NW.T), strict=True)), "items")

    def digits(self, items: ItemTensors) -> Tensor:
        """Digits of items, int16 [N, L], on the CPU; they depend on nothing but the item. See ``Encoder``.

        Raises:
            ValueError: on a source of another width than the tokenizer's, or a value that is not finite.
        """
        self._check(items)
        return self._encoder.digits(items).cpu()

    def latents(self, items: ItemTensors) -> Tensor:
        """Vectors of items in the codec's space, which SIDs stand for, float64 [N, D], on the CPU.

        Raises:
            ValueError: as ``digits``.
        """
        self._check(items)
        return self._encoder.latents(items).cpu()

    def _check(self, items: ItemTensors) -> None:
        for name, dim in self.model.config.read_sources.items():
            if name not in items.sources or name not in items.present:
                raise ValueError(f"source '{name}' is not given; where an item lacks it, say so in ``present``")
            if items.sources[name].shape != (len(items), dim):
                shape = tuple(items.sources[name].shape)
                raise ValueError(f"source '{name}' has shape {shape}, expected ({len(items)}, {dim})")

    @torch.no_grad()
    def decode(self, words_NW: Tensor, *, num_digits: int | None = None) -> Decoded:
        """Sources and targets of packed SIDs.

        Args:
            words_NW: int64 [N, W].
            num_digits: use only this many first digits; None for all.

        Raises:
            ValueError: on words that are not SIDs of this tokenizer; names the row.
        """
        model = self.model
        self.codec.spec.check_words(words_NW, may_miss=False)  # what predicts would predict something of nothing
        z_ND = self.codec.decode(words_NW, num_digits=num_digits).to(self.device)
        standardize = {n: cast(Standardize, module) for n, module in model.standardize.items()}
        sources = {n: standardize[n].invert(decoder(z_ND)).cpu() for n, decoder in model.decoders.items()}
        probabilities = {
            n: (head(z_ND).sigmoid() if model.config.targets[n].multi_label else head(z_ND).softmax(1)).cpu()
            for n, head in model.heads.items()
        }
        return Decoded(sources, probabilities)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as ``folder``, whole or not at all."""
        with atomic_path(Path(folder)) as temporary:
            temporary.mkdir()
            save_tensors(self.model.state_dict(), temporary / _WEIGHTS_FILE)
            self.codec.save(temporary / CODEC_FOLDER)
            value = {
                "model": asdict(self.model.config),
                "vocabularies": {name: v.to_json() for name, v in self.vocabularies.items()},
                "fingerprint": self.codec.spec.fingerprint,
                "weights_sha256": sha256_of(temporary / _WEIGHTS_FILE),
                "encoding": self.encoding,
            }
            write_json(temporary / _JSON_FILE, value, sealed=True)

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Reads what ``save`` wrote.

        Args:
            folder: the tokenizer's, or the output folder of the job that trained it.

        Raises:
            DataError: if a file is missing or broken.
            CodecMismatchError: if the weights are not those it was saved with.
        """
        folder = tokenizer_folder(local(folder))
        try:
            value = read_object(folder / _JSON_FILE)
            check_is_file(folder / _WEIGHTS_FILE)
            model = VQFusion(_config(value["model"]))
            model.load_state_dict(torch.load(folder / _WEIGHTS_FILE, weights_only=True, map_location="cpu"))
            vocabularies = {name: Vocabulary.from_json(v) for name, v in value["vocabularies"].items()}
            fingerprint = value["fingerprint"]
            encoding = value.get("encoding", fingerprint)  # absent in folders of earlier versions
            codec = None if encoding == fingerprint else Codec.load(folder / CODEC_FOLDER)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: not found; name a folder train-tokenizer wrote") from None
        except Exception as error:
            raise DataError(
                f"{folder}: not a tokenizer, or a broken one ({first_line(error)}); train it again"
            ) from error
        tokenizer = Tokenizer(model, vocabularies, codec=codec)
        there = tokenizer.codec.spec.fingerprint, tokenizer.encoding
        if there != (fingerprint, encoding):
            raise CodecMismatchError(
                f"{folder}: weights of codec {there[0]}, encoding {there[1]}, beside the description of {fingerprint}, "
                f"{encoding}; restore the folder, or train again"
            )
        kept = value.get("weights_sha256")  # absent as above
        if kept is not None and kept != sha256_of(folder / _WEIGHTS_FILE):
            raise DataError(f"{folder / _WEIGHTS_FILE}: not what was written; restore the folder, or train again")
        return tokenizer


def tokenizer_folder(folder: Path) -> Path:
    """The tokenizer's own folder, given that or the output folder of the job that trained it."""
    folder = Path(folder)
    return folder / TOKENIZER_FOLDER if (folder / TOKENIZER_FOLDER).is_dir() else folder


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that say what the tokenizer does; the folder as ``tokenizer_folder`` takes it."""
    return [tokenizer_folder(folder) / name for name in (_JSON_FILE, _WEIGHTS_FILE)]


def _fingerprint(model: VQFusion) -> str:
    state = {name: t for name, t in model.state_dict().items() if name.startswith(_ENCODING)}
    only_decoding = tuple(f"standardize.{escape(name)}." for name in model.config.predicted)
    tensors = {name: t for name, t in state.items() if not name.startswith(only_decoding)}
    config = {"sources": model.config.read_sources, "quantizer": asdict(model.config.quantizer)}
    return fingerprint_of(tensors, json.dumps(config, sort_keys=True))


def _config(value: dict) -> VQFusionConfig:
    targets = {name: TargetConfig(**target) for name, target in value["targets"].items()}
    predicted = tuple(value.get("predicted", ()))  # absent in folders of earlier versions
    return VQFusionConfig(
        **value | {"predicted": predicted, "targets": targets, "quantizer": QuantizerConfig(**value["quantizer"])}
    )
