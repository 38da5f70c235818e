"""TorchX components: each runs one ``sidrec`` command under torchrun, on one machine or many.

    torchx run -s local_cwd --wait --log torchx/components.py:train_tokenizer -j 1x2 -- --data DIR --out DIR

What follows ``--`` are the command's own flags (``sidrec train-tokenizer --help``). docs/torchx.md has a recipe per
scheduler. TorchX reads these signatures as they stand, so types are spelled out, and old-fashioned, in each of them.
"""

import random
from typing import Dict, List, Optional

from torchx import specs
from torchx.components import dist

IMAGE = "sidrec-torchrec:latest"


def train_tokenizer(
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
) -> specs.AppDef:
    """Learns to fuse an item's content into one SID.

    Args:
        script_args: flags of ``sidrec train-tokenizer``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes at its last checkpoint
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("train-tokenizer", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def encode_corpus(
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
) -> specs.AppDef:
    """Writes the SID of every item.

    Args:
        script_args: flags of ``sidrec encode-corpus``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes at its last checkpoint
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("encode-corpus", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def prepare(
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
) -> specs.AppDef:
    """Cuts event logs into training, validation and test sequences; one process works.

    Args:
        script_args: flags of ``sidrec prepare``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("prepare", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def collaborative_vectors(
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
) -> specs.AppDef:
    """Adds a vector of what users do with it to every item, for SIDs to tell.

    Args:
        script_args: flags of ``sidrec collaborative-vectors``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component(
        "collaborative-vectors", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port
    )


def tune_tokenizer(
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
) -> specs.AppDef:
    """Turns a tokenizer towards what users choose, through a ranker trained with it.

    Args:
        script_args: flags of ``sidrec tune-tokenizer``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes at its last checkpoint
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("tune-tokenizer", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def train_ranker(
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
) -> specs.AppDef:
    """Trains the long-sequence ranker with one arm.

    Args:
        script_args: flags of ``sidrec train-ranker``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes at its last checkpoint
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("train-ranker", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def evaluate(
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
) -> specs.AppDef:
    """Tests a trained ranker on warm and on cold items.

    Args:
        script_args: flags of ``sidrec evaluate``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("evaluate", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def predict(
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
) -> specs.AppDef:
    """Writes a trained ranker's probabilities of requests.

    Args:
        script_args: flags of ``sidrec predict``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("predict", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def pipeline(
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
) -> specs.AppDef:
    """Runs everything: tokenizers, SIDs, a ranker per arm, and the report.

    Args:
        script_args: flags of ``sidrec pipeline``
        j: [{min_nodes}:]{nodes}x{processes per node}
        image: container image that has this package installed
        h: named resource of a node; outdoes cpu, gpu and memMB
        cpu: cores to ask for on a node; 0 is the scheduler's default (all of them on local_cwd)
        gpu: GPUs to ask for on a node, one per process
        memMB: memory to ask for on a node
        env: environment variables, A=a,B=b
        mounts: mounts of the container, type=bind,src=/host,dst=/job
        max_retries: restarts, by torchrun and by the scheduler; the command resumes at its last finished step
        rdzv_port: where several nodes meet; 0 draws one from 20000 to 29999
    """
    return _component("pipeline", script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port)


def _component(command, script_args, j, image, h, cpu, gpu, memMB, env, mounts, max_retries, rdzv_port):
    """torchx's own ``dist.ddp`` on ``python -m sidrec_torchrec.cli COMMAND``, with the cores shared by the processes."""
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
