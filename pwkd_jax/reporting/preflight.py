"""The pages of `python -m pwkd_jax.preflight` as text, within 100 columns."""

GIB, MIB = 1 << 30, 1 << 20


def text(result: dict) -> str:
    """The result of `preflight.preflight` in lines."""
    tpu = result["fits"] is not None
    parts = [_head(result), _memory(result), _work(result), _network(result)] if tpu else [_head(result), _work(result)]
    if result.get("input"):
        parts.append(_input(result))
    if result.get("suggestions"):
        parts.append(_suggestions(result))
    parts.append(_verdict(result) if tpu else _unknown(result))
    return "\n\n".join(p for p in parts if p)


def _head(r: dict) -> str:
    chip, data = r["chip"], r["data"]
    lines = [f"{r['config']} on {r['topology']}: {_plural(r['chips'], 'chip' if r['fits'] is not None else 'card')}"]
    if chip:
        peak = chip["peak"] if r["dtype"] == "bfloat16" else chip["peak_float32"]
        lines.append(
            f"each with {chip['memory'] / GIB:.0f} GiB at {chip['bandwidth'] / 1e9:,.0f} GB/s and, of {r['dtype']}, "
            f"{peak / 1e12:,.0f} TFLOP/s"
        )
    if r["devices"] != r["chips"]:
        lines.append(f"{r['devices']} devices, {r['devices'] // r['chips']} a chip; figures below are a device's")
    size = "x".join(map(str, data["image_shape"]))
    lines.append(
        f"{data['name']}, {data['source']}: {data['train_images']:,} + {data['test_images']:,} images of {size}, "
        f"{data['num_classes']:,} classes"
    )
    return "\n".join(lines)


def _memory(r: dict) -> str:
    names = f"{'args':>8}{'outputs':>8}{'aliased':>8}{'temps':>8}{'code':>7}{'total':>8}{'HBM':>6}"
    lines = [f"{'Memory of a device, MiB':<31}{'batch':>6}{names}"]
    available = r["chip"]["memory"] * r["chips"] / r["devices"]
    for p in r["programs"]:
        m = p["memory"]
        cells = (m["arguments"], m["outputs"], -m["aliased"], m["temporaries"])
        numbers = "".join(f"{_n(c / MIB):>8}" for c in cells) + f"{_n(m['code'] / MIB):>7}{_n(p['total'] / MIB):>8}"
        share = f"{p['total'] / available:>6.0%}"
        lines.append(f"  {p['name']:<29}{p['batch']:>6}{numbers}{share}" + ("" if p["fits"] else "  too big"))
    return "\n".join(lines)


def _work(r: dict) -> str:
    money = f"{'cost':>9}" if r["cost"] is not None and r["price"] else ""
    names = f"{'GFLOP':>9}{'GB':>7}{'FLOP/B':>7}{'least ms':>10}  {'bound':<7}{'runs':>10}{'chip-h':>8}"
    lines = [f"{'One run on one device':<31}{names}{money}"]
    for p in r["programs"]:
        if p["fits"] is False:
            lines.append(f"  {p['name']:<29}{'not known: it does not fit':>33}")
            continue
        left = f"  {p['name']:<29}{_n(p['flops'] / 1e9):>9}{_n(p['traffic'] / 1e9):>7}{_n(p['intensity'] or 0):>7}"
        if p["step_seconds"] is None:
            lines.append(f"{left}{'-':>10}  {'-':<7}{p['runs']:>10,}{'-':>8}")
            continue
        cost = f"{_n(p['cost']):>9}" if money else ""
        lines.append(
            f"{left}{_n(p['step_seconds'] * 1e3):>10}  {p['bound']:<7}{p['runs']:>10,}{_n(p['chip_hours']):>8}{cost}"
        )
    return "\n".join(lines)


