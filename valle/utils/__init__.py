"""Small helpers that know no model: errors, files, audio input and output, logging, commands."""
