"""valle: train and run codec language models — audio continued by audio, one toolkit from recording to wav."""

__version__ = "0.1.0"
