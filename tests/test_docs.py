"""The documentation's code runs: every block of README.md and docs/, in order, in a folder that holds what the page speaks of.

A page's placeholders, DATA and SIDS say, are names of folders that are there (``GIVEN``). Commands are called in this process, with
flags that make them small (``SMALLER``). What cannot run says why (``NOT_RUN``).
"""

import contextlib
import doctest
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sidrec_torchrec import cli
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.flags import flags_of, is_config
from sidrec_torchrec.jobs import encode_corpus, export, train_ranker, train_tokenizer
from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.ranker.config import RankerConfig
from tests.conftest import ROOT

LANGUAGES = {"bash", "python", "toml", "yaml", "text", "dockerfile"}  # the last two are not run
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# By page, what lies in the folder where its blocks run: names of the page, and of the ``shelf``.
GIVEN = {
    "README.md": {
        "DATA": "data",
        "data": "data",
        "ml-1m": "data",
        "amazon": "data",
        "runs/ml-25m/sids/side": "sids",
    },
    "docs/data.md": {"DIR": "data", "DATA": "data", "data": "data", "ml-1m": "data"},
    "docs/engines.md": {
        "DATA": "data",
        "TOKENIZER": "tokenizer",
        "RANKER": "ranker",
        "requests.parquet": "requests.parquet",
    },
    "docs/dpca.md": {"DATA": "data", "vectors": "vectors"},
    "docs/index.md": {"DATA": "data"},
    "docs/migrate.md": {"DATA": "data"},
    "docs/ne_per_byte.md": {"DATA": "data"},
    "docs/predict.md": {
        "runs/side": "ranker",
        "requests.parquet": "requests.parquet",
        "requests": "requests",
        "events.parquet": "data/events.parquet",
    },
    "docs/ranker.md": {
        "data": "recent",
        "syn/data": "data",
        "syn/prepared/sequences": "prepared",
        "syn/sids/side": "sids",
        "runs/october-arms/sids/side": "sids",
    },
    "docs/refresh.md": {"DATA": "data", "PREPARED": "prepared", "TOKENIZER": "tokenizer", "SIDS": "sids"},
    "docs/serving.md": {"DATA": "data", "PREPARED": "prepared", "SIDS": "sids", "ranker.pt2": "ranker.pt2"},
    "docs/sid_life.md": {
        "DATA": "data",
        "TOKENIZER": "tokenizer",
        "SIDS_BEFORE": "sids",
        "SIDS_NOW": "sids",
        "SPREAD_SIDS": "sids",
    },
    "docs/vq_fusion.md": {"DATA": "data", "PREPARED": "prepared"},
}
# By how a command begins, flags that come after its own.
SMALLER = {
    "data synthetic": "--items 120 --users 60 --median-events 40 --min-events 20 --max-events 120 --categories 8",
    "data fractal": "--users-times 2 --items-times 2",
    "train-tokenizer": "--epochs 1",
    "tune-tokenizer": "--epochs 1",
    "train-ranker": "--epochs 1 --model.dim 16 --model.num-heads 2",
    "pipeline": "--dry-run --out NEW",  # its steps are the commands of the other pages; tests/jobs/test_pipeline.py runs it
    "codec digits": "--dry-run",  # trains a ranker for each number of digits
    "serve": "--dry-run",  # until it is stopped; tests/server asks one
    "export": "--dry-run",  # tests/ranker/test_serving.py does; the package is of the shelf
}
DOWNLOADS = "reads a download; tests/data/test_converters.py and test_corpora.py run it on files like those"
# By how a line begins, why it is not run. Its flags are looked at all the same, if it is a command of ours.
NOT_RUN = {
    "sidrec data movielens": DOWNLOADS,
    "sidrec data amazon-reviews": DOWNLOADS,
    "sidrec data kuairand": DOWNLOADS,
    "sidrec data mind": DOWNLOADS,
    "sidrec data taobao-mm": DOWNLOADS,
    "sidrec data yambda": DOWNLOADS,
    "sidrec prepare --data DIR --out prepared --split time --train-from 10001": "its days are those of that download",
    "sidrec codec drift --new SIDS": "of items that came since; tests/jobs/test_codec_life.py adds some",
    "sidrec report": "of two finished runs of the pipeline; tests/study makes reports of some",
    "pip install": "changes what is installed",
    "make": "sets up an environment and runs for minutes",
    "sbatch": "submits to a cluster",
    "torchx run": "submits to clusters; tests/test_torchx.py makes every component's request, and runs one",
    "docker build": "needs a Docker engine",
    "curl": "needs a server; test_the_request_is_answered asks one",
    "python benchmarks/": "takes minutes to hours",
}

BUCKET = "s3://BUCKET"  # a page's; here a folder, which is at a URL as well: tests/jobs/test_urls.py has a server

