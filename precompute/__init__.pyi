from .config import PrecomputeConfig as PrecomputeConfig
from .config import PrecomputeError as PrecomputeError
from .config import PrecomputeInterrupted as PrecomputeInterrupted
from .dry_run import dry_run as dry_run
from .progress import Observer as Observer
from .progress import Snapshot as Snapshot
from .run import precompute as precompute
