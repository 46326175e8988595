"""The pages of `python -m pwkd_jax.preflight` as text, within 100 columns."""

GIB, MIB = 1 << 30, 1 << 20


def text(result: dict) -> str:
    """The result of `preflight.preflight` in lines."""
    tpu = result["fits"] is not None
    parts = [_head(result), _memory(result), _work(result), _network(result)] if tpu else [_head(result), _work(result)]
    if result.get("suggestions"):
        parts.append(_suggestions(result))
    parts.append(_verdict(result) if tpu else _unknown(result))
    return "\n\n".join(p for p in parts if p)


def _head(r: dict) -> str:
    chip, data = r["chip"], r["data"]
    lines = [f"{r['config']} on {r['topology']}: {_plural(r['chips'], 'chip' if r['fits'] is not None else 'card')}"]
    if chip:
        peak = chip["peak"] if r["dtype"] == "bfloat16" else chip["peak_float32"]
        lines[0] += (
            f" of {chip['memory'] / GIB:.0f} GiB, {peak / 1e12:,.0f} TFLOP/s in {r['dtype']} and "
            f"{chip['bandwidth'] / 1e9:,.0f} GB/s"
        )
    if r["devices"] != r["chips"]:
        lines.append(f"{r['devices']} devices, {r['devices'] // r['chips']} a chip; figures below are a device's")
    size = "x".join(map(str, data["image_shape"]))
    lines.append(
        f"{data['name']}, {data['source']}: {data['train_images']:,} training and {data['test_images']:,} test images of "
        f"{size}, {data['num_classes']:,} classes"
    )
    return "\n".join(lines)


def _memory(r: dict) -> str:
    names = f"{'args':>9}{'outputs':>9}{'aliased':>9}{'temps':>9}{'code':>7}{'total':>9}{'HBM':>6}"
    lines = [f"{'Memory of a device, MiB':<34}{'batch':>7}{names}"]
    available = r["chip"]["memory"] * r["chips"] / r["devices"]
    for p in r["programs"]:
        m = p["memory"]
        cells = [m["arguments"], m["outputs"], -m["aliased"], m["temporaries"]]
        numbers = "".join(f"{c / MIB:>9,.0f}" for c in cells) + f"{m['code'] / MIB:>7,.0f}{p['total'] / MIB:>9,.0f}"
        share = f"{p['total'] / available:>6.0%}"
        lines.append(f"  {p['name']:<32}{p['batch']:>7,}{numbers}{share}" + ("" if p["fits"] else "  does not fit"))
    return "\n".join(lines)


def _work(r: dict) -> str:
    money = f"{'cost':>10}" if r["cost"] is not None and r["price"] else ""
    names = f"{'GFLOP':>9}{'GB':>8}{'FLOP/B':>8}{'ms, least':>11}  {'bound by':<9}{'runs':>10}{'chip-h':>9}"
    lines = [f"{'One run on one device':<34}{names}{money}"]
    for p in r["programs"]:
        if p["fits"] is False:
            lines.append(f"  {p['name']:<32}{'not known: it does not fit':>36}")
            continue
        left = f"  {p['name']:<32}{p['flops'] / 1e9:>9,.1f}{p['traffic'] / 1e9:>8,.2f}{p['intensity'] or 0:>8,.0f}"
        if p["step_seconds"] is None:
            lines.append(f"{left}{'-':>11}  {'-':<9}{p['runs']:>10,}{'-':>9}")
            continue
        cost = f"{p['cost']:>10,.2f}" if money else ""
        lines.append(
            f"{left}{p['step_seconds'] * 1e3:>11,.3f}  {p['bound']:<9}{p['runs']:>10,}{_hours(p['chip_hours']):>9}{cost}"
        )
    return "\n".join(lines)


def _network(r: dict) -> str:
    lines = [f"{'Collectives of one run':<34}{'ms, estimate':>13}{'compiled in':>13}   kind, count and bytes"]
    for p in r["programs"]:
        kinds = ", ".join(f"{k} {n} of {b / 1e6:,.2f} MB" for k, (n, b) in p["communication"].items()) or "none"
        seconds = "-" if p["network_seconds"] is None else f"{p['network_seconds'] * 1e3:,.3f}"
        compiled = f"{p['compile_seconds']:,.0f} s" + ("*" if p["kept"] else " ")
        lines.append(f"  {p['name']:<32}{seconds:>13}{compiled:>13}   {kinds}")
    if any(p["kept"] for p in r["programs"]):
        lines.append("  * in an earlier command, which is remembered")
    return "\n".join(lines)


def _suggestions(r: dict) -> str:
    lines = ["Largest batches that fit"]
    for s in r["suggestions"]:
        tried = ", ".join(f"{int(b):,}: {m / GIB:.2f}" for b, m in s["tried"].items())
        what = f"{s['largest']:,}" if s["largest"] else f"none, not even {s['unit']:,}"
        lines.append(f"  {s['key']:<24}{what:>8}   by the {s['program']}")
        lines.append(f"  {'':<24}{'':>8}   GiB of {s['limit'] / GIB:.2f} at {tried}")
    return "\n".join(lines)


def _verdict(r: dict) -> str:
    lines = []
    if r["fits"]:
        most = max(r["programs"], key=lambda p: p["total"])
        lines.append(f"Fits: the {most['name']} needs most, {most['total'] / GIB:.2f} GiB.")
    else:
        for p in r["programs"]:
            if not p["fits"]:
                room = f" of the {p['limit'] / GIB:.2f} GiB that programs get" if p["limit"] else ""
                hint = "" if r.get("suggestions") else " (--suggest finds the batch)"
                lines.append(
                    f"Does not fit: the {p['name']} needs {p['total'] / GIB:.2f} GiB{room};\n"
                    f"  lower {p['batch_key']}{hint} or take more chips."
                )
    lines += _total(r)
    lines.append(
        "The compiler's: memory, FLOP, bytes, collectives. Estimates: the least time, which is the largest of FLOP\n"
        "at the peak, bytes at the bandwidth and collectives over the links by ring algorithms without latency;\n"
        "real steps take longer. Not counted: compiling, input, checkpoints, calibration, ensembles."
    )
    return "\n".join(lines)


def _total(r: dict) -> list[str]:
    if r["chip_hours"] is None:
        return []
    what = "These programs" if r["partial"] else "The whole config"
    money = f", {r['cost']:,.2f} at {r['price']:g} an hour" if r["cost"] is not None and r["price"] else ""
    hours = r["chip_hours"] / r["chips"]
    return [f"{what}: at least {_hours(r['chip_hours'])} chip-hours, {_hours(hours)} hours on this topology{money}."]


def _unknown(r: dict) -> str:
    least = max(p["memory"]["arguments"] for p in r["programs"])
    lines = [
        "Not known without the card: whether it fits, for the GPU's compiler chooses kernels, fusions and workspaces\n"
        "by running them there; the state and batch alone take "
        f"{least / MIB:,.0f} MiB of a card, and activations come on top."
    ]
    lines += _total(r)
    lines.append(
        "FLOP are counted in the program as written, bytes in what the CPU's compiler makes of it, where a GPU's would\n"
        "fuse otherwise: take the least time and what follows from it as a rough estimate. Communication is left out."
    )
    if not r["chip"]:
        lines.append("Name a card (a100, h100, h200) for times from its peak and bandwidth.")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3f}"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
