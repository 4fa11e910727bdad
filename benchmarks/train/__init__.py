"""`make bench-train`: training throughput, memory and loss against PEFT + Trainer and TRL, side by side.

Every measurement is a process of its own with the same environment; rounds go over all rows in turn, and a ratio only
ever compares two rows of one round.
"""
