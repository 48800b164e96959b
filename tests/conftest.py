"""Set before anything of transformers is imported: no test may ask a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("NOGRAD_MODELS", None)
os.environ.pop("NOGRAD_REDIS_URL", None)
