from .compare import verify as verify
from .config import VerifyConfig as VerifyConfig
from .errors import VerifyError as VerifyError
from .evaluate import evaluate_masks as evaluate_masks
from .evaluation_config import EvaluateConfig as EvaluateConfig
from .evaluation_table import evaluation_lines as evaluation_lines
from .table import table_lines as table_lines
