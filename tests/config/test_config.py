"""Configurations from flags and recipes, and the errors in both."""

from pathlib import Path

import pytest

from megaprune.cli.prune import parse_config
from megaprune.config.schema import Config
from megaprune.config.sizes import num_layers_to_prune
from megaprune.utils.errors import UsageError

ROOT = Path(__file__).parents[2]
BASE = ["--hf-model", "m", "--save", "s", "--train-data", "d", "--train-iters", "100"]
E3 = [*BASE, "--num-layers-to-prune", "4"]
SHORTGPT = [*E3, "--method", "shortgpt"]
MANUAL = ["--hf-model", "m", "--save", "s", "--method", "manual", "--prune-layers", "3"]
FLAGS = [
    ("--trust-remote-code", True),
    ("--valid-data a.jsonl b.parquet", ["a.jsonl", "b.parquet"]),
    ("--text-key body", "body"),
    ("--messages-key chat", "chat"),
    ("--seq-length 128", 128),
    ("--calibration-samples 7", 7),
    ("--data-cache-path c", "c"),
    ("--method kl-init", "kl-init"),
    ("--search-iters 20", 20),
    ("--search-preset paper", "paper"),
    ("--mask-ramp 0.5", 0.5),
    ("--gumbel-temperature 2", 2.0),
    ("--gumbel-anneal 0.5", 0.5),
    ("--protect-layers none", "none"),
    ("--lr 1e-5", 1e-5),
    ("--min-lr 1e-6", 1e-6),
    ("--lr-decay-style inverse-square-root", "inverse-square-root"),
    ("--lr-warmup-iters 9", 9),
    ("--micro-batch-size 2", 2),
    ("--global-batch-size 64", 64),
    ("--clip-grad 0", 0.0),
    ("--weight-decay 0.1", 0.1),
    ("--seed 4294967295", 2**32 - 1),
    ("--bf16", True),
    ("--distill-loss ce", "ce"),
    ("--distill-tail full", "full"),
    ("--distill-top-k 5", 5),
    ("--kd-loss-alpha 0.5", 0.5),
    ("--hidden-loss-weight 2", 2.0),
    ("--mtp-loss-scaling-factor 0.1", 0.1),
    ("--teacher online", "online"),
    ("--search-weights frozen", "frozen"),
    ("--tensor-model-parallel-size 2", 2),
    ("--pipeline-model-parallel-size 2", 2),
    ("--context-parallel-size 1", 1),
    ("--expert-model-parallel-size 4", 4),
    ("--expert-tensor-parallel-size 2", 2),
    ("--sequence-parallel", True),
    ("--pipeline-model-parallel-layout Et|tL", "Et|tL"),
    ("--transformer-impl local", "local"),
    ("--use-distributed-optimizer", True),
    ("--recompute-granularity full", "full"),
    ("--save-interval 10", 10),
    ("--exit-on-signal false", False),
    ("--no-exit-on-signal", False),
    ("--exit-duration-in-mins 230", 230.0),
    ("--tokenizer-workers 8", 8),
    ("--log-interval 1", 1),
    ("--tensorboard-dir t", "t"),
    ("--wandb-project w", "w"),
    ("--max-shard-size 1MB", "1MB"),
    ("--dry-run", True),
]


def flat(argv):
    return parse_config(argv).flat()


