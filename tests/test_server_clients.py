"""Clients that others wrote, each with its own idea of the API; they are of the extra `clients`."""

import pytest
from serving_process import OPTIONS, ServerProcess


@pytest.fixture(scope="module")
def address(short_smollm2):
    with ServerProcess(short_smollm2, *OPTIONS, "--forget") as server:
        yield f"{server.address}/v1"


def test_langchain(address):
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(base_url=address, api_key="any", model="any", max_retries=0)
    answer = model.invoke([("system", "Be brief."), ("human", "Say hello.")])
    assert answer.content and answer.usage_metadata["output_tokens"] > 0
    streamed = list(model.stream([("system", "Be brief."), ("human", "Say hello.")]))
    assert "".join(chunk.content for chunk in streamed) == answer.content


def test_litellm(address):
    litellm = pytest.importorskip("litellm")
    asked = {"model": "openai/any", "api_base": address, "api_key": "any", "messages": [{"role": "user", "content": "Say hello."}]}
    answer = litellm.completion(**asked)
    assert answer.choices[0].message.content and answer.usage.completion_tokens > 0
    streamed = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.choices[0].message.content


def test_litellm_with_texts_and_embeddings(address):
    litellm = pytest.importorskip("litellm")
    asked = {"api_base": address, "api_key": "any"}
    answer = litellm.text_completion(model="text-completion-openai/any", prompt="The capital of France is", max_tokens=4, **asked)
    assert answer.choices[0].text and answer.usage.completion_tokens == 4
    found = litellm.embedding(model="openai/any", input=["A cat.", "A dog."], **asked)
    assert len(found.data) == 2 and sum(value**2 for value in found.data[0]["embedding"]) == pytest.approx(1, abs=1e-4)


def test_langchain_with_texts_and_embeddings(address):
    langchain_openai = pytest.importorskip("langchain_openai")
    asked = {"base_url": address, "api_key": "any", "model": "any", "max_retries": 0}
    assert langchain_openai.OpenAI(**asked, max_tokens=4).invoke("The capital of France is")
    embeddings = langchain_openai.OpenAIEmbeddings(**asked, check_embedding_ctx_length=False)
    assert len(embeddings.embed_documents(["A cat.", "A dog."])) == 2


def test_llm(address, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(f"- model_id: local\n  model_name: any\n  api_base: {address}\n")
    llm = pytest.importorskip("llm")
    model = llm.get_model("local")
    model.key = "any"
    conversation = model.conversation()
    assert conversation.prompt("Say hello.", stream=False).text()
    assert "".join(conversation.prompt("And again.", stream=True))
