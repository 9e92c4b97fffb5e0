"""What this process gets of its machine, and how it starts Python again. Imports nothing else of HLAT."""
