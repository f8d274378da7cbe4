"""From a model's step to codes: sampling and the decoding loop. Knows no model."""
