"""What the sources say of the kernels, for the scripts beside this file."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"


def launch_bounds():
    """Threads a block and blocks a multiprocessor, by the start of a kernel's name."""
    text = "".join(path.read_text() for path in KERNELS.glob("*.cu"))
    found = re.findall(r"ATKD_KERNEL\((\w+?)_?(?:##[\w#]+)?, \w+, (\d+), (\d+)\)", text)
    return {name: (int(threads), int(blocks)) for name, threads, blocks in found}


def planned_shared():
    """Bytes that src/plan.rs gives the threads of row_pipelined beside the row, and those that the device takes."""
    text = (ROOT / "src/plan.rs").read_text()
    found = re.search(r"const PIPELINED_SHARED_BYTES: usize = (\d+) \+ (\d+);", text)
    return int(found[1]), int(found[2])
