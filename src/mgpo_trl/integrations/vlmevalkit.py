"""
A model class for VLMEvalKit, which finds models by name in `vlmeval.config.supported_VLM`:

```python
supported_VLM["mgpo"] = partial(MGPOForVLMEvalKit, model_path="outputs/run")
```

It follows the interface that VLMEvalKit documents for its models (`generate(message, dataset)`, `use_custom_prompt`,
`set_dump_image`) without inheriting from it, so that neither package needs the other.
"""

from ..inference import GroundedVQA
from .questions import Splitter, said


class MGPOForVLMEvalKit:
    """
    Plays the two-round conversation for every message, and returns the boxed answer.

    Args:
        model_path (`str`): Model directory, Hub id, or LoRA adapter.
        **options: As in [`~mgpo_trl.GroundedVQA.from_pretrained`].
    """

    INSTALL_REQ = False
    INTERLEAVE = False
    is_api = False

    def __init__(self, model_path: str, **options):
        self.vqa = GroundedVQA.from_pretrained(model_path, **options)
        self.splitter = Splitter()
        self.dump_image_func = None

    def use_custom_prompt(self, dataset: str) -> bool:
        """The prompts of the data sets are used; choices are split off them."""
        return False

    def set_dump_image(self, dump_image_func) -> None:
        """Where the harness leaves its function that writes images to files."""
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        """Write the images of a row to files."""
        return self.dump_image_func(line)

    def generate(self, message, dataset: str | None = None) -> str:
        """
        Answer one message.

        Args:
            message (`list[dict]`): Parts `{"type": "image" | "text", "value": ...}`: one image, any texts.
            dataset (`str`, *optional*): Name of the data set; not used.
        """
        images = [part["value"] for part in message if part["type"] == "image"]
        if len(images) != 1:
            raise ValueError(f"MGPO looks at one image, and the message has {len(images)}.")
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        return said(self.vqa.batch([self.splitter.question(images[0], text)])[0])
