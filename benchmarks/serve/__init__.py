"""`make bench-serve`: generation with many adapters against vLLM's CPU build, PEFT and Transformers, side by side.

Outputs are compared first, in processes of their own; then rounds go over all rows in turn, every row a process, and
a ratio only ever compares two rows of one round.
"""
