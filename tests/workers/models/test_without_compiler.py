"""torchvision's models run without torch's compiler, which is there for whoever wants it; in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import sys
from pathlib import Path

import torch

from nograd.tasks.modelfile import load_model_file

def there():
    return getattr(sys.modules.get("torch._dynamo"), "__file__", None) is not None
"""

CASES = {
    "only what needs it loads it": """
from nograd.workers.models import open_model
from nograd.workers.models.images import _from_table
from nograd.workers.models.warmup import steps

folder = Path(sys.argv[1])
(folder / "models.toml").write_text('''
[own]
loader = "torchvision"
model = "resnet18"
weights = "w.pth"
init = { num_classes = 2 }

[table]
loader = "torchvision"
model = "resnet18"
weights = "w.pth"
init = { num_classes = 2 }
transform = { resize = 8, center_crop = 8 }
''')
file = load_model_file(folder / "models.toml")
_from_table(file.specs["table"].transform)
import torchvision
torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), folder / "w.pth")
for name in ("own", "table"):
    model = open_model(file, name)
    model.load(torch.device("cpu"))
    with torch.no_grad():
        for step in steps(model):
            step()
assert "torch._dynamo" not in sys.modules

from torchvision.ops import roi_align
from torchvision.ops.roi_align import is_compile_supported
supported = is_compile_supported("cpu")
assert there()
assert supported == torch._dynamo.utils.is_compile_supported("cpu")
x, boxes = torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]])
compiled = torch.compile(lambda x, boxes: roi_align(x, boxes, 2), backend="eager", fullgraph=True)
assert torch.equal(compiled(x, boxes), roi_align(x, boxes, 2))
""",
    "a torchvision that wants more of it gets it": """
from nograd.workers.models.without_compiler import without_compiler

with without_compiler():
    from torch._dynamo.utils import counters
    import torchvision
assert there()
assert counters is torch._dynamo.utils.counters
""",
    "who imports another part of it meanwhile gets it": """
from nograd.workers.models.without_compiler import without_compiler

with without_compiler():
    import torch._dynamo.config
    import torchvision
assert there()
from torch._dynamo.utils import counters
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
""",
    "where it is loaded nothing changes": """
import torch._dynamo
import nograd.workers.models.torchvision
from torchvision.ops.roi_align import is_compile_supported

assert is_compile_supported is torch._dynamo.utils.is_compile_supported
""",
}


@pytest.mark.parametrize("case", CASES)
def test_the_compiler_is_loaded_where_it_is_wanted(tmp_path, case):
    done = subprocess.run(
        [sys.executable, "-c", START + CASES[case], tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
