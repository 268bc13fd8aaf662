"""An evaluation from start to end: what it keeps, how it goes on after a kill, and its report beside published figures."""
