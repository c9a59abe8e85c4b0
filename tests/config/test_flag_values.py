"""Values of single flags that are refused."""

import pytest

from megaprune.cli.prune import parse_config
from tests.config.test_config import E3, SHORTGPT, refusal


@pytest.mark.parametrize(
    "flag, least",
    [
        *((flag, 1) for flag in ("seq-length", "calibration-samples", "micro-batch-size", "global-batch-size")),
        *((f"{which}-parallel-size", 1) for which in ("tensor-model", "pipeline-model", "context")),
        *((flag, 1) for flag in ("distill-top-k", "save-interval", "log-interval")),
        *((flag, 0) for flag in ("train-iters", "lr-warmup-iters", "seed")),
        *((flag, 0) for flag in ("lr", "min-lr", "clip-grad", "weight-decay")),
    ],
)
def test_numbers_too_small(flag, least):
    assert refusal([*E3, f"--{flag}", least - 1]).startswith(f"--{flag} {least - 1}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "flag", ["lr", "min-lr", "clip-grad", "weight-decay", "mask-lr", "gumbel-temperature", "gumbel-anneal"]
)
def test_numbers_that_are_not_finite(flag, value):
    assert refusal([*E3, f"--{flag}={value}"]) == f"--{flag} {value} is not a finite number"


@pytest.mark.parametrize(
    "words",
    [
        *("--mask-lr 0", "--mask-lr -1", "--mask-init-scale 0", "--mask-ramp 0", "--mask-ramp 1.1"),
        *("--gumbel-temperature 0", "--gumbel-anneal 1", "--gumbel-anneal -0.1"),
    ],
)
def test_search_settings(words):
    assert refusal([*E3, *words.split()]).startswith(words.split()[0])


@pytest.mark.parametrize(
    "words, said",
    [
        ("--lora-alpha 16", "--lora-alpha needs --lora-rank"),
        ("--lora-target-modules linear_qkv", "--lora-target-modules needs --lora-rank"),
        ("--export-adapter", "--export-adapter needs --lora-rank"),
        ("--teacher self", "--teacher self needs --lora-rank"),
        ("--lora-rank 0", "--lora-rank 0 is less than 1"),
        ("--lora-rank 8 --lora-alpha 0", "--lora-alpha 0.0 is not above 0"),
        ("--lora-rank 8 --lora-alpha nan", "--lora-alpha nan is not a finite number"),
    ],
)
def test_lora_settings(words, said):
    assert said in refusal([*E3, *words.split()])


def test_the_searches_of_e3():
    """Scores are trained in the paper's search alone; other methods have neither."""
    for words in ("--mask-lr 0.1", "--mask-init-scale 2"):
        assert refusal([*E3, *words.split()]).startswith(f"{words.split()[0]} is for --search-preset paper")
        settings = parse_config([*E3, *words.split(), "--search-preset", "paper"]).method_options()
        assert settings["search_preset"] == "paper"
    still = [*E3, "--lr", "0", "--search-preset", "paper"]
    assert refusal(still) == "--search-preset paper trains the scores with --lr, which is 0: give --mask-lr"
    assert parse_config([*still, "--mask-lr", "0.1"]).method_options()["mask_lr"] == 0.1
    assert settings["mask_init_scale"] == 2.0 and settings["mask_lr"] is None and settings["lr"] == 1e-4
    assert parse_config(E3).method_options()["search_preset"] == "measured"
    assert refusal([*SHORTGPT, "--search-preset", "paper"]).startswith("--search-preset is for --method e3")
