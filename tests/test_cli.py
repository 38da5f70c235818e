"""The command line: flags from config dataclasses, and errors in words."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sidrec_torchrec import __version__, cli
from sidrec_torchrec.cli import main, parse_config
from sidrec_torchrec.config_source import config_skeleton
from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.flags import UsageError, flags_of
from sidrec_torchrec.jobs import JOBS
from sidrec_torchrec.training.config import POSITIONAL


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


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--rate", "nan", "--training.optimizer.rate: must be a finite number, got nan"),
        ("--rate", ".inf", "--training.optimizer.rate: must be a finite number, got inf"),
        ("--rate", "1e999", "--training.optimizer.rate: must be a finite number, got inf"),
        ("--training.passes", f"{2**63}", "--training.passes: must lie below 2^63"),
        ("--hidden-dims", f"1,{-(2**63)}", "--model.hidden-dims: must lie below 2^63"),
    ],
)
def test_numbers_that_no_flag_can_have(flag, value, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        parse("--out", "d", flag, value)


def test_memory_that_runs_out_is_said_in_a_line(monkeypatch, capsys):
    def without_room(config: Outer) -> None:
        torch.empty(1 << 60)

    monkeypatch.setitem(JOBS._entries, "job", without_room)
    assert main(["job", "--out", "d"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("error: not enough memory (") and "smaller sizes or batches" in line

    def with_another_error(config: Outer) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setitem(JOBS._entries, "job", with_another_error)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        main(["job", "--out", "d"])


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
        (["--out", "d", "--cold-fraction", "much"], "--cold-fraction: must be float, got 'much'"),
        (["--out", "d", "--hidden-dims", "8,wide"], "--model.hidden-dims: must be int, got 'wide'"),
        (["--out", "d", "--sauce", "a"], "there is no flag --sauce; did you mean --source?"),
        (["--out", "d", "--zzz", "a"], "there is no flag --zzz"),
        (["--out", "d", "--hiden-dims", "8"], "did you mean --model.hidden-dims?"),
        (
            ["--out", "d", "--passes", "2"],
            "--passes may be --training.passes or --training.optimizer.passes; write which",
        ),
        (["--out", "d", "--cold", "0.5"], "there is no flag --cold"),
        (["--out", "d", "--source"], "--source needs a value"),
        (["d"], "'d' belongs to no flag"),
        (["--log", "xml"], "--log is text or json, got 'xml'"),
        ([], "sidrec job needs --out; sidrec job --help lists all flags"),
    ],
)
def test_bad_flags_are_one_line(arguments, words, capsys):
    assert main(["job", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Runs.

    Args:
        run: what to compare.
        out: where to.
    """

    run: tuple[Path, ...] = field(metadata=POSITIONAL)
    out: Path


