"""docs/extending.md: one of each kind is added here, from a test, without touching the package."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sidrec_torchrec import cli
from sidrec_torchrec.codec.alphabet import ALPHABETS, Grid, format_stages, parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.quantizer import QUANTIZERS
from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.jobs import JOBS, train_ranker
from sidrec_torchrec.ops.kernels import kernel_runs, register
from sidrec_torchrec.ranker.arms import ARMS, Arm
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers import READERS, VectorReader
from sidrec_torchrec.training.config import JobConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
KINDS = ("quantizer", "alphabet", "arm", "reader", "converter", "tracker", "job", "backend")


@pytest.fixture
def added(monkeypatch):
    """Forgets afterwards what a test registers."""
    for registry in (ALPHABETS, QUANTIZERS, ARMS, READERS, CONVERTERS, JOBS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_the_page_has_each_kind_and_names_files_that_are_there():
    for kind in KINDS:
        assert re.search(rf"^## .*{kind}", PAGE, re.MULTILINE | re.IGNORECASE), kind
    files = set(re.findall(r"`(sidrec_torchrec/[\w/]+\.py|tests/[\w/]+\.py)`", PAGE))
    assert len(files) >= len(KINDS)
    assert not [file for file in files if not (ROOT / file).exists()]


def test_an_alphabet(added):
    @ALPHABETS.register("quinary")
    @dataclass(frozen=True)
    class Quinary(Grid):
        power: int = 1
        name = "quinary"
        count = 5
        step = 0.5

    stages = parse_stages("quinary*3,ternary,quinary^2")
    assert [stage.radix for stage in stages] == [5, 5, 5, 3, 25]
    assert format_stages(stages) == "quinary*3,ternary,quinary^2"
    x_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    dpca = DPCA(DPCAConfig(dim=8, stages=stages))
    errors = dpca.fit(x_ND)
    assert errors[-1] < 0.5 and int(dpca.encode(x_ND).max()) > 3


def test_a_quantizer(added):
    @QUANTIZERS.register("signs-only")
    class SignsOnly(DPCA):
        @classmethod
        def check_stages(cls, stages):
            if any(stage.radix != 2 for stage in stages):
                raise ValueError("takes signs alone")

    with pytest.raises(ValueError, match="takes signs alone"):
        QuantizerConfig(kind="signs-only", stages="ternary*4")
    assert isinstance(QuantizerConfig(kind="signs-only", stages="signs*4").build(8), SignsOnly)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(SyntheticConfig(items=100, users=30), folder)
    return folder


def test_an_arm_and_a_reader(added, data, tmp_path):
    class Module(nn.Module):
        def forward(self, items):
            return items["parity"].values().unsqueeze(1)

    @ARMS.register("parity")
    class Parity(Arm):
        keys = ("parity",)

        def values(self, item_N: np.ndarray):
            return {"parity": torch.from_numpy(item_N % 2).float()}

        def module(self, device):
            return Module()

    @READERS.register("halved")
    class Halved(VectorReader):
        def forward(self, batch, items, targets):
            q_SD, pooled_SPD = super().forward(batch, items, targets)
            return q_SD, pooled_SPD * 0.5

    model = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), attention="halved")
    assert cli.main(["prepare", "--data", str(data), "--out", str(tmp_path / "prepared")]) == 0
    paths = {"data": data, "prepared": tmp_path / "prepared", "out": tmp_path / "run"}
    result = train_ranker.main(train_ranker.TrainRankerConfig(arm="parity", epochs=1, model=model, **paths))
    assert np.isfinite(result["train_loss"][0])


@dataclass(frozen=True, kw_only=True)
class CountConfig(JobConfig):
    """What to count.

    Args:
        out: a file.
        numbers: how many.
    """

    out: Path
    numbers: int = 3


def count(config: CountConfig) -> dict[str, int]:
    """Counts."""
    config.out.write_text(str(config.numbers))
    return {"numbers": config.numbers}


def test_a_job_and_a_converter(added, tmp_path, capsys):
    JOBS.register("count")(count)
    CONVERTERS.register("tally")(count)
    assert cli.main(["count", "--out", str(tmp_path / "a"), "--numbers", "7"]) == 0
    assert (tmp_path / "a").read_text() == "7" and capsys.readouterr().out == ""
    assert cli.main(["data", "tally", "--out", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out) == {"numbers": 3}
    assert {"count", "data tally"} <= set(cli.commands())


def test_a_backend():
    """On the device that torch keeps for others to name."""
    from sidrec_torchrec.ops import side_decode

    called = []

    @register(
        side_decode.side_decode,
        "privateuseone",
        reference=side_decode.reference,
        values=1,
        dtypes=(torch.float32,),
        is_usable=lambda: True,
    )
    def kernel(words_NW, table_RD, radices, chunk_words):
        called.append(radices)
        return side_decode.reference(words_NW, table_RD, radices, chunk_words)

    assert kernel_runs(side_decode.side_decode, "privateuseone", torch.float32)
    assert not kernel_runs(side_decode.side_decode, "privateuseone", torch.float64)
    words_NW, table_RD = torch.tensor([[5], [7]]), torch.arange(18.0).view(9, 2)
    expected_ND = side_decode.side_decode(words_NW, table_RD, [3, 3, 3], [0, 0, 0])
    torch.testing.assert_close(kernel(words_NW, table_RD, [3, 3, 3], [0, 0, 0]), expected_ND)
    assert called == [[3, 3, 3]]
