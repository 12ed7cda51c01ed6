"""neuronx-cc: how it is called, what it compiled before, and what its errors mean."""
