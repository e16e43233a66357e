"""What starts fast does not import what takes seconds: looked at in processes of their own."""

import subprocess
import sys

from conftest import TRAIN


def test_an_adapters_base_is_checked_without_transformers(tmp_path):
    """Without base.json there is nothing that a class would have to be known for."""
    (tmp_path / "adapter_config.json").write_text("{}")
    code = "import sys; from pathlib import Path; from sft.model import adapter_base as m, directory as d; "
    code += (
        f"m.check_base(Path({str(tmp_path)!r}), d.ModelDirectory('.'), False); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=TRAIN).returncode == 0
