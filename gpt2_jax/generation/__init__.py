"""From a model's logits to texts: samplers, the decoding loop, beams, speculation, conversations."""
