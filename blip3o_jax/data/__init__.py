"""Data: sources of examples, their transformation to model arrays, the stream of batches. Host side, numpy and PIL."""
