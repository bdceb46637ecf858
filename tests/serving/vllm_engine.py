"""Runs in vLLM's own environment: `vllm_engine.py JOBS.json RESULTS.json`. One engine for each job, one after the other.

A job: `{"name", "path", "ask": a name in ASK, "prompts": [[token, …] or text, …], "tokens": how many to generate, "engine":
arguments of `LLM`}`. The results, by name: `{"answers": …, "modules": names of the classes that the model is made of}`, or
`{"error": what was raised at load}`. vLLM's log goes where stderr goes.
"""

import gc
import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: no second start for each model
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_STREAM="ext://sys.stderr",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams

ENGINE = {
    "trust_remote_code": True,
    "model_impl": "transformers",
    "enforce_eager": True,
    "dtype": "float32",
    "max_num_seqs": 8,
}


def generate(llm: LLM, prompts: list[dict], job: dict) -> list[dict]:
    how = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=1)
    answers = []
    for request in llm.generate(prompts, how, use_tqdm=False):
        output = request.outputs[0]
        logprobs = [row[token].logprob for row, token in zip(output.logprobs, output.token_ids)]
        answers.append({"tokens": list(output.token_ids), "logprobs": logprobs})
    return answers


def classify(llm: LLM, prompts: list[dict], job: dict) -> list[list[float]]:
    return [list(request.outputs.probs) for request in llm.classify(prompts, use_tqdm=False)]


def embed(llm: LLM, prompts: list[dict], job: dict) -> list[list[float]]:
    return [list(request.outputs.embedding) for request in llm.embed(prompts, use_tqdm=False)]


def tag(llm: LLM, prompts: list[dict], job: dict) -> list[list[list[float]]]:
    requests = llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
    return [request.outputs.data.tolist() for request in requests]


ASK = {"generate": generate, "classify": classify, "embed": embed, "tag": tag}


def run(job: dict) -> dict:
    try:
        llm = LLM(job["path"], **{**ENGINE, **job.get("engine", {})})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    prompts = [text if isinstance(text, str) else {"prompt_token_ids": text} for text in job["prompts"]]
    answers = ASK[job["ask"]](llm, prompts, job)
    modules = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))[0]
    return {"answers": answers, "modules": modules}


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = {}
    for job in jobs:
        print(f"---- {job['name']}", file=sys.stderr, flush=True)
        results[job["name"]] = run(job)
        gc.collect()
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
