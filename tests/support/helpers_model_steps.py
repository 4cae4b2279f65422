"""Models with steps of their own, written as Keras' guide for each backend writes them."""

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def apply_gradients(model, optimizer, variables, loss_of):
    """One update on PyTorch or TensorFlow; returns the loss."""
    if BACKEND == "torch":
        import torch

        model.zero_grad()
        loss = loss_of()
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
        return loss
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = loss_of()
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return loss


class WithTrackers(keras.Model):
    """Trains by ``loss_of(x)``, two losses with a running mean each, and logs their means."""

    def __init__(self):
        super().__init__()
        self.trackers = [keras.metrics.Mean(name="loss"), keras.metrics.Mean(name="part_loss")]

    @property
    def metrics(self):
        return self.trackers

    def update_trackers(self, values):
        for tracker, value in zip(self.trackers, values, strict=True):
            tracker.update_state(value)
        return {tracker.name: tracker.result() for tracker in self.trackers}

    if BACKEND == "jax":

        def stateless_losses(self, trainable, others, x):
            mapping = zip(
                [*self.trainable_variables, *self.non_trainable_variables],
                [*trainable, *others],
                strict=True,
            )
            with keras.StatelessScope(mapping) as scope:
                loss, part = self.losses_of(x)
            others = [scope.get_current_value(v) for v in self.non_trainable_variables]
            return loss, (part, others)

        def stateless_trackers(self, state, values):
            mapping = zip(self.metrics_variables, state, strict=True)
            with keras.StatelessScope(mapping) as scope:
                logs = self.update_trackers(values)
            return logs, [scope.get_current_value(v) for v in self.metrics_variables]

        def train_step(self, state, data):
            import jax

            trainable, others, slots, metrics = state
            differentiate = jax.value_and_grad(self.stateless_losses, has_aux=True)
            (loss, (part, others)), gradients = differentiate(trainable, others, data)
            trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
            logs, metrics = self.stateless_trackers(metrics, (loss, part))
            return logs, (trainable, others, slots, metrics)

    else:

        def train_step(self, data):
            parts = []

            def loss_of():
                loss, part = self.losses_of(data)
                parts[:] = [part]
                return loss

            loss = apply_gradients(self, self.optimizer, self.trainable_weights, loss_of)
            return self.update_trackers((loss, parts[0]))


