"""Made keras_gates.npz: the gates of attn_gate.keras.FAMILIES in Keras, their weights and what they compute.

Written from descriptions of the gates, not from those networks' code. Run once, in an environment of its own:

    pip install keras==3.15.1 jax==0.10.2 h5py==3.16.0
    JAX_PLATFORMS=cpu python tests/data/make_keras_gates.py

Computed in float64 (batch norms in float32, as Keras does), stored in float32. For each case: `channels`
(C, G, I), `x`, `g` (channels last, as Keras has them), `slope` (the gradient of y), `arrays/NAME` (all
weights), and under `eval/` and `train/`: `y`, `d x`, `d g`, `d NAME`, and for train `moving/NAME`, the moving
statistics after that one step. `files/` holds what h5py reads from a saved model.
"""

import io
import os
import tempfile
import zipfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"

import h5py
import jax
import keras
import numpy as np
from keras import layers

keras.config.set_floatx("float64")


def of_dims(dims: int):
    """Layers of Keras for 2 or 3 axes of space."""
    return (
        {2: layers.Conv2D, 3: layers.Conv3D}[dims],
        {2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}[dims],
        {2: layers.UpSampling2D, 3: layers.UpSampling3D}[dims],
    )


def moleimg(x, g, inter, dims, tail=1, names=(None,) * 5):
    conv, transposed, upsample = of_dims(dims)
    theta = conv(inter, 2, strides=2, padding="same", name=names[0])(x)
    phi = conv(inter, 1)(g)
    phi = transposed(inter, 3, strides=tail, padding="same", name=names[1])(phi)
    alpha = layers.Activation("sigmoid")(
        conv(1, 1, name=names[2])(layers.Activation("relu")(layers.add([phi, theta])))
    )
    y = layers.multiply([upsample(2)(alpha), x])
    return layers.BatchNormalization(name=names[4])(conv(x.shape[-1], 1, name=names[3])(y))


def robinvvinod(x, g, inter, dims, stride=2):
    conv, _, upsample = of_dims(dims)
    theta = conv(inter, 3, strides=stride, padding="same")(x)
    phi = conv(inter, 1)(g)
    logits = conv(1, 1)(layers.Activation("relu")(layers.add([theta, phi])))
    y = layers.multiply([upsample(stride)(layers.Activation("sigmoid")(logits)), x])
    return layers.BatchNormalization()(conv(x.shape[-1], 1)(y))


def one_grid(x, g, inter, dims, combine=layers.add, activation="relu", prefix=None, **options):
    conv, _, _ = of_dims(dims)
    names = [prefix and f"{prefix}_{part}" for part in ("theta_x", "phi_g", "psi_f")]
    theta, phi = (conv(inter, 1, name=n, **options)(t) for n, t in zip(names[:2], (x, g), strict=True))
    query = layers.Activation(activation)(combine([theta, phi]))
    alpha = layers.Activation("sigmoid")(conv(1, 1, name=names[2], **options)(query))
    return layers.multiply([x, alpha])


def every_second_voxel(x, g, inter, dims):
    conv, _, upsample = of_dims(dims)
    query = layers.Activation("relu")(layers.add([conv(inter, 1, strides=2)(x), conv(inter, 1)(g)]))
    return layers.multiply([x, upsample(2)(layers.Activation("sigmoid")(conv(1, 1)(query)))])


class OneBias(layers.Layer):
    """The bias of junqiangchen's output transform."""

    def build(self, shape):
        self.bias = self.add_weight(shape=(1,), name="bias")

    def call(self, inputs):
        return inputs + self.bias


def junqiangchen(x, g, inter, dims):
    conv, _, _ = of_dims(dims)
    channels = x.shape[-1]
    y = OneBias()(conv(channels, 1, use_bias=False)(every_second_voxel(x, g, inter, dims)))
    return layers.GroupNormalization(min(16, channels), epsilon=1e-5)(y)


def nikhilroxtomar(x, g, inter, dims):
    conv, _, _ = of_dims(dims)
    phi = layers.BatchNormalization()(conv(inter, 1)(g))
    theta = layers.BatchNormalization()(conv(inter, 1)(x))
    alpha = layers.Activation("sigmoid")(conv(inter, 1)(layers.Activation("relu")(layers.add([phi, theta]))))
    return layers.multiply([alpha, x])


