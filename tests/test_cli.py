"""The command line: flags from config dataclasses, and errors in words."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.cli import main, parse_config
from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.jobs import JOBS


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Sizes.

    Args:
        hidden_dims: widths.
    """

    hidden_dims: tuple[int, ...] = (64,)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Rates.

    Args:
        rate: of all.
        passes: over the data.
    """

    rate: float = 0.1
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Args:
        passes: over the data.
        names: some names.
        stages: not the job's.
        optimizer: rates.
    """

    passes: int = 1
    names: tuple[str, ...] = ()
    stages: str = ""
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A job.

    Args:
        out: where to.
        source: which sources.
        cold_fraction: a share.
        stages: digits.
        report: whether to.
        data: optional folder.
        model: sizes.
        training: how.
    """

    out: Path
    source: tuple[str, ...] = ("all",)
    cold_fraction: float = 0.25
    stages: str = "ternary*25"
    report: bool = False
    data: Path | None = None
    model: Inner = field(default_factory=Inner)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not 0 <= self.cold_fraction < 1:
            raise ValueError(f"cold_fraction must lie in [0, 1), got {self.cold_fraction}")


def job(config: Outer) -> dict[str, str]:
    if config.source == ("bad",):
        raise DataError("items.parquet: no column 'bad'; name one of 'text_emb'")
    print(json.dumps({"out": str(config.out)}))
    return {"out": str(config.out)}


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(JOBS._entries, "job", job)


def parse(*arguments: str) -> Outer:
    return parse_config(Outer, list(arguments), prog="sidrec job")


def test_defaults_and_types():
    assert parse("--out", "d") == Outer(out=Path("d"))


@pytest.mark.parametrize("flag", ["--cold-fraction", "--cold_fraction"])
@pytest.mark.parametrize("equals", [True, False])
def test_kebab_and_snake_case(flag, equals):
    arguments = [f"{flag}=0.5"] if equals else [flag, "0.5"]
    assert parse("--out=d", *arguments).cold_fraction == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--source", "plot_emb", "--source", "cast-emb"],
        ["--source", "plot_emb,cast-emb"],
        ["--source=plot_emb", "--out", "e", "--source=cast-emb"],
    ],
)
def test_list_flags_repeat_or_hold_commas(arguments):
    assert parse("--out", "d", *arguments).source == ("plot_emb", "cast-emb")


def test_nested_lists_and_commas_in_plain_flags():
    config = parse("--out", "d", "--model.hidden-dims", "128,64", "--stages", "onehot:256,ternary*20")
    assert config.model == Inner(hidden_dims=(128, 64))
    assert config.stages == "onehot:256,ternary*20"


def test_a_nested_flag_goes_by_its_last_name():
    named = parse(
        "--out", "d", "--hidden-dims", "8,9", "--rate=0.5", "--names", "a", "--names", "b", "--optimizer.passes", "3"
    )
    assert named.model == Inner(hidden_dims=(8, 9))
    assert named.training == Training(names=("a", "b"), optimizer=Optimizer(rate=0.5, passes=3))
    # the job's own field has the name, whoever else has
    assert parse("--out", "d", "--stages", "ternary*3").stages == "ternary*3"


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        (["--report"], True),
        (["--report", "--stages", "ternary*3"], True),
        (["--source", "a", "--report"], True),
        (["--report", "false"], False),
        (["--report=true", "--report=false"], False),
        ([], False),
    ],
)
def test_a_switch_needs_no_value(arguments, report):
    assert parse("--out", "d", *arguments).report == report


def test_an_empty_list():
    assert parse("--out", "d", "--source", "").source == ()


def test_flags_outdo_the_config_file(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("out: d\nsource: [a, b]\ncold_fraction: 0.1\nmodel:\n  hidden_dims: [8]\n")
    expected = Outer(out=Path("d"), source=("c",), cold_fraction=0.1, model=Inner(hidden_dims=(8,)))
    assert parse("--config", str(file), "--source", "c") == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "d", "--cold-fraction", "2"], "cold_fraction must lie in [0, 1), got 2.0"),
        (["--out", "d", "--cold-fraction", "much"], "cold_fraction"),
        (["--out", "d", "--sauce", "a"], "unrecognized arguments: --sauce"),
        (["--out", "d", "--suorce", "a"], "unrecognized arguments: --suorce a; did you mean --source?"),
        (["--out", "d", "--hiden-dims", "8"], "did you mean --model.hidden_dims?"),
        (
            ["--out", "d", "--passes", "2"],
            "--passes may be --training.passes or --training.optimizer.passes; write which",
        ),
        (["--out", "d", "--cold", "0.5"], "unrecognized arguments: --cold"),
        (["--out", "d", "--source"], "source"),
        ([], "required"),
    ],
)
def test_bad_flags(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["job", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["job", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "which sources." in out
    assert "widths." in out
    words = " ".join(out.split())
    assert "as --model.hidden_dims, may go by its last name, --hidden_dims, where no other has it." in words


def test_a_job_runs(capsys):
    assert main(["job", "--out", "d"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "d"}


def test_an_error_is_its_message_alone(capsys):
    assert main(["job", "--out", "d", "--source", "bad"]) == 2
    assert capsys.readouterr() == ("", "error: items.parquet: no column 'bad'; name one of 'text_emb'\n")


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SIDREC_DEBUG", "1")
    with pytest.raises(DataError):
        main(["job", "--out", "d", "--source", "bad"])


def test_unknown_commands(capsys):
    assert main(["jib"]) == 2
    assert capsys.readouterr().err.endswith("error: unknown command 'jib'\n")
    assert main([]) == 2
    assert main(["codec", "design-it"]) == 2
    for asking in (["--help"], ["data"], ["codec"], ["codec", "--help"]):
        capsys.readouterr()
        assert main(asking) == 0
        assert "data movielens" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.commands())
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"sidrec {name}" in capsys.readouterr().out


def test_help_and_a_doctor_who_finds_a_mismatch_do_without_torch():
    code = """
import sys
from sidrec_torchrec import cli, environment
assert cli.main(["--help"]) == 0
environment.installed_versions = lambda: {"torch": "2.11.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
assert cli.main(["doctor"]) == 1
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_synthetic_corpus_is_made_and_valid(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "corpus"), "--users", "20", "--items", "100", "--median-events", "20"]
    assert main(["data", "synthetic", *flags]) == 0
    assert main(["data", "validate", "--data", str(tmp_path / "corpus")]) == 0
    assert "valid" in capsys.readouterr().out


def test_a_converter_of_another_package_is_a_command(monkeypatch, capsys):
    def convert(config: Outer) -> dict[str, int]:
        """Converts logs of another kind."""
        return {"events": len(config.source)}

    monkeypatch.setitem(CONVERTERS._entries, "other-logs", convert)
    assert main(["--help"]) == 0
    assert "data other-logs        convert other-logs to our format" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "other-logs", "--help"])
    assert "Converts logs of another kind." in capsys.readouterr().out
    assert main(["data", "other-logs", "--out", "d"]) == 0
    assert json.loads(capsys.readouterr().out) == {"events": 1}
