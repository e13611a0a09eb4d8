"""The demo world's part in evaluation and rewards, built on what any package may add: detectors, readers, rewards."""
