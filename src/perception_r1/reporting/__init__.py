"""A page about runs: what they left behind, read and put side by side, in one HTML file that needs nothing else."""
