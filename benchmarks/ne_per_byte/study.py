"""What the study compares: ways of feeding items, each with the tokenizers it needs and the settings it is tuned over."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.sharding import OptimizerConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.plans import TokenizerPlan, Variant

BASE = "none"
TRADITIONAL = "prefix n-grams"  # of residual codes of content: traditional SIDs
TOLD_TRADITIONAL = "prefix n-grams of our tokenizer"  # what users do has told its residual codes, too
PIECES = "pieces of residual codes"
OURS = "side"
CROSS = "side on residual codes"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A variant of the study.

    Args:
        family: what is coloured alike; gains are given as multiples of the best ``TRADITIONAL`` one.
        variant: what it is.
    """

    family: str
    variant: Variant


# Every variant is tuned over as many settings: rates for all, with them shares of learned rows and of SIDE's digits to drop.
_NAMES = ("learning_rate", "table_learning_rate", "table_dropout", "digit_dropout", "dropout")
SETTINGS = tuple(
    dict(zip(_NAMES, values, strict=True))
    for values in (
        (2e-3, 0.05, 0.35, 0.1, 0.1),
        (2e-3, 0.05, 0.1, 0.3, 0.3),
        (1e-3, 0.05, 0.35, 0.1, 0.3),
        (1e-3, 0.05, 0.6, 0.3, 0.1),
        (4e-3, 0.05, 0.1, 0.1, 0.3),
        (2e-3, 0.2, 0.1, 0.1, 0.3),
    )
)


def arm_of(name: str) -> str:
    """The arm of a variant, by its name; of one that the study had once, of the variant whose name is most like it."""
    arms = {entry.variant.name: entry.variant.arm for entry in Entries(("source",), ())}
    name = name.removesuffix(" *")
    return arms[name] if name in arms else arms[difflib.get_close_matches(name, arms, 1, 0)[0]]


def tuned(variant: Variant, setting: dict[str, float], epochs: int) -> Variant:
    """The variant at one of the settings."""
    options = replace(
        variant.arm_options, table_dropout=setting["table_dropout"], digit_dropout=setting["digit_dropout"]
    )
    rates = OptimizerConfig(learning_rate=setting["learning_rate"], table_learning_rate=setting["table_learning_rate"])
    model = replace(variant.training.model, dropout=setting["dropout"])
    return replace(
        variant, arm_options=options, training=RankerTrainingConfig(epochs=epochs, model=model, optimizer=rates)
    )


