"""``--dry-run``: what would run, and what is done already; nothing is run and nothing written."""

from sidrec_torchrec.cli import main


def test_a_dry_run_says_the_config_and_what_is_there(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "prepared"
    main(["data", "synthetic", "--out", str(data), "--users", "20", "--items", "100", "--median-events", "20"])
    command = ["prepare", "--data", str(data), "--out", str(out)]

    def dry(*flags: str) -> str:
        capsys.readouterr()
        assert main([*command, *flags, "--dry-run"]) == 0
        return capsys.readouterr().out

    first = dry("--negatives", "2")
    assert not out.exists()
    assert first.endswith(f"# {out}: new\n")
    (tmp_path / "flags.yaml").write_text(first)
    assert main(["prepare", "--config", str(tmp_path / "flags.yaml")]) == 0
    assert dry("--negatives", "2").endswith(f"# {out}: finished\n")
    assert f"# {data}/users.parquet: not there" not in dry("--negatives", "2")
    assert f"# {tmp_path}/none/events.parquet: not there" in dry(
        "--data", str(tmp_path / "none"), "--out", str(tmp_path / "new")
    )
    assert f"# {out}: refused: holds another run (protocol.negatives was 2, is 1)" in dry()
    (out / "metrics.json").unlink()
    assert dry("--negatives", "2").endswith(f"# {out}: begun, and would go on\n")
    with (data / "events.parquet").open("ab") as file:
        file.write(b"\0")
    assert "events.parquet has changed" in dry("--negatives", "2")


def test_a_dry_pipeline_says_the_state_of_each_step(tmp_path, capsys):
    command = ["pipeline", "--out", str(tmp_path / "run"), "--arms", "none,side", "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    steps = [line.partition(":")[0] for line in out.splitlines() if line.startswith("# ")][1:]
    assert steps == [
        "# data",
        "# prepare",
        "# collaborative vectors",
        "# train tokenizer side",
        "# tune tokenizer side",
        "# encode side",
        "# train ranker none seed 0",
        "# train ranker side seed 0",
        "# report",
    ]
