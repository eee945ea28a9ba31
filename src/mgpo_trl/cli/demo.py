"""`mgpo demo`: a page in the browser to try a model."""

import argparse
import os
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from .loading import add_model_arguments, load_model

SUMMARY = "Start a page to try a model: upload an image, ask, move the box by hand and ask again."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mgpo demo`."""
    parser.add_argument("model", metavar="DIR", help="model, Hub id or adapter")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--examples", metavar="DATASET", help="dataset whose first rows become examples on the page")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model, serve the page until Ctrl-C."""
    if find_spec("gradio") is None:
        raise ValueError("The page needs Gradio, which is not installed. Run: pip install 'gradio>=6.31,<7'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from ..demo import build_page, example_rows, serve

    with TemporaryDirectory(prefix="mgpo-examples-") as directory:
        examples = example_rows(args.examples, directory) if args.examples else []
        vqa = load_model(args.model, args)
        if not examples and _is_builtin(vqa):
            examples = example_rows("builtin:refer", directory)
        page = build_page(vqa, args.model, examples)
    print(f"{serve(page, args.host, args.port)}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _is_builtin(vqa) -> bool:
    """Whether it is the built-in model, which knows its own scenes and nothing else."""
    from ..builtin.tiny import ImageOnlyQwen2_5_VLProcessor

    return isinstance(vqa.template.chat.processor, ImageOnlyQwen2_5_VLProcessor)