class Entries:
    """All entries of a study, for items of some sources and targets.

    Args:
        sources: of the items.
        targets: that fused tokenizers may predict.
    """

    def __init__(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
        self.sources = sources
        self.targets = targets

    def __iter__(self) -> Iterator[Entry]:
        yield _entry(BASE, "none", "none")
        yield Entry(family="raw", variant=Variant(name="raw", arm="raw", sources=self.sources))
        for name, arm in (("raw as 32 int8", "projected"), ("raw as PQ of 8 bytes", "pq")):
            yield Entry(family="raw", variant=Variant(name=name, arm=arm, sources=self.sources))
        yield _entry("id", "id", "id")
        yield _entry("id", "id, hashed to 65,536 rows", "hashed-id", arm_options=ArmConfig(ngram_rows=65_536))
        yield from self._traditional()
        yield from self._in_pieces()
        yield from self._side()

    def _traditional(self) -> Iterator[Entry]:
        """N-grams of residual codes: per source as is usual, and of all we give our own tokenizers."""
        for codewords, depth in ((256, 3), (256, 6), (2048, 3)):
            yield _ngrams(f"prefix n-grams, RQ {codewords}x{depth} per source", *self._residual(codewords, depth))
        yield _ngrams("all n-grams, RQ 256x3 per source", *self._residual(256, 3), arm="all-ngram")
        for what, plan in self._fused_residual().items():
            yield _ngrams(f"prefix n-grams, RQ 256x5 {what}", plan)

    def _in_pieces(self) -> Iterator[Entry]:
        """Codes of content in pieces: from single digits, 769 rows of 256x3, to where every item may be one, as an id is."""
        for codewords, depth, rows in ((256, 3, 769), (256, 3, 1_024), (256, 3, 8_192), (256, 6, 8_192)):
            name = f"pieces, {rows:,} rows, RQ {codewords}x{depth} per source"
            plans = self._residual(codewords, depth)
            yield _entry(PIECES, name, "pieces", *plans, arm_options=ArmConfig(piece_rows=rows))

    def _residual(self, codewords: int, depth: int) -> Iterator[TokenizerPlan]:
        """A residual tokenizer of each source, of content alone."""
        for source in self.sources:
            quantizer = QuantizerConfig(kind="rq", stages=f"onehot:{codewords}*{depth}")
            yield TokenizerPlan(name=f"rq-{codewords}x{depth}-{source}", quantizer=quantizer, sources=(source,))

    def _fused_residual(self) -> dict[str, TokenizerPlan]:
        quantizer = QuantizerConfig(kind="rq", stages="onehot:256*5")
        return {
            "fused": self._fused("rq-256x5", quantizer),
            "fused, collaborative": self._fused("rq-256x5", quantizer, collaborative=True),
            "fused, collaborative, tuned": self._fused("rq-256x5", quantizer, collaborative=True, tuned=True),
        }

    def _side(self) -> Iterator[Entry]:
        """SIDE and what is made of it, first by what is learned, then by how the SIDs are made."""
        plain, told = self._trits(25), self._trits(25, collaborative=True)
        best = self._trits(25, collaborative=True, tuned=True)
        for count in (25, 39):  # what telling and tuning are worth
            yield _ours(f"SIDE, {count} trits", self._trits(count))
            yield _ours(f"SIDE, {count} trits, collaborative", self._trits(count, collaborative=True))
            yield _ours(f"SIDE, {count} trits, tuned", self._trits(count, tuned=True))
        yield _ours("SIDE as digits, 25 trits, collaborative", told, options=ArmConfig(side_mode="digits"))
        for count in (5, 10, 25, 39, 60):  # 5: a byte; 39: as many as one word holds
            plan = self._trits(count, collaborative=True, tuned=True)
            yield _ours(f"SIDE, {count} trits, collaborative, tuned", plan)
        for count in (25, 39):
            for told in ("", ", collaborative"):
                plan = self._trits(count, collaborative=bool(told), tuned=True, digit_dropout=0.1)
                yield _ours(f"SIDE, {count} trits{told}, tuned without a tenth", plan)
        for told in ("", ", collaborative"):
            plan = self._trits(39, collaborative=bool(told), tuned=True)
            yield _ours(f"SIDE + pieces, 39 trits{told}, tuned", plan, arm="side-pieces")
        yield _ours("LearnedSIDE, 25 trits", plain, arm="learned-side")
        yield _ours("LearnedSIDE, 25 trits, collaborative", told, arm="learned-side")
        yield _ours("LearnedSIDE, 25 trits, collaborative, tuned", best, arm="learned-side")
        for count in (10, 39, 60):
            plan = self._trits(count, collaborative=True)
            yield _ours(f"LearnedSIDE, {count} trits, collaborative", plan, arm="learned-side")
        yield _ours("hybrid, 25 trits + 2,187 rows, collaborative", told, arm="hybrid")
        many_rows = ArmConfig(coarse_ids=65_536)  # for 10^5 items: a learned row per prefix of 10 trits
        yield _ours("hybrid, 25 trits + 59,049 rows, collaborative, tuned", best, arm="hybrid", options=many_rows)
        for arm in ("side", "learned-side"):
            name = f"attention to vectors, {arm}, 25 trits, collaborative, tuned"
            yield _ours(name, best, arm=arm, model=RankerConfig(attention="vectors"))
        no_targets = TokenizerPlan(name="dpca-25-no-targets", quantizer=_ternary(25), sources=self.sources)
        yield _ours("SIDE, 25 trits, no targets", no_targets)
        apart = [
            TokenizerPlan(name=f"dpca-12-{source}", quantizer=_ternary(12), sources=(source,))
            for source in self.sources
        ]
        yield _ours("SIDE, 12 trits per source, no targets", *apart)
        mixed = self._fused("dpca-mixed", QuantizerConfig(stages="onehot:256,ternary*20"))
        yield _ours("SIDE, one-hot 256 + 20 trits", mixed)
        for what, plan in self._fused_residual().items():
            yield _ours(f"LearnedSIDE on RQ 256x5 {what}", plan, arm="learned-side", family=CROSS)

    def _trits(self, count: int, **told: bool | float) -> TokenizerPlan:
        return self._fused(f"dpca-{count}", _ternary(count), **told)

    def _fused(
        self, name: str, quantizer: QuantizerConfig, *, digit_dropout: float = 0.0, **told: bool | float
    ) -> TokenizerPlan:
        """Of all sources, predicting the targets; ``collaborative``, ``tuned`` and how are part of its name."""
        name = "-".join([name, *(word for word in ("collaborative", "tuned") if told.get(word))])
        if digit_dropout:
            name += f"-dropout-{digit_dropout}"
        return TokenizerPlan(
            name=name,
            quantizer=quantizer,
            sources=self.sources,
            targets=self.targets,
            digit_dropout=digit_dropout if told.get("tuned") else None,
            **told,
        )


def _ternary(count: int) -> QuantizerConfig:
    return QuantizerConfig(stages=f"ternary*{count}")


def _entry(family: str, name: str, arm: str, *tokenizers: TokenizerPlan, **options: object) -> Entry:
    return Entry(family=family, variant=Variant(name=name, arm=arm, tokenizers=tokenizers, **options))


def _ngrams(name: str, *tokenizers: TokenizerPlan, arm: str = "prefix-ngram") -> Entry:
    told = any(plan.collaborative or plan.tuned for plan in tokenizers)
    options = ArmConfig(ngram_rows=65_536)
    return _entry(TOLD_TRADITIONAL if told else TRADITIONAL, name, arm, *tokenizers, arm_options=options)


def _ours(
    name: str,
    *tokenizers: TokenizerPlan,
    arm: str = "side",
    family: str = OURS,
    options: ArmConfig | None = None,
    model: RankerConfig | None = None,
) -> Entry:
    training = RankerTrainingConfig(model=model or RankerConfig())
    return _entry(family, name, arm, *tokenizers, arm_options=options or ArmConfig(), training=training)
