"""Scores of generated images: composition, text, editing, and the intervals around them; numpy only."""
