"""Jobs: one config and one main each. The command ``train-tokenizer`` is ``train_tokenizer.main``, and so on.

Another package adds a command by an entry point, whose value is such a function; the first line of its docstring is its help::

    [project.entry-points."sidrec_torchrec.jobs"]
    my-command = "my_package.my_job:main"
"""

from collections.abc import Callable
from typing import Any

from sidrec_torchrec.registry import Registry

HELP = {
    "pipeline": "everything: tokenizers, SIDs, a ranker per arm, and the report",
    "prepare": "cut event logs into training, validation and test sequences",
    "collaborative-vectors": "add a vector of what users do with it to every item, for SIDs to tell",
    "train-tokenizer": "learn to fuse an item's content into one SID",
    "tune-tokenizer": "turn a tokenizer towards what users choose, through a ranker trained with it",
    "encode-corpus": "write the SID of every item, or of those that came since",
    "decode-sids": "write what SIDs keep of each item",
    "train-ranker": "train the long-sequence ranker with one arm",
    "evaluate": "test a trained ranker on warm and on cold items",
    "predict": "write a trained ranker's probabilities of requests, or of each user's newest events",
    "report": "put runs side by side: their arms, differences with intervals, and what differs between them",
    "export": "write a trained ranker as one file that a server loads",
    "serve": "answer requests over HTTP, by an exported ranker",
    "codec collisions": "say which items share a SID",
    "codec design": "weigh lists of DPCA stages on a source, and name one",
    "codec digits": "say how many digits a corpus needs, by small rankers that read them",
    "codec disambiguate": "add a digit that makes every item's SID its own, or move what is beyond a capacity",
    "codec drift": "say how SIDs moved between two codecs, two corpora or two generations",
    "codec index": "write what finds the SID of an item and the items of a SID",
    "data fractal": "expand a log: many times its users, items and events, with its structure",
    "data schema": "say what the files and columns of a data folder are called, for all jobs",
    "data synthetic": "make a corpus whose structure is known",
    "data validate": "check a data folder, and say what is in it",
}
"""What each job does, for ``sidrec --help``, which imports none of them."""


WITHOUT_TORCHREC = frozenset({"serve"})
"""Jobs for machines that need no TorchRec."""


def _module(command: str) -> str:
    return command.replace("-", "_").replace(" ", "_")


JOBS: Registry[Callable[[Any], Any]] = Registry("job", {name: f"{__name__}.{_module(name)}:main" for name in HELP})
