"""Comparison of two HF folders tensor by tensor, in constant memory."""

from tqdm import tqdm

from megaprune.utils.progress import bars_are_shown
from megaprune.weights.byte_ranges import first_difference
from megaprune.weights.reader import TensorFiles
from megaprune.weights.source import HFSource
from megaprune.weights.stored_layout import Place


def verify(first: HFSource, second: HFSource) -> tuple[int, list[str]]:
    """Return the number of tensors that are equal bit for bit in both folders, and a line for each difference."""
    names = (first.stored_files, second.stored_files)
    differences = [f"{name} is in {first.folder} only" for name in names[0] if name not in names[1]]
    differences += [f"{name} is in {second.folder} only" for name in names[1] if name not in names[0]]
    files = TensorFiles()
    common = [name for name in names[0] if name in names[1]]
    equal = 0
    for name in tqdm(common, unit=" tensors", dynamic_ncols=True, disable=not bars_are_shown()):
        places = [(source.stored_files[name], name) for source in (first, second)]
        described = [files.describe(*place) for place in places]
        if described[0] != described[1]:
            shown = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in described)
            differences.append(f"{name} is stored as {shown}")
            continue
        at = first_difference(*(files.where(path, Place(stored)) for path, stored in places))
        if at is None:
            equal += 1
        else:
            differences.append(f"{name} differs, first in byte {at:,} of its data")
    files.close()
    return equal, differences
