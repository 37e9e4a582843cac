"""The store as an actor: shared, restarted when it dies, gone when nobody needs it."""

import os
import signal
import uuid

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from adapter_store.actor import PROTOCOL_VERSION, get_or_create_store, store_name
from adapter_store.errors import AdapterRejected, SpecUnknown
from adapter_store.image.packing import pack
from adapter_store.records import Registration, StoreConfig
from adapter_store.sources.base import SourceConfig
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.ray_session import NAMESPACE, ray_session  # noqa: F401
from tests.support.waiting import until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def sources(tmp_path):
    for name, files in {"a": small_adapter(), "bad": small_adapter(use_dora=True)}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    return (SourceConfig(uri=tmp_path.as_uri(), name="local"),)


@pytest.fixture
def store(sources):
    handle = get_or_create_store(sources, namespace=NAMESPACE, name=f"store-{uuid.uuid4().hex}")
    yield handle
    ray.kill(handle)


def pid_of(handle):
    return ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))


def lease(handle, owner="me"):
    """Acquires as a replica does: a store that began anew is told the spec again."""
    try:
        return ray.get(handle.acquire.remote("a", ray.get(handle.register_spec.remote(small_spec())), owner))
    except SpecUnknown:  # it died between the two calls
        return lease(handle, owner)


def test_the_image_is_a_view_of_shared_memory_with_the_packed_bytes(store):
    held = lease(store)
    image = ray.get(held.image)
    assert np.array_equal(image, pack(small_adapter(), small_spec()).data)
    assert not image.flags.writeable
    assert ray.get(store.heartbeat.remote("me", (held.version,))) == ()
    assert ray.get(store.status.remote()).num_leases == 1
    assert ray.get(store.protocol_version.remote()) == PROTOCOL_VERSION


def test_a_refusal_reaches_the_caller_with_its_fields(store):
    digest = ray.get(store.register_spec.remote(small_spec()))
    with pytest.raises(AdapterRejected) as caught:
        ray.get(store.acquire.remote("bad", digest, "me"))
    assert isinstance(caught.value, RayTaskError)
    assert caught.value.cause.code == caught.value.code == "adapter_rejected"
    assert "use_dora" in caught.value.cause.reason
    assert lease(store).name == "a"


def test_all_callers_with_one_configuration_share_one_store(sources):
    config = StoreConfig(refresh_s=1.0)
    first = get_or_create_store(sources, config, namespace=NAMESPACE, name="shared")
    second = get_or_create_store(sources, config, namespace=NAMESPACE, name="shared")
    other = get_or_create_store(sources, StoreConfig(refresh_s=2.0), namespace=NAMESPACE, name="shared")
    try:
        assert pid_of(first) == pid_of(second) != pid_of(other)
    finally:
        ray.kill(first)
        ray.kill(other)


def test_a_killed_store_comes_back_empty_and_serves_again(store):
    held = lease(store)
    before = pid_of(store)
    os.kill(before, signal.SIGKILL)
    again = lease(store)
    assert pid_of(store) != before
    assert again.version == held.version
    assert np.array_equal(ray.get(again.image), pack(small_adapter(), small_spec()).data)
    # What was held before belongs to nobody now; the owner is told.
    assert ray.get(store.heartbeat.remote("other", (held.version,))) == (held.version,)


def test_a_killed_store_with_a_disk_finds_images_names_and_pins_again(sources, tmp_path):
    config = StoreConfig(disk_path=str(tmp_path / "disk"), refresh_s=0.0)
    handle = get_or_create_store(sources, config, namespace=NAMESPACE, name=f"disk-{uuid.uuid4().hex}")
    try:
        ray.get(handle.register.remote((Registration(name="team/x", source="local", location="a"),)))
        digest = ray.get(handle.register_spec.remote(small_spec()))
        assert ray.get(handle.pin.remote("a")).is_pinned
        ray.get(handle.expect.remote("a"))
        until(lambda: ray.get(handle.status.remote()).num_disk_images, "the image to come to the disk")
        os.kill(pid_of(handle), signal.SIGKILL)
        assert ray.get(lease(handle).image).nbytes == lease(handle).num_bytes
        status = ray.get(handle.status.remote())
        assert (status.fetches, status.num_registered, status.num_pinned, status.degraded) == (0, 1, 1, ())
        assert [record.name for record in ray.get(handle.warm_set.remote(digest, 1 << 20))] == ["a"]
        assert ray.get(handle.resolve.remote("team/x")).source == "catalog"
        assert not ray.get(handle.unpin.remote("a")).is_pinned
        assert ray.get(handle.unregister.remote(("team/x",))) == ("team/x",)
    finally:
        ray.kill(handle)


def test_a_store_that_nobody_calls_leaves_and_a_new_one_can_be_had(sources):
    name = f"idle-{uuid.uuid4().hex}"
    handle = get_or_create_store(sources, namespace=NAMESPACE, name=name, idle_exit_s=0.2)
    lease(handle)
    full_name = store_name(sources, StoreConfig(), name)

    def has_left():
        try:
            ray.get_actor(full_name, namespace=NAMESPACE)
        except ValueError:
            return True
        return False

    until(has_left, "the idle store to leave")
    with pytest.raises(RayActorError):
        ray.get(handle.protocol_version.remote())
    again = get_or_create_store(sources, namespace=NAMESPACE, name=name)
    assert lease(again).name == "a"
    ray.kill(again)