def _network(r: dict) -> str:
    lines = [f"{'Collectives of one run':<31}{'est. ms':>9}{'compiled':>10}   kinds"]
    for p in r["programs"]:
        kinds = ", ".join(f"{n} {k} of {_n(b / 1e6)} MB" for k, (n, b) in p["communication"].items()) or "none"
        seconds = "-" if p["network_seconds"] is None else _n(p["network_seconds"] * 1e3)
        compiled = f"{p['compile_seconds']:,.0f} s" + ("*" if p["kept"] else " ")
        lines.append(f"  {p['name']:<29}{seconds:>9}{compiled:>11}  {kinds}")
    if any(p["kept"] for p in r["programs"]):
        lines.append("  * in an earlier command, which is remembered")
    return "\n".join(lines)


def _input(r: dict) -> str:
    i, what = r["input"], "chip" if r["fits"] is not None else "card"
    host = f"a host, {_plural(i['chips_per_host'], what)}"
    lines = [f"{'Input of that speed, images/s':<31}{'a ' + what:>14}{host:>17}{'its cores':>11}"]
    for s in i["steps"]:
        lines.append(f"  {s['name']:<29}{_n(s['chip']):>14}{_n(s['host']):>17}{s['cores']:>11,}")
    most = max(i["steps"], key=lambda s: s["cores"])
    asked = f"At {i['images_per_core_second']:g} images/s a core the {most['name']} keeps {_plural(most['cores'], 'core')} busy"
    if i["host_cores"] is None:
        return "\n".join([*lines, f"{asked};", "  how many a host has, we have no published number of."])
    has = f"a host has {i['host_cores']:,}"
    if i["enough"]:
        return "\n".join([*lines, f"{asked}: {has}, enough."])
    short = "that step waits for its input" if r["partial"] else "it waits for its input"
    return "\n".join([*lines, f"{asked}: {has}, not enough;", f"  {short}, or the images are made smaller beforehand."])


def _suggestions(r: dict) -> str:
    lines = ["Largest batches that fit"]
    for s in r["suggestions"]:
        what = f"{s['largest']:,}" if s["largest"] else f"none, not even {s['unit']:,}"
        lines.append(f"  {s['key']:<19}{what:>13}   by the {s['program']}")
        for batch, needed in s["tried"].items():
            lines.append(f"  {'':<19}{int(batch):>13,}   {needed / GIB:.2f} of {s['limit'] / GIB:.2f} GiB")
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
        "The compiler's word: memory, FLOP, bytes, collectives. Estimates: the least time of a run, which is\n"
        "the most of FLOP at the peak, bytes at the bandwidth and collectives over the links (rings, without\n"
        "latency), and what follows. Real runs take longer; compiling, input and checkpoints come on top."
    )
    if not r["full"]:
        lines.append(
            "Compiled with the compiler's search for speed cut short; --full takes minutes a program and gives\n"
            "the very executable: about the same FLOP and collectives, other temporaries (more on the chip)."
        )
    return "\n".join(lines)


def _total(r: dict) -> list[str]:
    if r["chip_hours"] is None:
        return []
    what = "These programs" if r["partial"] else "The whole config"
    money = f", {_few(r['cost'])} at {r['price']:g} a chip-hour" if r["cost"] is not None and r["price"] else ""
    hours = r["chip_hours"] / r["chips"]
    return [f"{what}: at least {_few(r['chip_hours'])} chip-hours, {_few(hours)} hours here{money}."]


def _unknown(r: dict) -> str:
    least = max(p["memory"]["arguments"] for p in r["programs"])
    lines = [
        "Not known without the card: whether it fits, for the GPU's compiler chooses its kernels, fusions and\n"
        f"workspaces by running them there. State and batch take {_n(least / MIB)} MiB; activations come to that."
    ]
    lines += _total(r)
    lines.append(
        "FLOP are counted in the program as written, bytes in what the CPU's compiler makes of it, where a\n"
        "GPU's fuses otherwise: the least time and what follows is rough, and leaves communication out."
    )
    if not r["chip"]:
        lines.append("Name a card (a100, h100, h200) for times from its peak and bandwidth.")
    return "\n".join(lines)


def _n(x: float) -> str:
    """Three digits, or all those before the point."""
    size = abs(x)
    if size and size < 0.005:
        return "<0.01" if x > 0 else ">-0.01"
    return f"{x + 0.0:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _few(x: float) -> str:
    return _n(x) if x >= 0.01 else f"{x:.1g}"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