XL = ("xl_1", "g_up_1", "psi_1", "q_attn_conv_1", "q_attn_bn_1")
# name: function, size of x, size of g, channels of x, g and between, options
CASES = {
    "moleimg": (moleimg, (8, 6), (4, 3), (5, 7, 3), {}),
    "bnsreenu": (moleimg, (4, 6), (2, 3), (4, 4, 4), {}),
    "nabsabraham": (moleimg, (8, 8), (2, 2), (5, 7, 3), {"tail": 2, "names": XL}),
    "nabsabraham 3D": (moleimg, (4, 4, 4), (2, 2, 2), (3, 4, 2), {"names": XL}),
    "robinvvinod": (robinvvinod, (8, 6), (4, 3), (5, 7, 3), {}),
    "robinvvinod stride 4": (robinvvinod, (8, 4), (2, 1), (5, 7, 3), {"stride": 4}),
    "miscnn 3D": (robinvvinod, (4, 6, 4), (2, 3, 2), (3, 4, 2), {}),
    "keras_unet_collection": (one_grid, (7, 5), (7, 5), (6, 7, 3), {"prefix": "att"}),
    "keras_unet_collection multiply": (
        one_grid,
        (7, 5),
        (7, 5),
        (6, 7, 3),
        {"prefix": "att", "combine": layers.multiply},
    ),
    "keras_unet_collection gelu": (
        one_grid,
        (7, 5),
        (7, 5),
        (6, 7, 3),
        {"prefix": "att", "activation": "gelu"},
    ),
    "keras_unet": (one_grid, (7, 5), (7, 5), (6, 7, 7), {"kernel_initializer": "he_normal"}),
    "lixiaolei1982": (one_grid, (7, 5), (7, 5), (6, 8, 2), {}),
    "antspynet 3D": (one_grid, (3, 5, 4), (3, 5, 4), (4, 5, 2), {}),
    "medicai": (every_second_voxel, (8, 6), (4, 3), (5, 7, 3), {}),
    "medicai 3D": (every_second_voxel, (4, 6, 4), (2, 3, 2), (3, 4, 2), {}),
    "junqiangchen 3D": (junqiangchen, (4, 6, 4), (2, 3, 2), (4, 5, 2), {}),
    "nikhilroxtomar": (nikhilroxtomar, (7, 5), (7, 5), (6, 7, 6), {}),
}


def make_model(function, x_size, g_size, channels, options):
    keras.backend.clear_session()
    x, g = layers.Input((*x_size, channels[0])), layers.Input((*g_size, channels[1]))
    return keras.Model([x, g], function(x, g, channels[2], len(x_size), **options))


def eighths(rng, shape):
    """Numbers that are exact in float32 and need little room in the file."""
    return rng.integers(-16, 17, shape) / 8


def results(model, x, g, slope, training):
    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]

    def loss(trainable, x, g):
        y, moved = model.stateless_call(trainable, fixed, [x, g], training=training)
        return (y * slope).sum(), (y, moved)

    (_, (y, moved)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(trainable, x, g)
    found = {"y": y, "d x": grads[1], "d g": grads[2]}
    found |= {f"d {v.path}": d for v, d in zip(model.trainable_variables, grads[0], strict=True)}
    if training:
        found |= {f"moving/{v.path}": m for v, m in zip(model.non_trainable_variables, moved, strict=True)}
    return found


def saved_files(model):
    """What h5py reads from this model in the formats of Keras, by the ways in attn_gate/keras.py's text."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/net.h5")
        model.save(f"{folder}/net.keras")
        with h5py.File(f"{folder}/net.h5") as file:
            file.visititems(
                lambda name, item: found.update({f"h5/{name}": item[()]} if hasattr(item, "dtype") else {})
            )
        inner = zipfile.ZipFile(f"{folder}/net.keras").read("model.weights.h5")
        with h5py.File(io.BytesIO(inner)) as file:
            for layer in file["layers"].values():
                name = layer["vars"].attrs["name"]
                found |= {f"keras/{name}/{number}": array[()] for number, array in layer["vars"].items()}
    return found


def main():
    rng = np.random.default_rng(0)
    stored = {}
    for case, (function, x_size, g_size, channels, options) in CASES.items():
        model = make_model(function, x_size, g_size, channels, options)
        for variable in model.variables:
            values = eighths(rng, variable.shape)
            variable.assign(np.abs(values) + 0.5 if variable.path.endswith("moving_variance") else values)
        x, g = (eighths(rng, (2, *size, c)) for size, c in zip((x_size, g_size), channels, strict=False))
        slope = eighths(rng, x.shape)
        stored |= {f"{case}/channels": channels, f"{case}/x": x, f"{case}/g": g, f"{case}/slope": slope}
        stored |= {f"{case}/arrays/{v.path}": v for v in model.variables}
        for mode in ("eval", "train"):
            found = results(model, x, g, slope, mode == "train")
            stored |= {f"{case}/{mode}/{name}": value for name, value in found.items()}
        if case == "nabsabraham":
            stored |= {f"files/{name}": value for name, value in saved_files(model).items()}
    path = Path(__file__).with_name("keras_gates.npz")
    np.savez_compressed(path, **{name: np.asarray(value, np.float32) for name, value in stored.items()})
    print(f"{path}: {len(CASES)} gates, {path.stat().st_size / 1024:.0f} KiB, Keras {keras.__version__}")


if __name__ == "__main__":
    main()
