# An image for serving: docker build --file docker/serve.Dockerfile --build-arg DEVICE=cuda13 .
FROM python:3.12-slim

# cpu, cuda12, cuda13 or tpu. NVIDIA's libraries come as packages; the host needs the driver alone.
ARG DEVICE=cpu

ENV PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=/cache

COPY . /opt/magma_jax
RUN case "$DEVICE" in \
        cpu) extra= ;; \
        cuda12|cuda13|tpu) extra="jax[$DEVICE]" ;; \
        *) echo "DEVICE is cpu, cuda12, cuda13 or tpu, not $DEVICE" >&2; exit 2 ;; \
    esac && pip install --no-cache-dir "/opt/magma_jax[serve]" $extra

# TPUs are devices of root's; elsewhere the server needs no rights.
RUN useradd --create-home magma && mkdir /cache && chown magma /cache
USER magma

EXPOSE 8000
ENTRYPOINT ["magma-jax", "serve"]
CMD ["--checkpoint", "/models/magma", "--host", "0.0.0.0"]
