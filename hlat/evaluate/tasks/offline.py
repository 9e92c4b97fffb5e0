"""What the YAML files of this folder name: the harness looks for functions beside them."""

from hlat.evaluate.offline import cloze, code_bits, comment_bits, docstring, docstring_bits, function

__all__ = ["cloze", "code_bits", "comment_bits", "docstring", "docstring_bits", "function"]
