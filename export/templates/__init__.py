"""Block graphs of known families written operator by operator, where a traced graph would be larger and slower.

Each piece is a forward pass and its backward pass side by side; :mod:`export.verify` judges the result like any other.
"""

from export.templates.choose import find_template
from export.templates.frame import Template

__all__ = ["Template", "find_template"]
