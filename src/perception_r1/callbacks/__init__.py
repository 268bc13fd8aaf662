"""What a person sees of a run: progress, pictures, tables, and the files that remain."""
