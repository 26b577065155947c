"""Which versions computed something."""

from importlib.metadata import PackageNotFoundError

import pytest

import gdd_dist
from gdd_dist.runtime import versions


def test_a_copy_that_nobody_installed_has_a_version(monkeypatch):
    def version(name):
        if name == "gdd_dist":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(versions, "version", version)
    assert versions.versions()["gdd_dist"] == gdd_dist.__version__


def test_a_missing_library_is_no_version(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions, "PACKAGES", ("torch",))
    with pytest.raises(PackageNotFoundError):
        versions.versions()
