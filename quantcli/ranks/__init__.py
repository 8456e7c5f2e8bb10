"""Several processes, on one machine or many, that make one output on a shared filesystem.

They meet in a folder beside the output: each leaves who it is and what it makes, what it has
written with a digest of every slab, and that it is done; whoever is last checks and publishes. No
locks and no network are needed, only that a file which one has closed is seen by the others.
"""