def test_values_may_stand_by_themselves_where_a_config_says_so(monkeypatch, capsys):
    def compared(config: Compared) -> None:
        print([str(path) for path in config.run])

    monkeypatch.setitem(JOBS._entries, "compared", compared)
    for arguments in (["a,b", "c", "--out", "d"], ["--out=d", "a,b", "c"], ["a,b", "--out", "d", "c"]):
        assert main(["compared", *arguments]) == 0
        assert capsys.readouterr().out == "['a,b', 'c']\n"
    assert main(["compared", "--run", "a,c", "--out", "d"]) == 0  # a flag's list has commas, as everywhere
    assert capsys.readouterr().out == "['a', 'c']\n"
    assert main(["compared", "--out", "d"]) == 2
    assert "sidrec compared needs RUN ...;" in capsys.readouterr().err
    assert main(["compared", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sidrec compared RUN ... --out PATH")


def test_help_is_the_docstring(capsys):
    assert main(["job", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sidrec job --out PATH [--flag value ...]")
    assert "  --source TEXT,...           which sources. [all]" in out
    assert "  --model.hidden-dims N,...   widths. [64]" in out
    words = " ".join(out.split())
    assert "A flag of a config within, such as --model.hidden-dims, also goes by its last name" in words


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
    assert capsys.readouterr().err == "error: there is no command 'jib'; did you mean 'job'?\n"
    assert main(["train-tokeniser", "--out", "d"]) == 2
    assert "did you mean 'train-tokenizer'?" in capsys.readouterr().err
    assert main([]) == 2
    assert capsys.readouterr().err == "error: no command; sidrec --help lists all\n"
    assert main(["codec", "design-it"]) == 2
    assert "did you mean 'codec design'?" in capsys.readouterr().err
    for asking in (["--help"], ["data"], ["codec"], ["codec", "--help"]):
        assert main(asking) == 0
        assert "data movielens" in capsys.readouterr().out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sidrec-torchrec {__version__}\n"


OURS = [name for name in cli.commands() if name not in ("doctor", "completion")]


@pytest.mark.parametrize("name", OURS)
def test_every_command_has_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    assert f"usage: sidrec {name}" in capsys.readouterr().out


def test_no_command_needs_torch_to_list_and_to_refuse_flags():
    code = f"""
import sys
from sidrec_torchrec import cli, environment
assert cli.main(["--help"]) == 0
for name in {OURS}:
    assert cli.main([*name.split(), "--help"]) == 0, name
    assert cli.main([*name.split(), "--no-such-flag", "a"]) == 2, name
    assert cli.main(["completion", "words", *name.split()]) == 0, name
assert cli.main(["train-ranker", "--data", "d", "--prepared", "p", "--out", "o", "--model.dim", "wide"]) == 2
environment.installed_versions = lambda: {{"torch": "2.11.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}}
assert cli.main(["doctor"]) == 1
for module in ("torch", "pyarrow", "numpy"):
    assert module not in sys.modules, module
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--model.dim: must be int, got 'wide'" in result.stderr


@pytest.mark.parametrize("name", OURS)
def test_flags_read_from_the_source_are_those_of_the_config(name):
    registry, entry = cli._where(name)
    declared = config_skeleton(registry._late[entry])
    assert declared is not None
    own, real = flags_of(declared), flags_of(cli._config_class(registry[entry]))
    assert list(own) == list(real)
    for path, flag in own.items():
        assert (flag.help, flag.words, flag.is_list, flag.choices) == (
            real[path].help,
            real[path].words,
            real[path].is_list,
            real[path].choices,
        )
        if not flag.is_config:
            assert (flag.kind, flag.default) == (real[path].kind, real[path].default)
        assert flag.help, f"--{flag.name} says nothing"


def test_lines_as_json(capsys, tmp_path):
    flags = ["--out", str(tmp_path / "corpus"), "--users", "20", "--items", "100", "--median-events", "20"]
    assert main(["data", "synthetic", *flags, "--log", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines
    assert {(line["level"], line["rank"], line["job"]) for line in lines} == {("info", 0, "data synthetic")}
    assert lines[-1]["message"].startswith("data synthetic: done in ")
    assert main(["data", "validate", "--data", str(tmp_path), "--log=json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["level"] == "error"


def test_a_finished_command_says_so_unless_it_is_quiet(capsys):
    assert main(["job", "--out", "d"]) == 0
    assert capsys.readouterr().err == "job: done in 0 s; see d\n"
    assert main(["--quiet", "job", "--out", "d"]) == 0
    assert capsys.readouterr() == ('{"out": "d"}\n', "")
    assert main(["job", "--out", "d", "--source", "bad", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_error_of_all_processes_is_said_once(capsys, monkeypatch, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert main(["job", "--out", "d", "--source", "bad"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for rank in range(2):  # for torchrun's own report
        failure = ProcessFailure(rank, 7, 2, str(tmp_path / str(rank) / "error.json"))
        assert f"traceback : {said.removeprefix('error: ')}" in str(ChildFailedError("sidrec", {rank: failure}))
    assert main(["job", "--out", "d", "--nothing", "bad"]) == 2
    assert "no flag --nothing" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "sidrec completion words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ([], {"pipeline", "codec", "data", "completion"}),
        (["codec"], {"design", "drift", "index"}),
        (["encode-corpus"], {"--tokenizer", "--append", "--dry-run", "--schema.time-unit"}),
        (["encode-corpus", "--report"], {"short", "full"}),
        (["encode-corpus", "--append"], {"--tokenizer"}),
        (["encode-corpus", "--out"], set()),
    ],
)
def test_words_to_complete(words, some, capsys):
    assert main(["completion", "words", *words]) == 0
    found = {*capsys.readouterr().out.split()}
    assert some <= found if some else not found


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path):
    sidrec = tmp_path / "sidrec"
    sidrec.write_text(f'#!/bin/sh\nexec {sys.executable} -m sidrec_torchrec.cli "$@"\n')
    sidrec.chmod(0o755)
    code = """eval "$(sidrec completion bash)"
COMP_WORDS=(sidrec codec des) COMP_CWORD=2
_sidrec
echo "${COMPREPLY[@]}" """
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["design"]


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
    assert "data other-logs         convert other-logs to our format" in capsys.readouterr().out
    assert main(["data", "other-logs", "--help"]) == 0
    assert "Converts logs of another kind." in capsys.readouterr().out
    assert main(["data", "other-logs", "--out", "d"]) == 0
    assert json.loads(capsys.readouterr().out) == {"events": 1}
