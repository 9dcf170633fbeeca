"""Memory that tensors leave is used again, in any thread that begins after it was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, threading
import torch
from mobilesam.sam.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    # Where the heap begins decides how well the blocks fit into it: it has its final size after two rounds at most.
    for _ in range(6):
        before = faults()
        for _ in range(5):
            # As many as live together in a block of a ViT-B; together more than one of a thread's pieces.
            held = [torch.zeros(mebibytes << 18) for mebibytes in (12, 38, 50, 66)]
            del held
    print(faults() - before)

assert keep_freed_memory()
torch.set_num_threads(1)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can be told")
def test_a_later_thread_has_no_page_faults_once_it_has_its_memory() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    pages = 5 * (12 + 38 + 50 + 66) * 256
    assert int(done.stdout) < pages / 20
