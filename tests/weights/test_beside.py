"""Files beside the weights: those that are valid for the result are copied, the others are not."""

import json

import pytest

from megaprune.cli.main import attempt
from megaprune.weights.beside import files_beside
from tests.helpers import stored, tiny
from tests.helpers.checkpoints import LLAMA, write_folder

ALONG = [
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "qwen.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "tool_use.jinja", "tokenization_x.py"),
    *("LICENSE", "LICENSE.txt", "Notice", "NOTICE.md", "Open Source Software Notice", "LICENSE-MODEL.txt"),
    *("modeling_x.py", "configuration_x.py"),
]
STAYS = [
    *("README.md", "pytorch_model.bin.index.json", "model.safetensors.index.json", ".gitattributes"),
    *("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "training_args.bin"),
    *("trainer_state.json", "all_results.json", "eval_results.json", "params.json", "consolidated.safetensors"),
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml", "model.onnx"),
    *("modules.json", "config_sentence_transformers.json", "preprocessor_config.json", "requirements.txt"),
    *("handler.py", "convert.py", "configuration.json", "latest", "stored_layout.json"),
]


def fill(folder, names):
    for name in names:
        (folder / name).write_text(f"the source's {name}")


def test_a_list_decides(tmp_path):
    fill(tmp_path, ALONG + STAYS + ["config.json"])
    for name in ("original", "onnx", "additional_chat_templates", "1_Pooling"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").write_text("{}")
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{}")
    found = {str(path.relative_to(tmp_path)) for path in files_beside(tmp_path)}
    assert found == {*ALONG, "additional_chat_templates/rag.jinja"}


def test_code_comes_with_what_it_imports(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "pangu.Model"}}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["words.Tokenizer", None], "AutoProcessor": "other/repo--proc.Class"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    fill(tmp_path, ["proc.py", "unused.py", "helper_b.py"])
    (tmp_path / "pangu.py").write_text("import torch\nfrom .layers import Layer\nfrom . import helper_a\n")
    (tmp_path / "layers.py").write_text("from torch import nn\nimport kernels\n")
    (tmp_path / "kernels.py").write_text("no python, but named")
    (tmp_path / "helper_a.py").write_text("def f():\n    from .helper_b import g\n")
    (tmp_path / "words.py").write_text("")
    found = {path.name for path in files_beside(tmp_path)}
    code = {"pangu.py", "layers.py", "kernels.py", "helper_a.py", "helper_b.py", "words.py"}
    assert found == {"tokenizer_config.json", *code}


@pytest.mark.parametrize("config", [b"{", b"[]", b'{"auto_map": 3}', b'{"auto_map": "../../x.Class"}', b"\xff"])
def test_configs_that_name_no_code(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    assert [path.name for path in files_beside(tmp_path)] == ["tokenizer_config.json"]


@pytest.fixture
def littered(tiny_model, tmp_path):
    """Model whose folder contains unrelated files, including an adapter's settings."""
    model = stored.edited(tiny_model("qwen3"), tmp_path / "model", lambda tensors: None)
    fill(model, [name for name in STAYS if not name.endswith(("index.json", ".safetensors")) and "quant" not in name])
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing", "target_modules": ["q_proj"], "r": 2}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    return model


def test_surgery_and_conversion_copy_the_same(littered, tmp_path):
    words = ["--hf-model", littered, "--save", tmp_path / "run", "--method", "manual", "--prune-layers", "2"]
    tiny.run_here([str(word) for word in [*words, "--train-iters", 0, "--seq-length", tiny.SEQ_LENGTH]])
    for verb in (["import", "--hf-model", littered], ["export", "--hf-path", tmp_path / "hf"]):
        words = [str(word) for word in [*verb, "--megatron-path", tmp_path / "m"]]
        assert attempt("convert", words) == (0, None)
    beside = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    beside |= {"chat_template.jinja"} & {path.name for path in littered.iterdir()}
    for folder, others in (
        (tmp_path / "run" / "hf", {"model.safetensors", "README.md"}),
        (tmp_path / "m" / "hf", set()),
        (tmp_path / "hf", {"model.safetensors"}),
    ):
        assert {path.name for path in folder.iterdir()} == beside | others
    tiny.load_hf(tmp_path / "run" / "hf")
    tiny.load_hf(tmp_path / "hf")


def test_the_copies_are_the_sources_bytes(tmp_path):
    from megaprune.weights.surgery import copy_beside

    write_folder(tmp_path / "source", LLAMA)
    fill(tmp_path / "source", ALONG)
    (tmp_path / "out").mkdir()
    copy_beside(tmp_path / "source", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(ALONG)
    assert all((tmp_path / "out" / name).read_text() == f"the source's {name}" for name in ALONG)
