"""Quantize an exported model with llm-compressor, in the compressed-tensors format that vLLM serves.

    pip install llmcompressor        # in an environment of its own: it pins torch and transformers
    python examples/quantize/compress.py --hf-model runs/x/hf --save runs/x/hf-w8a8 --data train.jsonl

The input is an ordinary checkpoint, pruned or not.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

# The output layer decides on every token, and routers of experts are small and decide much: they keep their dtype.
IGNORED = ["lm_head", "re:.*mlp.gate$"]
GROUP_SIZES = (128, 64, 32, 16)


def rounded(scheme: str) -> list[Modifier]:
    """Return the step that rounds every linear layer to a scheme."""
    return [QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORED)]


def smoothed() -> list[Modifier]:
    """Return the steps to 8-bit weights and activations; activations are scaled for each token while the model runs."""
    steps = GPTQModifier(targets="Linear", scheme="W8A8", ignore=IGNORED)
    return [SmoothQuantModifier(smoothing_strength=0.8), steps]


def grouped(model: torch.nn.Module) -> list[Modifier]:
    """Return the step to 4-bit weights in groups, of the largest size that divides every layer's inputs."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    widths = {each.in_features for name, each in layers.items() if name != "lm_head"}
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    if not fitting:
        sys.exit(f"error: --scheme w4a16: no group of {GROUP_SIZES} divides the layers' inputs {sorted(widths)}")
    scheme.weights.group_size = fitting[0]
    return [GPTQModifier(config_groups={"group_0": scheme}, ignore=IGNORED)]


# Scheme -> its steps for a model, and whether they read data.
SCHEMES = {
    "w8a8": (lambda model: smoothed(), True),
    "w8a8-rtn": (lambda model: rounded("W8A8"), False),
    "fp8": (lambda model: rounded("FP8_DYNAMIC"), False),
    "w4a16": (grouped, True),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-model", required=True, help="folder of the model, such as a run's hf/")
    parser.add_argument("--save", required=True, help="folder for the quantized model; must not exist")
    parser.add_argument("--scheme", choices=SCHEMES, default="w8a8")
    parser.add_argument("--data", help="JSON lines with the key text, for schemes that calibrate: the recovery data")
    parser.add_argument("--samples", type=int, default=256, help="number of texts (default: 256)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of each text at most (default: 512)")
    args = parser.parse_args()
    steps, calibrates = SCHEMES[args.scheme]
    if Path(args.save).exists():
        sys.exit(f"error: --save {args.save} exists already")
    if calibrates and not args.data:
        sys.exit(f"error: --scheme {args.scheme} calibrates: give --data")
    model = AutoModelForCausalLM.from_pretrained(args.hf_model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    data = texts(Path(args.data), tokenizer, args.samples, args.seq_length) if calibrates else None
    calibration = dict(dataset=data, num_calibration_samples=len(data), max_seq_length=args.seq_length) if data else {}
    oneshot(model=model, recipe=steps(model), **calibration)
    aside = Path(f"{args.save}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_compressed=True)
    tokenizer.save_pretrained(aside)
    card = Path(args.hf_model) / "README.md"
    if card.is_file():  # for `megaprune push`, which asks for the card, and for evaluations with the same windows
        shutil.copyfile(card, aside / card.name)
    aside.rename(args.save)
    size = sum(path.stat().st_size for path in Path(args.save).glob("*.safetensors"))
    print(f"{args.scheme}: {size / 1e6:.1f} MB of weights in {args.save}")


def texts(path: Path, tokenizer, samples: int, seq_length: int) -> Dataset:
    """Return the tokens of the first texts of a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [row["text"] for row in rows if row.get("text")][:samples]
    tokens = [tokenizer(text, truncation=True, max_length=seq_length)["input_ids"] for text in found]
    return Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens])


if __name__ == "__main__":
    main()
