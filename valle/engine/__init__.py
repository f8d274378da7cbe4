"""The only training loop, with its optimizers, schedules, checkpoints and metrics."""
