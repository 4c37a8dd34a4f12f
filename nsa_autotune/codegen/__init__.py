"""Templates to source to loaded kernels; knows no family."""
