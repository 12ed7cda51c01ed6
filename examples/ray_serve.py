"""Serve a model with Ray Serve: replicas that share the load, and are replaced when they die.

    python examples/ray_serve.py ./my-llama --replicas 2
    python examples/ray_serve.py ./my-llama --replicas 1 --most 4  # as many as the load asks for

It takes the extra `ray`, and runs until Ctrl-C. In a Ray cluster it uses the cluster of RAY_ADDRESS.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder, .gguf file or hub id")
    parser.add_argument("--replicas", type=int, default=2, help="copies of the model")
    parser.add_argument("--most", type=int, help="most copies; between these Ray chooses by the load")
    parser.add_argument("--batch-size", type=int, default=8, help="answers that a replica gives at a time")
    parser.add_argument("--n-positions", type=int, default=2048, help="tokens of a prompt and its answer")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    from ray import serve

    from jx_neuron.integrations.ray import application

    replicas = (options.replicas, options.most) if options.most else options.replicas
    server = application(
        options.model, replicas=replicas, batch_size=options.batch_size, n_positions=options.n_positions
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(server, name="jx-neuron", blocking=True)


if __name__ == "__main__":
    main()
