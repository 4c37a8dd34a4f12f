"""Which variant serves a problem on the GPU at hand."""
