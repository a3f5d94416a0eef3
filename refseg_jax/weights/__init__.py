"""Published checkpoints -> our parameter trees, one table per source: hf.py (Hugging Face)."""
