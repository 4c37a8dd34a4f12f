"""A package of its own from the winners of one GPU: generated kernels, dispatch table, module and operators."""
