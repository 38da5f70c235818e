# An image that runs every command and TorchX component. For GPUs; without them: docker build --build-arg DEVICE=cpu -t sidrec-torchrec .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# The operators are compiled where they run: g++ for the CPU's, and for what Triton starts the GPU's with.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ARG DEVICE=cuda
COPY pyproject.toml README.md LICENSE /src/
COPY sidrec_torchrec /src/sidrec_torchrec
# torchrec requires the CUDA build of fbgemm: where that is not wanted, it comes alone.
RUN pip install --no-cache-dir "/src[$DEVICE]" \
    && pip install --no-cache-dir --no-deps -r /src/sidrec_torchrec/requirements/torchrec.txt \
    && rm -r /src \
    && sidrec doctor

WORKDIR /work
CMD ["sidrec", "--help"]
