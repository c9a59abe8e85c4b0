"""Loss, perplexity, KL and agreement against an independent computation, and the refusals."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from megaprune.cli.evaluate import run as evaluate_by_flags
from megaprune.evaluation.perplexity import evaluate_model
from megaprune.utils.errors import MegapruneError, UsageError

SEQ_LENGTH = 8


@torch.no_grad()
def log_probs_by_hand(folder, stream, seq_length=SEQ_LENGTH):
    """Return log p over the vocabulary for every token of the stream except the first, each from its own window."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = [stream[start : start + seq_length] for start in range(0, len(stream) - 1, seq_length)]
    log_probs = torch.cat([model(torch.tensor([window])).logits[0].double().log_softmax(-1) for window in windows])
    return log_probs[: len(stream) - 1]


def loss_by_hand(folder, stream, seq_length=SEQ_LENGTH):
    log_probs = log_probs_by_hand(folder, stream, seq_length)
    return -sum(log_probs[position, token].item() for position, token in enumerate(stream[1:])) / (len(stream) - 1)


def evaluate(hf_model, data, **options):
    return evaluate_model(hf_model, [data], device="cpu", **options)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_loss_over_every_token_but_the_first(student, data, stream, micro_batch_size):
    assert (len(stream) - 1) % SEQ_LENGTH  # the last window is not full
    result = evaluate(student, data, seq_length=SEQ_LENGTH, micro_batch_size=micro_batch_size)
    assert result["tokens"] == len(stream) - 1
    assert result["loss"] == pytest.approx(loss_by_hand(student, stream), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert "kl" not in result


def test_distance_from_a_teacher(student, teacher, data, stream):
    result = evaluate(student, data, teacher=teacher, seq_length=SEQ_LENGTH)
    of_student, of_teacher = log_probs_by_hand(student, stream), log_probs_by_hand(teacher, stream)
    kl = (of_teacher.exp() * (of_teacher - of_student)).sum(-1).mean().item()
    agreement = (of_teacher.argmax(-1) == of_student.argmax(-1)).double().mean().item()
    assert result["kl"] == pytest.approx(kl, rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(agreement)
    assert result["loss"] == pytest.approx(loss_by_hand(student, stream), rel=1e-5)


def test_a_model_is_no_distance_from_itself(student, data):
    result = evaluate(student, data, teacher=student, seq_length=SEQ_LENGTH)
    assert result["kl"] == pytest.approx(0, abs=1e-9)
    assert result["top1_agreement"] == 1


def test_limit_counts_windows(student, data, stream):
    result = evaluate(student, data, seq_length=SEQ_LENGTH, limit=2)
    assert result["tokens"] == 2 * SEQ_LENGTH
    assert result["loss"] == pytest.approx(loss_by_hand(student, stream[: 2 * SEQ_LENGTH + 1]), rel=1e-5)


def test_window_is_by_default_the_context(student, data):
    assert evaluate(student, data)["seq_length"] == 64


def test_window_is_by_default_what_the_card_says(student, data, stream, tmp_path):
    folder = shutil.copytree(student, tmp_path / "hf")
    (folder / "README.md").write_text("---\nmegaprune:\n  seq_length: 16\n---\n")
    result = evaluate(str(folder), data)
    assert result["seq_length"] == 16
    assert result["loss"] == pytest.approx(loss_by_hand(student, stream, 16), rel=1e-5)
    assert evaluate(str(folder), data, seq_length=8)["seq_length"] == 8


def test_dtype(student, data):
    exact, rounded = (evaluate(student, data, dtype=dtype) for dtype in ("auto", "bf16"))
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert exact["loss"] != rounded["loss"]
    assert exact["loss"] == pytest.approx(rounded["loss"], rel=0.05)


def test_tied_embeddings_are_not_missing(make_model, data, stream):
    tied = make_model(seed=3, tie_word_embeddings=True)
    result = evaluate(tied, data, seq_length=SEQ_LENGTH)
    assert result["loss"] == pytest.approx(loss_by_hand(tied, stream), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hf_model": "/no/such/model"}, "--hf-model /no/such/model: no such folder"),
        ({"teacher": "./no/such/model"}, "--teacher ./no/such/model: no such folder"),
        ({"seq_length": 65}, "--seq-length 65 is more than the 64 positions"),
        ({"seq_length": 0}, "--seq-length 0"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0"),
        ({"limit": -1}, "--limit -1"),
        ({"dtype": "int8"}, "--dtype int8: give one of auto, fp32, bf16, fp16"),
    ],
)
def test_refusals_in_one_line(student, data, options, message):
    with pytest.raises(MegapruneError) as error:
        evaluate(**({"hf_model": student, "data": data} | options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model(tmp_path, data):
    with pytest.raises(MegapruneError, match=r"it contains no config\.json; a finished run's model is in RUN_DIR/hf"):
        evaluate(str(tmp_path), data)


def test_data_is_blamed_by_its_own_flag(student):
    with pytest.raises(UsageError, match=r"--data /no/such\.jsonl"):
        evaluate(student, "/no/such.jsonl")


def test_teacher_with_another_vocabulary(student, data, make_model):
    with pytest.raises(MegapruneError, match="has a vocabulary of 48 and .* one of 32"):
        evaluate(student, data, teacher=make_model(seed=0, vocab_size=48))


def damaged(student, folder, change):
    """Return a copy of `student` with tensors changed by `change`."""
    shutil.copytree(student, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_missing_tensor_is_refused(student, data, tmp_path):
    folder = damaged(student, tmp_path / "hf", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(MegapruneError, match=r"has no weights for model\.norm\.weight"):
        evaluate(folder, data)


@pytest.mark.parametrize("role", ["--hf-model", "--teacher"])
def test_a_loss_that_is_not_finite_is_refused(student, data, tmp_path, role):
    folder = damaged(student, tmp_path / "hf", lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    hf_model, teacher = (folder, None) if role == "--hf-model" else (student, folder)
    with pytest.raises(MegapruneError, match=f"^{role} {folder}: the loss isn't finite"):
        evaluate(hf_model, data, teacher=teacher)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr("megaprune.device.torch_device", lambda: torch.device("cpu"))


def test_command_prints_and_writes(student, teacher, data, tmp_path, capsys, on_cpu):
    output = tmp_path / "results" / "student.json"
    words = ["--hf-model", student, "--data", data, "--teacher", teacher, "--output", output]
    evaluate_by_flags([*map(str, words), "--seq-length", str(SEQ_LENGTH)])
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert f"loss             {result['loss']:.4f} nats" in printed
    assert f"top-1 agreement  {result['top1_agreement']:.2%}" in printed
    assert printed.rstrip().endswith(str(output))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --data, --tasks or both"),
        (["--teacher", "t", "--tasks", "a"], "--teacher needs --data"),
        (["--data", "d", "--output", "."], "--output . is a folder"),
    ],
)
def test_command_refuses_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        evaluate_by_flags(["--hf-model", "model", *flags])
