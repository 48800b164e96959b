"""producer → tasks ← workers; and nothing a web server imports pulls in torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"tasks": {"tasks"}, "producer": {"producer", "tasks"}, "workers": {"workers", "tasks"}}
#: the worker's own libraries, and what comes with them
HEAVY = ["torch", "torchvision", "transformers", "lightning", "numpy", "PIL", "pyarrow", "fsspec"]


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    package = ["nograd", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield base + (node.module.split(".") if node.module else [])


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_package_imports_only_what_it_stands_on(folder):
    for path in modules(folder):
        for name in imports(path):
            if (
                name[0] == "nograd"
                and len(name) > 1
                and not (folder == "producer" and name[1:3] == ["workers", "launcher"])
            ):
                assert name[1] in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {'.'.join(name)}"


@pytest.mark.parametrize(
    "module", ["nograd.tasks", "nograd.producer", "nograd.producer.cli", "nograd.workers.launcher"]
)
def test_importing_it_does_not_import_the_worker_s_libraries(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["tasks", "producer"])
def test_every_module_of_the_light_side_can_be_imported_where_torch_is_not_installed(folder):
    names = [".".join(["nograd", *path.relative_to(ROOT).with_suffix("").parts]) for path in modules(folder)]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import sys, importlib\n"
        f"for name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_user_s_own_tasks_module_does_not_collide(tmp_path):
    (tmp_path / "tasks.py").write_text("from celery import Celery\napp = Celery('mine')\nOWN = True\n")
    code = (
        "import tasks, nograd.tasks, celery\n"
        "assert tasks.OWN and nograd.tasks.app is not tasks.app\n"
        "assert celery.current_app.main == 'mine', celery.current_app\n"
        "assert 'nograd.predict' in tasks.app.tasks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
