"""Load on real endpoints: the bare model and the guarded one in every mode, side by side in one run."""
