import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dlc_jax.probes.kernel import ClassSums, prototype_loss


@settings(deadline=None, max_examples=25)
@given(
    num_classes=st.sampled_from([2, 15]),  # few shapes, few compilations
    num_features=st.sampled_from([1, 64]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_loss_is_torchs_cross_entropy_of_inverse_distances(num_classes, num_features, scale, seed):
    import torch

    generator = np.random.default_rng(seed)
    features = generator.normal(0, scale, (7, num_features)).astype(np.float32)
    prototypes = generator.normal(0, scale, (num_classes, num_features)).astype(np.float32)
    labels = generator.integers(0, num_classes, 7).astype(np.int32)
    distances = np.linalg.norm(
        features[:, None].astype(np.float64) - prototypes[None].astype(np.float64), axis=-1
    )
    if distances.min() < 0.02 * scale:
        return  # 1 / distance is ill-conditioned there in any float32 implementation
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(1 / distances), torch.from_numpy(labels).long(), reduction="none"
    ).numpy()
    np.testing.assert_allclose(
        prototype_loss(*map(jnp, (features, labels, prototypes))), expected, rtol=2e-3, atol=2e-6
    )


def jnp(array):
    import jax

    return jax.numpy.asarray(array)


def test_loss_by_hand():
    features = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    prototypes = np.array([[0.0, 2.0], [3.0, 0.0]], np.float32)
    # distances: 2 and 3; sqrt(13) and 4
    logits = np.array([[1 / 2, 1 / 3], [1 / np.sqrt(13), 1 / 4]])
    expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1], [1, 0]]
    losses = prototype_loss(jnp(features), jnp(np.array([1, 0], np.int32)), jnp(prototypes))
    np.testing.assert_allclose(losses, expected, atol=1e-6)


def test_a_sample_on_its_prototype_has_no_infinite_loss():
    point = np.ones((1, 3), np.float32)
    prototypes = np.array([[1, 1, 1], [2, 2, 2]], np.float32)
    for label in (0, 1):
        loss = prototype_loss(jnp(point), jnp(np.array([label], np.int32)), jnp(prototypes))
        assert np.isfinite(loss).all()


def test_class_means_do_not_depend_on_batches():
    features = np.array([[1, 2], [3, 4], [10, 10]], np.float32)
    labels = np.array([1, 1, 0])
    whole = ClassSums(3)
    whole.add(features, labels)
    np.testing.assert_array_equal(whole.means(), [[10, 10], [2, 3], [np.nan, np.nan]])
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(100, 5)), generator.integers(0, 3, 100)
    whole = ClassSums(3)
    whole.add(features, labels)
    total = ClassSums(3)
    for start in range(0, 100, 33):
        part = ClassSums(3)
        for at in range(start, min(start + 33, 100), 10):
            stop = min(at + 10, start + 33)
            part.add(features[at:stop], labels[at:stop])
        total.add_arrays(part.arrays())
    np.testing.assert_allclose(total.sums, whole.sums, rtol=1e-13)
    np.testing.assert_array_equal(total.counts, whole.counts)
