"""The embedded pair: two real models that install from the package index, no model hub needed."""
