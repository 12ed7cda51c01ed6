"""neuronx-cc: its invocation, a cache of NEFFs, and explanations of its errors."""
