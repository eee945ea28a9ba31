"""
A page to try a model: upload an image, ask, see where it looked, choose the region by hand and ask again.

Needs Gradio (the extra `demo`). The page asks for nothing outside of its own server: system fonts, no
usage statistics, and a content security policy that makes the browser refuse the rest.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .answer_picture import mark_region
from .geometry import view_to_original
from .images import open_image
from .inference import GroundedAnswer, GroundedVQA

TITLE = "Ask, and see where it looked"
EXAMPLES = 4
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)
FONTS = ["system-ui", "sans-serif"]
MONOSPACE = ["ui-monospace", "monospace"]


@dataclass(frozen=True)
class Shown:
    """The view that a visitor looks at, without a box on it."""

    view: Image.Image
    """What the model saw first."""
    image_size: tuple[int, int]
    """(width, height) of the original image."""
    corner: tuple[int, int] | None = None
    """The first corner of a region that is being chosen, in pixels of the marked view."""

    def marked(self, box: Sequence[int] | None) -> Image.Image:
        """The view with a region, given in original pixels."""
        return mark_region(self.view, self.image_size, box)

    def region(self, first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int, int, int]:
        """The region between two pixels of the marked view, both included, in original pixels."""
        (x1, x2), (y1, y2) = sorted((first[0], second[0])), sorted((first[1], second[1]))
        return view_to_original((x1, y1, x2 + 1, y2 + 1), self.marked(None).size, self.image_size)


def build_page(vqa: GroundedVQA, name: str, examples: Sequence[tuple[str, str, str]] = ()) -> gr.Blocks:
    """
    Build the page.

    Args:
        vqa ([`~mgpo_trl.GroundedVQA`]): The model.
        name (`str`): What the model is called on the page.
        examples (`Sequence[tuple[str, str, str]]`): Image file, question, choices (one a line) of each example.
    """
    rounds = vqa.conversation.num_rounds
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p>{html.escape(name)}</p>")
        shown = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=280):
                asked, ask = _question_fields()
            with gr.Column(min_width=280):
                view = _picture("What the model saw, and the region", "view")
                with gr.Column(visible=rounds > 1):
                    box, again = _box_fields()
            with gr.Column(min_width=280):
                answer = _answer_fields(rounds)
        if examples:
            gr.Examples([list(one) for one in examples], asked, cache_examples=False, api_visibility="private")
        _connect(Handlers(vqa), shown, asked, ask, view, box, again, answer)
    return page


def _connect(handlers: "Handlers", shown, asked, ask, view, box, again, answer) -> None:
    """What a click, a line that was typed, and a click on the view lead to."""
    results = [shown, view, *box, *answer]
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    gr.on([ask.click, asked[1].submit], handlers.ask, asked, results, **one_at_a_time)
    again.click(handlers.ask_again, [*asked, *box], results, **one_at_a_time)
    view.select(handlers.choose_corner, [shown], [shown, view, *box], api_visibility="private")
    gr.on([number.input for number in box], handlers.redraw, [shown, *box], [view], api_visibility="private")


def _question_fields():
    """Image, question and choices, and the button that asks."""
    gr.HTML("<b>Image</b>")
    image = gr.Image(
        label="Image", show_label=False, elem_id="image", type="filepath", sources=["upload", "clipboard"]
    )
    image.preprocess = _uploaded_file
    question = gr.Textbox(label="Question", elem_id="question")
    choices = gr.Textbox(label="Choices, one a line (none: a free answer)", elem_id="choices", lines=3)
    return [image, question, choices], gr.Button("Ask", variant="primary", elem_id="ask")


def _uploaded_file(payload) -> str | None:
    """The uploaded file as it is: Gradio would open it first, with lower limits than ours and errors of its own."""
    return None if payload is None else payload.path


def _answer_fields(rounds: int) -> list:
    """Crop, answer, status, and what the model wrote in each round."""
    return [
        _picture("The region, cut from the original", "crop"),
        gr.Textbox(label="Answer", elem_id="answer", interactive=False),
        gr.Textbox(label="Status of the box", elem_id="status", interactive=False),
        *(
            gr.Textbox(label=f"Round {number}", elem_id=f"round-{number}", lines=2, interactive=False)
            for number in range(1, rounds + 1)
        ),
    ]


def _picture(label: str, name: str) -> gr.Image:
    """A picture with its label above it: Gradio's own would hide a corner."""
    gr.HTML(f"<b>{label}</b>")
    return gr.Image(
        label=label,
        show_label=False,
        elem_id=name,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
    )


