"""The demo world: data, evaluation, rewards and the embedded model, built on public extension points only."""
