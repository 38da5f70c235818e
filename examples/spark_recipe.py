"""Prepare, encode and score on Spark, by the same functions as the jobs.

    python examples/spark_recipe.py DATA TOKENIZER RANKER OUT

DATA is a data folder whose events have labels, TOKENIZER and RANKER are folders of a trained tokenizer and ranker. In OUT there
are afterwards

- ``prepared``: what ``sidrec prepare`` writes, byte for byte, by ``SparkEngine``: train-ranker trains from it;
- ``rows``: the same sequences from DataFrames, by ``groupBy(...).applyInArrow``, with their split;
- ``sids``: every item's id and SID, by ``mapInArrow``;
- ``scores``: last events of the log as requests, with probabilities, by ``cogroup(...).applyInArrow``.

Spark reads no float16: write vectors as float32. Needs Java 17 and ``pip install pyspark``; on a cluster, this package on every machine, and folders that all of them see.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import LongType, StructType

from sidrec_torchrec import Predictor, Tokenizer
from sidrec_torchrec.data.of_tables import of_tables
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.scatter import bucket_of
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import SidrecError

BUCKETS = 8  # of users; so many that each has some million events


class SparkEngine(Engine):
    """Runs a job's pieces of work as tasks of Spark; ``ENGINES.register("spark")`` would make ``--engine spark`` of it."""

    def __init__(self, spark: SparkSession) -> None:
        self._context = spark.sparkContext

    def map(self, work: Callable[[Any], Any], items: Sequence[Any], *, on_gpus: bool = False) -> Iterator[Any]:
        """See ``Engine``."""
        held = self._context.broadcast(work)

        def attempt(item: Any) -> tuple[Any, SidrecError | None]:
            try:
                return held.value(item), None
            except SidrecError as error:  # bad data is no failure of the task, to be tried again
                return None, error

        for result, error in self._context.parallelize(items, max(1, len(items))).map(attempt).collect():
            if error is not None:
                raise error
            yield result

    def for_little(self) -> Engine:
        """Itself: the cluster is there."""
        return self


def sequences(spark: SparkSession, data: Path, config: PrepareConfig) -> DataFrame:
    """Rows of sequences with their split, of a log with labels; users' features are left out."""
    coder, make = of_tables(data, config)
    buckets = make.buckets
    placed = pa.schema([*buckets.event_schema, ("place", pa.int64()), ("bucket", pa.int64())])

    def code(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            coded = coder(pa.Table.from_batches([batch]))
            bucket_N = bucket_of(coded.column("user_id").combine_chunks(), BUCKETS)
            coded = coded.append_column("place", batch.column("place")).append_column("bucket", pa.array(bucket_N))
            yield from spark_types(coded, placed).to_batches()

    def cut(events: pa.Table) -> pa.Table:
        ordered = events.sort_by("place").select(buckets.event_schema.names).cast(buckets.event_schema)
        return spark_types(make(ordered, buckets.user_schema.empty_table()), split_schema)

    split_schema = make.schema.append(pa.field("split", pa.string()))
    events = spark.read.parquet(str(buckets.path)).withColumn("place", F.monotonically_increasing_id())
    coded = events.mapInArrow(code, from_arrow_schema(placed))
    return coded.groupBy("bucket").applyInArrow(cut, from_arrow_schema(split_schema))


def encode(items: DataFrame, tokenizer: Tokenizer) -> DataFrame:
    """Every item's id and SID, of one word."""

    def sids(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from tokenizer.encode_table(pa.Table.from_batches([batch])).select(["item_id", "sid"]).to_batches()

    return items.mapInArrow(sids, StructType([items.schema["item_id"]]).add("sid", LongType()))


def score(requests: DataFrame, events: DataFrame, predictor: Predictor) -> DataFrame:
    """The requests with their probabilities; each task holds one bucket of users with their events."""
    schema = StructType(requests.schema.fields)
    for field in from_arrow_schema(pa.schema([(name, pa.float32()) for name in predictor.names])):
        schema = schema.add(field)

    def probabilities(requests: pa.Table, events: pa.Table) -> pa.Table:
        scored = predictor.predict_table(requests.drop_columns("bucket"), events=events.sort_by("timestamp"))
        return scored.select(schema.names)

    bucket = F.pmod(F.hash("user_id"), F.lit(BUCKETS))
    by_user = [frame.withColumn("bucket", bucket).groupBy("bucket") for frame in (requests, events)]
    return by_user[0].cogroup(by_user[1]).applyInArrow(probabilities, schema)


def spark_types(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in the types that Spark has for those of ``schema``."""
    return table.cast(to_arrow_schema(from_arrow_schema(schema)))


if __name__ == "__main__":
    data, tokenizer, ranker, out = map(Path, sys.argv[1:])
    spark = SparkSession.builder.appName("sidrec").getOrCreate()
    config = PrepareConfig(max_history=48, targets_per_row=32)
    prepared = prepare(data, out / "prepared", config, engine=SparkEngine(spark))
    print(f"{prepared.folder}: {prepared.counts['train']['targets']} training targets")
    sequences(spark, data, config).write.parquet(str(out / "rows"))
    items, events = (spark.read.parquet(str(data / f"{name}.parquet")) for name in ("items", "events"))
    encode(items, Tokenizer.load(tokenizer)).write.parquet(str(out / "sids"))
    requests = events.select("user_id", "item_id", "timestamp").orderBy(F.desc("timestamp")).limit(200)
    score(requests, events, Predictor.open(ranker, read=False)).write.parquet(str(out / "scores"))
