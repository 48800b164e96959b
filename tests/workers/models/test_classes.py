import pytest

from nograd.tasks.errors import ModelFileError

TABLE = 'loader = "python"\nclass = "{}"\n'


def failure(opened, target, extra=""):
    with pytest.raises(ModelFileError) as caught:
        opened(TABLE.format(target) + extra).load(None)
    return caught.value.message


def test_classes_are_found_beside_the_model_file_from_any_working_directory(hosted, predict, user_code, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(
        "class Outer:\n"
        "    class Model:\n"
        "        def load(self, device): pass\n"
        "        def forward(self, batch): return [x + 1 for x in batch]\n"
    )
    assert predict(hosted(TABLE.format("package.inner:Outer.Model")), [1, 2]) == [2, 3]


def test_classes_are_found_in_the_working_directory(hosted, predict, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "from_cwd.py").write_text(
        "class M:\n    def load(self, device): pass\n    def forward(self, batch): return batch\n"
    )
    monkeypatch.chdir(folder)
    assert predict(hosted(TABLE.format("from_cwd:M")), [1]) == [1]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("no_colon", "expected package.module:Name"),
        ("package.module.Model", "expected package.module:Name. Did you mean 'package.module:Model'?"),
        (":Model", "expected package.module:Name"),
        ("no.such.module:Model", "cannot import no.such.module: ModuleNotFoundError: No module named 'no'"),
        ("json:Model", "has no Model"),
        ("json:dumps", "a function, not a class"),
    ],
)
def test_a_class_that_is_not_there_is_named_with_its_file(opened, tmp_path, target, why):
    message = failure(opened, target)
    assert message.startswith(f"{tmp_path / 'models.toml'}: [it] class = {target!r}: ")
    assert why in message


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("class M(:", "SyntaxError"),
        ("raise OSError('no licence')", "OSError: no licence"),
        ("import sys; sys.exit('usage: train.py')", "SystemExit: usage: train.py"),
        ("exit()", "SystemExit: None"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(opened, user_code, source, why):
    name = user_code(source)
    message = failure(opened, f"{name}:M")
    assert f"class = '{name}:M': cannot import {name}: " in message
    assert why in message


def test_a_constructor_that_exits_does_not_end_the_worker_without_a_word(opened, user_code):
    name = user_code("import sys\nclass M:\n    def __init__(self): sys.exit(0)\n")
    assert f"init = {{}}: {name}:M raised SystemExit: 0" in failure(opened, f"{name}:M")


def test_init_arguments_that_the_class_does_not_take_are_named(opened, user_code):
    name = user_code("class M:\n    def __init__(self, size): pass\n")
    message = failure(opened, f"{name}:M", "init = { sise = 3 }\n")
    assert f"init = {{'sise': 3}}: {name}:M raised TypeError" in message
    assert "'sise'" in message
