"""The model card, and the values that are read back from it."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from megaprune.report.front_matter import inherited
from megaprune.report.model_card import model_card, read_seq_length

COMMAND = "torchrun --nproc-per-node 2 tools/prune.py --config demo.yaml"


def write_card(folder, text):
    (folder / "README.md").write_text(text)
    return folder


def test_front_matter(report):
    card = model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND, license="apache-2.0")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "finetune",
        "tags": ["megaprune", "layer-pruning"],
        "megaprune": {"method": "e3", "kept_layers": [0, 1, 2, 5, 7], "seq_length": 256},
        "model-index": [
            {
                "name": "Qwen3-8B-5-layers",
                "results": [
                    {
                        "task": {"type": "text-generation", "name": "Text Generation"},
                        "dataset": {"type": "text", "name": "held-out text of the run", "args": {"seq_length": 256}},
                        "metrics": [{"type": "perplexity", "name": "perplexity per token", "value": 9.4877}],
                    }
                ],
            }
        ],
    }


def test_the_license_of_the_source_is_inherited(tmp_path, report):
    write_card(tmp_path, "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\ntags: [a]\n---\n# Source\n")
    card = model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND, source_card=inherited(tmp_path))
    assert card.startswith("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\nlibrary_name: transformers\n")
    assert inherited(tmp_path / "none") == {}


def test_results_are_those_of_the_weights_in_the_folder(report):
    def value(**given):
        card = ModelCard(model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND, **given))
        return card.data.eval_results[0].metric_value

    assert value() == 9.4877  # exp(2.25)
    assert value(adapter=True) == 33.1155  # exp(3.5): the adapter is not part of the model


def test_the_hub_library_reads_it(report):
    card = ModelCard(model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND))
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert card.data.license is None
    assert card.text.lstrip().startswith("# Qwen/Qwen3-8B, pruned to 5 of 8 layers")


def test_body_has_the_numbers_and_the_command(report):
    card = model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND)
    assert "- kept layers (source indices, from 0): 0-2, 5, 7\n- removed layers: 3-4, 6\n" in card
    assert "| parameters | 8,000,000 | 5,600,000 |" in card
    assert "| source | 2.0000 | 7.39 |\n| pruned, before recovery | 3.5000 | 33.12 |\n| this model | 2.2500" in card
    assert f"```bash\n{COMMAND}\n```" in card


def test_a_card_without_training_says_so(report):
    report = replace(report, tokens_seen=0, valid={"teacher": {"loss": 2.0}, "pruned": {"loss": 3.5}})
    card = model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND)
    assert "left all remaining weights unchanged" in card
    assert "| this model | 3.5000 | 33.12 |" in card


def test_share_of_the_loss_that_recovery_regained(report):
    sentence = "Recovery regained 83.3% of the loss that pruning cost."
    assert sentence in model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND).split("\n")
    untrained = replace(report, valid={name: report.valid[name] for name in ("teacher", "pruned")})
    assert "regained" not in model_card(untrained, source_name="Qwen/Qwen3-8B", command=COMMAND)


def test_without_validation_there_is_no_quality_section(report):
    report = replace(report, valid={})
    assert "## Quality" not in model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND)


@pytest.mark.parametrize("shown", ["absolute", "relative"])
def test_local_source_is_shown_by_its_name_alone(tmp_path, monkeypatch, report, shown):
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(report, source_name=str(folder) if shown == "absolute" else "private/my-model", command="")
    assert "# my-model, pruned to 5 of 8 layers" in card
    assert "base_model" not in card  # the hub refuses names that are not its own
    assert "private" not in card


def test_the_command_has_no_folders_of_this_machine(report):
    card = model_card(
        report, source_name="Qwen/Qwen3-8B", command="prune.py --hf-model Qwen/Qwen3-8B --save /home/me/x"
    )
    assert "```bash\nprune.py --hf-model Qwen/Qwen3-8B --save x\n```" in card


def test_seq_length_round_trip(tmp_path, report):
    card = model_card(report, source_name="Qwen/Qwen3-8B", command=COMMAND)
    assert read_seq_length(write_card(tmp_path, card)) == 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# No front matter\n---\nmegaprune: {seq_length: 4}\n---\n",
        "---\nlicense: mit\n---\n# Another's card",
        "---\nmegaprune: text\n---\n",
        "---\nmegaprune: {seq_length: many}\n---\n",
        "---\nmegaprune: {seq_length: 4\n---\n",
        "---\n- a list\n---\n",
        "---\nnever closed\n",
    ],
)
def test_cards_of_others_have_no_seq_length(tmp_path, text):
    assert read_seq_length(write_card(tmp_path, text)) is None


def test_no_card_has_no_seq_length(tmp_path):
    assert read_seq_length(tmp_path) is None
