# TensorRT-LLM's release image with our plugin package in its site-packages, where every MPI rank finds it.
# A bundle also carries the package unpacked, so this image is a convenience: it saves nothing but a search path.
# Build: docker build -f infra/images/trtllm.Dockerfile --build-arg RELEASE=nvcr.io/nvidia/tensorrt-llm/release@sha256:... \
#          --build-arg WHEEL=kilotok_trtllm-... .kilotok/store/artifacts/build_engine/KEY/plugins
ARG RELEASE
FROM ${RELEASE}
ARG RELEASE
ARG WHEEL
COPY ${WHEEL} /opt/kilotok/
RUN python -m pip install --no-deps --no-index --no-cache-dir /opt/kilotok/${WHEEL} \
 && echo "${RELEASE##*@}" > /etc/kilotok-image-digest \
 && test "$(python -c 'import engine_plugins.trtllm.hook as h; print(h.TARGET)')" != ""
LABEL org.opencontainers.image.title="kilotok trtllm" org.opencontainers.image.base.name="${RELEASE}"
EXPOSE 8000
ENTRYPOINT ["python", "-m", "engine_plugins.trtllm.front"]
