from .compare import verify as verify
from .config import VerifyConfig as VerifyConfig
from .errors import VerifyError as VerifyError
from .table import table_lines as table_lines
