"""What the plugin registers, and that registering costs nothing."""

from __future__ import annotations

import subprocess
import sys

from flash_env_freesolo import flash_register_environments

from flash.api import EnvironmentLoader


class Context:
    pass


def test_the_record_detects_a_folder_and_makes_a_loader(tmp_path):
    (record,) = flash_register_environments()

    assert not record.detect(tmp_path)
    (tmp_path / "environment.py").touch()
    assert record.detect(tmp_path)
    assert isinstance(record.make(Context()), EnvironmentLoader)


def test_registering_imports_neither_the_sdk_nor_anything_heavy():
    code = (
        "import sys, flash_env_freesolo as p; p.flash_register_environments();"
        "print(sorted({'freesolo', 'requests', 'openai', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
