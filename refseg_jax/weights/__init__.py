"""Published checkpoints -> our parameter trees, one table per source.

hf.py (Hugging Face), released.py (the authors' CrossVLT and LAVT).
"""
