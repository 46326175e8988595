"""What `python -m pwkd_jax.benchmark` found as text, within 120 columns."""

from pwkd_jax.reporting.phrases import count


def text(result: dict) -> str:
    """The result of `benchmark.benchmark` in lines."""
    environment = result["environment"]
    lines = [
        f"{result['config']}, {result['dtype']}, on {environment['device_count']} x {environment['device']}"
        f" ({environment['processor']}), jax {environment['jax']}",
        f"images of {'x'.join(map(str, result['data']['image_shape']))} from "
        + ("random numbers" if result["data"]["synthetic"] else result["data"]["name"]),
        f"utilisation is of {result['peak_flops'] / 1e12:.3g} TFLOP/s a device, {result['peak_source']}",
        "",
        f"{'program':<29}{'batch':>6}{'compile s':>10}{'step ms':>9}{'(of rounds)':>18}{'images/s':>10}{'use':>6}{'GB/s':>7}"
        f"{'MiB':>7}{'wait':>6}",
    ]
    for row in result["programs"]:
        low, high = min(row["step_seconds_rounds"]), max(row["step_seconds_rounds"])
        spread = f"({_ms(low)} to {_ms(high)})"
        lines.append(
            f"{row['name']:<29}{row['batch']:>6}{row['compile_seconds']:>10.1f}{_ms(row['step_seconds']):>9}{spread:>18}"
            f"{row['images_per_second']:>10,.0f}{row['utilisation']:>6.0%}{row['traffic_per_second'] / 1e9:>7.1f}"
            f"{row['memory_bytes'] / 2**20:>7.0f}{row['input_wait']:>6.0%}"
        )
    if result["forms"] or result["notes"]:
        lines.append("")
    for form, found in result["forms"].items():
        middle, low, high = found["plain_steps"]
        lines.append(
            f"The {form} step takes {middle:.2f} ({low:.2f} to {high:.2f}) plain steps for the work of {found['work']:.2f}, "
            f"{middle / found['work']:.2f} times its share;\nto compile, {found['compile']:.1f} times as long."
        )
    lines += [f"Not timed: {note}" for note in result["notes"]]
    if peak := result["device_peak_bytes"]:
        lines.append(f"The device held {count(peak)}B at most.")
    lines += [
        "",
        "step: with its batch at hand, median of the rounds; images/s: fed as in training; wait: the share of that time that",
        "input costs; use: model FLOPs (a training step is 3 forward passes) of the peak; GB/s: bytes that the compiler",
        "counts; MiB: arguments, outputs and temporaries of one device.",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"
