"""A step plan of one layer: the plugin that does a whole step in one launch."""
