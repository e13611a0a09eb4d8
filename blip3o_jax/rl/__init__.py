"""Reinforcement learning: rewards, advantages, and rollouts of the current parameters as a source of batches."""
