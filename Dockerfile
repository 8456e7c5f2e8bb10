# quantcli with llama.cpp's engine, so that a file can be made and measured:
#   docker build -t quantcli .
#   docker run --rm -v "$PWD:/work" quantcli quantize my-model --bits 4
# With --build-arg EXTRAS=torch,llama-cpp the calibrated methods work too (some 1 GB more).
FROM python:3.12-slim-bookworm AS build
ARG EXTRAS=llama-cpp
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/quantcli && \
    CMAKE_ARGS="-DGGML_NATIVE=OFF" /opt/quantcli/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && \
    rm -rf /var/lib/apt/lists/* && useradd --create-home quantcli
COPY --from=build /opt/quantcli /opt/quantcli
USER quantcli
WORKDIR /work
ENV PATH=/opt/quantcli/bin:$PATH
ENTRYPOINT ["quantcli"]
CMD ["--help"]
