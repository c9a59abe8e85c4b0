"""Registry of methods: traits, refusals, and everything that follows from them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaprune.selection import Budget, Choice, find, methods, names, register
from megaprune.selection.plugins import load_modules
from megaprune.selection.registry import registrations_undone
from megaprune.selection.selector import Selector
from megaprune.utils.errors import MegapruneError, UsageError

ROOT = Path(__file__).parents[2]
PROTECTED = frozenset({0, 6})
THREE = Budget.of_layers(7, 4)
USUAL = {
    "seed": 1,
    "search_preset": "measured",
    "lr": 1e-4,
    "mask_lr": 0.02,
    "mask_ramp": 0.05,
    "mask_init_scale": 1.0,
    "gumbel_temperature": 1.0,
    "gumbel_anneal": 0.9,
    "search_iters": 9,
    "criterion": "perplexity",
    "selection_budget": 1000,
    "prune_layers": [3, 4],
}


@pytest.fixture
def registered():
    """Remove the methods that a test registers."""
    with registrations_undone():
        yield


def test_built_in_methods_and_their_traits():
    one_shot = {"kl-init", "shortgpt", "shortened", "random", "manual"}
    assert {method.name for method in methods()} == one_shot | {
        *("e3", "auto", "clp", "sheared", "sleb", "exhaustive", "evolution", "quadratic")
    }
    traits = {
        "searches": {"e3", "sheared"},
        "needs_scores": {"e3"},
        "calibrated": {
            *("auto", "clp", "evolution", "exhaustive", "kl-init", "quadratic", "shortened", "shortgpt", "sleb"),
        },
        "contiguous": {"clp", "exhaustive"},
        "needs_held_out": {"auto", "quadratic"},
        "names_layers": {"manual"},
    }
    for trait, having in traits.items():
        assert {method.name for method in methods() if getattr(method, trait)} == having, trait
    takers = {flag: {method.name for method in methods() if flag in method.flags} for flag in USUAL}
    assert takers["criterion"] == {"shortened"} and takers["selection_budget"] == {"auto", "quadratic"}
    assert takers["search_iters"] == {"e3", "sheared", "clp"} and takers["mask_lr"] == {"e3"}
    assert {method.name for method in methods() if "parameters" not in method.budgets} == {"clp", "manual"}
    assert all(method.description for method in methods())
    assert all(method.options(USUAL) is not None for method in methods())


def test_an_alias_is_another_name():
    assert find("minitron") is find("shortgpt")
    assert {"minitron", "shortgpt"} <= set(names())
    with pytest.raises(UsageError, match="--method: invalid choice: 'best' .choose from auto, clp, e3"):
        find("best")


@pytest.mark.parametrize("method", ["e3", "sheared"])
def test_searches_give_selectors(method):
    chosen = find(method)
    selector: Selector = chosen.selector(THREE, PROTECTED, 5, chosen.options(USUAL), torch.linspace(-1, 1, 7))
    for step in range(5):
        selector.update(torch.linspace(0, 1, 7) * selector.mask(step), step)
    assert len(selector.kept_layers()) == 4 and set(selector.kept_layers()) >= PROTECTED


def test_methods_are_listed_without_torch():
    """`--help`, and a wrong flag, must not wait for it."""
    code = (
        "import sys, megaprune.selection; from megaprune.selection import names, register\n"
        "assert 'e3' in names(); register('mine')(lambda budget, protected: [0])\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_method_is_compared_by_name_outside_of_its_file():
    quoted = '"(' + "|".join(map(re.escape, names())) + ')"'
    compared = re.compile(rf"method.*(==|!=|\bin\b).*{quoted}")
    assert compared.search('if own["method"] == "clp":') and compared.search('prune.method in ("e3", "sheared")')
    for path in ROOT.glob("megaprune/**/*.py"):
        for line in path.read_text().splitlines():
            assert not compared.search(line), f"{path.name}: {line.strip()}"


def test_the_table_in_the_docs_is_that_of_the_registry():
    table = (ROOT / "docs/methods.md").read_text().partition("| --- |")[2].partition("\n\n")[0]
    rows = {re.match(r"\| ((?:`[\w-]+`(?:, )?)+) \|", line) for line in table.splitlines()[1:]}
    documented = {tuple(re.findall("`([^`]+)`", row[1])) for row in rows}
    assert documented == {(method.name, *method.aliases) for method in methods()}
    for method in methods():
        row = next(line for line in table.splitlines()[1:] if line.startswith(f"| `{method.name}`"))
        marks = [word.strip() for word in row.split("|")[2:5]]
        looks = "while training" if method.searches else "calibration" if method.calibrated else "no data"
        budgets = "list" if method.names_layers else "layers" if "parameters" not in method.budgets else "both"
        assert marks == [looks, "yes" if method.contiguous else "", budgets], method.name


# Methods of the user's own


def test_a_method_of_the_users_own(registered):
    @register("mine", calibrated=True)
    def mine(evaluator, budget, protected, *, seed, strength=2):
        """Keep the layers that are mine."""
        return torch.tensor([6, 0, seed, seed + strength])

    method = find("mine")
    assert method.description == "Keep the layers that are mine." and method.flags == {"seed", "strength"}
    assert method.choose(THREE, PROTECTED, method.options(USUAL), evaluator=None) == Choice([0, 1, 3, 6])

    # as a notebook's cell is run again
    @register("mine", aliases=["ours"])
    def mine(budget, protected):  # noqa: F811
        return Choice([0, 1, 2, 6], torch.linspace(0, 1, 7))

    assert find("ours").choose(THREE, PROTECTED, {}).scores == pytest.approx([i / 6 for i in range(7)])


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([0, 1, 6], "have 3 layers where the budget is 4"),
        ([0, 1, 2, 3, 6], "have 5 layers where the budget is 4"),
        ([0, 1, 2, 2], "are not those of a model of 7, each once"),
        ([0, 1, 6, 7], "are not those of a model of 7, each once"),
        ([0, 1, 6, -2], "are not those of a model of 7, each once"),
        ([0, 1, 2, 3], "lack layer 6, which --protect-layers keeps"),
        ([0, 2, 4, 6], "leave more than one cut"),
        (None, "must return the kept layers as numbers"),
        (["a"], "must return the kept layers as numbers"),
    ],
)
def test_wrong_answers_are_refused(registered, kept, said):
    register("wrong", contiguous=True)(lambda budget, protected: kept)
    with pytest.raises(MegapruneError, match=f"--method wrong .*{said}"):
        find("wrong").choose(THREE, PROTECTED, {})


def test_an_answer_beyond_a_budget_of_parameters_is_refused(registered):
    register("wrong")(lambda budget, protected: [0, 1, 6])
    with pytest.raises(MegapruneError, match="have 30 parameters where the budget is 29"):
        find("wrong").choose(Budget((10,) * 7, 29), PROTECTED, {})
    assert find("wrong").choose(Budget((10,) * 7, 31), PROTECTED, {}).kept_layers == [0, 1, 6]


@pytest.mark.parametrize(
    ("traits", "function", "said"),
    [
        ({"name": "e3"}, lambda budget, protected: [], "'e3' is registered already, by megaprune.selection.methods.e3"),
        ({"name": "minitron"}, lambda budget, protected: [], "'minitron' is registered already"),
        ({"name": "a", "aliases": ["sleb"]}, lambda budget, protected: [], "'sleb' is registered already"),
        ({"name": "a/b"}, lambda budget, protected: [], "cannot be named 'a/b'"),
        ({"name": "a", "calibrated": True, "searches": True}, lambda *_: [], "both calibrated"),
        ({"name": "a", "budgets": []}, lambda budget, protected: [], "must have budgets of layers, parameters or both"),
        ({"name": "a", "calibrated": True}, lambda budget, protected: [], "must take .evaluator, budget, protected"),
        ({"name": "a", "searches": True}, lambda budget, protected: [], "must take .budget, protected, num_steps"),
        ({"name": "a"}, lambda budget, protected, seed: [], "flags as keyword-only"),
    ],
)
def test_wrong_registrations_are_refused(registered, traits, function, said):
    with pytest.raises(MegapruneError, match=said):
        register(**traits)(function)


def test_what_is_no_flag_is_refused(registered):
    register("mine")(lambda budget, protected, *, strength: [])
    with pytest.raises(MegapruneError, match="--method mine: its function takes 'strength' as a keyword"):
        find("mine").options(USUAL)


# Modules


def test_modules_that_cannot_be_loaded_are_named(tmp_path, registered):
    (tmp_path / "broken.py").write_text("import torch\nraise ValueError('no\\nway')")
    (tmp_path / "taken.py").write_text(
        "from megaprune.selection import register\n@register('e3')\ndef mine(budget, protected): ...\n"
    )
    for name, said in [
        ("none.py", "there is no such file"),
        ("broken.py", "can't be imported: ValueError: no way"),
        ("taken.py", "the method 'e3' is registered already"),
    ]:
        for _ in range(2):
            with pytest.raises(UsageError, match=f"--method-module {tmp_path / name}:? {said}"):
                load_modules([str(tmp_path / name)])
    with pytest.raises(UsageError, match="--method-module no.such.module can't be imported: ModuleNotFoundError"):
        load_modules(["no.such.module"])
    assert find("e3").function.__module__ == "megaprune.selection.methods.e3"


def test_installed_packages_may_bring_methods(tmp_path):
    """Methods come through the entry points `megaprune.methods`."""
    (tmp_path / "brought.py").write_text(
        "from megaprune.selection import register\n@register('brought')\ndef brought(budget, protected): return [0]\n"
    )
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megaprune.methods]\nbrought = brought\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom megaprune.selection import names; print(names())"
    listed = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "'brought'" in listed.stdout
    (tmp_path / "brought.py").write_text("raise OSError('gone')")
    refused = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "the plugin brought of brought can't be loaded: OSError: gone" in refused.stderr
