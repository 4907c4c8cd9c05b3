"""Where conversations come from, to train on and to be examined with: one file per task."""
