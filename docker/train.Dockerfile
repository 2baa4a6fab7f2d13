# An image for training, conversion and evaluation: docker build --file docker/train.Dockerfile --build-arg DEVICE=tpu .
FROM python:3.12-slim

# cpu, cuda12, cuda13 or tpu. NVIDIA's libraries come as packages; the host needs the driver alone.
ARG DEVICE=cpu

# SIGTERM reaches the first process, which is Python here and saves; what it prints must not wait in a buffer.
ENV PYTHONUNBUFFERED=1

COPY . /opt/magma_jax
RUN case "$DEVICE" in \
        cpu) extra= ;; \
        cuda12|cuda13) extra="jax[$DEVICE,k8s]" ;; \
        tpu) extra="jax[tpu]" ;; \
        *) echo "DEVICE is cpu, cuda12, cuda13 or tpu, not $DEVICE" >&2; exit 2 ;; \
    esac && pip install --no-cache-dir "/opt/magma_jax[gcs]" $extra

WORKDIR /work
ENTRYPOINT ["magma-jax"]
CMD ["--help"]
