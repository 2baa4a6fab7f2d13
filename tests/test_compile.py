"""Compiler options per platform."""

from magma_jax.compile import compiler_options


def test_options_are_those_of_the_platform():
    assert compiler_options("gpu") == {}
    compiler_options("cpu").clear()  # a copy
    assert compiler_options("cpu")
