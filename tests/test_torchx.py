"""The TorchX components: valid, launchable on every scheduler we write recipes for, and run for real on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.runner import Runner, get_runner
from torchx.schedulers import slurm_scheduler
from torchx.specs import AppState
from torchx.specs.builders import parse_args
from torchx.specs.file_linter import validate
from torchx.specs.finder import ModuleComponentsFinder, get_component, get_components
from torchx.tracker.backend.fsspec import create

from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.fusion.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILE = "sidrec_torchrec/components.py"
COMPONENTS = {
    "train_tokenizer": "train-tokenizer",
    "encode_corpus": "encode-corpus",
    "collaborative_vectors": "collaborative-vectors",
    "tune_tokenizer": "tune-tokenizer",
    "train_ranker": "train-ranker",
    "prepare": "prepare",
    "evaluate": "evaluate",
    "predict": "predict",
    "pipeline": "pipeline",
}
CLUSTERS = {"slurm": {}, "kubernetes": {"queue": "q"}, "aws_batch": {"queue": "q"}}
BIN = Path(sys.executable).parent


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # a dry run makes a client, but calls nothing
    with get_runner() as runner:
        yield runner


def shell_command(runner: Runner, component: str, *arguments: str) -> str:
    """What bash would run on this machine."""
    request = runner.dryrun_component(f"{FILE}:{component}", list(arguments), "local_cwd").request
    (replicas,) = request.role_params.values()
    return replicas[0].args[-1]


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_valid(component):
    assert validate(str(ROOT / FILE), component) == []


def test_installed_components_stand_beside_those_of_torchx():
    own = {f"sidrec.{component}" for component in COMPONENTS}
    torchxs = {
        found.name for found in ModuleComponentsFinder("torchx.components", "").find() if not found.validation_errors
    }
    assert {"dist.ddp", "utils.echo"} <= torchxs
    assert set(get_components()) >= own | torchxs
    assert {name for name in get_components() if name.startswith("sidrec.")} == own


def test_each_has_its_own_words_and_all_have_the_same_flags():
    components = [get_component(f"sidrec.{name}") for name in COMPONENTS]
    assert len({component.description for component in components}) == len(COMPONENTS)
    for component in components:
        given = parse_args(component.fn, ["-j", "2x8", "--env", "A=a,B=b", "--max_retries", "3", "--", "--out", "o"])
        assert (given.j, given.max_retries, given.script_args[-2:]) == ("2x8", 3, ["--out", "o"])
        assert "restarts, by torchrun" in (component.fn.__doc__ or "")


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_runs_its_command(runner, component):
    command = shell_command(runner, component, "-j", "1x2", "--", "--out", "a folder")
    assert command.endswith(f"-m sidrec_torchrec.cli {COMPONENTS[component]} --out 'a folder'")
    assert "--nnodes 1 --nproc_per_node 2" in command


def test_restarts_and_ports(runner):
    arguments = ["--max_retries", "2", "-j", "2x1"]
    commands = [shell_command(runner, "train_ranker", *arguments, "--", "--out", "o") for _ in range(8)]
    assert all("torchrun --max_restarts 2 " in command for command in commands)
    ports = {re.search(r":(2\d{4}) ", command)[1] for command in commands}
    assert len(ports) > 1  # two jobs on one host do not meet
    command = shell_command(runner, "train_ranker", "-j", "2x1", "--rdzv_port", "29501", "--", "--out", "o")
    assert ":29501 " in command and "--max_restarts 0" in command


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("scheduler", CLUSTERS)
def test_dry_runs_on_clusters(runner, scheduler, component):
    arguments = ["-j", "2x4", "--cpu", "16", "--gpu", "4", "--memMB", "65536", "--image", "team/sidrec:1"]
    arguments += ["--", "--out", "o"]
    request = repr(runner.dryrun_component(f"{FILE}:{component}", arguments, scheduler, CLUSTERS[scheduler]))
    assert "--nnodes 2 --nproc_per_node 4" in " ".join(request.split())
    assert "65536" in request
    # The first node's address is found by a shell variable that the scheduler sets: it must be one.
    variables = re.findall(r"\$\{([^:}]*):=\s*localhost\}:2\d{4}", request)
    assert variables
    assert all(re.fullmatch(r"\w+", variable) for variable in variables)


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --export=ALL,*) IFS=, read -ra variables <<< "${1#--export=ALL,}"; export "${variables[@]}";; esac
  shift
done
exec "$@"
"""
SACCT = """#!/bin/bash
printf 'JobID|JobName|State\n7|train-ranker-0|%s\n' "$STATE"
"""


