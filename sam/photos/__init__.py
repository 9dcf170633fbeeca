"""Photos as people bring them: listed, read, decoded and preprocessed as SAM's predictor does."""
