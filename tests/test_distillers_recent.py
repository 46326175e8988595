"""Distillers with official code of 2023 and 2024, against that code; what mathematics says of them is in ..._recent_facts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import distillers
from pwkd_jax.distillers import diffkd, dkd, sdd, vkd, wkd
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.models import Outputs

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_recent.json").read_text())
LABELS = np.load(DATA / "golden_logits.npz")["labels"]
FIVE = LABELS % 5
PAST = distillers.Progress(np.int32(0), np.int32(1000), np.float32(100))


def of_kd(s, t, labels):
    """KD of every row alone, through the mean that another test holds to the authors'."""
    return jax.vmap(lambda a, b: kd_loss(a[None], b[None], 4.0))(s, t)


def of_dkd(s, t, labels):
    return sum(w * x for w, x in zip((1.0, 8.0), dkd.each_dkd(s, t, labels, 4.0), strict=True))


def regions(each, scales):
    def loss(fmap_s, head_s, bias_s, fmap_t, head_t, bias_t):
        own, taught = (sdd.region_logits(f, h, scales) for f, h in ((fmap_s, (head_s, bias_s)), (fmap_t, (head_t, bias_t))))
        return sdd.sdd_loss(each, own, taught, FIVE, 2.0)

    return loss, ("fmap_s", "head_s", "bias_s"), ("fmap_t", "head_t", "bias_t")


def transport(temperature, weight, *sinkhorn):
    def loss(s, t, prototypes):
        costs = wkd.category_costs(prototypes, 1.0)
        target, moved = wkd.wkd_logit_losses(s, t, LABELS, costs, temperature, *sinkhorn)
        return target + weight * moved

    return loss, ("logits_s",), ("logits_t", "prototypes")


def gaussians(grid, mean_weight):
    def loss(s, kernel, t):
        ones = jnp.ones(t.shape[-1], s.dtype)
        params = {"regressor": {"conv": {"kernel": kernel}, "norm": {"scale": ones, "bias": 0 * ones}}}
        module = distillers.create("wkd_f", grid=grid, mean_weight=mean_weight)
        inputs = (Outputs(t[:, 0, 0], stages=(s,)), Outputs(t[:, 0, 0], stages=(t,)), {}, PAST)
        return module.apply({"params": params}, *inputs, mutable=["batch_stats"])[0][0]

    return loss, ("fmap_s", "wkd_conv"), ("fmap_t",)


def matching(label_weight, kd_weight):
    def loss(s, head_s, bias_s, expand, contract, t, head_t, bias_t):
        whole = {"scale": jnp.ones(16, s.dtype), "bias": jnp.zeros(16, s.dtype)}
        split = {k: jnp.broadcast_to(v[0], (4, 32)) for k, v in whole.items()}
        kernels = {"expand": expand.reshape(16, 4, 32), "contract": contract.reshape(4, 32, 16)}
        params = {k: {"kernel": v} for k, v in kernels.items()} | {"expand_norm": split, "contract_norm": whole}
        module = distillers.create("norm", parts=4, label_weight=label_weight, kd_weight=kd_weight)
        teacher = Outputs(jnp.mean(t, axis=(1, 2)) @ head_t + bias_t, final=t, head=(head_t, bias_t))
        student = Outputs(jnp.zeros((32, 5), s.dtype), final=s, head=(head_s, bias_s))
        variables = {"params": {"transform": params}}
        return module.apply(variables, student, teacher, {"label": FIVE}, PAST, mutable=["batch_stats"])[0][0]

    return loss, ("fmap_s", "head_s", "bias_s", "norm_expand", "norm_contract"), ("fmap_t", "head_t", "bias_t")


def projected(own, free, taught):
    def loss(s, free, t):
        return vkd.smooth_l1(s @ vkd.orthogonal(free), vkd.standardised(t))

    return loss, (own, free), (taught,)


# Of both of DiffKD's modules: {the authors' layer: ours}. The first of either kind also stands for its bias.
BOTH = {"trans": "align", "noise_adapter.pred": "share/pick", "proj.0": "project"}
MAP = BOTH | {
    "ae.encoder.0": "encoder", "ae.decoder.0": "decoder", "model.pred.2": "noise/out/conv1",
    **{f"model.pred.{i}.block.{3 * j}": f"noise/block{i + 1}/conv{j + 1}" for i in (0, 1) for j in (0, 1, 2)},
    **{f"noise_adapter.feat.0.block.{3 * j}": f"share/block/conv{j + 1}" for j in (0, 1, 2)},
}  # fmt: skip
PIXEL = BOTH | {
    "model.pred.0": "noise/block1/conv1", "model.pred.3": "noise/block1/conv2", "model.pred.5": "noise/block2/conv1",
    "model.pred.8": "noise/block2/conv2",
    "noise_adapter.feat.0": "share/block/conv1", "noise_adapter.feat.3": "share/block/conv2",
}  # fmt: skip
TIMES = jnp.asarray(np.arange(32) * 31 % 1000)


