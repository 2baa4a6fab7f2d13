"""Addresses of files in installed packages."""

import pytest

from magma_jax.storage.hub import local_path
from magma_jax.storage.package_file import PackageFileError


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "some_model/a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert local_path("package://some_model/a.gguf") == tmp_path / "some_model/a.gguf"
    for address, message in {
        "package://some_model/b.gguf": "the installed package some_model has no such file",
        "package://some_model/../secret": "has no such file",
        "package://no_such_model/a.gguf": "the package no_such_model is not installed",
        "package://some_model": "no address of a package's file",
        "package://a.b/c": "no address of a package's file",
    }.items():
        (tmp_path / "secret").write_text("")
        with pytest.raises(PackageFileError, match=message):
            local_path(address)
