"""Facts that the sources have of the kernels, for the scripts beside this file."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"


def tool(name):
    """The path of one of NVIDIA's tools that read machine code, installed below target/."""
    found = lambda: next((ROOT / "target/nvdisasm").glob(f"lib/**/cu13/bin/{name}"), None)
    if not found():
        subprocess.run([sys.executable, "-m", "venv", ROOT / "target/nvdisasm"], check=True)
        subprocess.run([ROOT / "target/nvdisasm/bin/pip", "install", "--quiet", "--disable-pip-version-check",
                        "nvidia-cuda-nvdisasm>=13.2", "nvidia-cuda-cuobjdump>=13.2"], check=True, stdout=sys.stderr)
    return found()


def all_kernels(folder):
    """Writes one source of all kernels into a folder, as build.rs does. Returns its path."""
    path = pathlib.Path(folder) / "atkd.cu"
    path.write_text("".join(f'#include "{one.name}"\n' for one in sorted(KERNELS.glob("*.cu"))))
    return path


def geometry():
    """The numbers that kernels/params.h defines, by name."""
    found = {}
    for name, value in re.findall(r"#define (ATKD_\w+) ([^/\n]+)", (KERNELS / "params.h").read_text()):
        # A sum of numbers and of names before it.
        found[name] = sum(found[part] if part in found else int(part.rstrip("u"), 0)
                          for part in value.strip().strip("()").split(" + "))
    return found


def launch_bounds():
    """Threads per block and blocks per multiprocessor, by the start of a kernel's name."""
    numbers = geometry()
    text = "".join(path.read_text() for path in KERNELS.glob("*.cu"))
    found = re.findall(r"ATKD_KERNEL\((\w+?)_?(?:##[\w#]+)?, \w+, (\w+)\)", text)
    return {name: (numbers[f"{stem}_THREADS"], numbers[f"{stem}_BLOCKS"]) for name, stem in found}


def planned_shared(name):
    """Bytes of static shared memory that plans allow a block of this row_pipelined."""
    return geometry()["ATKD_PIPELINED_AT_1_STATIC_BYTES" if "_at_1_" in name else "ATKD_PIPELINED_STATIC_BYTES"]
