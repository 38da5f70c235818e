"""TorchX components: each runs one ``sidrec`` command under torchrun, on one machine or many.

    torchx run -s local_cwd --wait --log sidrec.train_tokenizer -j 1x2 -- --data DIR --out DIR

What follows ``--`` are the command's own flags (``sidrec train-tokenizer --help``). docs/torchx.md has a recipe per
scheduler.
"""

import functools
import inspect
import random
from collections.abc import Callable
from typing import Any, Dict, List, Optional

from torchx import specs
from torchx.components import dist

IMAGE = "sidrec-torchrec:latest"


# "Any", for TorchX takes whatever function returns an AppDef for a component of its own.
def _launch(
    command: str,
    *script_args: str,
    j: str = "1x1",
    image: str = IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 0,
) -> Any:
    """torchx's own ``dist.ddp`` on ``python -m sidrec_torchrec.cli COMMAND``, with the cores shared by the processes.

    Args:
        script_args: flags of the command
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes where it stopped
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    app = dist.ddp(
        command,
        *script_args,
        m="sidrec_torchrec.cli",
        name=f"/{command}",
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=env,
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port or random.randint(20000, 29999),  # a fixed one would be taken by another job on the host
    )
    (role,) = app.roles
    # with the store shared, half of torchrun's restarts fail or hang (torch 2.13)
    role.env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    processes = dist.parse_nnodes(j)[2]
    if cpu or h:
        threads = str(max(1, role.resource.cpu // processes))
    else:  # known only on the node; $$ is what torchx hands to the shell as $
        threads = f"$$(( $$(nproc) > {processes} ? $$(nproc) / {processes} : 1 ))"
    flag, torchrun = role.args
    torchrun = torchrun.replace("torchrun ", f"torchrun --max_restarts {max_retries} ", 1)
    role.args = [flag, f"export OMP_NUM_THREADS=$${{OMP_NUM_THREADS:-{threads}}}; exec {torchrun}"]
    return app


def _component(command: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """The component of the command that a function is named after, with the flags of ``_launch`` and their help.

    TorchX finds components by reading a file for functions, but their flags by asking for their signatures.
    """

    @functools.wraps(command)
    def component(*script_args: str, **flags: Any) -> Any:
        return _launch(command.__name__.replace("_", "-"), *script_args, **flags)

    signature = inspect.signature(_launch)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "command"]
    component.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    component.__doc__ = f"{command.__doc__}\n\n    Args:{(_launch.__doc__ or '').partition('Args:')[2]}"
    return component


@_component
def prepare(*script_args: str) -> specs.AppDef:
    """Cuts event logs into training, validation and test sequences; one process works."""


@_component
def collaborative_vectors(*script_args: str) -> specs.AppDef:
    """Adds a vector of what users do with it to every item, for SIDs to tell."""


@_component
def train_tokenizer(*script_args: str) -> specs.AppDef:
    """Learns to fuse an item's content into one SID."""


@_component
def tune_tokenizer(*script_args: str) -> specs.AppDef:
    """Turns a tokenizer towards what users choose, through a ranker trained with it."""


@_component
def encode_corpus(*script_args: str) -> specs.AppDef:
    """Writes the SID of every item."""


@_component
def train_ranker(*script_args: str) -> specs.AppDef:
    """Trains the long-sequence ranker with one arm."""


@_component
def evaluate(*script_args: str) -> specs.AppDef:
    """Tests a trained ranker on warm and on cold items."""


@_component
def predict(*script_args: str) -> specs.AppDef:
    """Writes a trained ranker's probabilities of requests."""


@_component
def pipeline(*script_args: str) -> specs.AppDef:
    """Runs everything: tokenizers, SIDs, a ranker per arm, and the report."""
