"""A hub as a source: one commit is one version, and only what is allowed is asked for."""

import os
from hashlib import sha256

import pytest

from adapter_store.errors import AdapterNameInvalid
from adapter_store.sources.base import SourceChanged, SourceConfig
from adapter_store.sources.opening import open_source
from tests.support.fake_hub import TOKEN, fake_hub
from tests.support.fake_sources import small_adapter
from tests.support.source_calls import all_names, read_all, refused, run
from tests.support.web_server import Answer, web_server

REPO = "team/upper"
BOTH = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub():
    with fake_hub() as made:
        made.push(REPO, {**small_adapter(), "README.md": b"not an adapter's file"})
        yield made


def open_at(hub, **more):
    known = {"max_attempts": 1, "connect_timeout_s": 2.0, "endpoint_url": hub.hub.address}
    known |= {"redirect_hosts": ("127.0.0.1:*",)}  # its CDN
    return open_source(SourceConfig(uri="hub://huggingface.co", **{**known, **more}))


def test_an_adapter_is_read_whole_even_where_models_must_not_be_fetched(hub):
    """`HF_HUB_OFFLINE` keeps huggingface_hub from fetching; an adapter source is configured, and meant."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    source = open_at(hub)
    assert run(source, lambda: read_all(source, REPO)) == [small_adapter()]


def test_a_lookup_is_one_request_and_tells_the_digest_of_the_weights(hub):
    source = open_at(hub)
    (listing,) = run(source, lambda: source.stat(REPO))
    assert [ask.method for ask in hub.hub.asked] == ["GET"]
    assert listing.names == BOTH
    digests = {file.name: file.sha256 for file in listing.files}
    assert digests == {BOTH[0]: None, BOTH[1]: sha256(small_adapter()[BOTH[1]]).hexdigest()}


def test_a_new_commit_is_a_new_version_and_an_old_one_can_be_asked_for(hub):
    source = open_at(hub)
    files = small_adapter(seed=5)

    async def main():
        old = await source.stat(REPO)
        commit = hub.push(REPO, files)
        new = await source.stat(REPO)
        assert new.etags != old.etags
        assert (await source.stat(f"{REPO}@{commit}")).etags == new.etags
        assert await read_all(source, REPO, old) == small_adapter()  # what was listed can still be read
        return await read_all(source, REPO)

    assert run(source, main) == [files]


def test_the_configured_revision_is_the_one_that_is_served(hub):
    first = hub.push(REPO, small_adapter(seed=1))
    hub.push(REPO, small_adapter(seed=2))
    source = open_at(hub, revision=first)
    assert run(source, lambda: read_all(source, REPO)) == [small_adapter(seed=1)]


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub):
    source = open_at(hub, token=TOKEN)
    assert run(source, lambda: read_all(source, REPO)) == [small_adapter()]
    assert {ask.headers.get("authorization") for ask in hub.hub.asked} == {f"Bearer {TOKEN}"}
    assert {ask.headers.get("authorization") for ask in hub.cdn.asked} == {None}
    assert hub.cdn.asked


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("name", ["team/missing", f"{REPO}@no-such-branch", "upper", "team/upper/below", "team/empty"])
def test_what_is_not_there_is_not_there(hub, name, token):
    """A hub answers strangers 401 for what does not exist."""
    hub.push("team/empty", {"README.md": b""})
    source = open_at(hub, token=token)
    assert run(source, lambda: source.stat(name)) == [None]


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository_is_told_with_what_to_do(hub, token):
    hub.gated.add(REPO)
    source = open_at(hub, token=token)
    assert "accept its conditions" in run(source, lambda: refused(lambda: source.stat(REPO)))[0]


def test_a_wrong_token_is_told_and_no_missing_adapter(hub):
    source = open_at(hub, token="hf_wrong")
    assert "does not know the token" in run(source, lambda: refused(lambda: source.stat(REPO)))[0]


def test_a_hub_that_has_enough_is_told(hub):
    hub.busy = True
    source = open_at(hub)
    assert "too many requests" in run(source, lambda: refused(lambda: source.stat(REPO)))[0]


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"sha": "../../x", "siblings": []}', b"[]"])
def test_what_is_no_hub_is_told(body):
    with web_server(lambda _: Answer(200, {}, body)) as server:
        source = open_source(SourceConfig(uri="hub://huggingface.co", endpoint_url=server.address))
        assert "check the endpoint" in run(source, lambda: refused(lambda: source.stat(REPO)))[0]


def test_only_allowed_repositories_are_asked_for(hub):
    hub.push("other/x", small_adapter())
    source = open_at(hub, repos=("team/*", "exact/name"))
    there, elsewhere, listed = run(
        source, lambda: source.stat(REPO), lambda: source.stat("other/x"), lambda: all_names(source, 1)
    )
    assert there is not None
    assert elsewhere is None
    assert listed == ["exact/name"]  # patterns cannot be listed
    assert {ask.path.split("/")[3] for ask in hub.hub.asked} == {"team"}


@pytest.mark.parametrize("name", [f"{REPO}@../../x", f"{REPO}@", f"{REPO}@a@b", "../x", f"{REPO}@a b"])
def test_no_name_leads_to_another_path(hub, name):
    async def main():
        with pytest.raises(AdapterNameInvalid):
            await source.stat(name)

    source = open_at(hub)
    run(source, main)
    assert hub.hub.asked == []


def test_a_repository_that_goes_away_while_it_is_read_is_another_by_now(hub):
    source = open_at(hub)

    async def main():
        listing = await source.stat(REPO)
        hub.commits.clear()
        with pytest.raises(SourceChanged):
            await read_all(source, REPO, listing)

    run(source, main)
