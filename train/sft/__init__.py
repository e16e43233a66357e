"""Looked at before all else, in words that older Pythons know: whether this one is new enough and has the packages."""

import importlib.util
import os
import sys

PACKAGES = """accelerate datasets deepspeed huggingface_hub jinja2 numpy peft psutil safetensors torch transformers
    xxhash yaml"""

requirements = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "requirements.txt")
if sys.version_info < (3, 11):
    why = "is Python %d.%d, and 3.11 or newer is needed: put it first on the PATH" % sys.version_info[:2]
else:
    missing = " ".join(name for name in PACKAGES.split() if importlib.util.find_spec(name) is None)
    why = missing and "lacks %s: %s -m pip install -r %s" % (missing, sys.executable, requirements)
if why:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("refused: %s %s\n" % (sys.executable, why))
    sys.exit(2)
