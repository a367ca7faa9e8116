"""The world in: videos, frames, views and the embedding cache. Arrays and tensors out; knows nothing of models."""
