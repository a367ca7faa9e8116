"""The world in: videos, clips, views and the cache of embeddings. Arrays and tensors out; knows nothing of models."""