def refusal(argv):
    """Return the message with which a command line is refused; check that it is one line."""
    with pytest.raises(UsageError) as caught:
        parse_config([str(word) for word in argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return the command line that uses it."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_defaults_are_the_documented_ones():
    config = parse_config(E3)
    given = dict(hf_model="m", save="s", train_data=["d"], train_iters=100, num_layers_to_prune=4)
    assert config.flat() == Config().flat() | given
    assert config.search_iters == 10
    settings = config.flat()
    documented = dict(
        trust_remote_code=False,
        text_key="text",
        messages_key="messages",
        calibration_samples=40,
        method="e3",
        gumbel_anneal=0.9,
        protect_layers="first,last",
        lr_decay_style="cosine",
        bf16=False,
        distill_loss="adaptive",
        teacher="online",
        distill_top_k=10,
        transformer_impl="auto",
        exit_on_signal=True,
        dry_run=False,
    )
    assert {name: settings[name] for name in documented} == documented


@pytest.mark.parametrize("words, value", FLAGS)
def test_flags_reach_their_setting(words, value):
    name = words.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    assert flat([*E3, *words.split()]) == flat(E3) | {name: value}
    flag, *values = words.split()
    with_underscores = "--" + flag.removeprefix("--").replace("-", "_")
    assert flat([*E3, with_underscores, *values]) == flat(E3) | {name: value}


def test_lora_flags_go_together():
    words = "--lora-rank 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_proj --export-adapter --teacher self"
    lora = dict(lora_rank=8, lora_alpha=16.0, lora_target_modules=["linear_qkv", "linear_proj"], export_adapter=True)
    assert flat([*E3, *words.split()]) == flat(E3) | lora | {"teacher": "self"}


def test_the_model_is_named_once():
    loaded = ["--load", "checkpoint", *E3[2:]]
    assert E3[0] == "--hf-model" and parse_config(loaded).model.given == "checkpoint"
    with pytest.raises(UsageError, match="--hf-model and --load"):
        parse_config([*E3, "--load", "checkpoint"])
    with pytest.raises(UsageError, match="--hf-model is required"):
        parse_config(E3[2:])


def test_what_to_prune():
    assert num_layers_to_prune(parse_config([*BASE, "--prune-ratio", "0.25"]).prune, 32) == 8
    assert num_layers_to_prune(parse_config([*BASE, "--prune-ratio", "0.6"]).prune, 32) == 19
    assert num_layers_to_prune(parse_config(E3).prune, 32) == 4
    manual = parse_config([*BASE, "--method", "manual", "--prune-layers", "3,7,9"])
    assert manual.search_iters == 0


def test_window_is_the_users_or_fits_the_model():
    def window(positions, *words):
        return parse_config([*E3, *words]).with_window(positions).data.seq_length

    assert (window(2048), window(4096), window(131_072)) == (2048, 4096, 4096)
    assert (window(2048, "--seq-length", "128"), window(2048, "--seq-length", "8192")) == (128, 8192)


def test_search_takes_a_tenth_of_the_iterations():
    def search_iters(*words):
        return parse_config(["--hf-model", "m", "--save", "s", "--train-data", "d", *words]).search_iters

    pruned = ("--num-layers-to-prune", "4")
    assert search_iters(*pruned, "--train-iters", "1200") == 120
    assert search_iters(*pruned, "--train-iters", "3") == 1
    assert search_iters(*pruned, "--train-iters", "100", "--search-iters", "100") == 100
    assert search_iters(*pruned, "--train-iters", "100", "--method", "random") == 0


# Recipes


def test_recipe_is_the_same_as_flags(recipe):
    argv = recipe(
        """
        hf-model: m           # dashes or underscores
        save: s
        train_data: [d, e]    # a list, or one value
        valid_data: v.jsonl
        method: e3
        prune_ratio: 0.25
        train_iters: 100
        lr: 1e-5              # to YAML a string
        min-lr: 1.0e-6
        search_iters: null    # as if it were not there
        bf16: true
        exit_on_signal: false
        sequence_parallel: no
        protect_layers: [first, 3, -1]
        text_key: -body
        """
    )
    words = "--hf-model m --save s --train-data d e --valid-data v.jsonl --prune-ratio 0.25 --train-iters 100 --lr 1e-5"
    words += " --min-lr 1e-6 --bf16 --no-exit-on-signal --protect-layers=first,3,-1 --text-key=-body"
    assert parse_config(argv) == parse_config(words.split())


def test_flag_wins_over_recipe(recipe):
    argv = recipe("{hf_model: m, save: s, train_data: [d, e], train_iters: 100, num_layers_to_prune: 4, bf16: true}")
    won = flat([*argv, "--save", "other", "--train-data", "f", "--bf16", "false"])
    assert (won["save"], won["train_data"], won["bf16"], won["hf_model"]) == ("other", ["f"], False, "m")
    assert flat(["--save=first", *argv])["save"] == "first"  # wherever --config stands
    assert flat([*argv, "--config=" + argv[1]]) == flat(argv)


@pytest.mark.parametrize("layers", ["[3, 7, 9]", '"3,7,9"', "3,7,9"])
def test_prune_layers_in_a_recipe(recipe, layers):
    argv = recipe(f"hf_model: m\nsave: s\ntrain_iters: 0\nmethod: manual\nprune_layers: {layers}")
    assert parse_config(argv).prune.prune_layers == "3,7,9"


def test_what_to_prune_on_the_command_line_replaces_the_recipes(recipe):
    argv = recipe("{hf_model: m, save: s, train_data: d, train_iters: 100, num_layers_to_prune: 4}")
    replaced = flat([*argv, "--prune-ratio=0.5"])
    assert (replaced["num_layers_to_prune"], replaced["prune_ratio"]) == (None, 0.5)
    manual = flat([*argv, "--method", "manual", "--prune_layers", "1,2"])
    assert (manual["num_layers_to_prune"], manual["prune_layers"]) == (None, "1,2")


@pytest.mark.parametrize(
    "text, said",
    [
        ("hf_model: m\nnum_layer: 4", "unknown key 'num_layer'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("help: true", "unknown key 'help'"),
        ("3: 4", "unknown key 3"),
        ("- hf_model\n- m", "must map flags to values"),
        ("just words", "must map flags to values"),
        ("", "must map flags to values"),
        ("hf_model: [m\nsave: s", "is not valid YAML"),
        ("hf_model: m\n\tsave: s", "is not valid YAML"),
        ("lr: {peak: 1}", "lr must be a value or a list of values"),
        ("train_data: [[a], b]", "train_data must be a value or a list of values"),
        ("train_data: [a, null]", "train_data must be a value or a list of values"),
        ("seq_length: [1, 2]", "--seq-length: invalid int value: '1,2'"),
        ("lr: true", "--lr: invalid float value: 'True'"),
        ("bf16: maybe", "--bf16"),
        ("method: best", "--method: invalid choice: 'best'"),
        ("lr: -1e-4", "--lr -0.0001 is less than 0"),
    ],
)
def test_bad_recipe(recipe, text, said):
    message = refusal([*E3, *recipe(text)])
    assert said in message
    assert "--config" in message or "--" in said


def test_recipe_that_is_not_there(tmp_path):
    assert f"--config {tmp_path / 'none.yaml'} does not exist" in refusal([*E3, "--config", tmp_path / "none.yaml"])
    assert f"--config {tmp_path} does not exist" in refusal([*E3, "--config", tmp_path])
    assert "--config" in refusal([*E3, "--config"])
    (tmp_path / "latin.yaml").write_bytes(b"hf_model: \xe9t\xe9")
    assert "is not valid YAML" in refusal([*E3, "--config", tmp_path / "latin.yaml"])


@pytest.mark.parametrize("path", sorted([*ROOT.glob("examples/recipes/*.yaml"), *ROOT.glob("examples/demo/*.yaml")]))
def test_shipped_recipes(path):
    config = parse_config(["--config", str(path)])
    assert config.search_iters >= 1
    assert path.stem in (Path(config.run.save).name, "demo")


# Refusals

OTHER = ["--hf-model", "m", "--save", "s", "--train-data", "d"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (OTHER[2:] + ["--num-layers-to-prune", "4", "--train-iters", "9"], "--hf-model is required"),
        (E3 + ["--hf-model", ""], "--hf-model is required"),
        (E3 + ["--save", ""], "--save is required"),
        (OTHER + ["--num-layers-to-prune", "4"], "--train-iters is required"),
        (OTHER[:4] + ["--num-layers-to-prune", "4", "--train-iters", "9"], "--train-data is required"),
        (
            OTHER[:4] + ["--num-layers-to-prune", "4", "--train-iters", "0", "--method", "kl-init"],
            "--train-data is required",
        ),
        # what to prune
        (BASE, "exactly one of --num-layers-to-prune, --prune-ratio, --prune-layers"),
        (E3 + ["--prune-ratio", "0.5"], "not --num-layers-to-prune and --prune-ratio"),
        (E3 + ["--prune-layers", "3"], "not --num-layers-to-prune and --prune-layers"),
        (E3 + ["--num-layers-to-prune", "0"], "--num-layers-to-prune 0 is less than 1"),
        (E3 + ["--num-layers-to-prune", "-3"], "--num-layers-to-prune -3 is less than 1"),
        (BASE + ["--prune-ratio", "0"], "--prune-ratio 0.0 is not between"),
        (BASE + ["--prune-ratio", "1"], "--prune-ratio 1.0 is not between"),
        (BASE + ["--prune-ratio", "-0.5"], "--prune-ratio -0.5 is not between"),
        (BASE + ["--prune-ratio", "nan"], "--prune-ratio nan is not between"),
        (BASE + ["--prune-ratio", "inf"], "--prune-ratio inf is not between"),
        (BASE + ["--method", "manual", "--num-layers-to-prune", "4"], "--prune-layers and --method manual"),
        (BASE + ["--prune-layers", "3"], "--prune-layers and --method manual"),
        (BASE + ["--method", "manual", "--prune-layers", "3,x"], "--prune-layers '3,x' is not a list"),
        (BASE + ["--method", "manual", "--prune-layers", "3,,4"], "--prune-layers '3,,4' is not a list"),
        (BASE + ["--method", "manual", "--prune-layers", "3 4"], "--prune-layers '3 4' is not a list"),
        (BASE + ["--method", "manual", "--prune-layers", ""], "--prune-layers '' is not a list"),
        (
            BASE + ["--method", "clp", "--target-params", "9"],
            "--method clp finds a segment of a fixed number of layers",
        ),
        (E3 + ["--criterion", "taylor"], "--criterion is for --method shortened, not e3"),
        (E3 + ["--selection-budget", "100"], "--selection-budget is for --method auto or quadratic, not e3"),
        (E3 + ["--method", "clp", "--search-weights", "frozen"], "--search-weights is for methods that search"),
        (E3 + ["--stitch", "fold", "--lora-rank", "2"], "--method e3 trains the adapters while it searches: give"),
        (SHORTGPT + ["--stitch", "fold", "--calibration-samples", "1"], "--calibration-samples must be above 1"),
        (
            SHORTGPT + ["--stitch", "fold", "--lora-rank", "2", "--export-adapter"],
            "--export-adapter exports",
        ),
        (SHORTGPT + ["--stitch", "fold", "--lora-rank", "2", "--teacher", "self"], "use --teacher online"),
        (
            MANUAL + ["--train-iters", "0", "--stitch", "fold"],
            "fitted on calibration windows: it needs --train-data",
        ),
        (MANUAL + ["--train-data", "d", "--train-iters", "9", "--rounds", "2"], "--method manual names them all"),
        (SHORTGPT + ["--rounds", "2", "--lora-rank", "2", "--export-adapter"], "leave --export-adapter out"),
        (SHORTGPT + ["--rounds", "2", "--lora-rank", "2", "--teacher", "self"], "use --teacher online"),
        (SHORTGPT + ["--rounds", "9", "--lr-warmup-iters", "11"], "a round has 11 of --train-iters 100"),
        (E3 + ["--rounds", "3", "--search-iters", "2"], "--search-iters 2 can't be shared by the rounds"),
        (E3 + ["--teacher", "cached"], "--teacher cached and --teacher-logits go together"),
        (E3 + ["--distill-loss", "ce", "--kd-loss-alpha", "0.5"], "--kd-loss-alpha 0.5 mixes cross-entropy"),
        (E3 + ["--distill-loss", "ce", "--hidden-loss-weight", "1"], "there are none with --distill-loss ce"),
        (
            E3 + ["--teacher", "cached", "--teacher-logits", "t", "--hidden-loss-weight", "1"],
            "--hidden-loss-weight 1 needs a teacher's hidden states, and there are none with --teacher cached",
        ),
        (E3 + ["--hidden-loss-weight", "-1"], "--hidden-loss-weight -1.0 is less than 0"),
        (
            E3 + ["--mtp-loss-scaling-factor", "0.1", "--mtp", "drop"],
            "the MTP layers, which --mtp drop does not",
        ),
        (E3 + ["--mtp-loss-scaling-factor", "0.1", "--lora-rank", "4"], "which --lora-rank does not"),
        (E3 + ["--mtp-loss-scaling-factor", "-1"], "--mtp-loss-scaling-factor -1.0 is less than 0"),
        (E3 + ["--kd-loss-alpha", "1.5"], "--kd-loss-alpha 1.5 is above 1"),
        (E3 + ["--kd-loss-alpha", "-0.1"], "--kd-loss-alpha -0.1 is less than 0"),
        # iterations
        (E3 + ["--train-iters", "0"], "--train-iters must be above 0"),
        (E3 + ["--search-iters", "101"], "--search-iters 101 is not between 1 and --train-iters 100"),
        (E3 + ["--search-iters", "0"], "--search-iters 0 is not between"),
        (E3 + ["--search-iters", "-1"], "--search-iters -1 is not between"),
        (E3 + ["--method", "random", "--search-iters", "5"], "--search-iters is for methods that search"),
        (E3 + ["--lr-warmup-iters", "100"], "--lr-warmup-iters 100 is not less than --train-iters 100"),
        (E3 + ["--min-lr", "0.1"], "--min-lr 0.1 is above --lr 0.0001"),
        (E3 + ["--seed", "4294967296"], "--seed 4294967296 is above 4294967295"),
        # words that are no flags or no values
        (E3 + ["--num-layers", "4"], "unknown argument '--num-layers'"),
        (E3 + ["--seq-lenght=3"], "did you mean --seq-length?"),
        (E3 + ["junk"], "--help"),
        (E3 + ["--lr"], "--lr"),
        (E3 + ["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (E3 + ["--seq_length", "1.5"], "--seq-length: invalid int value: '1.5'"),
        (E3 + ["--teacher", "school"], "--teacher: invalid choice: 'school'"),
        (E3 + ["--bf16", "perhaps"], "--bf16"),
    ],
)
def test_refused(argv, said):
    assert said in refusal(argv)


@pytest.mark.parametrize(
    ("words", "stitches", "share"),
    [
        (SHORTGPT, True, 0.5),
        (E3, True, 0.5),
        ([*E3, "--search-preset", "paper"], False, 1.0),
        ([*E3, "--distill-loss", "ce"], True, 1.0),
        ([*SHORTGPT, "--stitch", "none", "--kd-loss-alpha", "0.2"], False, 0.2),
        # what excludes the maps turns the default off and refuses the flag
        ([*SHORTGPT, "--lora-rank", "2", "--teacher", "self"], False, 0.5),
        ([*E3, "--lora-rank", "2"], False, 0.5),
        ([*SHORTGPT, "--calibration-samples", "1"], False, 0.5),
        ([*SHORTGPT, "--train-iters", "0"], False, 0.5),
        ([*MANUAL, "--train-data", "d", "--train-iters", "9"], True, 0.5),
    ],
)
def test_defaults_of_recovery(words, stitches, share):
    config = parse_config(words)
    assert (config.stitches, config.kd_share) == (stitches, share)
