"""How many digits a corpus needs: chosen by validation NE, the fewest bits within the tolerance."""

import dataclasses

import pytest

from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import codec_digits
from sidrec_torchrec.jobs.codec_digits import CodecDigitsConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from tests.jobs.test_train_ranker import SMALL

PROTOCOL = PrepareConfig(max_history=48, targets_per_row=32, validation_fraction=0.2)


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    return CodecDigitsConfig(
        data=corpus,
        out=tmp_path_factory.mktemp("digits") / "run",
        stages=("ternary*12", "ternary*2"),
        collaborative=False,
        tune=False,
        protocol=PROTOCOL,
        tokenizer=TokenizerTrainingConfig(epochs=1),
        ranker=RankerTrainingConfig(epochs=1, batch_events=1024, model=SMALL),
    )


def test_the_fewest_bits_within_the_tolerance_are_chosen(config, capsys):
    steps = codec_digits.plan(config)
    assert len(steps) == 9 and all(state.startswith("new (") for state in steps.values()), steps
    result = codec_digits.main(config)
    assert list(codec_digits.plan(config).values()) == ["finished"]
    found = result["found"]
    assert list(found) == ["none", "raw", "ternary*12", "ternary*2"]
    assert found["ternary*2"]["bits"] == pytest.approx(3.17, abs=0.01) and found["raw"]["bits"] == 0
    ne = {name: row["validation_ne"][0] for name, row in found.items()}
    best = min(("ternary*12", "ternary*2"), key=ne.get)
    expected = "ternary*2" if ne["ternary*2"] <= ne[best] + 0.003 else "ternary*12"
    assert result["chosen"] == expected
    assert codec_digits._choose(dataclasses.replace(config, tolerance=1.0), found) == "ternary*2"
    found["ternary*12"]["validation_ne"] = [0.5]
    assert codec_digits._choose(config, found) == "ternary*12"
    assert f"Chosen: {expected}" in capsys.readouterr().out


def test_what_cannot_be_chosen_from_is_refused(config):
    with pytest.raises(SidrecError, match="name each list of stages once"):
        dataclasses.replace(config, stages=("ternary*2", "ternary*2"))
    with pytest.raises(ValueError, match="cannot read 'trits'"):
        dataclasses.replace(config, stages=("trits",))
    with pytest.raises(SidrecError, match="give --validation-fraction above 0"):
        dataclasses.replace(config, protocol=dataclasses.replace(PROTOCOL, validation_fraction=0.0))
