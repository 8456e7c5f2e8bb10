"""Files of what a base model predicts, so that many models are held against one run of it."""
