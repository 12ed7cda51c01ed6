"""Serve a model with Ray Serve LLM: its router and OpenAI routes, and vLLM with this package's plugin in each replica.

    python examples/ray_serve_llm.py ./my-llama --replicas 2

It takes an environment with vLLM and this package (docs/vllm.md), and `pip install 'ray[serve]' pyarrow pandas` in it.
It runs until Ctrl-C. `examples/ray_serve.py` needs no vLLM.
"""

import argparse
from typing import Any


def application(model: str, name: str, replicas: int, batch_size: int, n_positions: int) -> Any:
    """The application for `ray.serve.run`: on CPUs, one of Ray's for each replica."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config=dict(model_id=name, model_source=model),
        engine_kwargs=dict(dtype="float32", max_model_len=n_positions, max_num_seqs=batch_size),
        accelerator_config=dict(kind="cpu"),
        deployment_config=dict(num_replicas=replicas, max_ongoing_requests=2 * batch_size),
        runtime_env=dict(env_vars=dict(VLLM_PLUGINS="jx_neuron")),
    )
    return build_openai_app(dict(llm_configs=[config]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder or hub id, of an architecture that vLLM knows")
    parser.add_argument("--name", default="model", help="the model's name in requests")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model")
    parser.add_argument("--batch-size", type=int, default=8, help="answers that a replica gives at a time")
    parser.add_argument("--n-positions", type=int, default=2048, help="tokens of a prompt and its answer")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    from ray import serve

    server = application(options.model, options.name, options.replicas, options.batch_size, options.n_positions)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(server, name="jx-neuron", blocking=True)


if __name__ == "__main__":
    main()
