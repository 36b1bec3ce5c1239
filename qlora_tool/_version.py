"""The version, in a module that imports nothing: what writes it into files need not import the package's front."""

__version__ = "0.2.0"
