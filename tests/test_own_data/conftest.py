import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Configs are written to the working directory, with paths as they are typed."""
    monkeypatch.chdir(tmp_path)
