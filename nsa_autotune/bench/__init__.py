"""Facts about variants: inputs, the accuracy gate, timing, and the process that survives what they do."""
