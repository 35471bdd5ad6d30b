"""Is this allocation fit to train on? facts of a node -> meeting of the nodes -> judge; ``start`` is the short form."""
