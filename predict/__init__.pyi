from .config import ExportConfig as ExportConfig
from .config import PredictError as PredictError
from .config import SegmentConfig as SegmentConfig
from .export.run import export as export
from .model import Model as Model
from .model import load_model as load_model
from .model import load_teacher_model as load_teacher_model
from .run import segment as segment
