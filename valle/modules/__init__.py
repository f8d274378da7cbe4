"""Building blocks that know no task: attention, transformer, embeddings, convolutions, quantizer, spectra."""
