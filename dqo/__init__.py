"""Diversity Quality Optimization: post-training language models that stay diverse.

The package imports nothing heavy: `from dqo.determinant import leave_one_out_bonus` costs only torch.
"""

__version__ = "0.1.0"
