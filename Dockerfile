# One image for workers, Flower and producers: docker build -t nograd .
FROM python:3.12-slim

# Where pip finds torch: empty takes the CUDA build, an index of CPU wheels the small one.
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 TOKENIZERS_PARALLELISM=false

WORKDIR /app
# Dependencies first: a change of our code does not download torch again.
COPY constraints.txt ./
RUN if [ -n "$TORCH_INDEX" ]; then index="--index-url $TORCH_INDEX"; fi; \
    pip install $index --constraint constraints.txt torch torchvision

COPY pyproject.toml README.md LICENSE ./
COPY tasks tasks
COPY producer producer
COPY workers workers
RUN pip install --constraint constraints.txt '.[worker,flower]'

COPY examples examples
# Celery refuses nothing as root, but a worker has no need to be root.
RUN useradd --create-home nograd
USER nograd

ENTRYPOINT ["nograd"]
CMD ["worker", "--models", "/app/examples/models.toml"]
