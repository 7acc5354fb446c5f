"""From a checkpoint to a bundle: graphs, weights, recorded cases."""
