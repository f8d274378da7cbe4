"""From recordings to batches: manifests, tokens, splits, datasets."""
