"""`python -m hlat` equals the `hlat` command."""

from hlat.cli import entry

if __name__ == "__main__":
    entry()
