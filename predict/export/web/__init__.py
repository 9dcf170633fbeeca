"""Web demo: a static folder with a page, the networks and onnxruntime-web, and a server for it.

`page/` holds the page's own files, which the export copies as they are: `app.mjs` is its beginning, `worker.mjs` does
the computing, `preprocess.mjs` and `masks.mjs` are the arithmetic of `sam/photos/preprocess.py` and of
`Sam.postprocess_masks`.
"""
