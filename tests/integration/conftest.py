"""What tests with real workers share."""

import pytest

import backfills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models of backfills and their model file, in a folder of the module's own."""
    folder = tmp_path_factory.mktemp("models")
    backfills.write_models(folder)
    return folder
