"""Quantize an exported model with torchao through transformers, and save it in HF format.

    pip install 'megaprune[quantize]'
    python examples/quantize/quantize.py --hf-model runs/demo/hf --save runs/demo/hf-int8
    python tools/evaluate.py --hf-model runs/demo/hf-int8 --data examples/demo/valid.jsonl

The input is an ordinary checkpoint, pruned or not, and so is the output.
"""

import argparse
import sys
from pathlib import Path

from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

SCHEMES = {
    "int8-weights": Int8WeightOnlyConfig,
    "int8-weights-and-activations": Int8DynamicActivationInt8WeightConfig,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-model", required=True, help="folder of the model, such as a run's hf/")
    parser.add_argument("--save", required=True, help="folder for the quantized model; must not exist")
    parser.add_argument("--scheme", choices=SCHEMES, default="int8-weights")
    args = parser.parse_args()
    if Path(args.save).exists():
        sys.exit(f"error: --save {args.save} exists already")
    quantized = AutoModelForCausalLM.from_pretrained(
        args.hf_model, dtype="auto", quantization_config=TorchAoConfig(SCHEMES[args.scheme]())
    )
    quantized.save_pretrained(args.save)
    AutoTokenizer.from_pretrained(args.hf_model).save_pretrained(args.save)
    size = sum(path.stat().st_size for path in Path(args.save).glob("*.safetensors"))
    print(f"{args.scheme}: {size / 1e6:.1f} MB of weights in {args.save}")


if __name__ == "__main__":
    main()
