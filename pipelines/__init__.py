"""The stages that a person runs; each reads from top to bottom like a story."""
