import subprocess
import sys


def test_each_loader_imports_only_the_libraries_of_its_own():
    code = """
import importlib, sys

def imported(*loaders):
    for loader in loaders:
        importlib.import_module(f"nograd.workers.models.{loader}")
    return {name for name in ("torchvision", "lightning", "pytorch_lightning", "transformers") if name in sys.modules}

assert imported("warmup", "module", "export", "python", "lightning") == set(), sys.modules.keys()
assert imported("torchvision") == {"torchvision"}
assert imported("transformers") == {"torchvision", "transformers"}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
