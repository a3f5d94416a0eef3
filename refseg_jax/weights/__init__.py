"""Published checkpoints -> our parameter trees, one table per source.

files.py and pytorch.py read files of any format to arrays by name; tables.py fills our parameters
from them, strictly. The sources: hf.py (Hugging Face: Swin, BERT), microsoft.py (Swin), resnet.py,
clip.py, darknet.py, released.py (the authors' CRIS, CrossVLT and LAVT). initial.py: what a new run
starts from. As a command, `python -m refseg_jax.weights`: a released checkpoint becomes a run.
"""
