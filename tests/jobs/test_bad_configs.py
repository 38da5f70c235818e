"""Bad settings are refused in words before anything is written or trained."""

import pyarrow.parquet as pq
import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.data.collaborative import CollaborativeConfig
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.fusion.config import VQFusionOptions
from sidrec_torchrec.jobs.pipeline import PipelineConfig
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.sharding import OptimizerConfig
from sidrec_torchrec.training.runs import CONFIG_FILE

NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (RankerConfig, {"dim": 0}, "dim must be at least 1, got 0"),
        (RankerConfig, {"dim": 66}, "dim must be a multiple of 4 and of num_heads .4., got 66"),
        (RankerConfig, {"num_heads": 0}, "num_heads must be at least 1"),
        (RankerConfig, {"head_dims": ()}, "head_dims must be one or more widths"),
        (RankerConfig, {"learned_queries": -1}, "learned_queries must be at least 0, got -1"),
        (RankerConfig, {"blocks": -1}, "blocks must be at least 0, got -1"),
        (RankerConfig, {"block_events": 0}, "block_events must be at least 1, got 0"),
        (RankerConfig, {"top_events": -1}, "top_events must be at least 0, got -1"),
        (RankerConfig, {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        (ArmConfig, {"table_dim": 6}, "table_dim must be a multiple of 4, got 6"),
        (ArmConfig, {"table_dim": 0}, "table_dim must be a multiple of 4, got 0"),
        (ArmConfig, {"ngram_rows": 0}, "ngram_rows must be at least 1"),
        (ArmConfig, {"table_dropout": 1.5}, "table_dropout must lie in"),
        (ArmConfig, {"side_mode": "digit"}, "side_mode must be one of digits, decoded; got 'digit'"),
        (OptimizerConfig, {"learning_rate": NAN}, "learning_rate must be at least 0, got nan"),
        (OptimizerConfig, {"warmup": 2.0}, "warmup must lie in"),
        (OptimizerConfig, {"max_gradient_norm": 0.0}, "max_gradient_norm must be above 0, got 0.0"),
        (PrepareConfig, {"cold_fraction": 1.0}, "cold_fraction must lie in"),
        (PrepareConfig, {"max_history": 0}, "max_history must be at least 1"),
        (TrainRankerConfig, {"data": "d", "prepared": "p", "out": "o", "epochs": 0}, "epochs must be at least 1"),
        (TrainTokenizerConfig, {"data": "d", "out": "o", "batch_size": 0}, "batch_size must be at least 1"),
        (VQFusionOptions, {"dropout": -0.1}, "dropout must lie in"),
        (TrainTokenizerConfig, {"data": "d", "out": "o", "predict": ("a", "a")}, "name each predict once, got 'a,a'"),
        (CollaborativeConfig, {"prior_events": float("inf")}, "prior_events must be finite, got inf"),
        (PipelineConfig, {"out": "o", "seeds": 0}, "seeds must be at least 1"),
        (PipelineConfig, {"out": "o", "source": ("a", "a")}, "name each source once, got 'a,a'"),
    ],
)
def test_config_names_the_bad_field(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--ranker.epochs", "0", "epochs must be at least 1, got 0"),
        ("--fused.stages", "trits*25", "cannot read 'trits*25'"),
        ("--residual.stages", "ternary*3", "residual VQ takes one-hot digits"),
        ("--protocol.cold-fraction", "1", "cold_fraction must lie in [0, 1), got 1.0"),
        ("--ranker.profile", "20:10", "profile names the first and last batch of a trace, such as 10:20"),
        ("--ranker.model.dim", "63", "dim must be a multiple of 4"),
        ("--arm-options.side-mode", "digit", "side_mode must be one of"),
        ("--arm-options.ngram-depth", "4", "ngram_depth 4 is more than the digits of onehot:256*3"),
    ],
)
def test_bad_flag_leaves_no_folder_that_would_refuse_the_corrected_command(flag, value, message, tmp_path, capsys):
    assert cli.main(["pipeline", "--data", str(tmp_path), "--out", str(tmp_path / "run"), flag, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written_is_one_line(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["prepare", "--data", str(corpus), "--out", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(tmp_path / "file") in lines[0]


def test_broken_run_file_is_named(corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_FILE).write_text('{"data": ')
    assert cli.main(["prepare", "--data", str(corpus), "--out", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'run' / CONFIG_FILE}: not JSON" in capsys.readouterr().err


def test_items_without_any_source(corpus, tmp_path, capsys):
    path = tmp_path / "items.parquet"
    pq.write_table(pq.read_table(corpus / "items.parquet", columns=["item_id", "category"]), path)
    assert cli.main(["train-tokenizer", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert f"{path}: no column of float lists to fuse" in capsys.readouterr().err
