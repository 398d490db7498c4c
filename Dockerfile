# A machine with NVIDIA GPUs: docker build -t fairway . && docker run --gpus all -it fairway
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc git lrzip make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /fairway
COPY Makefile requirements.txt requirements-gpu.txt ./
# The pins for GPUs come last and count. Make does not install again what is newer than requirements.txt.
RUN make .venv/installed && .venv/bin/pip install --no-cache-dir -r requirements-gpu.txt && touch .venv/installed
ENV PATH=/fairway/.venv/bin:$PATH
COPY . .
CMD ["bash", "-c", "make doctor && exec bash"]
