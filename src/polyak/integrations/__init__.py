"""Averages in the training loops of frameworks: :mod:`.lightning`, :mod:`.transformers`.

accelerate needs no module of its own: make the average after ``prepare``, attach it to the prepared optimizer, and give
it to ``accelerator.register_for_checkpointing``.
"""