class Vae(WithTrackers):
    """A variational autoencoder of two dense layers; it has no ``call``."""

    def __init__(self):
        super().__init__()
        inputs = keras.Input((3,))
        hidden = keras.layers.BatchNormalization()(keras.layers.Dense(4, use_bias=False)(inputs))
        outputs = [keras.layers.Dense(2, name=name)(hidden) for name in ("mean", "log_variance")]
        self.encoder = keras.Model(inputs, outputs)
        self.decoder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        self.seed = keras.random.SeedGenerator(3)
        self.built = True

    def losses_of(self, x):
        mean, log_variance = self.encoder(x, training=True)
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        reconstruction = self.decoder(mean + ops.exp(0.5 * log_variance) * noise)
        kl = -0.5 * ops.mean(1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        return ops.mean(ops.square(x - reconstruction)) + kl, kl


class Contrastive(WithTrackers):
    """Two noisy views of a sample are to be nearer to each other than to the other samples."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        self.noise = keras.layers.GaussianNoise(0.1, seed=4)
        self.built = True

    def losses_of(self, x):
        views = [self.encoder(self.noise(x, training=True)) for _ in range(2)]
        views = [ops.normalize(view, axis=1) for view in views]
        similarities = ops.matmul(views[0], ops.transpose(views[1])) / 0.5
        labels = ops.arange(ops.shape(x)[0])
        loss = keras.losses.sparse_categorical_crossentropy(labels, similarities, from_logits=True)
        correct = ops.cast(ops.equal(ops.argmax(similarities, 1), labels), "float32")
        return ops.mean(loss), ops.mean(correct)


class Gan(keras.Model):
    """Two networks, and on PyTorch and TensorFlow two optimizers that ``compile`` is given."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        self.discriminator = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)]
        )
        self.seed = keras.random.SeedGenerator(5)
        self.built = True

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        # On JAX the state of a step holds the slots of one optimizer.
        super().compile(**({"optimizer": d_optimizer} if BACKEND == "jax" else {}))
        if BACKEND != "jax":
            self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.loss_fn = loss_fn

    def discriminator_loss(self, x, noise):
        fake = ops.stop_gradient(self.generator(noise))
        outputs = self.discriminator(ops.concatenate([fake, x]))
        count = ops.shape(x)[0]
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))])
        return self.loss_fn(labels, outputs)

    def generator_loss(self, noise):
        outputs = self.discriminator(self.generator(noise))
        return self.loss_fn(ops.zeros_like(outputs), outputs)

    if BACKEND == "jax":

        def train_step(self, state, data):
            import jax

            trainable, (seed,), slots, metrics = state
            noise = jax.random.normal(jax.random.wrap_key_data(seed), (2, data.shape[0], 2))
            count = len(self.generator.trainable_variables)

            def losses_of(own, others, loss):
                values = [*own, *others] if loss == "g" else [*others, *own]
                mapping = zip(self.trainable_variables, values, strict=True)
                with keras.StatelessScope(mapping):
                    if loss == "g":
                        return self.generator_loss(noise[1])
                    return self.discriminator_loss(data, noise[0])

            differentiate = jax.value_and_grad(losses_of)
            g, d = trainable[:count], trainable[count:]
            d_loss, d_gradients = differentiate(d, g, "d")
            g_loss, g_gradients = differentiate(g, d, "g")
            trainable, slots = self.optimizer.stateless_apply(
                slots, [*g_gradients, *d_gradients], trainable
            )
            logs = {"d_loss": d_loss, "g_loss": g_loss}
            return logs, (trainable, [seed + 1], slots, metrics)

    else:

        def train_step(self, data):
            losses = {}
            for name, network in (("d", self.discriminator), ("g", self.generator)):
                noise = keras.random.normal((ops.shape(data)[0], 2), seed=self.seed)
                losses[f"{name}_loss"] = apply_gradients(
                    self,
                    getattr(self, f"{name}_optimizer"),
                    network.trainable_weights,
                    lambda name=name, noise=noise: (
                        self.discriminator_loss(data, noise)
                        if name == "d"
                        else self.generator_loss(noise)
                    ),
                )
            return losses


class CallsSuper(keras.Model):
    """Logs one more value than its base class."""

    def __init__(self):
        super().__init__()
        self.normalization = keras.layers.BatchNormalization()
        self.dense = keras.layers.Dense(1)

    def call(self, x, training=None):
        return self.dense(self.normalization(x, training=training))

    if BACKEND == "jax":

        def train_step(self, state, data):
            logs, state = super().train_step(state, data)
            return {**logs, "double": 2 * logs["loss"]}, state

    else:

        def train_step(self, data):
            logs = super().train_step(data)
            return {**logs, "double": 2 * logs["loss"]}


class OwnEvaluation(keras.Model):
    """Its ``test_step`` reports the largest error; its ``predict_step`` rounds."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.largest = keras.metrics.Mean(name="largest")

    def call(self, x):
        return self.dense(x)

    if BACKEND == "jax":

        def test_step(self, state, data):
            trainable, others, metrics = state
            x, y = data
            outputs, others = self.stateless_call(trainable, others, x)
            start = len(metrics) - len(self.largest.variables)
            own = self.largest.stateless_update_state(
                metrics[start:], ops.max(ops.abs(outputs - y))
            )
            logs = {"largest": self.largest.stateless_result(own)}
            return logs, (trainable, others, [*metrics[:start], *own])

        def predict_step(self, state, data):
            outputs, others = super().predict_step(state, data)
            return ops.round(outputs), others

    else:

        def test_step(self, data):
            x, y = data
            self.largest.update_state(ops.max(ops.abs(self(x, training=False) - y)))
            return {"largest": self.largest.result()}

        def predict_step(self, data):
            return ops.round(super().predict_step(data))


def host(variables):
    """Host copies of variables."""
    return [np.array(ops.convert_to_numpy(v.value)) for v in variables]
