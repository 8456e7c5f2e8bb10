"""A page about a set of artifacts, and the card of their repository: `export FILES --to report`."""
