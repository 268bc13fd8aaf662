"""What `perception-r1` does besides training and evaluation: a file for each command, and what they share."""
