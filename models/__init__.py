"""The mathematics of VAR: tokenizer, transformer and generation. Knows no ranks, files or optimisers."""
