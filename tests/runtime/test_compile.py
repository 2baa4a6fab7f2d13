"""Compiler options per platform, and where programs are kept."""

import jax
import pytest

from magma_jax.runtime.compile import compiler_options, enable_compilation_cache


def test_options_are_those_of_the_platform():
    assert compiler_options("gpu") == {}
    compiler_options("cpu").clear()  # a copy
    assert compiler_options("cpu")


@pytest.fixture
def no_folder():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize(("wanted", "home"), [(True, "writable"), (True, "file/below"), (False, "writable")])
def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path, wanted, home):
    told = {}
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: told.update({name: value}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    enable_compilation_cache(wanted)
    folder = tmp_path / home / "magma_jax" / "programs"
    assert told.get("jax_compilation_cache_dir") == (str(folder) if folder.exists() else None)
    assert folder.exists() == (wanted and home == "writable")
    assert (told.get("jax_enable_compilation_cache") is False) == (not wanted)
