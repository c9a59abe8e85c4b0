import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = ["<eos>", *(f"w{index}" for index in range(31))]
VOCAB_SIZE = len(WORDS)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Return a function that saves a tiny random Qwen3 with a tokenizer of whole words and gives its folder."""

    def make(seed, vocab_size=VOCAB_SIZE, **config):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        # Large initial weights make predictions far from uniform, so that a wrong window is noticed.
        settings = sizes | heads | {"max_position_embeddings": 64, "initializer_range": 0.5} | config
        folder = tmp_path_factory.mktemp("model")
        Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **settings)).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def student(make_model):
    return make_model(seed=0)


@pytest.fixture(scope="session")
def teacher(make_model):
    return make_model(seed=1)


@pytest.fixture(scope="session")
def stream():
    """Token ids of `data`: two documents, each with its end-of-text token."""
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(1, len(WORDS), (length,), generator=generator).tolist() for length in (20, 16)]
    return [token for document in documents for token in [*document, 0]]


@pytest.fixture(scope="session")
def data(tmp_path_factory, stream):
    path = tmp_path_factory.mktemp("data") / "valid.jsonl"
    texts = (" ".join(WORDS[token] for token in part) for part in (stream[:20], stream[21:-1]))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)
