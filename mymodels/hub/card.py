"""Model cards: the README.md of a Hub repo, with metadata the Hub understands."""

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def model_card(
    model: PreTrainedModel,
    *,
    name: str,
    repo_id: str,
    description: str,
    training_data: str,
    limits: str,
    dataset: str,
    metrics: dict[str, float],
    license: str = "apache-2.0",
    language: str = "en",
) -> str:
    """The card's text: what the model is, how to load it, what it was trained on, how well it does, and its limits.

    Args:
        model: its class decides the task and the Auto class in the snippet.
        repo_id: what the snippet loads, a folder or `user/name`.
        dataset: name of the data that `metrics` were measured on.
        metrics: measured values by metric name, on data held out from training.
    """
    head = type(model).__name__.removeprefix("MyGPT2").removeprefix("MyBert")
    results = [
        EvalResult(
            task_type=PIPELINE_TAGS[head],
            dataset_type="text",
            dataset_name=dataset,
            metric_type=metric.lower().replace(" ", "_"),
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[head],
        tags=[model.config.model_type, "custom_code"],
        model_name=name,
        eval_results=results,
    )
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in metrics.items())
    return f"""---
{data.to_yaml().strip()}
---

# {name}

{description}

{model.num_parameters() / 1e6:.2f} million parameters. Made with the Python package mymodels, loads without it.

## Load it

```python
from transformers import AutoModel{head}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel{head}.from_pretrained("{repo_id}", trust_remote_code=True)
```

The code files in this folder are for transformers 4.56 to 5.23, tested under eight releases. With mymodels installed,
`import mymodels` registers the model, and `trust_remote_code=True` is not needed.

## Training data

{training_data}

## Results

On {dataset}:

| metric | value |
|---|---|
{rows}

## Limits

{limits}
"""
