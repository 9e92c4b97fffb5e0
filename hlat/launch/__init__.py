"""`hlat launch`: scripts and manifests that start a run on a cluster.

Each is made from a readable template in `launch/templates/`. What comes from a recipe or a command line
enters a script as a quoted shell word and a manifest through a YAML library, and runs nowhere else.
"""
