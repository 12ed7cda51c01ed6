"""One step of a decoder: a pure function on fixed shapes, its key, its inputs, and the buckets of shapes."""
