"""vitlab: what pruning does to a Vision Transformer."""