SHARED_FLAGS = (ROOT / "benchmarks" / "comparison.py",)  # that several benchmarks have


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        where: page and line.
        language: that it is marked with.
        text: of it.
    """

    where: str
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    line_of = {
        match.start(): text[: match.start()].count("\n") + 1 for match in re.finditer("^ *```", text, re.MULTILINE)
    }
    return [Block(f"{page}:{line_of[m.start()]}", m[2], textwrap.dedent(m[3])) for m in found]


def commands_of(block: Block) -> list[str]:
    """The lines of a block of commands, those that go on in the next one joined; a request with what it sends."""
    text = re.sub(r"\\\n *", "", block.text)
    return [text] if text.startswith("curl") else [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """One of everything, small, and with every column that a page names."""
    folder = tmp_path_factory.mktemp("shelf")
    data = folder / "data"
    config = SyntheticConfig(
        items=120, users=60, median_events=40, max_events=120, categories=4, text_dim=12, image_dim=8
    )
    write_synthetic(config, data)
    items, events = (pq.read_table(data / f"{name}.parquet") for name in ("items", "events"))
    rng = np.random.default_rng(0)
    for name, own in (
        ("plot_emb", "text_emb"),
        ("description_emb", "image_emb"),
        ("genres", "tags"),
        ("title", "category"),
    ):
        items = items.append_column(name, items[own])
    pq.write_table(items.append_column("price", pa.array(rng.random(len(items)))), data / "items.parquet")
    drawn = {name: rng.integers(3, size=len(events)) for name in ("device", "hour")}
    drawn |= {"kind": rng.choice(["click", "order"], len(events)), "dwell": rng.random(len(events))}
    for name, values in drawn.items():
        events = events.append_column(name, pa.array(values))
    pq.write_table(events, data / "events.parquet")

    recent = folder / "recent"  # its last event is of 14 October 2026
    shutil.copytree(data, recent)
    time = events["timestamp"].to_numpy()
    place = events.schema.get_field_index("timestamp")
    pq.write_table(
        events.set_column(place, "timestamp", pa.array(time - time.max() + 1_791_936_000)), recent / "events.parquet"
    )

    prepare(data, folder / "prepared", PrepareConfig(max_history=48, targets_per_row=32))
    sources = ("text_emb", "image_emb")
    train_tokenizer.main(
        train_tokenizer.TrainTokenizerConfig(
            data=data,
            out=folder / "tokenizer",
            source=sources,
            target=("category",),
            epochs=1,
        )
    )
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=folder / "tokenizer", out=folder / "sids"))
    train_ranker.main(
        train_ranker.TrainRankerConfig(
            data=data,
            prepared=folder / "prepared",
            sids=(folder / "sids",),
            arm="side",
            out=folder / "ranker",
            epochs=1,
            model=RankerConfig(dim=16, num_heads=2, head_dims=(16, 8)),
        )
    )
    export.main(export.ExportConfig(ranker=folder / "ranker", out=folder / "ranker.pt2", compiled=False))
    requests = events.slice(0, 40).select(["user_id", "item_id", "timestamp"])
    pq.write_table(requests, folder / "requests.parquet")
    for name, part in (("requests/part-0", requests[:20]), ("requests/part-1", requests[20:])):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(part, folder / f"{name}.parquet")
    (folder / "vectors").mkdir()
    vectors = pa.array(rng.normal(size=(600, 384)).astype(np.float32).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"emb": vectors}), folder / "vectors" / "0.parquet")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder where a page's blocks run; what they register is forgotten."""
    monkeypatch.setattr(ARMS, "_entries", dict(ARMS._entries))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "mirrors"))
    yield tmp_path


def lay_out(page: str, shelf: Path, here: Path) -> None:
    for name, own in GIVEN.get(page, {}).items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (shelf / own).is_dir() else shutil.copyfile
        copy(shelf / own, here / name)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_blocks_run(page, shelf, here, capsys):
    lay_out(page, shelf, here)
    blocks = blocks_of(page)
    for block in blocks:
        if named := re.match(r"# (\w+\.py)\n", block.text):
            (here / named[1]).write_text(block.text)
    names = {"__name__": "__main__", "folder": here}
    for block in blocks:
        if block.language == "bash":
            for command in commands_of(block):
                run_command(block.where, command, here)
        elif block.language == "python" and not re.match(r"# (\w+\.py)\n", block.text):
            run_python(block, names)
        elif block.language == "yaml":
            run_entrypoint(block)
        elif block.language == "toml" and sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.text)


