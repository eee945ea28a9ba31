"""
Tests against a real vLLM on the CPU: what they need there, and nothing else does; see `docs/vllm.md`.

One file is one process, because an engine stays in the process of its trainer until that ends.
"""

import io
import os
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "every_process"))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])  # of vLLM's processes
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
import sitecustomize  # noqa: E402, F401, I001

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

MIN_PIXELS, MAX_PIXELS = 112 * 112, 196 * 196
SIZES = [(400, 200), (150, 300), (336, 336), (60, 40)]
ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
"""Options of the engine in these tests: the precision of the trainer, and blocks that short prompts fill."""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """
    The tiny Qwen2.5-VL as vLLM takes it: with the whole processor, whose pixel budget is not that of the run, and with
    the rotary base of the published vision towers, which vLLM does not read from the configuration.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    from mgpo_trl.builtin.tiny import build_tiny

    directory = tmp_path_factory.mktemp("model")
    tiny, processor = build_tiny("refer", seed=0)
    tiny.config.vision_config.rope_parameters["rope_theta"] = 10000.0
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(tiny.config).save_pretrained(directory)
    budget = {"shortest_edge": 224 * 224, "longest_edge": 448 * 448}
    images, videos = Qwen2VLImageProcessor(size=budget), Qwen2VLVideoProcessor(size=budget)
    whole = Qwen2_5_VLProcessor(images, processor.tokenizer, videos, chat_template=processor.chat_template)
    whole.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def photos():
    """Four rows whose pictures differ in size and aspect ratio, so that prompts and crops differ in length."""
    return [photo_row(number, size) for number, size in enumerate(SIZES)]


def photo_row(number, size):
    image = Image.frombytes("RGB", size, random.Random(number).randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {
        "id": f"photo-{number}",
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": f"What is on the {['red', 'blue', 'green', 'grey'][number]} card?",
        "choices": ["vertical lines", "horizontal lines"],
        "answer": "AB"[number % 2],
    }


def group_rows(rows):
    return [dict(row) for row in rows for _ in range(2)]


@pytest.fixture(scope="session")
def session_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def make_trainer(model_dir, photos, tmp_path_factory, session_patch):
    """Build an `MGPOTrainer` that samples with vLLM; keyword arguments are options of `MGPOConfig`."""
    prepare_engine(session_patch)
    return lambda **options: build_trainer(model_dir, photos, tmp_path_factory.mktemp("run"), **options)


def prepare_engine(patch):
    """Give engines the options of these tests, and leave their weights where others can be loaded in their place."""
    import vllm.model_executor.layers.utils as layers

    from mgpo_trl import vllm_rollout

    options_of = vllm_rollout.engine_options
    patch.setattr(vllm_rollout, "engine_options", lambda args: {**options_of(args), **ENGINE})
    patch.setattr(layers, "dispatch_cpu_unquantized_gemm", plain_linear)  # vLLM's own rearranges weights on a CPU


def build_trainer(model_dir, photos, output_dir, peft_config=None, **options):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    from mgpo_trl import MGPOConfig, MGPOTrainer

    defaults = {
        "round_token_budgets": [12, 6],
        "per_device_train_batch_size": 8,
        "max_pixels": MAX_PIXELS,
        "min_pixels": MIN_PIXELS,
        "beta": 0.0,
        "learning_rate": 1e-3,
    }
    args = MGPOConfig(
        output_dir=str(output_dir),
        use_vllm=True,
        vllm_max_model_length=512,
        min_box_side=10,
        num_generations=2,
        gradient_checkpointing=False,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**defaults, **options},
    )
    rows = Dataset.from_list(photos).cast_column("image", ImageFeature(decode=False))
    return MGPOTrainer(str(model_dir), reward, args, train_dataset=rows, peft_config=peft_config)


def reward(completions, **kwargs):
    """Every second rollout is right, so that every group has a signal."""
    return [float(number % 2) for number in range(len(completions))]


def plain_linear(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


def leave_out_nccl(patch):
    """Weights travel to a server by NCCL: what needs it does nothing, and the version of the weights is sent alone."""
    from trl.generation.vllm_client import VLLMClient

    def send_nothing(client, metadata, named_params):
        client.weight_version = f"weights of {len(metadata)} tensors"
        client._post(f"{client.base_url}/update_weight_version", json={"new_version": client.weight_version})

    patch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    patch.setattr(VLLMClient, "update_named_params", send_nothing)


@pytest.fixture
def figure(request):
    """Note a measured number: `figure(name, value)`. All of them are printed at the end."""
    return lambda name, value: request.node.user_properties.append((name, value))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value:.3g}")
