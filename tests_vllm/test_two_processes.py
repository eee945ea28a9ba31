"""Two processes with an engine each, as plain data parallelism: the sampler follows the weights of both."""

from two_processes import run


def test_two_colocated_engines(model_dir, tmp_path, figure):
    result = run(model_dir, tmp_path, {"vllm_mode": "colocate"})
    assert result["num_processes"] == 2 and len(result["differences"]) == 2 and max(result["differences"]) < 0.1
    figure("largest difference of a log-probability, vLLM to the loss pass, two processes", max(result["differences"]))
