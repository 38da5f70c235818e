"""What the study compares: ways of feeding items, each with the tokenizers it needs and the settings it is tuned over."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BASE = "none"
TRADITIONAL = "prefix-ngram"  # variants of this family are traditional SIDs
OURS = "side"


@dataclass(frozen=True, kw_only=True)
class TokenizerPlan:
    """A tokenizer to train on the items that are not cold.

    Args:
        name: of its folder.
        kind: of its quantizer, ``dpca`` or ``rq``.
        stages: its digits.
        source: the one source it reads; None for all.
        with_targets: whether it also predicts the targets.
    """

    name: str
    kind: str
    stages: str
    source: str | None = None
    with_targets: bool = True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of feeding items.

    Args:
        name: in tables.
        family: ``none``, ``raw``, ``id``, ``prefix-ngram`` (traditional) or ``side`` (ours).
        arm: the ranker's arm.
        tokenizers: that make its SIDs: one for ``side`` and ``hybrid``, one or one per source for ``prefix-ngram``.
        arm_options: fields of ``ArmConfig``.
        model_options: fields of ``RankerConfig``.
    """

    name: str
    family: str
    arm: str
    tokenizers: tuple[TokenizerPlan, ...] = ()
    arm_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)


# Every variant is tuned over as many settings: rates for all, and with them what matters to rows that are learned.
SETTINGS = (
    {"learning_rate": 2e-3, "table_dropout": 0.35, "dropout": 0.1},
    {"learning_rate": 2e-3, "table_dropout": 0.1, "dropout": 0.3},
    {"learning_rate": 1e-3, "table_dropout": 0.35, "dropout": 0.3},
    {"learning_rate": 1e-3, "table_dropout": 0.6, "dropout": 0.1},
)


def variants(sources: tuple[str, ...]) -> Iterator[Variant]:
    """All variants for items of these sources."""
    yield Variant(name="none", family=BASE, arm="none")
    yield Variant(name="raw", family="raw", arm="raw")
    yield Variant(name="id", family="id", arm="id")

    for codewords, depth in ((256, 3), (256, 6), (2048, 3)):
        stages = f"onehot:{codewords}*{depth}"
        per_source = tuple(
            TokenizerPlan(name=f"rq-{codewords}x{depth}-{s}", kind="rq", stages=stages, source=s, with_targets=False)
            for s in sources
        )
        label = f"prefix n-grams, RQ {codewords}x{depth}"
        yield Variant(
            name=f"{label} per source",
            family=TRADITIONAL,
            arm="prefix-ngram",
            tokenizers=per_source,
            arm_options={"ngram_rows": 65_536},
        )
    fused_rq = TokenizerPlan(name="rq-256x5", kind="rq", stages="onehot:256*5")
    yield Variant(
        name="prefix n-grams, RQ 256x5 fused",
        family=TRADITIONAL,
        arm="prefix-ngram",
        tokenizers=(fused_rq,),
        arm_options={"ngram_rows": 65_536},
    )

    trits = {
        count: TokenizerPlan(name=f"dpca-{count}", kind="dpca", stages=f"ternary*{count}") for count in (10, 25, 60)
    }
    for count, plan in trits.items():
        yield Variant(name=f"SIDE digits, {count} trits", family=OURS, arm="side", tokenizers=(plan,))
    no_targets = TokenizerPlan(name="dpca-25-no-targets", kind="dpca", stages="ternary*25", with_targets=False)
    mixed = TokenizerPlan(name="dpca-mixed", kind="dpca", stages="onehot:256,ternary*20")
    own = (trits[25],)
    yield Variant(name="SIDE digits, 25 trits, no targets", family=OURS, arm="side", tokenizers=(no_targets,))
    yield Variant(name="SIDE digits, one-hot 256 + 20 trits", family=OURS, arm="side", tokenizers=(mixed,))
    yield Variant(
        name="SIDE decoded, 25 trits", family=OURS, arm="side", tokenizers=own, arm_options={"side_mode": "decoded"}
    )
    yield Variant(
        name="LearnedSIDE, 25 trits", family=OURS, arm="side", tokenizers=own, arm_options={"side_learned": True}
    )
    yield Variant(name="hybrid, 25 trits + 2,187 rows", family=OURS, arm="hybrid", tokenizers=own)
    yield Variant(name="SIDE digits on RQ 256x5 fused", family="cross", arm="side", tokenizers=(fused_rq,))
    for learned in (False, True):
        yield Variant(
            name=f"code-space attention, 25 trits{', learned' if learned else ''}",
            family=OURS,
            arm="side",
            tokenizers=own,
            arm_options={"side_learned": learned},
            model_options={"attention": "codes"},
        )
