"""How much memory a run needs: its own code, run on tensors that have shapes and no values."""
