"""Conversion to OUT, and others that kill themselves to OUT-SHARE when this share of their steps is done:
`kill_worker.py VERB IN OUT SHARE...`.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from megaprune.cli import main as cli
from megaprune.weights import writer
from megaprune.weights.torch_dist import chunks, engine, export_hf, import_hf

FLAGS = {"import": ("--hf-model", "--megatron-path"), "export": ("--megatron-path", "--hf-path")}


def convert(verb: str, given: str, out: str, extra: tuple[str, ...] = ()) -> tuple[int, str | None]:
    """Run a conversion in parts small enough that there are several."""
    import_hf.PART_BYTES = 30_000
    size = ("--max-shard-size", "30KB") if verb == "export" else ()
    return cli.attempt("convert", [verb, FLAGS[verb][0], given, FLAGS[verb][1], out, "--workers", "1", *size, *extra])


def count_steps(die_at: int | None = None) -> list[int]:
    """Count the steps of a conversion: each written tensor and each renamed file. Kill this process at one of them."""
    done = [0]

    def counted(function):
        def wrapped(*args, **kwargs):
            done[0] += 1
            if done[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    writer.copy_range = chunks.copy_range = counted(writer.copy_range)
    import_hf.append_tensor = counted(import_hf.append_tensor)
    export_hf.CheckpointSource.read_from = counted(export_hf.CheckpointSource.read_from)
    Path.rename = counted(Path.rename)
    engine.put_in_place = counted(engine.put_in_place)
    Path.unlink = counted(Path.unlink)
    return done


def in_a_process(work) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def whole(verb: str, given: str, out: str) -> None:
    """Write the number of steps beside the result."""
    steps = count_steps()
    assert convert(verb, given, out) == (0, None)
    Path(out + ".steps").write_text(str(steps[0]))


def killed(verb: str, given: str, out: str, step: int) -> None:
    count_steps(die_at=step)
    convert(verb, given, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, given, out, *shares = sys.argv[1:]
    in_a_process(lambda: whole(verb, given, out))
    total = int(Path(out + ".steps").read_text())
    for share in shares:
        step = round(1 + float(share) * (total - 1))
        status = in_a_process(lambda share=share, step=step: killed(verb, given, f"{out}-{share}", step))
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the process was to die at step {step} of {total}")
