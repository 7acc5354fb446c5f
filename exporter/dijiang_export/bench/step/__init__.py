"""A whole decoding step on a GPU: in one launch, in three a layer, and others' bare products."""
