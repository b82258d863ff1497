"""Networks by name, one module per family.

Start reading at `registry.py`. Not covered: pretrained weights.
"""
