"""Labels of images: object masks from SA-1B's JSON, COCO files and PNGs."""
