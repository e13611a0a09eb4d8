"""Scores of generated pictures: composition, text, editing, and the intervals around them; numpy only."""
