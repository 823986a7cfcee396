"""Checkpoints: shards, manifest, saving beside training, and loading into any world."""
