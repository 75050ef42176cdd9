# Two images of one code base. docker, podman and buildah build them alike; docs/image.md has the details.
#   docker build --target control -t tuner:control .    no torch: check, push, pull, render, submit, the controller
#   docker build --target run     -t tuner:run .        the whole pipeline, CUDA through torch's own wheels
# The Debian and Python that the tests run on. Another base needs Python 3.11 to 3.13 with venv, and apt for `run`.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# What each layer installs, from pyproject.toml and scripts/constraints.txt: an edit that changes no requirement gives
# the same files, and the layers made from them stay.
FROM ${BASE} AS requirements
ARG EXTRAS=train,fast,track
ARG TORCH
COPY pyproject.toml scripts/constraints.txt scripts/image_requirements.py /project/
RUN python3 /project/image_requirements.py /project /requirements --extras "${EXTRAS}" --torch "${TORCH:-}"

FROM ${BASE} AS base
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    USER=tuner
# Any other uid works too (OpenShift): what asks for a name finds $USER before it looks here.
# Slim Pythons come without byte code: on a read-only root each start would compile the standard library anew. Hashes and
# not times decide whether it is current, so that builders may set the files' times; the same for pip's below.
RUN echo 'tuner:x:65532:65532:tuner:/tmp:/usr/sbin/nologin' >>/etc/passwd && \
    echo 'tuner:x:65532:' >>/etc/group && \
    python3 -m compileall -q -x 'site-packages|dist-packages|lib2to3' --invalidation-mode checked-hash \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" && \
    SOURCE_DATE_EPOCH=0 python3 -m venv /opt/venv

FROM base AS wheel
COPY pyproject.toml README.md LICENSE /project/
COPY presets /project/presets
COPY job_templates /project/job_templates
COPY tuner /project/tuner
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /project

FROM base AS control
COPY --from=requirements /requirements/constraints.txt /requirements/control.txt /opt/tuner/
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir -c /opt/tuner/constraints.txt -r /opt/tuner/control.txt
COPY --from=wheel /wheel /opt/tuner
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir --no-deps --no-index /opt/tuner/*.whl && pip check
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["tuner"]
ARG VERSION=0.1.0
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="tuner control" \
      org.opencontainers.image.description="Checks, submits and follows tuning runs; no torch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM base AS run
# Triton compiles a small C module when a kernel of Liger, of ours or torch.compile first runs. torch and bitsandbytes
# bring their kernels compiled: with EXTRAS=train,track and COMPILER= there is no compiler in the image.
ARG COMPILER="gcc libc6-dev"
RUN [ -z "${COMPILER}" ] || { \
        apt-get update -qq && \
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ${COMPILER} && \
        rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*; \
    }
# The libraries in the order in which they change least. torch and its CUDA libraries are pulled side by side.
COPY --from=requirements /requirements/torch.txt /opt/tuner/
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir --no-deps -r /opt/tuner/torch.txt
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir -r /opt/tuner/torch.txt
COPY --from=requirements /requirements/constraints.txt /requirements/run.txt /opt/tuner/
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir -c /opt/tuner/constraints.txt -r /opt/tuner/run.txt
COPY --from=wheel /wheel /opt/tuner
RUN SOURCE_DATE_EPOCH=0 pip install --no-cache-dir --no-deps --no-index /opt/tuner/*.whl && pip check
# No NVIDIA_VISIBLE_DEVICES: with it the containers of a pod that asked for no GPU see them all.
# There is no git, which the trackers' library would tell at length.
ENV HF_HOME=/tmp/huggingface \
    GIT_PYTHON_REFRESH=quiet
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["tuner"]
ARG VERSION=0.1.0
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="tuner" \
      org.opencontainers.image.description="Runs the tuning section of a KAITO Workspace: 4-bit QLoRA, a pushed adapter image" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
