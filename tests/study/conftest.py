"""A report as the pipeline makes it, of made-up metrics, and runs that have such."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.ranker.reliability import EDGES
from sidrec_torchrec.study.report import summarize_arm

NE = {"none": 0.98, "raw": 0.74, "prefix-ngram": 0.82, "side": 0.735, "learned-side": 0.734, "id": 0.83, "hybrid": 0.75}
STORED = {"none": 0.0, "raw": 1225.3, "prefix-ngram": 3.9, "side": 1.8, "learned-side": 1.8, "id": 1.5, "hybrid": 1.8}


def metrics(arm: str, seed: int) -> dict[str, Any]:
    """``metrics.json`` of a ranker."""
    rng = np.random.default_rng([*arm.encode(), seed])
    ne = {part: NE[arm] + shift + rng.normal(0, 0.004) for part, shift in (("all", 0), ("warm", 0), ("cold", 0.02))}
    test: dict[str, Any] = {f"ne_{part}": value for part, value in ne.items()}
    test |= {f"auc_{part}": 1.2 - value / 2 for part, value in ne.items()}
    test |= {f"calibration_{part}": 1 + rng.normal(0, 0.03) for part in ne}
    test |= {"targets_all": 6000.0, "targets_warm": 4500.0, "targets_cold": 1500.0}
    test["breakdown"] = {
        name: {
            "label": [
                {
                    "bucket": bucket,
                    "targets": 200 * place + 30,
                    "positives": 90 * place + 13,
                    "ne": NE[arm] + 0.02 * place + rng.normal(0, 0.01),
                    "calibration": 1 + rng.normal(0, 0.05),
                }
                for place, bucket in enumerate(table.buckets)
            ]
        }
        for name, table in TABLES.items()
    }
    middles = [(low + high) / 2 for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)]
    test["reliability"] = {
        "label": [
            {"from": 0.0, "to": 1.0, "targets": 260, "positives": round(260 * p**1.1), "prediction": p} for p in middles
        ]
    }
    return {
        "arm": arm,
        "seed": seed,
        "test": test,
        "bytes_per_event_stored": STORED[arm],
        "bytes_per_event_kjt": 8.0,
        "table_bytes": 330_448,
        "train_events_per_s": 5_000.0,
        "validation": [{"ne_all": NE[arm] + 0.1 / (epoch + 1)} for epoch in range(5)],
        "train_seconds": 20.0,
        "best_epoch": 3,
    }


def sequences(**changes: Any) -> dict[str, Any]:
    """``prepared.json``."""
    counts = {name: {"rows": 9, "events": 9_000, "targets": 6_000} for name in ("train", "validation", "test")}
    data = {"items": "a1", "events": "b2", "users": "c3"}
    return {"tasks": ["label"], "num_items": 2_000, "counts": counts, "data": data, "max_history": 512} | changes


@pytest.fixture(scope="session")
def make_report():
    """``report.json`` of arms and a number of seeds."""

    def make(arms: tuple[str, ...] = tuple(NE), seeds: int = 3, **changes: Any) -> dict[str, Any]:
        runs = {arm: [metrics(arm, seed) for seed in range(seeds)] for arm in arms}
        base = "none" if "none" in arms else None
        corpus = {
            "items": 2_000,
            "bits": 20 * math.log2(3),
            "digits": {"entropy": [1.5] * 19 + [0.01], "unused": [0] * 20, "idle": [19]},
            "collisions": {"items": 4, "largest": 2},
            "depths": [0, 10, 20],
            "reconstruction": {"text_emb": [1.0, 0.5, 0.2], "image_emb": [1.0, 0.6, 0.3]},
        }
        return {
            "arms": {arm: summarize_arm(its, runs.get(base or "")) | {"base": base} for arm, its in runs.items()},
            "tokenizer": {"side": {"training": {}, "corpus": corpus, "digit_bits": [math.log2(3)] * 20}},
            "seeds": seeds,
            "protocol": "Per user, the last 20% of events are the test targets.",
            "sequences": sequences(),
            "data": {
                "summary": {"users": 600, "items": 2_000, "events": 120_000, "sources": {"text_emb": {"dim": 64}}},
                "ne_oracle": 0.64,
            },
            "command": "sidrec pipeline --out run --arms " + ",".join(arms),
            "versions": {"torch": "2.13.0", "torchrec": "1.8.0"},
            "hardware": {"cpu": "any", "cores": 2, "gpus": []},
            "steps": {"prepare": 1.0, "train ranker side seed 0": 20.0},
            "seconds": 21.0,
            "processes": 1,
        } | changes

    return make


@pytest.fixture
def make_pipeline(make_report, tmp_path):
    """A pipeline's folder."""

    def make(name: str, config: dict[str, Any] | None = None, **report: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(make_report(**report)))
        (folder / "run.json").write_text(json.dumps({"tune": True, "ranker": {"epochs": 5}} | (config or {})))
        return folder

    return make


@pytest.fixture
def make_ranker(tmp_path):
    """A trained ranker's folder."""

    def make(arm: str, seed: int, config: dict[str, Any] | None = None, made_of: str = "", **changes: Any) -> Path:
        folder = tmp_path / f"{arm}-{seed}{made_of}{len(config or {})}{len(changes)}"
        (folder / "trained_on").mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics(arm, seed)))
        (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "epochs": 5} | (config or {})))
        (folder / "trained_on" / "prepared.json").write_text(json.dumps(sequences(**changes)))
        (folder / "trained_on" / "arm.json").write_text(json.dumps({"fingerprints": {"side": made_of}, "sources": []}))
        return folder

    return make
