# syntax=docker/dockerfile:1
# The guard and Ray in one image: for `docker run`, and for KubeRay's pods (helm/guard).
#
#   docker build -t backdoor-guard .                                                              CPU
#   docker build -t backdoor-guard:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .         CUDA
#
# A build that is to be the same again names its base by digest: --build-arg BASE=docker.io/library/python@sha256:…
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The same in every image of a cluster, and in the chart's rayVersion: Ray's processes insist on it.
ARG RAY_VERSION=2.60.0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/guard
ENV PATH=/opt/guard/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple \
    "torch>=2.11" "torchvision>=0.26" "ray[serve]==${RAY_VERSION}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY guard guard
COPY deployments deployments
RUN --mount=type=cache,target=/root/.cache/pip pip install .

FROM ${BASE}
LABEL org.opencontainers.image.title="backdoor-guard" \
      org.opencontainers.image.source="https://github.com/backdoor-guard/backdoor-guard" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 1000 guard && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp guard
COPY --from=build /opt/guard /opt/guard
# Everything that is written goes below /tmp, so that the root file system can be read-only.
ENV PATH=/opt/guard/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 MPLCONFIGDIR=/tmp/matplotlib
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001
ENTRYPOINT ["guard"]
CMD ["--help"]
