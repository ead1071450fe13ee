# vLLM's CPU build, torch's CPU build. From the repository's folder:
#     docker build -f cluster/docker/cpu.Dockerfile -t rlhf:cpu .
FROM python:3.12.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The distribution's own versions: a pinned one disappears from its mirrors with the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes bubblewrap curl g++ git iproute2 \
      libgomp1 libnuma1 libtcmalloc-minimal4 rsync \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 rlhf \
 && mkdir /runs \
 && chown rlhf:rlhf /runs
ENV PATH=/opt/rlhf/bin:$PATH \
    UV_NO_CACHE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    HF_HUB_DISABLE_TELEMETRY=1
RUN pip install --no-cache-dir uv==0.13.9 \
 && uv venv /opt/rlhf

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rlhf rlhf
COPY actors actors
COPY configs configs
RUN uv pip install --python /opt/rlhf/bin/python ".[cpu,tasks]" --torch-backend cpu

COPY configs /home/rlhf/configs
USER 1000
WORKDIR /home/rlhf
CMD ["rlhf", "doctor"]
