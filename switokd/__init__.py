"""switokd: networks that train each other by switchable online knowledge distillation.

Paper: Qian, Wang, Yin, Hong, Wang, "Switchable Online Knowledge Distillation",
ECCV 2022, arXiv:2209.04996.
"""

from importlib.metadata import version

__version__ = version("switokd")
