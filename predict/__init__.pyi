from .config import SegmentConfig as SegmentConfig
from .errors import PredictError as PredictError
from .exporter import ExportConfig as ExportConfig
from .exporter import export as export
from .models import Model as Model
from .models import load_model as load_model
from .models import load_teacher_model as load_teacher_model
from .segment import segment as segment