def test_what_slurm_is_given_runs(runner, tmp_path):
    """The script for sbatch, with an srun that runs here what it is asked to run on the nodes."""
    _program(tmp_path / "srun", SRUN)
    request = runner.dryrun_component("sidrec.prepare", ["-j", "1x2", "--", "--help"], "slurm").request
    variables = os.environ | {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", "-c", request.materialize()]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.count("usage: sidrec prepare") == 2  # --tee 3: of both processes


def test_states_of_slurm(tmp_path, monkeypatch):
    """docs/torchx.md says that a job which somebody cancels breaks --wait: it is to say so only as long as this holds."""
    _program(tmp_path / "sacct", SACCT)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scheduler = slurm_scheduler.create_scheduler("torchx")
    for state, expected in (("COMPLETED", AppState.SUCCEEDED), ("PREEMPTED", AppState.FAILED)):
        monkeypatch.setenv("STATE", state)
        assert scheduler.describe("7").state is expected
    monkeypatch.setenv("STATE", "CANCELLED by 1000")
    with pytest.raises(AssertionError, match="failed to translate slurm state CANCELLED by 1000"):
        scheduler.describe("7")


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["--cpu", "16", "-j", "2x4"], None, "4"),
        (["--cpu", "2", "-j", "1x4"], None, "1"),
        (["--cpu", "16", "-j", "1x1"], None, "16"),
        (["-j", "1x1"], None, str(len(os.sched_getaffinity(0)))),
        (["-j", "1x512"], None, "1"),
        (["--cpu", "16", "-j", "1x4"], "3", "3"),
    ],
)
def test_the_processes_of_a_node_share_its_cores(runner, tmp_path, arguments, given, expected):
    _program(tmp_path / "torchrun", '#!/bin/bash\necho "$OMP_NUM_THREADS"\n')
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"OMP_NUM_THREADS": given} if given else {})
    command = shell_command(runner, "train_ranker", *arguments, "--", "--out", "o")
    result = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout == f"{expected}\n"


def test_two_real_processes_train_a_tokenizer(tmp_path):
    """By its installed name, from a folder without this package, told to a tracker that the launcher names."""
    data, out, tracked = tmp_path / "data", tmp_path / "tokenizer", tmp_path / "tracked"
    write_synthetic(SyntheticConfig(items=200, users=20, median_events=20), data)
    tracked.mkdir()
    (tmp_path / "tracker.conf").write_text(f"protocol=file\nroot_path={tracked}\n")
    (tmp_path / ".torchxconfig").write_text("[torchx:tracker]\nfsspec=\n[tracker:fsspec]\nconfig=tracker.conf\n")
    arguments = ["--data", str(data), "--out", str(out), "--epochs", "1"]
    result = torchx_run("sidrec.train_tokenizer", *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    written = {path.name for path in (out / "checkpoints" / "last").glob("*.safetensors")}
    assert {name.replace("b.", ".") for name in written} == {"process-0.safetensors", "process-1.safetensors"}
    assert len(written) == 2
    assert Tokenizer.load(out / "tokenizer").codec.spec.num_digits == 39
    tracker = create(str(tmp_path / "tracker.conf"))
    (run,) = tracker.run_ids()
    assert run.startswith("local_cwd://torchx/train-tokenizer-")
    metrics = json.loads((out / "metrics.json").read_text())
    assert tracker.metadata(run)["validation.bits"] == metrics["validation"]["bits"]
    assert tracker.artifacts(run)["metrics.json"].path == str(out / "metrics.json")


def test_two_real_processes_fail_in_words(tmp_path):
    result = torchx_run(f"{ROOT / FILE}:evaluate", "--ranker", str(tmp_path / "nothing"), folder=tmp_path)
    assert result.returncode != 0
    assert result.stderr.count(f"error: {tmp_path}/nothing/run.json: not found") == 1  # both met it


def torchx_run(component: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """A component on two processes of this machine, as a user would run it in a folder."""
    command = [BIN / "torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={folder / 'log'}", "--wait", "--log"]
    return subprocess.run(
        [*command, component, "-j", "1x2", "--", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
