"""The verb `plan`: from a folder with nothing but config.json to tables, JSON and clear refusals."""

import json
import math

import pytest

from megaprune.cli.main import attempt
from megaprune.models.sizes import layer_costs
from tests.helpers.hf_tensors import expected_tensors
from tests.helpers.real_configs import DEEPSEEK_R1, LLAMA_2_7B, QWEN3_30B_A3B, QWEN3_32B

GIB = 2**30
R1_ON_64 = (
    *("--world-size", "64", "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8"),
    *("--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1", "--sequence-parallel", "--bf16"),
)
LORA = ("--lora-rank", "64", "--lora-alpha", "128", "--recompute-granularity", "full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    configs = {"r1": DEEPSEEK_R1, "qwen3-32b": QWEN3_32B, "qwen3-moe": QWEN3_30B_A3B, "llama": LLAMA_2_7B}
    for name, config in configs.items():
        made[name] = tmp_path_factory.mktemp(name)
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def plan(folders, tmp_path, capsys):
    """Return a function that runs the verb and gives its output and the JSON that it wrote."""

    def run(model, *flags):
        output = tmp_path / "plan.json"
        words = ["--hf-model", str(folders[model]), *flags, "--output", str(output)]
        assert attempt("plan", words) == (0, None)
        return capsys.readouterr().out, json.loads(output.read_text())

    return run


@pytest.fixture
def refusal(folders):
    """Return a function that runs the verb, which refuses, and gives its error line."""

    def run(model, *flags):
        status, line = attempt("plan", ["--hf-model", str(folders[model]), *flags])
        assert status == 2 and "\n" not in line
        return line

    return run


def stages_of(record, phase):
    return next(found for found in record["phases"] if found["name"] == phase)["stages"]


def test_r1_for_64_ranks(plan):
    text, record = plan("r1", *R1_ON_64, *LORA, "--teacher", "self", "--num-layers-to-prune", "8")
    assert "61 layers (3 dense, 58 MoE), 671,026,419,200 parameters, 37,552,297,472 of them active" in text
    assert "TP 8 with SP x PP 8 x DP 1; experts: EP 8 x ETP 1 x DP 1" in text
    search, recovery = stages_of(record, "search"), stages_of(record, "recovery")
    assert [stage["parameters"] for stage in search[:2]] == [7_535_525_888, 11_520_245_760]
    assert [stage["memory"]["teacher"] for stage in search] == [0] * 8
    # the student stays whole: it is its own teacher
    assert [stage["layers"] for stage in recovery] == [stage["layers"] for stage in search]
    assert [stage["memory"]["weights"] for stage in recovery] == [stage["memory"]["weights"] for stage in search]
    assert sum(len(stage["running_layers"]) for stage in recovery) == 53
    assert "assumed: the layers with the fewest parameters are removed" in text
    assert (search[0]["first_rank"], search[-1]["last_rank"]) == (0, 63)


def test_window_fits_the_model_by_default(plan, refusal, folders, tmp_path):
    config = json.loads((folders["llama"] / "config.json").read_text())
    folders["short"] = tmp_path
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    flags = ("--world-size", "1", "--num-layers-to-prune", "2", "--train-iters", "10")
    assert " 2,048; micro-batches" in plan("short", *flags)[0]
    assert "--seq-length 4096 is more than the model's 2048" in refusal("short", *flags, "--seq-length", "4096")
    assert " 4,096; micro-batches" in plan("qwen3-32b", *flags)[0]


def test_full_training_of_r1_does_not_fit(plan):
    text, record = plan("r1", *R1_ON_64, "--prune-layers", "1,30", "--method", "manual", "--device-memory-gib", "80")
    assert record["fits"] is False
    assert "does not fit in 80 GiB: recovery, stages 0-7; the fullest needs" in text
    assert text.count("DOES NOT FIT") == 8
    stage = stages_of(record, "recovery")[3]
    memory, trained = stage["memory"], stage["trained_parameters"]
    assert trained == stage["parameters"]
    assert (memory["gradients"], memory["optimizer"]) == (4 * trained, 12 * trained)
    assert memory["total"] == sum(memory.values()) - memory["total"]
    recovery = record["phases"][1]
    assert recovery["kept_layers"] == [layer for layer in range(61) if layer not in (1, 30)]
    assert recovery["assumed"] is None and "assumed" not in text
    tensors = expected_tensors(DEEPSEEK_R1, mtp=False).items()
    gone = [shape for name, shape in tensors if name.startswith(("model.layers.1.", "model.layers.30."))]
    assert recovery["parameters"] == 671_026_419_200 - sum(map(math.prod, gone))


def test_more_memory_fits(plan):
    text, record = plan("llama", "--world-size", "1", "--prune-ratio", "0.5", "--device-memory-gib", "500")
    assert record["fits"] is True
    assert "fits        every rank, in 500 GiB" in text and "DOES NOT FIT" not in text


def test_the_distributed_optimizer_shares_out_its_state(plan):
    flags = ("--world-size", "8", "--expert-model-parallel-size", "4", "--bf16", "--distill-loss", "ce")
    _, whole = plan("qwen3-moe", *flags)
    _, shared = plan("qwen3-moe", *flags, "--use-distributed-optimizer")
    (stage,), (sharded) = stages_of(whole, "training"), stages_of(shared, "training")[0]
    experts = 48 * 128 // 4 * 3 * 2048 * 768
    dense = stage["trained_parameters"] - experts
    assert stage["memory"]["optimizer"] == 12 * (dense + experts)
    # 8 replicas of what is dense, 2 of each expert
    assert sharded["memory"]["optimizer"] == pytest.approx(12 * (dense / 8 + experts / 2))
    assert sharded["memory"]["gradients"] == stage["memory"]["gradients"]


def test_a_teacher_beside_the_student_is_the_original(plan):
    _, record = plan("qwen3-32b", "--world-size", "8", "--tensor-model-parallel-size", "8", "--prune-ratio", "0.25")
    (search,), (recovery,) = stages_of(record, "search"), stages_of(record, "recovery")
    for stage in (search, recovery):
        assert stage["memory"]["teacher"] == search["memory"]["weights"]
    assert recovery["memory"]["weights"] < 0.8 * search["memory"]["weights"]


def test_a_loss_on_hidden_states_keeps_those_of_the_teacher(plan):
    flags = ("--world-size", "16", "--tensor-model-parallel-size", "8", "--sequence-parallel", "--prune-ratio", "0.25")
    flags = ("qwen3-32b", *flags, "--global-batch-size", "6", "--seq-length", "4096", "--bf16")
    (without,), (stage,) = (
        stages_of(plan(*flags, *extra)[1], "recovery") for extra in ((), ("--hidden-loss-weight", "1"))
    )
    # of 48 kept layers and 3 micro-batches, each rank with an eighth of the tokens
    states = 48 * 3 * 4096 * 5120 * 2 // 8
    assert stage["memory"]["activations"] - without["memory"]["activations"] == states


def test_iterations_and_tokens(plan):
    flags = ("--world-size", "16", "--pipeline-model-parallel-size", "4", "--global-batch-size", "32")
    text, record = plan("llama", *flags, "--train-iters", "500", "--num-layers-to-prune", "8", "--seq-length", "2048")
    assert (record["micro_batches"], record["tokens_per_iteration"]) == (8, 32 * 2048)
    assert (record["train_iters"], record["search_iters"], record["tokens"]) == (500, 50, 500 * 32 * 2048)
    assert record["pipeline_bubble"] == pytest.approx(3 / 11)
    assert "500 iterations (50 of them search), 32,768,000 tokens" in text


def test_balance_before_and_after(plan):
    layout = "Et*26|t*2|t*2|t*2L"
    flags = ("--world-size", "4", "--pipeline-model-parallel-size", "4", "--num-layers-to-prune", "8")
    text, record = plan("llama", *flags, "--pipeline-model-parallel-layout", layout)
    before, after = record["phases"]
    costs = [stage["cost"] for stage in before["stages"]]
    a_layer, output = layer_costs(LLAMA_2_7B)[0], 32000 * 4096
    assert costs == [26 * a_layer, 2 * a_layer, 2 * a_layer, 2 * a_layer + output]
    assert before["imbalance"] == pytest.approx(max(costs) * 4 / sum(costs)) and before["imbalance"] > 3
    assert after["imbalance"] < 1.1
    assert f"mean: {before['imbalance']:.3f} before pruning, {after['imbalance']:.3f} after" in text


def test_one_shot_methods_train_the_pruned_model_alone(plan):
    _, record = plan("llama", "--world-size", "2", "--method", "random", "--num-layers-to-prune", "8")
    (original,) = stages_of(record, "original")
    assert original["trained_parameters"] == original["memory"]["gradients"] == original["memory"]["optimizer"] == 0
    assert stages_of(record, "recovery")[0]["memory"]["optimizer"] > 0


def moment(record, name):
    return next((found["stages"] for found in record["moments"] if found["name"] == name), None)


def test_margin_is_part_of_the_total(plan):
    text, record = plan("llama", "--world-size", "8", "--tensor-model-parallel-size", "2", "--prune-ratio", "0.25")
    memory = stages_of(record, "recovery")[0]["memory"]
    tensors = memory["total"] - memory["margin"]
    # the cluster, TP and DP
    assert memory["margin"] == round(0.75 * GIB) + 3 * GIB // 4 + round(0.04 * tensors)
    assert "0.25 GiB for each of 3 communicators" in text


def test_pruned_student_is_built_without_the_searched_one(plan):
    text, record = plan("llama", "--world-size", "2", "--prune-ratio", "0.25", "--bf16")
    (recovery,), (transition,), (saving,) = (
        stages_of(record, "recovery"),
        moment(record, "transition"),
        moment(record, "saving"),
    )
    for part in ("weights", "gradients", "optimizer", "teacher"):
        assert transition[part] == saving[part] == recovery["memory"][part] > 0
    assert transition["activations"] == 0 and "pruned student is built" in text
    # a student that keeps its pruned layers is not built again
    lora = ("--lora-rank", "8", "--teacher", "self")
    _, record = plan("llama", "--world-size", "2", "--prune-ratio", "0.25", *lora)
    assert moment(record, "transition") is None and moment(record, "saving") is not None


def test_importance_passes(plan):
    flags = ("llama", "--world-size", "1", "--num-layers-to-prune", "4", "--seq-length", "512", "--method")
    found = {}
    for method in (("e3",), ("clp",), ("shortened",), ("shortened", "--criterion", "taylor"), ("random",)):
        _, record = plan(*flags, *method)
        found[method] = moment(record, "importance")
    assert found[("random",)] is None
    forward, taylor = found[("shortened",)][0], found[("shortened", "--criterion", "taylor")][0]
    assert forward == found[("e3",)][0]
    assert forward["gradients"] == 0 and forward["working"] >= 5 * 512 * 32000 * 4
    assert taylor["gradients"] == 4 * 6_738_415_616
    # the original's logits of 4 windows
    clp = found[("clp",)][0]
    assert clp["gradients"] == 0 and clp["activations"] - taylor["activations"] == 4 * 512 * 32000 * 4


def test_moments_that_do_not_fit_are_named(plan):
    flags = ("--world-size", "1", "--num-layers-to-prune", "16", "--method", "shortened", "--criterion", "taylor")
    text, record = plan("llama", *flags, "--lora-rank", "8", "--device-memory-gib", "100")
    assert record["fits"] is False and "DOES NOT FIT" not in text
    assert "does not fit in 100 GiB: importance, which needs" in text


def test_mtp_layers_are_counted_if_they_train(plan, refusal):
    flags = (*R1_ON_64, "--num-layers-to-prune", "8")
    factor = ("--mtp-loss-scaling-factor", "0.3")
    without, with_mtp = (stages_of(plan("r1", *flags, *extra)[1], "recovery") for extra in ((), factor))
    assert [stage["parameters"] for stage in with_mtp[:-1]] == [stage["parameters"] for stage in without[:-1]]
    # a layer of 32 experts, and the copy of the embedding that the last stage needs
    assert with_mtp[-1]["parameters"] - without[-1]["parameters"] > 32 * 3 * 7168 * 2048 + 7168 * 129280 // 8
    assert with_mtp[-1]["memory"]["activations"] > without[-1]["memory"]["activations"]
    assert with_mtp[-1]["memory"]["teacher"] == without[-1]["memory"]["teacher"]
    assert "no multi-token-prediction layers" in refusal("llama", "--world-size", "1", "--prune-ratio", "0.5", *factor)


def test_disk_of_checkpoints(plan):
    flags = ("llama", "--world-size", "8", "--tensor-model-parallel-size", "2", "--num-layers-to-prune", "8", "--bf16")
    _, record = plan(*flags, "--use-distributed-optimizer")
    trained = record["phases"][1]["parameters"]
    assert record["disk"] == {"checkpoint": pytest.approx(14 * trained, rel=1e-3), "at_once": 2}
    healed = ("--method", "auto", "--train-iters", "100", "--heal-candidates", "3", "--average-weights", "0.5")
    text, record = plan(*flags, *healed)
    assert record["disk"] == {"checkpoint": pytest.approx(18 * trained, rel=1e-3), "at_once": 4}
    assert "up to 4 at once" in text
    memory = stages_of(record, "recovery")[0]["memory"]
    assert memory["optimizer"] == 4 * memory["gradients"]  # 12 bytes of optimizer state, 4 of the average


def test_of_several_rounds_the_first_is_planned(plan):
    flags = ("--world-size", "2", "--method", "random", "--num-layers-to-prune")
    _, first = plan("llama", *flags, "8", "--rounds", "2")
    _, alone = plan("llama", *flags, "4")
    assert stages_of(first, "recovery") == stages_of(alone, "recovery")


def test_a_recipe_can_be_planned(plan, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num-layers-to-prune: 4\ntrain-iters: 100\nsave: runs/x\ntrain-data: [a.jsonl]\n")
    _, record = plan("llama", "--config", str(recipe), "--world-size", "2")
    assert (len(record["phases"][1]["kept_layers"]), record["tokens"]) == (28, 100 * 2 * 4096)


@pytest.mark.parametrize(
    "model, flags, words",
    [
        ("r1", (), "--world-size"),
        ("r1", ("--world-size", "0"), "--world-size 0 is less than 1"),
        ("llama", ("--world-size", "6", "--tensor-model-parallel-size", "4"), "must be a multiple of 4"),
        ("qwen3-moe", ("--world-size", "8", "--expert-model-parallel-size", "3"), "3 does not divide the model's 128"),
        ("qwen3-moe", ("--world-size", "4", "--expert-model-parallel-size", "8"), "does not divide the 4 processes"),
        (
            "r1",
            ("--world-size", "128", "--tensor-model-parallel-size", "128", "--sequence-parallel"),
            "--tensor-model-parallel-size 128 does not divide the model's 576 key-value latents",
        ),
        ("llama", ("--world-size", "64", "--pipeline-model-parallel-size", "64"), "only 32 layers are left"),
        ("llama", ("--world-size", "2", "--num-layers-to-prune", "32"), "--num-layers-to-prune"),
        ("llama", ("--world-size", "2", "--teacher", "self"), "--teacher self needs --lora-rank"),
        ("llama", ("--world-size", "2", "--global-batch-size", "3"), "--global-batch-size 3 is not a multiple"),
        ("llama", ("--world-size", "2", "--device-memory-gib", "0"), "--device-memory-gib 0.0"),
        ("llama", ("--world-size", "2", "--lora-rank", "8", "--lora-target-modules", "fc9"), "fc9"),
        ("llama", ("--world-size", "2", "--world-sizes", "2"), "did you mean --world-size?"),
    ],
)
def test_refusals(refusal, model, flags, words):
    assert words in refusal(model, *flags)


def test_a_folder_without_config(tmp_path):
    status, line = attempt("plan", ["--hf-model", str(tmp_path), "--world-size", "1"])
    assert status == 1 and "holds no config.json" in line
