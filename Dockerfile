# The one image of all components. scripts/image builds it without a registry; any other builder of OCI images will do:
#
#   .venv/bin/python -m meshbridge.datapath.compiler build/bytecode   # root; once on a machine of each architecture
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/meshbridge:VERSION .
#
# The kernel's programs are not compiled in here: BCC makes maps in the running kernel while it compiles, which builders
# rightly do not let a build do (docs/adr/0230).
#
# A secret named 'ca' (PEM) is what package servers are verified by while building, where the base does not know them.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends \
    gcc libc6-dev python3 python3-pip python3-venv >/dev/null
# Pip stays outside of what is installed with it.
RUN python3 -m venv --without-pip /opt/meshbridge
COPY constraints.txt /src/
COPY pyproject.toml README.md /src/
WORKDIR /src
COPY cni /src/cni
RUN cni/build /meshbridge-cni
# Dependencies first: a change of ours does not fetch them again.
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >/tmp/wanted \
    && pip --python /opt/meshbridge/bin/python install --quiet --no-cache-dir --no-compile --only-binary :all: \
       -c constraints.txt -r /tmp/wanted
COPY bpf /src/bpf
COPY deploy /src/deploy
COPY meshbridge /src/meshbridge
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    pip --python /opt/meshbridge/bin/python install --quiet --no-cache-dir --no-compile --no-deps .
# The asynchronous half of the Kubernetes client is never imported, and nobody reads the source of the other half: 95 MB.
# Bytecode is made once, here: containers cannot write any.
RUN cd /opt/meshbridge/lib/python3*/site-packages \
    && rm -rf kubernetes/aio aiohttp* yarl* multidict* frozenlist* propcache* aiosignal* aiohappyeyeballs* \
    && find . -name '*.pyi' -delete \
    && /opt/meshbridge/bin/python -m compileall -q -j 0 -b --invalidation-mode unchecked-hash kubernetes \
    && find kubernetes -name '*.py' -delete \
    && /opt/meshbridge/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . \
    && cd /opt/meshbridge/bin && find . -type f ! -name meshbridge -delete

FROM ${BASE}
ENV PATH=/opt/meshbridge/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# iptables and nftables: the agent reads the redirect rules of its node's pods with them.
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends ca-certificates iptables nftables python3 >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* \
    && groupadd --gid 65532 meshbridge && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin meshbridge
COPY --from=build /opt/meshbridge /opt/meshbridge
# The CNI plugin, which the agent puts on its node.
COPY --from=build /meshbridge-cni /usr/lib/meshbridge/meshbridge-cni
# The kernel's programs, compiled: see scripts/image. Those of another source or machine are not taken for ours.
COPY build/bytecode /usr/lib/meshbridge/bytecode
RUN python -c 'from meshbridge.datapath.compiler import compile_programs; compile_programs()'
LABEL org.opencontainers.image.title=meshbridge org.opencontainers.image.licenses=Apache-2.0
# Controller, webhook and authz need nothing more; the agent's DaemonSet asks for root.
USER 65532:65532
ENTRYPOINT ["meshbridge"]
