"""`PatientClient`: TRL's client of a vLLM server, for servers that go away, or come back as another."""

import logging
import socket
import time
import uuid

from trl.generation.vllm_client import VLLMClient

try:
    import requests
except ImportError:  # it comes with vLLM; without it TRL's client refuses to be built
    requests = None

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a request is sent in all. Each time, TRL's session sends it again on its own for about a minute."""
LONGEST_PAUSE = 30.0
"""Seconds; the pause between two looks at a silent server doubles up to this."""
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # urllib3's own
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}.items()
        if hasattr(socket, name)  # not on every platform
    ),
]
"""A machine that lost its power closes no connection: after two minutes of silence the kernel does."""


class PatientClient(VLLMClient):
    r"""
    Client of a vLLM server that samples the rounds.

    What changes w.r.t. [`~trl.generation.vllm_client.VLLMClient`]: a request that finds no server waits for one, with
    pauses that double, for at most `connection_timeout` seconds (`vllm_server_timeout`), and then fails with the
    address. Weights that are sent get a version, and every request asks for it first: a server that was started again
    meanwhile holds the weights of its checkpoint, and would sample from another policy without a word.

    Raises:
        ConnectionError: The server stayed away; the message names its address.
        RuntimeError: The server was started again since the last weights were sent.
    """

    def __init__(self, *args, connection_timeout: float = 0.0, **kwargs):
        self.patience = connection_timeout
        self.weight_version: str | None = None
        super().__init__(*args, connection_timeout=connection_timeout, **kwargs)
        for adapter in self.session.adapters.values():
            adapter.poolmanager.connection_pool_kw["socket_options"] = SOCKET_OPTIONS

    def image_features(self, *args, **kwargs):
        return self._patiently(super().image_features, *args, **kwargs)

    def generate(self, *args, **kwargs):
        return self._patiently(super().generate, *args, **kwargs)

    def reset_prefix_cache(self):
        return self._patiently(super().reset_prefix_cache)

    def reset_encoder_cache(self) -> None:
        """Drop image features that earlier weights computed. The answer is empty, which TRL's `_post` can not read."""
        self._patiently(lambda: self.session.post(f"{self.base_url}/reset_encoder_cache").raise_for_status())

    def update_named_params(self, metadata, named_params):
        """As in TRL. A broadcast can not be taken up again: only what comes before it is patient."""
        self._patiently(lambda: None)
        try:
            super().update_named_params(metadata, named_params)
        except requests.RequestException as error:
            raise ConnectionError(
                f"The vLLM server at {self.base_url} went away while it was sent the weights ({error}). {_WHAT_TO_DO}"
            ) from error

    def _finish_weight_update(self):
        version = uuid.uuid4().hex
        self._post(f"{self.base_url}/finish_weight_update", json={"weight_version": version})
        self.weight_version = version

    def _patiently(self, call, *args, **kwargs):
        """The result of `call`, which is made again once the server is back."""
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._check_weights()
                return call(*args, **kwargs)
            except requests.RequestException as error:
                cause = error
                logger.warning(f"No answer from the vLLM server at {self.base_url} (attempt {attempt}): {error}")
                if attempt == ATTEMPTS or not self._is_back(started + self.patience):
                    break
        raise ConnectionError(
            f"The vLLM server at {self.base_url} is gone: {attempt} attempts failed within "
            f"{time.monotonic() - started:.0f} seconds, the last with {cause!r}. {_WHAT_TO_DO} A server that only "
            f"needs longer gets it with `vllm_server_timeout` (now {self.patience:g} seconds)."
        ) from cause

    def _check_weights(self) -> None:
        """Compare the version of the server's weights with that of the last ones that were sent."""
        if self.weight_version is None:
            return
        found = self._get(f"{self.base_url}/weight_info")["weight_version"]
        if found != self.weight_version:
            raise RuntimeError(
                f"The vLLM server at {self.base_url} was started again, or was sent weights by another run: its "
                f"weights are version {found!r}, the last ones sent are {self.weight_version!r}. Its rollouts would "
                f"not be this policy's. {_WHAT_TO_DO}"
            )

    def _is_back(self, deadline: float) -> bool:
        """Whether the server answers before `deadline` (monotonic seconds)."""
        pause = 1.0
        while True:
            try:
                if requests.get(f"{self.base_url}/health", timeout=10).ok:
                    return True
            except requests.RequestException:
                pass
            if time.monotonic() + pause > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


_WHAT_TO_DO = "Start it again and go on from the last checkpoint with `--resume_from_checkpoint`."
