# A machine that orchestrates and builds on its CPU: kilotok with its dependencies as locked, and a compiler for the fused ops.
# On a DGX the worker runs without a container (infra/systemd): it starts containers itself and owns the GPUs.
# Build: docker build -f infra/images/worker.Dockerfile --build-arg PYTHON=python@sha256:... .
ARG PYTHON=python:3.11-slim
FROM ${PYTHON}
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 kilotok
WORKDIR /srv/kilotok
COPY pyproject.toml constraints.txt README.md ./
COPY specs specs
COPY engine_plugins engine_plugins
COPY tasks tasks
COPY flows flows
COPY infra infra
COPY prefect.yaml prefect.toml ./
# The volume of the store takes over the folder's owner.
RUN pip install --no-cache-dir -c constraints.txt -e '.[docker]' && mkdir .kilotok && chown -R kilotok /srv/kilotok
USER kilotok
CMD ["prefect", "worker", "start", "--pool", "kilotok", "--type", "process", "--limit", "1"]
