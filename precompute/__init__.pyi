from .config import PrecomputeConfig as PrecomputeConfig
from .errors import PrecomputeError as PrecomputeError
from .errors import PrecomputeInterrupted as PrecomputeInterrupted
from .preview import dry_run as dry_run
from .progress import Observer as Observer
from .progress import Snapshot as Snapshot
from .run import precompute as precompute
