"""What the study compares: ways of feeding items, each with the tokenizers it needs and the settings it is tuned over."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BASE = "none"
TRADITIONAL = "prefix n-grams"  # of residual codes of content: traditional SIDs
TOLD_TRADITIONAL = "prefix n-grams of our tokenizer"  # what users do has told its residual codes, too
OURS = "side"
CROSS = "side on residual codes"


@dataclass(frozen=True, kw_only=True)
class TokenizerPlan:
    """A tokenizer to train on the items that are not cold.

    Args:
        name: of its folder.
        kind: of its quantizer, ``dpca`` or ``rq``.
        stages: its digits.
        source: the one source it reads; None for all.
        with_targets: whether it also predicts the targets.
        collaborative: whether it also predicts the collaborative vectors of its training items.
        tuned: whether it is then tuned through a ranker.
    """

    name: str
    kind: str
    stages: str
    source: str | None = None
    with_targets: bool = True
    collaborative: bool = False
    tuned: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of feeding items.

    Args:
        name: in tables.
        family: what is coloured alike; gains are given as multiples of the best ``TRADITIONAL`` one.
        arm: the ranker's arm.
        tokenizers: that make its SIDs: one, or one per source.
        arm_options: fields of ``ArmConfig``.
        model_options: fields of ``RankerConfig``.
    """

    name: str
    family: str
    arm: str
    tokenizers: tuple[TokenizerPlan, ...] = ()
    arm_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)


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


def variants(sources: tuple[str, ...]) -> Iterator[Variant]:
    """All variants for items of these sources."""
    yield Variant(name="none", family=BASE, arm="none")
    yield Variant(name="raw", family="raw", arm="raw")
    yield Variant(name="id", family="id", arm="id")
    yield from _traditional(sources)
    yield from _side(sources)


def _traditional(sources: tuple[str, ...]) -> Iterator[Variant]:
    """N-grams of residual codes: per source as is usual, and of all we give our own tokenizers."""
    for codewords, depth in ((256, 3), (256, 6), (2048, 3)):
        yield _ngrams(f"prefix n-grams, RQ {codewords}x{depth} per source", *_residual(sources, codewords, depth))
    yield _ngrams("all n-grams, RQ 256x3 per source", *_residual(sources, 256, 3), arm="all-ngram")
    for what, plan in _RQ.items():
        yield _ngrams(f"prefix n-grams, RQ 256x5 {what}", plan)


def _residual(sources: tuple[str, ...], codewords: int, depth: int) -> Iterator[TokenizerPlan]:
    """A residual tokenizer of each source, of content alone."""
    for source in sources:
        name, stages = f"rq-{codewords}x{depth}-{source}", f"onehot:{codewords}*{depth}"
        yield TokenizerPlan(name=name, kind="rq", stages=stages, source=source, with_targets=False)


def _ngrams(name: str, *tokenizers: TokenizerPlan, arm: str = "prefix-ngram") -> Variant:
    told = any(plan.collaborative or plan.tuned for plan in tokenizers)
    return Variant(
        name=name,
        family=TOLD_TRADITIONAL if told else TRADITIONAL,
        arm=arm,
        tokenizers=tokenizers,
        arm_options={"ngram_rows": 65_536},
    )


def _side(sources: tuple[str, ...]) -> Iterator[Variant]:
    """SIDE and what is made of it, first by what is learned, then by how the SIDs are made."""
    plain, told, best = _trits(25), _trits(25, collaborative=True), _trits(25, collaborative=True, tuned=True)
    yield _ours("SIDE, 25 trits", plain)
    yield _ours("SIDE, 25 trits, collaborative", told)
    yield _ours("SIDE as digits, 25 trits, collaborative", told, side_mode="digits")
    yield _ours("SIDE, 25 trits, tuned", _trits(25, tuned=True))
    for count in (5, 10, 25, 39, 60):  # 5: a byte; 39: as many as one word holds
        tuned = _trits(count, collaborative=True, tuned=True)
        yield _ours(f"SIDE, {count} trits, collaborative, tuned", tuned)
    yield _ours("LearnedSIDE, 25 trits", plain, arm="learned-side")
    yield _ours("LearnedSIDE, 25 trits, collaborative", told, arm="learned-side")
    yield _ours("LearnedSIDE, 25 trits, collaborative, tuned", best, arm="learned-side")
    for count in (10, 39, 60):
        yield _ours(f"LearnedSIDE, {count} trits, collaborative", _trits(count, collaborative=True), arm="learned-side")
    yield _ours("hybrid, 25 trits + 2,187 rows, collaborative", told, arm="hybrid")
    for arm in ("side", "learned-side"):
        name = f"code-space attention, {arm}, 25 trits, collaborative, tuned"
        yield _ours(name, best, arm=arm, model_options={"attention": "codes"})
    no_targets = TokenizerPlan(name="dpca-25-no-targets", kind="dpca", stages="ternary*25", with_targets=False)
    mixed = TokenizerPlan(name="dpca-mixed", kind="dpca", stages="onehot:256,ternary*20")
    yield _ours("SIDE, 25 trits, no targets", no_targets)
    apart = [
        TokenizerPlan(name=f"dpca-12-{source}", kind="dpca", stages="ternary*12", source=source, with_targets=False)
        for source in sources
    ]
    yield _ours("SIDE, 12 trits per source, no targets", *apart)
    yield _ours("SIDE, one-hot 256 + 20 trits", mixed)
    for what, plan in _RQ.items():
        yield Variant(name=f"LearnedSIDE on RQ 256x5 {what}", family=CROSS, arm="learned-side", tokenizers=(plan,))


_RQ = {
    "fused": TokenizerPlan(name="rq-256x5", kind="rq", stages="onehot:256*5"),
    "fused, collaborative": TokenizerPlan(
        name="rq-256x5-collaborative", kind="rq", stages="onehot:256*5", collaborative=True
    ),
    "fused, collaborative, tuned": TokenizerPlan(
        name="rq-256x5-collaborative-tuned", kind="rq", stages="onehot:256*5", collaborative=True, tuned=True
    ),
}


def _trits(count: int, *, collaborative: bool = False, tuned: bool = False) -> TokenizerPlan:
    name = f"dpca-{count}{'-collaborative' if collaborative else ''}{'-tuned' if tuned else ''}"
    return TokenizerPlan(name=name, kind="dpca", stages=f"ternary*{count}", collaborative=collaborative, tuned=tuned)


def _ours(
    name: str,
    *tokenizers: TokenizerPlan,
    arm: str = "side",
    model_options: dict[str, Any] | None = None,
    **arm_options: Any,
) -> Variant:
    return Variant(
        name=name,
        family=OURS,
        arm=arm,
        tokenizers=tokenizers,
        arm_options=arm_options,
        model_options=model_options or {},
    )
