"""What KAITO's transformers runtime loads adapters with, in a folder of its own; torch and the rest are this one's.

https://github.com/kaito-project/kaito/blob/main/presets/workspace/dependencies/requirements.txt
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# peft and transformers at KAITO's versions, and what that transformers asks for.
PACKAGES = (
    *("peft==0.11.1", "transformers==5.14.1"),
    *("tokenizers<=0.23.0,>=0.22.0", "huggingface-hub<2.0,>=1.5.0", "httpx<1", "httpcore<2", "h11", "anyio"),
)
_ROOT = Path(__file__).parent.parent
_FOLDER = _ROOT / f".venv-kaito-{sys.version_info.major}.{sys.version_info.minor}"

_PROGRAM = """
import json, sys
import torch, transformers, peft
base, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter)
model.eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0]
print(json.dumps({"peft": peft.__version__, "transformers": transformers.__version__, "logits": logits.tolist()}))
"""


def logits_in_kaitos_runtime(base: Path, adapter: Path, ids: list[int]) -> dict[str, Any]:
    """{"peft": version, "transformers": version, "logits": one list a token}. Installs what it needs, once."""
    _install()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(base), str(adapter), json.dumps(ids)],
        env=os.environ | {"PYTHONPATH": str(_FOLDER), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _install() -> None:
    marker = _FOLDER / "installed"
    if marker.is_file() and marker.read_text() == "\n".join(PACKAGES):
        return
    # --target goes before site-packages on PYTHONPATH; --no-deps leaves torch and the rest to this environment.
    command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    done = subprocess.run(
        [sys.executable, *command, "--target", str(_FOLDER), *PACKAGES], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        if os.environ.get("CI") == "true":
            pytest.fail(f"KAITO's runtime cannot be installed: {done.stderr}")
        pytest.skip("KAITO's runtime cannot be installed here: no package index")
    marker.write_text("\n".join(PACKAGES))
