# The job as an image, for docker run, Slurm and Kubernetes, on GPUs and on CPUs. BuildKit builds it: make image.
#
#   base       the base image, a C compiler, Python's headers and an init
#   packages   a virtual environment with what requirements/image.txt locks, and torch: the base image's, or TORCH
#   attention  the same and flash-attention for the card
#   code       sft_job itself, in a folder of its own: a change of the code is a layer of a few megabytes
#   (last)     base, and what the others have made

# Python 3.11 or 3.12 with torch 2.11 to 2.13. `make base-digest` adds the digest of the image that the tag names now.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
# Has nvcc. Only FLASH_ATTENTION=fa2 uses it, and takes nothing but a wheel from it.
ARG DEVEL_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
# fa4: Hopper and Blackwell. fa2: Ampere and Ada, compiled here. none: torch's own attention, and CPUs.
ARG FLASH_ATTENTION=fa4


FROM ${BASE_IMAGE} AS base
# The last stage names another one.
# hadolint ignore=DL3002
USER 0:0
# The compiler and Python's headers stay: Triton compiles a small module for each kernel while it runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev tini \
    && if ! command -v python3; then apt-get install -y --no-install-recommends python3; fi \
    && version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
    && headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && if ! test -e "$headers/Python.h"; then apt-get install -y --no-install-recommends "libpython$version-dev"; fi \
    && rm -rf /var/lib/apt/lists/*


FROM base AS packages
# Only where the base image holds no torch: its version, and the index of its builds.
ARG TORCH=""
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if ! python3 -m pip --version; then \
        apt-get update \
        && apt-get install -y --no-install-recommends python3-pip \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv --without-pip /opt/sft-job/packages
# A pip.conf may be given to the build as the secret pip_conf; it is in no layer.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    python3 -m pip --python /opt/sft-job/packages/bin/python install --no-deps --only-binary :all: \
        --require-hashes --requirement /requirements/image.txt
# The code, and the base image's own packages, come last on the path: of these what is locked counts.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    site=$(/opt/sft-job/packages/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && echo /opt/sft-job/code > "$site/code.pth" \
    && if [ -n "$TORCH" ]; then \
        sed 's/ *\\$//; /^ /d; /==/!d' /requirements/image.txt > /tmp/locked.txt \
        && python3 -m pip --python /opt/sft-job/packages/bin/python install --only-binary :all: \
            --constraint /tmp/locked.txt --extra-index-url "$TORCH_INDEX" "torch==$TORCH" \
        && rm /tmp/locked.txt; \
    else \
        python3 -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])' \
            > "$site/torch.pth"; \
    fi \
    && torch=$(/opt/sft-job/packages/bin/python -c 'from importlib.metadata import version; print(version("torch"))') \
    && case "$torch" in \
        2.11.* | 2.12.* | 2.13.*) ;; \
        *) echo "torch $torch: sft_job is tested with 2.11 to 2.13; take another BASE_IMAGE, or set TORCH" >&2; exit 1 ;; \
    esac


FROM packages AS attention-none

FROM packages AS attention-fa4
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    python3 -m pip --python /opt/sft-job/packages/bin/python install --no-deps --only-binary :all: \
        --require-hashes --requirement /requirements/fa4.txt

FROM ${DEVEL_IMAGE} AS fa2-wheel
# 80 also runs on 86 and 89. Each job takes up to 10 GB of memory.
ARG FLASH_ATTN_CUDA_ARCHS=80
ARG MAX_JOBS=4
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    python3 -m venv --without-pip --system-site-packages /opt/build \
    && python3 -m pip --python /opt/build/bin/python install --no-deps --only-binary :all: \
        --require-hashes --requirement /requirements/fa2-build.txt \
    && FLASH_ATTENTION_FORCE_BUILD=TRUE PATH="/opt/build/bin:$PATH" python3 -m pip --python /opt/build/bin/python wheel \
        --no-deps --no-build-isolation --no-binary flash-attn --require-hashes \
        --requirement /requirements/fa2.txt --wheel-dir /wheels

FROM packages AS attention-fa2
RUN --mount=type=bind,from=fa2-wheel,source=/wheels,target=/wheels \
    python3 -m pip --python /opt/sft-job/packages/bin/python install --no-deps --no-index /wheels/*.whl

# hadolint ignore=DL3006
FROM attention-${FLASH_ATTENTION} AS attention


FROM packages AS code
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sft_job sft_job
COPY slurm slurm
COPY deploy deploy
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m pip --python /opt/sft-job/packages/bin/python install --no-deps --no-index --no-build-isolation \
        --target /opt/sft-job/code .


FROM base
ARG BASE_IMAGE
COPY --from=attention /opt/sft-job/packages /opt/sft-job/packages
COPY --from=code /opt/sft-job/code /opt/sft-job/code
# Any user: names that getpass finds where /etc/passwd knows no such id, and a home that everyone may write to. /tmp is the one
# place of caches; the volume makes it writable under a root that is read-only, unless something else is mounted there.
ENV PATH=/opt/sft-job/code/bin:/opt/sft-job/packages/bin:$PATH \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    USER=sft-job \
    LOGNAME=sft-job
VOLUME ["/tmp"]
# Nothing that a run is to leave can be written here: a relative path of an output ends with the exit code that says so.
WORKDIR /
USER 10001:0
ENTRYPOINT ["/usr/bin/tini", "--", "sft-job"]
CMD ["train"]

ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
ARG CREATED=""
ENV SFT_JOB_COMMIT=$REVISION
LABEL org.opencontainers.image.title="sft_job" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.created=$CREATED \
      org.opencontainers.image.base.name=$BASE_IMAGE
