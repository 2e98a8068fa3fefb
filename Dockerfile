# syntax=docker/dockerfile:1
# The guard and Ray in one image: for `docker run`, and for KubeRay's pods (helm/guard).
#
#   docker build -t backdoor-guard .                                                              CPU
#   docker build -t backdoor-guard:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .         CUDA
#   docker build --target sbom --output sbom .                                                    sbom/sbom.cdx.json
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

# What Python packages the image has, as a CycloneDX document; its tool has an environment of its own and is not shipped.
FROM build AS inventory
ARG CYCLONEDX_BOM=7.5.0
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/sbom && /opt/sbom/bin/pip install "cyclonedx-bom==${CYCLONEDX_BOM}"
RUN /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file /sbom.cdx.json /opt/guard/bin/python

FROM scratch AS sbom
COPY --from=inventory /sbom.cdx.json /

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
