"""The templates of `hlat launch`, as data files of the package `hlat_launch`."""
