"""Prompts in, text out: the scheduler, the decoders it drives, sampling and the prefix cache."""
