"""Weights and configurations between the released PyTorch layout and the native one."""
