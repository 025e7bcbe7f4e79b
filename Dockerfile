# One image for CPUs, GPUs and TPUs; the build argument EXTRA chooses the packages (docs/anywhere.md).
#     docker build -t mefn .                                  # CPU
#     docker build -t mefn-gpu --build-arg EXTRA=cuda .       # docker run --gpus=all ...
#     docker build -t mefn-tpu --build-arg EXTRA=tpu,gs .     # docker run --privileged --net=host ...
FROM python:3.12-slim

ARG EXTRA=""
RUN useradd --create-home --uid 1000 mefn
WORKDIR /src
# The requirements first: they stay in the cache of the build while the code changes.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml MANIFEST.in README.md LICENSE ./
COPY mefn_jax mefn_jax
COPY configs configs
RUN pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"

USER mefn
WORKDIR /home/mefn
ENTRYPOINT ["mefn-train"]
