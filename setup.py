"""Put notebooks and slides into the wheel, from where `vitlab init` copies them. All else: pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class _WithNotebooks(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a clone has them beside the package
            skip = shutil.ignore_patterns("__pycache__", ".*", "*.lock")
            for name in ("notebooks", "slides"):
                shutil.copytree(
                    name,
                    Path(self.build_lib, "vitlab", "lab", name),
                    ignore=skip,
                    dirs_exist_ok=True,
                )


setup(cmdclass={"build_py": _WithNotebooks})
