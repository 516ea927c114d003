"""LangChain's own suite for chat models, langchain-tests, against a running server."""

import pytest

from tests.serving import Served, make_model

suites = pytest.importorskip("langchain_tests.integration_tests")
client = pytest.importorskip("langchain_openai")


@pytest.fixture(scope="class", autouse=True)
def chatty(request, tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("served") / "chatty"
    make_model(folder, tiny_tokenizer, "chatml", sequence_length=1024)
    one = Served(folder.with_suffix(".log"), folder).ready()
    request.cls.url = f"{one.url}/v1"
    yield
    one.kill()


class TestChat(suites.ChatModelIntegrationTests):
    """Its tests of tools, structured output and images are left out: the server has none."""

    chat_model_class = client.ChatOpenAI
    has_tool_calling = has_tool_choice = has_structured_output = False

    @property
    def chat_model_params(self):
        fixed = {"model": "chatty", "temperature": 0, "max_tokens": 30, "stream_usage": True}
        return fixed | {"base_url": self.url, "api_key": "none"}
