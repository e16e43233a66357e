#!/usr/bin/env bash
# The tests of scripts and ranks on another release of transformers:
#
#     tests/on_transformers.sh 5.17.0 [further arguments of pytest]
#
# It makes a temporary environment that borrows all other packages from the active one. pip also replaces what that
# release wants older (huggingface_hub).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?which version of transformers, e.g. 5.17.0}
shift

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m venv "$folder/venv"
borrowed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$borrowed" > "$own/borrowed.pth"
"$folder/venv/bin/pip" install -q "transformers==$version"

export PATH="$folder/venv/bin:$PATH"
python -c 'import transformers; print("transformers", transformers.__version__, "from", transformers.__file__)'
python -m pytest tests/integration tests/distributed "$@"
