"""A real checkpoint without its bytes: it answers the requests of an import and records the reads."""

from collections import defaultdict

import torch

from megaprune.models import family_of
from megaprune.weights.source import HFSource
from tests.helpers.hf_tensors import expected_tensors


class PaperSource(HFSource):
    """Folder of a config. ``reads`` lists, for each tensor, the slices (dim, start, stop) that were read."""

    def __init__(self, config):
        self.folder = "paper"
        self.config, self.family = config, family_of(config)
        self.shapes = expected_tensors(config)
        self._files = dict.fromkeys(self.shapes)
        self.reads = defaultdict(list)

    def _described(self, name):
        return "BF16", tuple(self.shapes[name])

    def read(self, name, dim=0, start=0, stop=None):
        shape = list(self.shapes[name])
        stop = shape[dim] if stop is None else stop
        self.reads[name].append((dim, start, stop))
        shape[dim] = stop - start
        return torch.empty(shape, device="meta")

    def assert_read_once(self, names):
        """Assert that every element of these tensors was read once, and nothing else."""
        assert self.reads.keys() == set(names)
        for name in names:
            dims, cuts = {dim for dim, _, _ in self.reads[name]}, sorted(cut[1:] for cut in self.reads[name])
            assert len(dims) == 1, name
            ends = [0, *(stop for _, stop in cuts)]
            assert [start for start, _ in cuts] == ends[:-1], f"{name} was read as {cuts}"
            assert ends[-1] == self.shapes[name][dims.pop()], f"{name} was read as {cuts}"
