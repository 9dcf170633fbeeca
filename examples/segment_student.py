"""Segment a photo by one point with a student, in segment_anything's predictor.

python examples/segment_student.py RUN_OR_EXPORT photo.jpg X Y mask.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mobilesam.predict import StudentPredictor, load_model
from mobilesam.sam import decode_image

student, photo, x, y, mask_file = sys.argv[1:]
predictor = StudentPredictor(load_model(student).sam)
predictor.set_image(decode_image(Path(photo).read_bytes()))
masks, iou, _ = predictor.predict(np.array([[float(x), float(y)]]), np.array([1]))
Image.fromarray(masks[iou.argmax()]).save(mask_file)
print(f"predicted IoU {iou.max():.3f}: {mask_file}")
