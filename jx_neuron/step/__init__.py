"""One step of a decoder: a pure function on fixed shapes, the shapes, and the buckets that they are taken from."""
