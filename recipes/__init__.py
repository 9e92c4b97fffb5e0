"""The recipes that ship with HLAT, as data files of the package `hlat_recipes`."""
