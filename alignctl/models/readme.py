"""What stands beside an adapter for whoever loads it without alignctl."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, TaskType

_TEXT = """---
base_model: {base}
library_name: peft
---

# An adapter of {base}

Trained with alignctl. In this folder:

```python
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
base = {auto_class}.from_pretrained("{base}"{labels})
{changes}model = PeftModel.from_pretrained(base, ".")
```
{more}"""
_RESIZED = "base.resize_token_embeddings({rows})  # as many as the adapter was trained with\n"
_PADDED = (
    "base.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the token before the padding is scored\n"
)
_SCORES = """
It is a reward model: the adapter brings the head `score` with it, of which transformers says that it starts at random.
The score of a text, prompt and completion with its end token, is
`model(**tokenizer(text, return_tensors="pt")).logits[0, 0]`.
"""


def write_readme(folder: Path, model: PeftModel) -> None:
    """Says in the folder of an adapter how it is loaded, in Python that runs there. Of one on random weights, which are
    nowhere by themselves, peft's own stays."""
    config, text = model.peft_config["default"], model.config.get_text_config()
    if not config.base_model_name_or_path:
        return
    scores = config.task_type == TaskType.SEQ_CLS
    readme = _TEXT.format(
        base=config.base_model_name_or_path,
        auto_class="AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM",
        labels=", num_labels=1" if scores else "",
        changes=_RESIZED.format(rows=text.vocab_size) + (_PADDED if scores else ""),
        more=_SCORES if scores else "",
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