def denoised(name, layers, module):
    """Noise and times given, so that nothing is drawn; every array that trains is compared."""
    student, teacher = ("fmap_s", "fmap_t") if name == "diff_map" else ("logits_s", "logits_t")
    own = [k for k in GOLDEN["arrays"] if k.startswith(f"{name}.")]

    def ours(key):
        layer, kind = key.removeprefix(f"{name}.").rsplit(".", 1)
        time = layer == "model.time_embedding"
        return tuple(("noise/time" if time else f"{layers[layer]}/{'kernel' if kind == 'weight' else 'bias'}").split("/"))

    def loss(s, *rest):
        weights, (t, noise, target_noise) = rest[: len(own)], rest[len(own) :]
        if name == "diff_logits":
            s, t = s[:, None, None, :10], t[:, None, None, :12]
        inputs = (s, t, noise, target_noise, TIMES)
        flat = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
        given = {ours(key): w.T if ours(key)[-1] == "time" else w for key, w in zip(own, weights, strict=True)}
        assert {k for k in flat if k[-1] != "scale" and "norm" not in k[-2]} == given.keys()
        params = {k: given.get(k, (jnp.ones if k[-1] == "scale" else jnp.zeros)(x.shape, s.dtype)) for k, x in flat.items()}
        found, _ = module.apply({"params": unflatten_dict(params)}, *inputs, mutable=["batch_stats"])
        guess, target, noises, decoded = found
        if name == "diff_map":
            return jnp.mean((guess - target) ** 2) + noises + decoded
        return kd_loss(guess[:, 0, 0], target[:, 0, 0], 1.0) + noises

    return loss, (student, *own), (teacher, f"{name}_noise", f"{name}_target_noise")


LOSSES = {
    "SDD_KD_12": regions(of_kd, (2,)), "SDD_KD_124": regions(of_kd, (2, 4)),
    "SDD_DKD_12": regions(of_dkd, (2,)), "SDD_DKD_124": regions(of_dkd, (2, 4)),
    "WKD_L_T8": transport(8.0, 600.0, 0.05, 10), "WKD_L_T4": transport(4.0, 60.0, 0.05, 10),
    "WKD_L_T2_reg0.5": transport(2.0, 1.0, 0.5, 3),
    "WKD_F_grid1": gaussians(1, 4.0), "WKD_F_grid4": gaussians(4, 3.0), "WKD_F_grid3": gaussians(3, 2.0),
    "NORM": matching(0.125, 0.0), "NORM_KD": matching(0.25, 1.0),
    "DiffKD_map": denoised("diff_map", MAP, diffkd.Denoise(True, 24, 5)),
    "DiffKD_logits": denoised("diff_logits", PIXEL, diffkd.Denoise(False, 0, 5)),
    "VkD_up": projected("pooled_s", "vkd_up", "pooled_t"),
    "VkD_square": projected("pooled_s", "vkd_square", "pooled_t_same"),
    "VkD_down": projected("pooled_t", "vkd_down", "pooled_s"),
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays(golden_logits):
    """By name, in this library's layout: maps NHWC, kernels with the outputs last."""
    made = {key: golden_logits[key] for key in ("logits_s", "logits_t")}
    stream = np.random.RandomState(0).randn(450_000)
    for name, a in json.loads((DATA / "golden_features.json").read_text())["arrays"].items():
        if name.startswith(("fmap", "pooled")):
            x = stream[a["offset"] : a["offset"] + np.prod(a["shape"])].reshape(a["shape"]).astype(np.float32)
            made[name] = (x * np.float32(a["scale"])).transpose((0, 2, 3, 1) if x.ndim == 4 else (0, 1))
    rng = np.random.RandomState(1)
    for name, (shape, scale) in GOLDEN["arrays"].items():
        x = rng.randn(*shape).astype(np.float32) * np.float32(scale)
        kernel = (2, 3, 1, 0) if x.ndim == 4 else range(x.ndim)[::-1]
        made[name] = x.transpose((0, 2, 3, 1) if name.endswith("_noise") else kernel)
    return made


def test_every_number_of_the_authors_is_compared():
    assert LOSSES.keys() == GOLDEN.keys() - {"about", "arrays"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_authors(name, arrays):
    (loss, own, taught), expected = LOSSES[name], GOLDEN[name]
    assert expected["grad_l2"].keys() == set(own)
    for dtype, value_at, rtol, grad_rtol in ((np.float32, "value", 2e-5, 1e-3), (np.float64, "value_float64", 1e-7, 1e-5)):
        with jax.enable_x64(dtype == np.float64):
            inputs = [arrays[k].astype(dtype) for k in (*own, *taught)]
            value, grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(own)))))(*inputs)
            assert value.dtype == dtype
            np.testing.assert_allclose(value, expected[value_at], rtol=rtol)
            for key, grad in zip(own, grads, strict=True):
                np.testing.assert_allclose(np.linalg.norm(grad), expected["grad_l2"][key], rtol=grad_rtol, err_msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_bfloat16(name, arrays):
    loss, own, taught = LOSSES[name]
    rounded = [jnp.asarray(arrays[k], jnp.bfloat16) for k in (*own, *taught)]
    value, grads = jax.jit(jax.value_and_grad(loss))(*rounded)
    assert value.dtype == jnp.float32 and np.all(np.isfinite(grads.astype(jnp.float32)))
    np.testing.assert_allclose(value, loss(*(x.astype(jnp.float32) for x in rounded)), rtol=2e-2)
