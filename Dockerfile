# The image of workers, beat and Flower: what a Procfile names, and the CLI.

FROM python:3.11-slim AS build
# As in the Makefile; a test compares the two.
ARG UV_VERSION=0.13.8
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN pip install uv==${UV_VERSION} && python -m venv /opt/dispatcher
WORKDIR /src
# Dependencies first, in a layer of their own: they change less often than the code.
COPY pyproject.toml uv.lock README.md ./
RUN uv export --quiet --frozen --no-dev --no-emit-project --output-file requirements.txt \
    && /opt/dispatcher/bin/pip install --require-hashes --no-deps --requirement requirements.txt
COPY dispatcher dispatcher
COPY workers workers
COPY migrations migrations
RUN /opt/dispatcher/bin/pip install --no-deps .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /app dispatcher \
    && install -d -o dispatcher -g dispatcher -m 700 /app/.dispatcher
COPY --from=build /opt/dispatcher /opt/dispatcher
ENV PATH=/opt/dispatcher/bin:$PATH PYTHONUNBUFFERED=1
USER dispatcher
WORKDIR /app
# Run it with `--init` (compose: `init: true`): children of the local backend outlive the worker
# process, and something has to take in their exit codes when they end.
CMD ["celery", "-A", "workers.app", "worker", "--pool", "threads", "--concurrency", "4", \
     "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
