"""Runs in vLLM's own environment: `vllm_client.py URL JOB.json` asks a server through OpenAI's client and prints JSON.

The job: `{"model", "prompts": [text, …], "tokens": how many to generate}`.
"""

import json
import sys

from openai import OpenAI

with open(sys.argv[2]) as file:
    job = json.load(file)
client = OpenAI(base_url=sys.argv[1], api_key="none", timeout=60)
completion = client.completions.create(
    model=job["model"],
    prompt=job["prompts"],
    temperature=0,
    max_tokens=job["tokens"],
    logprobs=1,
    extra_body={"ignore_eos": True},
)
json.dump([{"text": c.text, "logprobs": c.logprobs.token_logprobs} for c in completion.choices], sys.stdout)
