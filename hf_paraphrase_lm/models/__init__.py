"""The model families, a folder each. Their files import nothing else of this package: they must work as remote code."""
