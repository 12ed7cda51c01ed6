"""`python -m jx_neuron`, which is the command jx-neuron."""

from jx_neuron.cli import main

if __name__ == "__main__":
    main()
