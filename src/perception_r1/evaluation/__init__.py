"""An evaluation from start to end: what it keeps, how it goes on after a kill, its report beside published metrics."""
