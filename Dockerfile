# An image of lepton-launch. Its steps are those of the Makefile, which CI runs (make install); only apt and the user are added.
# CI does not build it: the machines this project is made on have no Docker engine. It was built and tried there with buildah
# 1.28 (chroot isolation) on 2026-11-24, on a Debian bookworm from debootstrap (BASE=...): 2.99 GB; doctor, and the quickstart to
# its end as the user lepton. Without an engine: buildah bud --isolation chroot -t lepton-launch .
#
#   docker build -t lepton-launch .
#   docker run --rm lepton-launch doctor
#   docker run --rm --shm-size 1g -v "$PWD:/work" lepton-launch quickstart
#   docker run --rm --network host --shm-size 1g --entrypoint ray lepton-launch start --address=HEAD:6379 --block
#   docker run --rm --gpus all --shm-size 1g -v "$PWD:/work" lepton-launch my-recipe.yaml
#
# --gpus all needs the NVIDIA container toolkit on the host. The driver comes from there, CUDA from the torch wheel, so the
# base image needs neither. Which torch wheel pip finds, CPU or CUDA, depends on the package index:
# --build-arg PIP_INDEX_URL=... or PIP_EXTRA_INDEX_URL=... names another.
# --shm-size: Ray and NCCL use /dev/shm, of which Docker gives 64 MB unless told; lepton-launch doctor looks at it.
# Run folders are made in /work/runs, with the rights of UID; tokens and converted weights are kept in the container only,
# unless a volume is mounted at /home/lepton/.cache.

# Any base with apt and Python 3.10 to 3.12 (with venv) will do.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG UID=1000
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

# g++: Triton compiles its kernels with it on a GPU. wget: KubeRay's probes ask Ray's health through it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make g++ wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lepton-launch
COPY . .
RUN PIP_NO_CACHE_DIR=1 make install

RUN useradd --create-home --uid "${UID}" lepton \
    && mkdir -p /work /home/lepton/.cache \
    && chown lepton:lepton /work /home/lepton/.cache
# As head or worker of a cluster (cluster/) the image is started with another command than the one below: ray and python
# are then found on the PATH, in login shells too, which set their own.
ENV PATH=/opt/lepton-launch/.venv/bin:$PATH
RUN echo 'export PATH=/opt/lepton-launch/.venv/bin:$PATH' > /etc/profile.d/lepton-launch.sh

USER lepton
WORKDIR /work

ENTRYPOINT ["/opt/lepton-launch/.venv/bin/lepton-launch"]
CMD ["--help"]