def run_entrypoint(block: Block) -> None:
    """Of a job for Kubernetes: it is YAML, and its command has these flags."""
    words = shlex.split(yaml.safe_load(block.text)["spec"]["entrypoint"])
    assert words[0] == "sidrec", block.where
    config = importlib.import_module(f"sidrec_torchrec.jobs.{words[1].replace('-', '_')}")
    known = {flag.name for one in vars(config).values() if is_config(one) for flag in flags_of(one).values()}
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= known, block.where


def run_command(where: str, line: str, here: Path) -> None:
    line = line.replace(BUCKET, f"file://{here}/bucket")
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":  # in one process: tests/jobs/test_predict.py has two
        words = ["sidrec", *words[words.index("sidrec_torchrec.cli") + 1 :]]
    reason = next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), None)
    if words[:1] == ["python"] and reason:
        check_flags_of_a_benchmark(where, words)
    elif words[0] == "sidrec":
        small = next((flags for start, flags in SMALLER.items() if line.startswith(f"sidrec {start}")), "")
        flags = [*words[1:], *shlex.split(small), *(["--dry-run"] if reason else [])]
        flags += ["--out", "NEW"] if reason and "--out" in words else []
        if "--out" in flags and "--append" not in flags and "--dry-run" not in flags:
            remove(here / flags[flags.index("--out") + 1])  # as a reader would name another
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()) as output:
            code = cli.main(flags)
        assert code == 0, f"{where}: {line}\n{error.getvalue()}"
        assert "refused" not in output.getvalue(), f"{where}: {line}\n{output.getvalue()}"
    elif words[0] == "python" and not reason:
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert reason, f"{where}: {line}: neither run nor said why"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_flags_of_a_benchmark(where: str, words: list[str]) -> None:
    """The script is there, and has each flag."""
    script = ROOT / words[1]
    assert script.exists(), where
    known = set(re.findall(r"\"(--[\w-]+)\"", "".join(path.read_text() for path in (script, *SHARED_FLAGS))))
    flags = {word for word in words[2:] if word.startswith("--")}
    assert flags <= known, f"{where}: {script.name} has no {sorted(flags - known)}"


def run_python(block: Block, names: dict) -> None:
    """Runs it with what the page's blocks before have made; a comment after a print is what it prints."""
    if "folder" in names:
        block = replace(block, text=block.text.replace(BUCKET, f"file://{names['folder']}/bucket"))
    if block.text.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.text, names, block.where, None, 0)
        assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0, block.where
        names.update(test.globs)
        return
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block.text, block.where, "exec"), names)  # noqa: S102 - it is ours
    said = [match[1] for match in re.finditer(r"^ *print\([^\n]*?\)(?: *# ([^\n]*))?$", block.text, re.MULTILINE)]
    printed = output.getvalue().splitlines()
    assert len(printed) == len(said), block.where
    assert [have for have, expected in zip(printed, said, strict=True) if expected] == [s for s in said if s], (
        block.where
    )


def test_the_request_is_answered(shelf):
    """The body of the page's request, by a server of a ranker like the page's."""
    from sidrec_torchrec import Scorer
    from tests.server.test_server import Gate, ask, serving  # which is skipped where there is no FastAPI

    (block,) = (block for block in blocks_of("docs/serving.md") if block.text.startswith("curl"))
    body = shlex.split(block.text)[-1]
    with serving(Gate(Scorer(shelf / "ranker.pt2"))) as port:
        status, answer, _ = ask(port, body)
    assert status == 200 and len(answer["probabilities"]["label"]) == 2


def test_every_block_says_what_it_is():
    assert {
        block.where: block.language for page in PAGES for block in blocks_of(page) if block.language not in LANGUAGES
    } == {}
    for page in PAGES:
        assert len(re.findall(r"^ *```", (ROOT / page).read_text(), re.MULTILINE)) == 2 * len(blocks_of(page)), page


def test_nothing_is_excused_that_is_not_there():
    lines = [
        line for page in PAGES for block in blocks_of(page) if block.language == "bash" for line in commands_of(block)
    ]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert [start for start in SMALLER if not any(line.startswith(f"sidrec {start}") for line in lines)] == []
    assert set(GIVEN) <= set(PAGES)


def test_a_wrong_line_is_noticed(shelf, here):
    lay_out("docs/refresh.md", shelf, here)
    for line in (
        "sidrec codec drift --new NO_SUCH_SIDS",
        "sidrec encode-corpus --data DATA --tokenizer TOKENIZER --output X",
        "sidrec data mind --inputs a --out X",
        "python benchmarks/sid_lookup.py --no-such-flag",
        "frobnicate",
    ):
        with pytest.raises(AssertionError, match="page:1"):
            run_command("page:1", line, here)
    with pytest.raises(AssertionError, match="page:1"):
        run_python(Block("page:1", "python", "print(1 + 1)  # 3\n"), {})


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    """Those of pages that the site does not have; mkdocs looks at the site's."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = ROOT / (file or page)
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
