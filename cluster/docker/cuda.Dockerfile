# vLLM for NVIDIA GPUs, with the compiler that DeepSpeed builds its kernels with. From the repository's folder:
#     docker build -f cluster/docker/cuda.Dockerfile -t rlhf:cuda .
# The CUDA of the base is that of torch's default build (13.0); the node's driver must be new enough for it.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The distribution's own versions: a pinned one disappears from its mirrors with the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes bubblewrap curl g++ git \
      ibverbs-providers iproute2 libibverbs1 libnuma1 ninja-build python3.12-dev python3.12-venv rsync \
 && rm -rf /var/lib/apt/lists/*

# The base has a user of its own with the number 1000.
RUN userdel --remove ubuntu \
 && useradd --create-home --uid 1000 rlhf \
 && mkdir /runs \
 && chown rlhf:rlhf /runs
ENV PATH=/opt/rlhf/bin:$PATH \
    UV_NO_CACHE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    HF_HUB_DISABLE_TELEMETRY=1
RUN python3.12 -m venv /opt/rlhf \
 && pip install --no-cache-dir uv==0.13.9

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rlhf rlhf
COPY actors actors
COPY configs configs
RUN uv pip install --python /opt/rlhf/bin/python ".[nvidia,tasks]"

COPY configs /home/rlhf/configs
USER 1000
WORKDIR /home/rlhf
CMD ["rlhf", "doctor"]
