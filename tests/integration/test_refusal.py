"""A worker whose models cannot be served does not start, and says which key of which file is to blame."""

import os
import pickle
import shutil

import pytest
import torch

import fleet_of_tests
import nursery
from waiting import PATIENCE_S

GOOD = '[m]\nloader = "module"\nclass = "fleet_of_tests:Dropout"\nweights = "w.pth"\n'


@pytest.fixture
def refuse(redis_url, tmp_path):
    """Start a worker on a model file and return what it says; it must exit with 2."""

    def refuse(text, *args, names_file=True):
        path = tmp_path / "models.toml"
        path.write_text(text)
        env = {**os.environ, "NOGRAD_REDIS_URL": redis_url, "NOGRAD_MODELS": str(path)}
        log = tmp_path / "worker.log"
        with log.open("wb") as out:
            words = ("celery", "-A", "nograd.tasks", "worker", "-c", "4", *args)
            code = nursery.start(words, out, env, tmp_path).wait(PATIENCE_S)
        said = log.read_text()
        assert code == 2, said
        assert str(path) in said or not names_file
        assert "Traceback" not in said
        assert " ready." not in said
        return said

    shutil.copy(fleet_of_tests.__file__, tmp_path)
    torch.save(fleet_of_tests.Dropout().state_dict(), tmp_path / "w.pth")
    return refuse


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_pool_that_cannot_batch(refuse, pool):
    assert f"-P celery.concurrency.{pool.removesuffix('s')}" in refuse(GOOD, "-P", pool, names_file=False)


def test_an_unknown_key(refuse):
    assert "[m] wieghts = 'x'" in refuse(GOOD + 'wieghts = "x"')


def test_a_missing_weight_file(refuse):
    assert "weights = 'gone.pth'" in refuse(GOOD.replace("w.pth", "gone.pth"))


def test_a_pickle_that_weights_only_refuses(refuse, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    said = refuse(GOOD.replace("w.pth", "evil.pth"))
    assert "weights = 'evil.pth'" in said
    assert "weights_only" in said
    assert "\nexecuted" not in said


def test_weights_of_another_model(refuse, tmp_path):
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pth")
    said = refuse(GOOD.replace("w.pth", "other.pth"))
    assert "weights = 'other.pth'" in said
    assert "linear.weight" in said


@pytest.mark.parametrize("name", ["no_such_module:Thing", "fleet_of_tests:NoSuchClass", "fleet_of_tests", "os:path"])
def test_a_class_that_does_not_import(refuse, name):
    assert f"class = '{name}'" in refuse(GOOD.replace("fleet_of_tests:Dropout", name))


def test_a_module_that_exits_while_it_is_imported(refuse, tmp_path):
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(0)\n")
    said = refuse(GOOD.replace("fleet_of_tests:Dropout", "a_script:Model"))
    assert "class = 'a_script:Model': cannot import a_script: SystemExit: 0" in said


def test_a_class_that_raises_when_it_is_made(refuse):
    assert "init = {'size': 3}" in refuse(GOOD + "init = { size = 3 }")