def _box_fields():
    """The four numbers of a region, and the button that asks with it."""
    gr.HTML("Click two corners on the view, or type original pixels:")
    with gr.Row():
        names = ("x1", "y1", "x2", "y2")
        box = [gr.Number(label=name, elem_id=name, precision=0, min_width=60, minimum=0) for name in names]
    return box, gr.Button("Ask with this region", elem_id="again")


class Handlers:
    """
    What happens on a click.

    Args:
        vqa ([`~mgpo_trl.GroundedVQA`]): The model.
    """

    def __init__(self, vqa: GroundedVQA):
        self.vqa = vqa

    def ask(self, image: str | None, question: str, choices: str):
        """Ask, and let the model choose the region."""
        return self._ask(image, question, choices, None)

    def ask_again(self, image: str | None, question: str, choices: str, *box: int | None):
        """Ask with the region in the number fields."""
        if None in box:
            return _refuse("The region has not all four numbers. Type them, or click two corners on the view.")
        return self._ask(image, question, choices, tuple(int(number) for number in box))

    def choose_corner(self, shown: Shown | None, event: gr.SelectData) -> list:
        """A click on the view: the first corner of a region, then the second."""
        place = (int(event.index[0]), int(event.index[1]))
        box = shown.region(shown.corner or place, place)
        shown = replace(shown, corner=place if shown.corner is None else None)
        return [shown, shown.marked(box), *(box if shown.corner is None else (*box[:2], None, None))]

    def redraw(self, shown: Shown | None, *box: int | None):
        """The view with the region that is being typed; as it was where that is none yet."""
        x1, y1, x2, y2 = box
        if shown is None or None in box or not (x1 < x2 <= shown.image_size[0] and y1 < y2 <= shown.image_size[1]):
            return gr.skip()
        return shown.marked(box)

    def _ask(self, image: str | None, question: str, choices: str, box: tuple[int, int, int, int] | None):
        lines = [line.strip() for line in (choices or "").splitlines() if line.strip()]
        try:
            return _results(self.vqa(*_checked(image, question), lines or None, box))
        except (ValueError, torch.OutOfMemoryError) as error:
            return _refuse(str(error))


def _refuse(message: str):
    """Say why nothing was asked, and leave the page as it is."""
    gr.Warning(html.escape(message), duration=20, title="Not answered")
    return gr.skip()


def _checked(image: str | None, question: str | None) -> tuple[Image.Image, str]:
    if image is None:
        raise ValueError("There is no image. Upload one first.")
    if not (question or "").strip():
        raise ValueError("There is no question. Type one first.")
    return open_image(image, "The image"), question.strip()


def _results(said: GroundedAnswer) -> list:
    """Values of the components that show an answer, in their order on the page."""
    shown = Shown(said.rollout.view, said.rollout.image.size)
    status = "" if said.status is None else said.status.replace("_", " ")
    box = said.box or (None,) * 4
    crop = None if said.crop is None else mark_region(said.crop, said.crop.size, None)  # a small one is enlarged
    return [shown, shown.marked(said.box), *box, crop, said.words, status or said.no_crop, *said.turns]


def example_rows(spec: str, directory: str | Path) -> list[tuple[str, str, str]]:
    """
    The first rows of a dataset as examples: image file, question, choices (one a line).

    Args:
        spec (`str`): Anything that `eval.py --dataset` takes.
        directory (`str` or `Path`): Where their images go; needed until the page is built.
    """
    from .scripts import open_rows

    examples = []
    for number, row in enumerate(open_rows(spec, limit=EXAMPLES).dataset):
        path = Path(directory, f"{number}.png")
        open_image(row["image"], str(row["id"])).save(path, compress_level=1)
        examples.append((str(path), row["question"], "\n".join(row["choices"] or [])))
    return examples


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """
    Serve the page in threads of this process.

    Args:
        page (`gr.Blocks`): What [`build_page`] returned; `page.close()` ends it.
        host (`str`, *optional*): Address to listen at; `"0.0.0.0"` opens it to the network.
        port (`int`, *optional*): The first free one from 7860 when not given.

    Returns:
        `str`: Where the page is.

    Raises:
        OSError: The port is taken.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=FONTS, font_mono=MONOSPACE),
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
    )
    return url


class ContentPolicy:
    """Adds the content security policy to every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


__all__ = ["build_page", "example_rows", "serve"]
