"""What pyproject.toml cannot say: an installed package holds the configs, which in a checkout stand beside it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package that is built."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                "configs",
                Path(self.build_lib) / "magma_jax/configs",
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )


setup(cmdclass={"build_py": BuildWithConfigs})
