from jx_neuron.cli import main

main()
