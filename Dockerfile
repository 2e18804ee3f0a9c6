# The relay as an image: docker build --tag relay .
#
# BUILD_BASE has pip; BASE needs nothing but the same minor version of Python: no shell, no package manager. Where BASE has
# its Python elsewhere, say so: --build-arg BASE=python:3.13-slim --build-arg PYTHON=/usr/local/bin/python3
ARG BUILD_BASE=python:3.13-slim
ARG BASE=gcr.io/distroless/python3-debian13

FROM ${BUILD_BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# Wheels alone, each by its locked hash: nothing is compiled. Into a folder rather than a virtual environment, which would
# be tied to this stage's interpreter. Before the relay itself, so that its changes leave this layer as it is.
COPY requirements.lock requirements-dev.lock ./
RUN python3 -m pip install --quiet --require-hashes --only-binary :all: --target /image/app/lib --requirement requirements.lock \
 && rm -r /image/app/lib/bin
# What builds the relay's own wheel, by its locked hashes too; pip refuses a dependency that is not named here.
RUN python3 -m venv tools \
 && awk '/^[a-z]/ { keep = /^(hatchling|packaging|pathspec|pluggy|tomli-w|tomlkit|trove-classifiers)==/ } keep' requirements-dev.lock > tools.lock \
 && tools/bin/pip install --quiet --require-hashes --only-binary :all: --requirement tools.lock
COPY pyproject.toml README.md ./
COPY schemas schemas
COPY relay relay
RUN tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels . \
 && python3 -m pip install --quiet --no-deps --no-index --target /image/app/lib wheels/*.whl
# The commands that pip makes name this stage's interpreter; the relay's own names the one of BASE. The byte code is made
# here, once, and trusted as it is: the root file system may be read-only, and the files' times differ.
ARG PYTHON=/usr/bin/python3
RUN rm -r /image/app/lib/bin && mkdir /image/app/bin \
 && printf '#!%s\nimport sys\n\nfrom relay.cli import main\n\nsys.exit(main())\n' "$PYTHON" > /image/app/bin/relay \
 && chmod 755 /image/app/bin/relay \
 && python3 -m compileall -q --invalidation-mode unchecked-hash -s /image /image/app/lib
# Any user may keep a spool here; a volume that Docker makes for it takes the mode over.
RUN mkdir /image/spool && chmod 1777 /image/spool

FROM ${BASE}
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="rocketchat-kafka-relay" \
      org.opencontainers.image.description="Rocket.Chat Omnichannel webhooks onto Kafka: durable before 200, exactly once, in order per chat" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /image /
ENV PATH=/app/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app/lib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    RELAY_SPOOL_PATH=/spool/relay.db
# A number, so that Kubernetes can tell that it is not root; any other will do.
USER 65532:65532
WORKDIR /spool
# Fails here, and not in production, if the two bases do not fit each other.
RUN ["/app/bin/relay", "--version"]
EXPOSE 8080 8081
ENTRYPOINT ["/app/bin/relay"]
CMD ["serve"]
