"""From a model's logits to texts: samplers, decoding, beams, speculation, conversations."""
