"""Your own training loop, which takes our loss alone.

    python -m pwkd_jax.examples.own_loop
"""

import jax
import jax.numpy as jnp
import optax

import pwkd_jax as pwkd

task = pwkd.task(pwkd.load_data("digits"))
net = pwkd.make_slimmable("resnet8", (0.5, 1.0), image_shape=(8, 8, 1), num_classes=10)
teacher = pwkd.train_teacher(net, task, duration="2 epochs")
student = pwkd.create_model("resnet8", width=0.25, num_classes=10)

# The loop: twenty lines.

distil = pwkd.fit_distiller(student, teacher, task, "kd")
plan = pwkd.even_plan("pwkd", teacher.widths, total=80)
rate = pwkd.learning_rate(pwkd.cycles(plan, True), form="cosine", peak=0.05)
tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
variables = student.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
params, stats, opt_state = variables["params"], variables["batch_stats"], tx.init(variables["params"])
batches = pwkd.batches(task.train, batch_size=64, seed=0)
for stage in plan:
    width = stage.widths[0]
    sub_network = teacher.at(width)

    @jax.jit
    def step(params, stats, opt_state, images, labels, width=width, sub_network=sub_network):
        x = task.normalise(images)
        taught, _ = pwkd.apply_model(sub_network.model, sub_network.variables, x, train=False)

        def loss_fn(params):
            out, new = pwkd.apply_model(student, {"params": params, "batch_stats": stats}, x, train=True)
            loss, metrics = distil.loss(out, taught, labels, width=width)
            return loss, (new, metrics)

        grads, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, metrics

    for n in range(stage.start, stage.end):
        batch = batches(n)
        params, stats, opt_state, metrics = step(params, stats, opt_state, batch["image"], batch["label"])
    print(f"taught at width {width:g}: distillation {metrics['distillation']:.3f}")

found = pwkd.Network(student, {"params": params, "batch_stats": stats}, task.card(student, source={"steps": 80}))
print("student:", pwkd.score(found, task))
