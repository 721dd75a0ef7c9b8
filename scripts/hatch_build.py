"""Makes the man page when a wheel is built: it lands in share/man/man1, where man looks beside bin."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManPage(BuildHookInterface[Any]):
    """The parser needs nothing but Python, so it can be asked where the package's dependencies are absent."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - the interface's
        self._folder = tempfile.TemporaryDirectory()
        page = Path(self._folder.name, "qmigrate.1")
        script = Path(self.root, "scripts", "build_man")
        page.write_bytes(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=True).stdout)
        build_data["shared_data"][str(page)] = "share/man/man1/qmigrate.1"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        self._folder.cleanup()
