"""The client of OpenEnv, against a server of that package on a thread."""

import socket
import threading
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.environments.openenv import OpenEnv

pytest.importorskip("openenv.core")


@pytest.fixture(scope="module")
def url():
    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Said(Action):
        message: str

    class Heard(Observation):
        message: str
        numbers: tuple[int, ...] = ()

    class Echo(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, start=0, **kwargs):
            self.count = start
            return Heard(message=f"seed {seed}")

        def step(self, action, timeout_s=None, **kwargs):
            self.count += 1
            return Heard(
                message=action.message.upper(),
                numbers=(self.count,),
                reward=self.count / 4,
                done=self.count == 3,
            )

        @property
        def state(self):
            return State()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_fastapi_app(Echo, Said, Heard, max_concurrent_envs=4)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_two_sessions_talk_with_the_server_side_by_side(url):
    first, second = OpenEnv(url).make(), OpenEnv(url, observation_field="numbers", reset={"start": 1}).make()
    assert first.reset(7) == [{"role": "user", "content": "seed 7"}]
    assert second.reset(8) == [{"role": "user", "content": "[]"}]
    steps = [first.step("ab"), first.step("cd"), second.step("x"), first.step("ef")]
    assert [step.messages[0]["content"] for step in steps] == ["AB", "CD", "[2]", "EF"]
    assert [step.reward for step in steps] == [0.25, 0.5, 0.5, 0.75]
    assert [step.terminated for step in steps] == [False, False, False, True]
    first.close()
    second.close()


def test_a_field_that_is_not_there_is_named(url):
    world = OpenEnv(url, observation_field="mesage").make()
    with pytest.raises(UserError, match=r"no field 'mesage'; did you mean 'message'. .*observation_field"):
        world.reset(0)
    world.close()
