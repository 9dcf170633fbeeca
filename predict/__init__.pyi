from .config import SegmentConfig as SegmentConfig
from .errors import PredictError as PredictError
from .exporter import ExportConfig as ExportConfig
from .exporter import export as export
from .model import Model as Model
from .model import load_model as load_model
from .model import load_teacher_model as load_teacher_model
from .segment import segment as segment
