"""The configuration of `push`."""

from dataclasses import dataclass

from megaprune.config.fields import flag, required


@dataclass
class PushConfig:
    """The flags of `push`: the model, its place on the hub, and what its card says."""

    hf_model: str = required("folder of the model with its card: the hf/ folder of a run")
    repo_id: str = required("repository on the hub: owner/name; it is made if it does not exist")
    private: bool = flag("make the repository private, if it does not exist", False)
    revision: str | None = flag("branch to push to; it is made if it does not exist (default: main)")
    create_pr: bool = flag("open a pull request instead of pushing to the branch", False)
    commit_message: str | None = flag("message of the commit (default: names the number of layers)")
    license: str | None = flag("license of the model, as the hub spells it (default: as in the card)")
    base_model: str | None = flag("source model's hub id for the card, where the source was a folder")
    evaluation: str | None = flag("file of `megaprune evaluate --output`: its task scores go into the card")
    source_evaluation: str | None = flag("the same of the source model, for a table of both")
    dry_run: bool = flag("check everything and show the files and the card; nothing is sent", False)
