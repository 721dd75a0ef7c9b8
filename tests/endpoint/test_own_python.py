"""Our further processes are this package's, wherever the user stands."""

import subprocess
from pathlib import Path

import qmigrate
from qmigrate.endpoint.own_python import environment, own_python


def test_files_of_the_users_folder_are_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("json.py", "argparse.py", "qmigrate.py"):
        (tmp_path / name).write_text("raise SystemExit('mine')")
    command = own_python("qmigrate", "--version")
    found = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stdout.split()[-1]) == (0, qmigrate.__version__), found.stderr
