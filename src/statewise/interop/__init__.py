"""Statewise and other libraries: their file formats, their names, their tools."""
