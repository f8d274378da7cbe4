"""Shared fixtures."""

import signal

import pytest
import torch
from synthetic import write_tokenized

# Shells start background jobs with SIGINT ignored, and the commands that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tokenized(tmp_path):
    return write_tokenized(tmp_path / "tokenized")


@pytest.fixture
def one_thread():
    """Bitwise comparisons need the same order of additions."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
