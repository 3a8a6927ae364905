"""Annotation by an open model on your own server: vLLM, SGLang, llama.cpp or Ollama.

Start one of them (each serves the OpenAI API; the model names are examples):

    vllm serve Qwen/Qwen3-8B --port 8000
    python -m sglang.launch_server --model-path Qwen/Qwen3-8B --port 30000
    llama-server --hf-repo Qwen/Qwen3-8B-GGUF --port 8080 --parallel 16 --ctx-size 65536
    OLLAMA_NUM_PARALLEL=16 ollama serve    (and once: ollama pull qwen3:8b)

and annotate with its name as the argument:

    NUNER_EXTRAS=annotate launch/local.sh annotate --config=configs/annotate_local.py:vllm \\
        --config.endpoint.model=Qwen/Qwen3-8B --config.source.paths="('corpus.txt',)" --dry_run

`--config.prompt.template=structured` has the server force its answers into a JSON schema, which small models need
most. Cost: your electricity. Expect: a server's own throughput; the client sustains some hundred answers a second.
"""

from nuner_jax.config import annotate

PORTS = {"vllm": 8000, "sglang": 30000, "llamacpp": 8080, "ollama": 11434}


def get_config(server="vllm"):
    if server not in PORTS:
        raise ValueError(f"server {server!r}: one of {', '.join(PORTS)}")
    config = annotate()
    config.source.size = 100_000
    config.endpoint.base_url = f"http://localhost:{PORTS[server]}/v1"
    config.endpoint.key_variable = ""  # a server of your own asks for none
    config.endpoint.max_tokens_key = "max_tokens"  # all four know it
    config.price.input = config.price.output = 0.0
    config.request.max_concurrency = 256 if server in ("vllm", "sglang") else 16  # the latter two have fixed slots
    config.request.timeout = 600.0  # a full queue takes its time
    return config
