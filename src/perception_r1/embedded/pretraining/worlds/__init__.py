"""Worlds that need eyes: shapes at any pixel on textured backgrounds, pages in several fonts."""
