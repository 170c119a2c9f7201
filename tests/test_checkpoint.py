"""A checkpoint gives back exactly what was saved, on any mesh, or nothing, or a sentence."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgrpo_jax import checkpoint

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def initial(width: int = 16):
    kernel_DF = jax.random.normal(jax.random.key(0), (width, 8))
    params = {"mlp": {"kernel": kernel_DF}, "norm": jnp.ones(width, jnp.bfloat16)}
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def sharded(state, mesh):
    """Matrices split over fsdp in their first axis, the rest on every device."""

    def one(x):
        spec = PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, state)


@jax.jit
def update(state, step):
    def loss(params):
        x_B8 = jnp.sin(jnp.arange(16.0) + step) @ params["mlp"]["kernel"]
        return jnp.sum((x_B8 - 1) ** 2) + jnp.sum(params["norm"].astype(jnp.float32) ** 2)

    gradient = jax.grad(loss)(state["params"])
    change, optimizer = OPTIMIZER.update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], change), "optimizer": optimizer}


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_a_continued_run_is_the_straight_run_to_the_last_bit(tmp_path):
    wanted = sharded(initial(), mesh_of(1, 8))
    start = jax.device_put(initial(), jax.tree.map(lambda x: x.sharding, wanted))
    straight = state = start
    for step in range(6):
        straight = update(straight, step)
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        for step in range(3):
            state = update(state, step)
        checkpoints.save(3, state, {"data": {"next_index": 48}})
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        step, state, extra = checkpoints.restore(wanted)
    assert (step, extra) == (3, {"data": {"next_index": 48}})
    for later in range(step, 6):
        state = update(state, later)
    assert_equal_bits(state, straight)


def test_a_state_saved_on_one_mesh_comes_back_in_the_shardings_of_another(tmp_path):
    small, large = mesh_of(4, 2), mesh_of(1, 8)
    state = update(initial(), 0)
    placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, sharded(state, small)))
    with checkpoint.Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(1, placed, {})
        wanted = sharded(state, large)
        _, restored, _ = checkpoints.restore(wanted)
    assert_equal_bits(restored, state)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.sharding, y.sharding), restored, wanted)
    assert restored["params"]["mlp"]["kernel"].addressable_shards[0].data.shape == (2, 8)


def test_donating_the_state_after_save_does_not_reach_the_checkpoint(tmp_path):
    # 16 MiB a matrix, so that the background write is still under way when the buffers are reused.
    state = {"w": jnp.arange(2.0**22).reshape(2**11, 2**11)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(1, state, {})
        state = jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        _, restored, _ = checkpoints.restore(sharded(state, mesh_of(1, 8)))
    assert_equal_bits(restored, {"w": jnp.arange(2.0**22).reshape(2**11, 2**11)})


def test_only_the_newest_are_kept_and_the_newest_comes_back(tmp_path):
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((8, 8), step)}, {"step": step})
    names = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"2", "3"}
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        step, state, extra = checkpoints.restore(
            sharded({"w": jnp.zeros((8, 8), int)}, mesh_of(1, 8))
        )
    assert step == 3 and extra == {"step": 3} and (state["w"] == 3).all()


def test_an_empty_folder_restores_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        assert checkpoints.restore(sharded(initial(), mesh_of(1, 8))) is None


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        checkpoints.save(5, {"w": jnp.ones((8, 8))}, {"n": 1})
        checkpoints.save(5, {"w": jnp.ones((8, 8))}, {"n": 2})
        _, _, extra = checkpoints.restore(sharded({"w": jnp.zeros((8, 8))}, mesh_of(1, 8)))
    assert extra == {"n": 1}


@pytest.fixture
def full_disk():
    """No file of this process may grow past 64 KiB, as if the disk were full; gives the way out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(seed: int):
    return {"w": jax.random.bits(jax.random.key(seed), (512, 512))}  # 1 MiB that does not compress


def test_a_half_written_checkpoint_is_an_error_and_is_never_picked_up(tmp_path, request):
    checkpoints = checkpoint.Checkpoints(tmp_path, kept=2)
    checkpoints.save(1, noise(1), {})
    checkpoints.wait()
    free_disk = request.getfixturevalue("full_disk")
    with pytest.raises(Exception, match="(?i)file too large|EFBIG"):
        checkpoints.save(2, noise(2), {})
        checkpoints.wait()
    free_disk()
    assert any(path.name.startswith("2") for path in (tmp_path / "checkpoints").iterdir())
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        step, state, _ = checkpoints.restore(sharded(noise(0), mesh_of(1, 8)))
        assert step == 1
        assert_equal_bits(state, noise(1))
        checkpoints.save(2, noise(2), {})
    with checkpoint.Checkpoints(tmp_path, kept=2) as checkpoints:
        assert checkpoints.restore(sharded(noise(0), mesh_of(1, 8)))[0] == 2


def test_another_architecture_is_refused_by_the_name_of_the_array(tmp_path):
    with checkpoint.Checkpoints(tmp_path, kept=1) as checkpoints:
        checkpoints.save(4, initial(16), {})
        with pytest.raises(
            ValueError, match=r"step 4 .*params/norm is bfloat16\[16\] there and bfloat16\[24\]"
        ):
            checkpoints.restore(sharded(initial(24), mesh_of(1, 8)))
        fewer = initial(16)
        del fewer["params"]["norm"]
        with pytest.raises(ValueError, match=r"params/norm is bfloat16\[16\] there and absent"):
            checkpoints.restore(sharded(fewer, mesh_of(1, 8)))
