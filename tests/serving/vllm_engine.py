"""Runs in vLLM's own environment: `vllm_engine.py JOBS.json RESULTS.json`. An engine for each job, two at a time.

Each is a fork of this process, which has imported vLLM once.

A job: `{"name", "path", "ask": a name in ASK, "prompts": [[token, …] or text, …], "tokens": how many to generate, "engine":
arguments of `LLM`}`. The results, by name: `{"answers": …, "modules": names of the classes that the model is made of}`, or
`{"error": what was raised at load}`. vLLM's log goes where stderr goes.
"""

import gc
import json
import multiprocessing
import os
import sys
import time

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in the process that asks: no further start
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_STREAM="ext://sys.stderr",
    HF_HUB_OFFLINE="1",
)

import torch._dynamo
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
    start, how = time.monotonic(), {**ENGINE, **job["engine"]}
    torch._dynamo.config.disable = how["enforce_eager"]  # else a helper of the sampler is compiled even so
    try:
        llm = LLM(job["path"], **how)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    running.append(llm)  # it ends with the process
    prompts = [text if isinstance(text, str) else {"prompt_token_ids": text} for text in job["prompts"]]
    answers = ASK[job["ask"]](llm, prompts, job)
    modules = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))[0]
    print(f"---- {job['name']}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return {"answers": answers, "modules": modules}


running: list[LLM] = []


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    gc.freeze()  # the engine collects garbage all the time, which all that is imported makes slow
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(run, jobs, chunksize=1)
    with open(sys.argv[2], "w") as file:
        json.dump({job["name"]: result for job, result in zip(jobs, results)}, file)


if __name__ == "__main__":
    main()
