"""Commands and their flags."""

from tests.bad_input.kinds import Folder, Kind

TRAIN = "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm none"


def config(text: str, suffix: str = "yaml"):
    def spoil(folder: Folder) -> None:
        (folder / f"config.{suffix}").write_text(text)

    return spoil


CONFIG = "prepare --data {}/data --out {}/out --config {}/config.yaml"
PREPARE = "prepare --data {}/data --out {}/out"
TOKENIZER = "train-tokenizer --data {}/data --out {}/out"

CASES = [
    Kind("no such command", "prepar", "there is no command 'prepar'; did you mean 'prepare'?"),
    Kind("no command", "", "no command"),
    Kind(
        "an unknown flag",
        PREPARE + " --max-histories 3",
        "there is no flag --max-histories; did you mean --protocol.max-history?",
    ),
    Kind("a flag without a value", PREPARE + " --max-history", "--max-history needs a value"),
    Kind("a required flag left out", "prepare --data {}/data", "out"),
    Kind("text for a number", PREPARE + " --max-history many", "--protocol.max-history: must be int, got 'many'"),
    Kind(
        "a fraction for a whole number",
        PREPARE + " --max-history 1.5",
        "--protocol.max-history: must be int, got '1.5'",
    ),
    Kind("a history of 0", PREPARE + " --max-history 0", "max_history must be at least 1, got 0"),
    Kind("a history below 0", PREPARE + " --max-history -1", "max_history must be at least 1, got -1"),
    Kind("no targets per row", PREPARE + " --targets-per-row 0", "targets_per_row must be at least 1, got 0"),
    Kind("all items cold", PREPARE + " --cold-fraction 1", "cold_fraction must lie in [0, 1), got 1.0"),
    Kind(
        "a share of NaN", PREPARE + " --cold-fraction nan", "--protocol.cold-fraction: must be a finite number, got nan"
    ),
    Kind("text for a share", PREPARE + " --cold-fraction many", "--protocol.cold-fraction: must be float, got 'many'"),
    Kind("a seed beyond 64 bits", PREPARE + f" --seed {10**30}", "--protocol.seed: must lie below 2^63"),
    Kind("a seed below 0", PREPARE + " --seed -1", "seed must be at least 0, got -1"),
    Kind("a seed of text", PREPARE + " --seed x", "seed"),
    Kind("an unknown split", PREPARE + " --split middle", "split"),
    Kind(
        "an unknown policy",
        PREPARE + " --unknown-items ask",
        "--protocol.policy.unknown-items: must be one of 'refuse', 'drop', 'keep', got 'ask'",
    ),
    Kind("an unknown engine", PREPARE + " --engine flink", "unknown engine 'flink'; there are"),
    Kind("a task twice", PREPARE + " --tasks label,label", "label"),
    Kind("a switch that is neither", PREPARE + " --sort perhaps", "sort"),
    Kind("a config that is not there", CONFIG, "config.yaml"),
    Kind("a config of broken YAML", CONFIG, "config", config("protocol: [")),
    Kind("a config that is a list", CONFIG, "config", config("- 1\n- 2\n")),
    Kind("a config with an unknown key", CONFIG, "max_histories", config("protocol:\n  max_histories: 3\n")),
    Kind(
        "a config with a wrong type",
        CONFIG,
        "--protocol.max-history: must be int, got '[1]'",
        config("protocol:\n  max_history: [1]\n"),
    ),
    Kind("a config with Python in it", CONFIG, "config", config("data: !!python/object/apply:os.system ['true']\n")),
    Kind(
        "a config of bytes that are no text",
        CONFIG,
        "the file of --config is not text in UTF-8",
        lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe\x00\x80"),
    ),
    Kind("no epochs", TRAIN + " --epochs 0", "epochs must be at least 1, got 0"),
    Kind("epochs below 0", TRAIN + " --epochs -3", "epochs must be at least 1, got -3"),
    Kind("a batch of 0", TOKENIZER + " --batch-size 0", "batch_size must be at least 1, got 0"),
    Kind("a batch below 0", TRAIN + " --batch-events -8", "batch_events must be at least 0, got -8"),
    Kind(
        "a learning rate of NaN",
        TRAIN + " --learning-rate nan",
        "--optimizer.learning-rate: must be a finite number, got nan",
    ),
    Kind("a learning rate below 0", TRAIN + " --learning-rate -1", "learning_rate must be at least 0, got -1.0"),
    Kind(
        "an infinite learning rate",
        TRAIN + " --learning-rate inf",
        "--optimizer.learning-rate: must be a finite number, got inf",
    ),
    Kind("no gradient at all", TRAIN + " --max-gradient-norm 0", "max_gradient_norm must be above 0, got 0.0"),
    Kind("an unknown arm", "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm sidee", "sidee"),
    Kind("an unknown attention", TRAIN + " --attention flash", "flash"),
    Kind("a width that heads do not divide", TRAIN + " --dim 20 --num-heads 3", "dim must be a multiple of"),
    Kind("a dropout of 1", TRAIN + " --dropout 1", "dropout must lie in [0, 1), got 1.0"),
    Kind(
        "an arm without its SIDs",
        "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm side",
        "--sids",
    ),
    Kind(
        "an arm with a source that is not there",
        "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm raw --source audio",
        "audio",
    ),
    Kind("stages that are no stages", TOKENIZER + " --stages trits*25", "cannot read 'trits*25'"),
    Kind(
        "stages without end",
        TOKENIZER + " --stages ternary*99999999999",
        "stages 'ternary*99999999999': 99,999,999,999 stages; there may be 1,024 at most",
    ),
    Kind("a codec's commitment below 0", TOKENIZER + " --commitment -1", "commitment must be at least 0, got -1.0"),
    Kind("no stages", TOKENIZER + " --stages ternary*0", "ternary*0"),
    Kind(
        "stages of another quantizer", TOKENIZER + " --kind rq --stages ternary*3", "residual VQ takes one-hot digits"
    ),
    Kind("an unknown quantizer", TOKENIZER + " --kind pq", "pq"),
    Kind("a latent of width 0", TOKENIZER + " --latent-dim 0", "latent_dim must be at least 1, got 0"),
    Kind("a source twice", TOKENIZER + " --source text_emb,text_emb", "name each source once, got 'text_emb,text_emb'"),
    Kind("no seeds", "pipeline --data {}/data --out {}/out --seeds 0", "seeds must be at least 1, got 0"),
    Kind("a short flag that two configs have", "pipeline --data {}/data --out {}/out --epochs 1", "write which"),
    Kind("a corpus without items", "data synthetic --out {}/out --items 0", "items"),
    Kind("a corpus of a seed below 0", "data synthetic --out {}/out --seed -1", "seed must be at least 0, got -1"),
    Kind("a corpus of noise below 0", "data synthetic --out {}/out --noise -1", "noise must be at least 0, got -1.0"),
    Kind("a corpus without chance", "data synthetic --out {}/out --bias 1e300", "bias must lie in [-100, 100]"),
    Kind(
        "a corpus beyond all memory",
        f"data synthetic --out {{}}/out --items {10**15}",
        "not enough memory",
        leaves=("out",),
    ),
    Kind("layers beyond all memory", TOKENIZER + f" --hidden-dim {10**15}", "not enough memory"),
    Kind("a corpus of fewer than no users", "data synthetic --out {}/out --users -1", "users"),
    Kind(
        "digits to decode beyond the SID's",
        "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out {}/d.parquet --num-digits 99",
        "99",
    ),
    Kind(
        "digits to decode below 0",
        "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out {}/d.parquet --num-digits -1",
        "num_digits",
    ),
    Kind(
        "decoded over the SIDs",
        "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out {}/sids/sids.parquet",
        "sids.parquet: is read by this command",
    ),
    Kind(
        "predictions over the log",
        "predict --ranker {}/ranker --newest 1 --out {}/data/events.parquet",
        "events.parquet: is read by this command",
    ),
    Kind("no requests and none to make", "predict --ranker {}/ranker --out {}/p.parquet", "requests"),
    Kind(
        "requests and newest events, too",
        "predict --ranker {}/ranker --out {}/p.parquet --requests {}/r.parquet --newest 2",
        "newest",
    ),
    Kind("newest events below 0", "predict --ranker {}/ranker --out {}/p.parquet --newest -2", "newest"),
    Kind("an unknown split to evaluate", "evaluate --ranker {}/ranker --split tset", "tset"),
]
