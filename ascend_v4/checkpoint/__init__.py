"""Release checkpoints: names, expected tensors, strict reading, description and random checkpoints."""
