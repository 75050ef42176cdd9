# Two images of one code base:
#   docker build --target control -t tuner:control .    CLI without torch: check, push, pull
#   docker build --target run     -t tuner:run .        the whole pipeline, CUDA through torch's own wheels
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS control
WORKDIR /opt/tuner
COPY pyproject.toml README.md LICENSE ./
COPY presets presets
COPY job_templates job_templates
COPY scripts/constraints.txt scripts/
COPY tuner tuner
RUN python3 -m pip install --no-cache-dir --constraint scripts/constraints.txt .
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["tuner"]

FROM ${BASE} AS run
WORKDIR /opt/tuner
# The libraries first, in layers of their own: a change of our code is a few hundred kilobytes to pull.
COPY scripts/constraints.txt scripts/
RUN python3 -m pip install --no-cache-dir --constraint scripts/constraints.txt torch
RUN python3 -m pip install --no-cache-dir --constraint scripts/constraints.txt \
    transformers peft bitsandbytes trl datasets
COPY pyproject.toml README.md LICENSE ./
COPY presets presets
COPY job_templates job_templates
COPY tuner tuner
RUN python3 -m pip install --no-cache-dir --constraint scripts/constraints.txt ".[train]"
ENV HF_HOME=/tmp/huggingface
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["tuner"]
